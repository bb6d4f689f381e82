"""The contract's rows C10 and C11: what is exported, and what is told."""

from __future__ import annotations

import inspect

import torch

from effdl import catalog
from effdl.core.export import export_onnx, export_program, onnx_outputs, save_safetensors
from tests.contract.cases import Case, assert_same, every, first


@every("C10")
def test_c10_the_finished_model_exports(case: Case, tmp_path):
    _, module = case.fit(max_epochs=1)
    model, inputs = case.network(module).eval(), case.inputs(module)
    with torch.no_grad():
        want = first(model(*inputs))
    from safetensors.torch import load_file

    state = load_file(save_safetensors(model, tmp_path / "model.safetensors"))
    assert_same(dict(model.state_dict()), state)
    program = export_program(model, inputs, tmp_path / "model.pt2")
    assert torch.allclose(first(program.module()(*inputs)), want, atol=1e-5)
    if "C10-onnx" not in case.entry.contract_exceptions:
        onnx = onnx_outputs(export_onnx(model, inputs, tmp_path / "model.onnx"), inputs)
        assert torch.allclose(onnx[0], want, atol=1e-4)


@every("C11")
def test_c11_metadata(case: Case):
    doc = inspect.getdoc(case.cls) or ""
    assert "Example::" in doc, "a runnable example belongs in the docstring"
    if case.example.bad:
        assert "Raises:" in doc
        assert "Args:" in doc
    paper = case.cls.paper
    if paper is not None:
        assert paper.title
        assert paper.year > 1980
        assert paper.arxiv or paper.venue
        assert paper.bibtex.startswith("@")
        assert paper.slug == case.entry.slug
    assert case.entry.name in {entry.name for entry in catalog.entries()}
    assert set(case.entry.contract_exceptions) <= {*(f"C{i}" for i in range(1, 12)), "C10-onnx"}
