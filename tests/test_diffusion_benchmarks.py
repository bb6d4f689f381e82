"""The diffusion benchmark runs, small, and compares what it says."""

import json

import pytest

from benchmarks.__main__ import main


def test_samplers_make_the_images_of_diffusers(tmp_path, capsys):
    out = tmp_path / "diffusion.json"
    main(["diffusion", "--pairs", "1", "--batch", "2", "--no-memory", "--rows", "samplers", "int8", "--out", str(out)])
    assert "integer kernels / fp32" in capsys.readouterr().out
    found = json.loads(out.read_text())["rows"]
    assert [row["difference"] < 1e-5 for row in found["samplers"]] == [True, True]
    assert all(0 < row["difference"] < 0.2 for row in found["int8"])
    with pytest.raises(SystemExit, match="no part"):
        main(["diffusion", "--rows", "nothing"])


def test_the_adjoint_and_fine_tuning_parts(capsys):
    pytest.importorskip("torchdiffeq")
    pytest.importorskip("peft")
    main(["diffusion", "--pairs", "1", "--batch", "2", "--no-memory", "--rows", "fine-tuning"])
    printed = capsys.readouterr().out
    assert "LoRA, rank 8 / all weights" in printed
    assert "SaRA" in printed
