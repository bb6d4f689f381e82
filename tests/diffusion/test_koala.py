"""koala: surgery against the golden counts, the losses, where features are taken, and what is saved."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from effdl.core.errors import ConfigurationError
from effdl.core.report import latencies_ms
from effdl.diffusion.koala import (
    FEATURES,
    KOALA_1B,
    KOALA_700M,
    KOALADistillationModule,
    ShrinkSpec,
    distillation_loss,
    feature_pairs,
    recorded,
    shrink_unet,
    teacher_name,
)
from effdl.tasks.tiny import tiny_condition_unet, tiny_stable_diffusion_xl, tiny_unet
from tests.support import golden

GOLDEN = golden("koala")
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True, "addition_embed_type": "text_time",
}  # fmt: skip
FULL = SDXL | {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "num_sanity_val_steps": 0, "enable_checkpointing": False,
}  # fmt: skip


def count(net) -> int:
    return sum(p.numel() for p in net.parameters())


def config_of(case: dict) -> dict:
    return {k: v for k, v in case.items() if k != "mid_block"}


def small(seed: int = 0, **config):
    """Two stages, attention in the inner one: 8x8 images of three one-hot classes."""
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
              "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip
    layers = {"layers_per_block": 2, "transformer_layers_per_block": (1, 3), "block_out_channels": (8, 16)}
    return tiny_condition_unet(8, 1, 3, seed, norm_num_groups=4, **(blocks | layers | config))


def batches(number: int = 4):
    g = torch.Generator().manual_seed(0)
    return [
        {"image": torch.randn(4, 1, 8, 8, generator=g), "encoder_hidden_states": torch.randn(4, 2, 3, generator=g)}
        for _ in range(number)
    ]


def module_of(teacher=None, **kwargs) -> KOALADistillationModule:
    options = {"depth": 1, "optimizer": lambda p: torch.optim.AdamW(p, 1e-3)} | kwargs
    return KOALADistillationModule(small() if teacher is None else teacher, **options)


def fit(module, data=None, callbacks=(), val=False, **kwargs):
    data = DataLoader(batches(), batch_size=None) if data is None else data
    options = QUIET | {"max_epochs": 1, "enable_checkpointing": bool(callbacks)} | kwargs
    trainer = Trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, data, data if val else None)
    return trainer


def step(module, batch=None) -> torch.Tensor:
    """One step's loss outside of a Trainer, with its gradients; what it logs is in ``module.logged``."""
    module.logged = {}
    module.log = lambda name, value, **kwargs: module.logged.__setitem__(name, float(value.detach()))
    module.log_dict = lambda values, **kwargs: module.logged.update({k: float(v) for k, v in values.items()})
    module.zero_grad()
    loss = module.training_step(batches(1)[0] if batch is None else batch, 0)
    loss.backward()
    return loss.detach()


# ---- surgery -------------------------------------------------------------------------------------------------------


def test_must_01_full_size_parameter_counts():
    with torch.device("meta"):
        sdxl = UNet2DConditionModel(**FULL)
    nets = {"sdxl": sdxl, "koala-1b": shrink_unet(sdxl, KOALA_1B)[0], "koala-700m": shrink_unet(sdxl, KOALA_700M)[0]}
    for name, net in nets.items():
        assert count(net) == GOLDEN["full_size"][name]["params"]
        assert sum(part.endswith(".attn1") for part, _ in net.named_modules()) == GOLDEN["full_size"][name]["n_attn1"]


def test_must_02_tiny_configurations_of_the_golden():
    case = GOLDEN["tiny"][0]["teacher"]
    teacher = UNet2DConditionModel(sample_size=8, **SDXL, **config_of(case))
    for case in GOLDEN["tiny"]:
        assert count(teacher) == case["teacher_params"]
        asked = case["student"]
        spec = ShrinkSpec(asked["layers_per_block"], tuple(asked["transformer_layers_per_block"]), asked["mid_block"])
        student, key_map = shrink_unet(teacher, spec)
        assert count(student) == case["student_params"]
        assert sorted(set(student.state_dict()) - set(key_map)) == case["uncopied_student_keys"] == []
        state = teacher.state_dict()
        assert all(torch.equal(value, state[key_map[key]]) for key, value in student.state_dict().items())
        pairs = feature_pairs(student, teacher, "sa", teacher_name(student.config, teacher.config))["sa"]
        assert set(pairs.items()) == {tuple(pair) for pair in case["sa_pairs_student_to_teacher"]}


def test_must_03_nothing_removed_is_the_teacher():
    teacher = small()
    module = module_of(teacher, layers_per_block=2, depth=(1, 3), features=tuple(FEATURES))
    x, t, c = torch.randn(2, 1, 8, 8), torch.tensor([3, 800]), torch.eye(3)[:2, None]
    assert torch.equal(module.model(x, t, c).sample, teacher(x, t, c).sample)
    step(module)
    assert all(module.logged[f"koala/{name}"] == 0 for name in ("out", "feature_share", *FEATURES))
    assert module.logged["koala/task"] > 0


def test_must_04_the_first_layers_and_the_last_up_pair_stay():
    teacher = small()
    student, key_map = shrink_unet(teacher, ShrinkSpec(1, 2))
    ours, theirs = student.state_dict(), teacher.state_dict()
    last = "up_blocks.0.attentions.{}.transformer_blocks.1.attn1.to_q.weight"
    assert torch.equal(ours[last.format(1)], theirs[last.format(2)])
    assert not torch.equal(ours[last.format(1)], theirs[last.format(1)])
    for i in range(2):
        name = f"down_blocks.1.attentions.0.transformer_blocks.{i}.ff.net.2.weight"
        assert torch.equal(ours[name], theirs[name])
        assert not torch.equal(ours[name], theirs[name.replace(f"blocks.{i}.ff", "blocks.2.ff")])
    assert key_map["up_blocks.1.resnets.1.conv1.weight"] == "up_blocks.1.resnets.2.conv1.weight"
    assert len(student.up_blocks[0].attentions) == 2
    assert len(student.down_blocks[1].attentions[0].transformer_blocks) == 2
    ours["conv_in.weight"].add_(1)  # a copy, not a view
    assert not torch.equal(ours["conv_in.weight"], teacher.state_dict()["conv_in.weight"])


def test_unconditional_and_half_precision_u_nets_shrink_too():
    teacher = tiny_unet(8, 1, layers_per_block=3).bfloat16().eval()
    student, key_map = shrink_unet(teacher, ShrinkSpec(2))
    assert key_map["up_blocks.0.attentions.2.to_q.weight"] == "up_blocks.0.attentions.3.to_q.weight"
    assert key_map["up_blocks.0.attentions.1.to_q.weight"] == "up_blocks.0.attentions.1.to_q.weight"
    assert (student.dtype, student.training) == (torch.bfloat16, False)
    assert student(torch.randn(1, 1, 8, 8).bfloat16(), 3).sample.isfinite().all()


@pytest.mark.parametrize(
    ("spec", "teacher", "message"),
    [
        ({"layers_per_block": 3}, {}, "layers_per_block=3.*1 to 2, what down stage 0"),
        ({"depth": 4}, {}, "depth=4.*1 to 3, what down stage 1"), ({"depth": 0}, {}, "depth=0"),
        ({"depth": (1, 1, 1)}, {}, "depth=.*2: one for each"), ({"mid": 0}, {}, "mid=0"),
        ({"layers_per_block": (0, 1)}, {}, "layers_per_block=0"),
        ({"depth": 1}, {"transformer_layers_per_block": [1, [2, 2]],
                        "reverse_transformer_layers_per_block": [[3, 3, 3], 1]}, "unet=.*per stage"),
    ],
)  # fmt: skip
def test_specifications_that_do_not_fit_are_refused(spec, teacher, message):
    with pytest.raises(ConfigurationError, match=message):
        shrink_unet(small(**teacher), ShrinkSpec(**spec))
    with pytest.raises(ConfigurationError, match="unet"):
        shrink_unet(torch.nn.Linear(1, 1), ShrinkSpec(1))


# ---- losses and features -------------------------------------------------------------------------------------------


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


# ---- cost, checkpoints, pipelines ----------------------------------------------------------------------------------


def test_must_09_half_the_time():
    config = SDXL | config_of(GOLDEN["tiny"][0]["teacher"])
    teacher = UNet2DConditionModel(sample_size=16, **config | {"transformer_layers_per_block": (1, 2, 10)}).eval()
    student, _ = shrink_unet(teacher, ShrinkSpec(1, (1, 2, 5)))
    added = {"text_embeds": torch.randn(1, 16), "time_ids": torch.randn(1, 6)}
    given = (torch.randn(1, 4, 16, 16), 10, torch.randn(1, 7, 24)), {"added_cond_kwargs": added}
    ours, theirs = latencies_ms([student, teacher], *given, seconds=0.8)
    assert ours <= 0.75 * theirs, f"{ours:.1f} of {theirs:.1f} ms"


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
