"""koala: the losses, where features are taken, checkpoints, pipelines in and out."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from effdl.core.errors import ConfigurationError
from effdl.diffusion.koala import (
    FEATURES,
    KOALADistillationModule,
    distillation_loss,
    recorded,
)
from effdl.tasks.tiny import tiny_stable_diffusion_xl, tiny_unet
from tests.diffusion.koala_nets import GOLDEN, QUIET, SDXL, batches, count, fit, module_of, small, step


def test_must_05_golden_losses():
    case = GOLDEN["loss"]
    tensors = {key: torch.tensor(case[key], dtype=torch.float64) for key in ("eps", "student_pred", "teacher_pred")}
    features = tuple(
        [torch.tensor(f, dtype=torch.float64) for f in case[key]] for key in ("student_feats", "teacher_feats")
    )
    loss = distillation_loss(*tensors.values(), {"sa": features})
    found = [loss.task, loss.out, *loss.features["sa"], loss.total]
    wanted = [case["task"], case["out_kd"], *case["feat_kd_each"], case["total"]]
    error = max(abs(float(a) - b) / b for a, b in zip(found, wanted))  # the file has seven digits
    print(f"golden: max relative error {error:.1e}")
    assert error <= 1e-6
    weighed = distillation_loss(*tensors.values(), {"sa": features}, 0.5, 0.0, 2.0)
    assert float(weighed.total) == pytest.approx(0.5 * case["task"] + 2 * sum(case["feat_kd_each"]), rel=1e-6)


def test_must_05_features_alone_teach_every_attention():
    teacher = small()
    module = module_of(teacher, depth=2, features="sa", lambda_task=0.0, lambda_out=0.0)
    step(module)
    queries = {name: p for name, p in module.model.named_parameters() if name.endswith("attn1.to_q.weight")}
    assert len(queries) == 2 * (1 + 1 + 2)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in queries.values())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_must_06_features_are_those_of_the_step():
    teacher = small()
    module = module_of(teacher)
    calls, outputs, learned = [], [], []
    for who, net in (("student", module.model), ("teacher", teacher)):
        net.register_forward_pre_hook(
            lambda _net, args, kwargs, who=who: calls.append((who, args, kwargs)), with_kwargs=True
        )
    name = "mid_block.attentions.0.transformer_blocks.0.attn1"
    for net in (module.model, teacher):
        net.get_submodule(name).register_forward_hook(lambda _net, _args, out: outputs.append(out.detach().clone()))
    compare = module.compute_loss
    module.compute_loss = lambda *args: (learned.append(module._seen[name].detach().clone()), compare(*args))[1]
    first, second = (step(module, batch) for batch in batches(2))
    assert first != second
    assert [who for who, *_ in calls] == ["student", "teacher"] * 2
    (_, a, ka), (_, b, kb) = calls[:2]
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])  # noqa: PT018
    assert torch.equal(ka["encoder_hidden_states"], kb["encoder_hidden_states"])
    assert torch.equal(learned[0], outputs[0])
    assert torch.equal(learned[1], outputs[2])
    assert not torch.equal(outputs[0], outputs[2])
    assert module._seen == {}
    hooks = [len(part._forward_hooks) for net in (module.model, teacher) for part in net.modules()]
    assert sum(hooks) == 2  # the two of this test
    x, c = torch.randn(2, 1, 8, 8), torch.eye(3)[:2, None]
    for net in (module.model, teacher):
        seen = []
        for t in (10, 900):
            with recorded(net, {"sa": [name]}) as features:
                net(x, t, c)
            seen.append(features[name])
        assert not torch.allclose(*seen)


@pytest.mark.parametrize("feature", [*FEATURES, "block", "probs"])
def test_must_08_the_feature_that_is_trained_comes_nearer(feature):
    teacher = small()
    teacher.set_attn_processor(AttnProcessor())
    tap = {"features": "sa", "tap": feature} if feature not in FEATURES else {"features": feature}
    module = module_of(teacher, lambda_task=0.0, lambda_out=0.0, **tap)
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    losses = []
    for _ in range(6):
        losses.append(step(module, batches(1)[0]))
        assert module.logged[f"koala/{tap['features']}"] == pytest.approx(float(losses[-1]), rel=1e-5)
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0], losses
    assert "get_attention_scores" not in vars(teacher.mid_block.attentions[0].transformer_blocks[0].attn1)


def test_must_08_probabilities_want_an_eager_processor_and_are_probabilities():
    with pytest.raises(ConfigurationError, match=r"tap='probs'.*AttnProcessor2_0"):
        module_of(tap="probs")
    teacher = small()
    teacher.set_attn_processor(AttnProcessor())
    name = "mid_block.attentions.0.transformer_blocks.0.attn1"
    with recorded(teacher, {"sa": [name]}, "probs") as seen:
        teacher(torch.randn(2, 1, 8, 8), 5, torch.eye(3)[:2, None])
    assert seen[name].shape == (2 * 2, 16, 16)
    torch.testing.assert_close(seen[name].sum(-1), torch.ones(4, 16))


def test_a_map_of_ones_own_and_any_two_networks():
    student = small(seed=1, transformer_layers_per_block=1)
    module = module_of(student=student, features={"mid_block": "mid_block", "up_blocks.0.attentions.1": "conv_in"})
    with pytest.raises(ConfigurationError, match=r"up_blocks.0.attentions.1: .*the teacher's shape"):
        step(module)
    module = module_of(student=student, features={"mid_block": "mid_block"})
    step(module)
    assert module.logged["koala/own"] > 0
    with pytest.raises(ConfigurationError, match="out_channels=2"):
        module_of(student=small(out_channels=2))
    with pytest.raises(ConfigurationError, match="features=.*24 channels.*16"):
        module_of(student=small(block_out_channels=(8, 24)))
    with pytest.raises(ConfigurationError, match="only_cross_attention"):
        module_of(small(only_cross_attention=True))
    with pytest.raises(ConfigurationError, match="features='sa'"):
        KOALADistillationModule(tiny_unet(8, 1, layers_per_block=2))
    assert KOALADistillationModule().pipeline.unet.config.layers_per_block == 1


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        module = module_of()
        if checkpointing:
            module.model.enable_gradient_checkpointing()
        step(module)
        grads.append([p.grad for p in module.model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads))


@pytest.mark.slow
def test_a_compiled_student_learns_the_same():
    eager, compiled = module_of(), module_of()
    compiled.model.compile(backend="eager")
    for batch in batches(3):  # new hooks in every step, one graph
        torch.testing.assert_close(step(compiled, batch), step(eager, batch))
    for ours, theirs in zip(compiled.model.parameters(), eager.model.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.compiler.reset()
    module = module_of()
    module.model.compile(backend="eager")
    outputs = module.denoise(batches(1)[0])  # without hooks: such a graph has none
    with pytest.raises(ConfigurationError, match="compiler.reset"):
        module.compute_loss(outputs, None)
    with pytest.raises(ConfigurationError, match="compiler.reset"):
        step(module)


def test_checkpoints_know_the_student_alone_and_its_cut(tmp_path, monkeypatch):
    module = module_of()
    trainer = fit(module, val=True, callbacks=[ModelCheckpoint(tmp_path, filename="it")])
    assert trainer.callback_metrics["koala/val_out"] > 0
    state = torch.load(tmp_path / "it.ckpt", weights_only=True)
    assert set(state["state_dict"]) == {f"model.{name}" for name in module.model.state_dict()}
    assert module.report()["pairs_sa"] == 4
    monkeypatch.setattr("effdl.diffusion._koala_report.STEPS", 2)
    module.figures(tmp_path)
    assert (tmp_path / "samples.png").is_file()
    with pytest.raises(ConfigurationError, match="layers_per_block"):
        Trainer(**QUIET).fit(module_of(depth=2), DataLoader(batches(), batch_size=None), ckpt_path=tmp_path / "it.ckpt")


def test_must_10_stable_diffusion_xl_from_pipeline_to_pipeline(tmp_path):
    blocks = {"down_block_types": SDXL["down_block_types"][1:], "up_block_types": SDXL["up_block_types"][:2]}
    pipeline = tiny_stable_diffusion_xl(16, layers_per_block=2, transformer_layers_per_block=2, **blocks)
    module = KOALADistillationModule(pipeline, depth=1, mid=False)
    told = []
    for net in (module.model, pipeline.unet):
        net.register_forward_pre_hook(
            lambda _net, _args, kwargs: told.append(kwargs["added_cond_kwargs"]), with_kwargs=True
        )
    batch = {"image": torch.randn(2, 3, 16, 16), "prompt": ["a cat", ""]}
    fit(module, DataLoader([batch] * 2, batch_size=None))
    ours, theirs = told[:2]
    assert all(torch.equal(ours[key], theirs[key]) for key in ("text_embeds", "time_ids"))
    assert ours["time_ids"].tolist() == [[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]] * 2
    assert not torch.equal(*ours["text_embeds"])
    draw = {"num_inference_steps": 2, "output_type": "pt", "height": 16, "width": 16}
    module.save_pretrained(tmp_path)
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    stock.set_progress_bar_config(disable=True)
    assert stock.unet.mid_block is None
    assert count(stock.unet) == count(module.model) < 0.5 * count(pipeline.unet)
    images = [p("a cat", generator=torch.Generator().manual_seed(0), **draw).images for p in (stock, module.pipeline)]
    torch.testing.assert_close(*images, atol=1e-5, rtol=0)
    given = {"encoder_hidden_states": torch.randn(2, 16, 64), "text_embeds": torch.randn(2, 32)}
    ids = torch.arange(12.0).view(2, 6)
    condition = module.condition({"image": batch["image"], **given, "time_ids": ids})
    assert torch.equal(condition["added_cond_kwargs"]["time_ids"], ids)
    with pytest.raises(ConfigurationError, match="text_embeds"):
        module.condition({"image": batch["image"]})
