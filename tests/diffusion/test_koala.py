"""koala: surgery against the golden counts; what is cut is what the paper cuts."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from effdl.core.errors import ConfigurationError
from effdl.core.report import latencies_ms
from effdl.diffusion.koala import (
    FEATURES,
    KOALA_1B,
    KOALA_700M,
    ShrinkSpec,
    feature_pairs,
    shrink_unet,
    teacher_name,
)
from effdl.tasks.tiny import tiny_unet
from tests.diffusion.koala_nets import FULL, GOLDEN, SDXL, config_of, count, module_of, small, step


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


def test_must_09_half_the_time():
    config = SDXL | config_of(GOLDEN["tiny"][0]["teacher"])
    teacher = UNet2DConditionModel(sample_size=16, **config | {"transformer_layers_per_block": (1, 2, 10)}).eval()
    student, _ = shrink_unet(teacher, ShrinkSpec(1, (1, 2, 5)))
    added = {"text_embeds": torch.randn(1, 16), "time_ids": torch.randn(1, 6)}
    given = (torch.randn(1, 4, 16, 16), 10, torch.randn(1, 7, 24)), {"added_cond_kwargs": added}
    ours, theirs = latencies_ms([student, teacher], *given, seconds=0.8)
    assert ours <= 0.75 * theirs, f"{ours:.1f} of {theirs:.1f} ms"
