"""diffusion-classification: numbering of blocks, the truncated forward, heads, noise, probes; official numbers."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits

from effdl.core.errors import ConfigurationError
from effdl.core.noise import alpha_sigma
from effdl.core.random import generator
from effdl.diffusion._feature_heads import AttentionHead, PooledHead
from effdl.diffusion._unet_blocks import default_block, features_of, list_blocks
from effdl.diffusion.diffusion_classification import (
    DiffusionFeatureExtractor,
    baseline_rows,
    probe_accuracy,
    search_blocks,
)
from effdl.tasks.tiny import tiny_condition_unet, tiny_sd3_transformer, tiny_unet
from tests.support import golden

GOLDEN = golden("diffusion-classification")
SCHEDULE = DDPMScheduler().alphas_cumprod


def official_weights(head: torch.nn.Module) -> None:
    """0.2 sin(0.7 i + 1.3 k + 0.1) for entry i of the k-th tensor."""
    for k, tensor in enumerate(head.state_dict().values()):
        i = torch.arange(tensor.numel(), dtype=torch.float64)
        tensor.copy_((0.2 * torch.sin(0.7 * i + 1.3 * k + 0.1)).reshape(tensor.shape))


@pytest.mark.parametrize("name", ["linear", "attention"])
def test_must_01_golden_heads(name):
    told, features = GOLDEN[name], torch.tensor(GOLDEN["feature"], dtype=torch.float64)
    shape = tuple(features.shape[1:])
    if name == "linear":
        head = PooledHead([shape], 5, told["pool"])
    else:
        head = AttentionHead([shape], 5, 1, told["pool"], told["dim"], told["heads"], told["blocks"], told["mlp_ratio"])
    head = head.double()
    assert [list(tensor.shape) for tensor in head.state_dict().values()] == told["shapes"]
    official_weights(head)
    with torch.no_grad():  # a pooled head sees its features in fp32
        flat = torch.nn.functional.adaptive_avg_pool2d(features, told["pool"]).flatten(1)
        logits = head(features) if name == "attention" else head[0](flat)
    wanted = torch.tensor(told["logits"], dtype=torch.float64)
    print(f"{name}: largest error {float((logits - wanted).abs().max()):.1e}")
    torch.testing.assert_close(logits, wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(head.float()(features.float()), wanted.float(), atol=1e-5, rtol=1e-5)


def test_must_01_the_projection_of_queries_keys_and_values_has_no_bias():
    head = AttentionHead([(4, 4, 4)], 3, dim=8, heads=2)
    names = set(head.state_dict())
    assert "encoder.blocks.0.attn.qkv.weight" in names
    assert "encoder.blocks.0.attn.qkv.bias" not in names
    assert head.before[0][0].weight.shape == (4, 4, 4)
    assert float(head.encoder.cls_token.detach().abs().sum()) == 0


def test_must_02_scalings_are_the_official_ones_and_the_schedulers():
    x, noise = torch.randn(2, 1, 3, 3, 3, generator=generator(0)).unbind()
    for t, (a, s) in GOLDEN["q_sample"]["sqrt_abar_and_sqrt_1m"].items():
        ours = torch.stack(alpha_sigma(SCHEDULE, torch.tensor(int(t))))
        torch.testing.assert_close(ours, torch.tensor([a, s]), atol=1e-6, rtol=1e-5)
        noisy = ours[0] * x + ours[1] * noise
        torch.testing.assert_close(noisy, DDPMScheduler().add_noise(x, noise, torch.tensor([int(t)])))


NETWORKS = {
    "plain": lambda: (tiny_unet(8, 1), {}),
    "resnet samplers": lambda: (
        tiny_unet(8, 1, layers_per_block=2, downsample_type="resnet", upsample_type="resnet"), {},
    ),
    "classes": lambda: (tiny_unet(8, 1, num_classes=4), {"class_labels": torch.tensor([3, 1])}),
    "text": lambda: (tiny_condition_unet(8), {"encoder_hidden_states": torch.randn(2, 5, 32, generator=generator(1))}),
    "odd sides": lambda: (
        tiny_condition_unet(10, block_out_channels=(8, 8, 16), norm_num_groups=4,
                            down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3),
        {"encoder_hidden_states": torch.ones(2, 5, 32)},
    ),
    "transformer": lambda: (
        tiny_sd3_transformer(8),
        {"encoder_hidden_states": torch.ones(2, 5, 32), "pooled_projections": torch.ones(2, 32)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_must_03_the_truncated_forward_is_the_full_one_bit_by_bit(kind):
    network, condition = NETWORKS[kind]()
    channels, side = network.config["in_channels"], network.config["sample_size"]
    x, t = torch.randn(2, channels, side, side, generator=generator(0)), torch.tensor([7, 7])
    blocks, seen = list_blocks(network), {}

    def keep(number):
        return lambda module, args, output: seen.__setitem__(number, output)

    handles = [network.get_submodule(b.name).register_forward_hook(keep(i)) for i, b in enumerate(blocks, 1)]
    network(x, timestep=t, **condition)
    for handle in handles:
        handle.remove()
    found = features_of(network, x, t, condition, range(1, len(blocks) + 1))
    assert len(found) == len(blocks)
    for number, output in seen.items():
        output = output[-1] if isinstance(output, tuple) else getattr(output, "sample", output)
        ours = found[number] if output.dim() == 4 else found[number].flatten(2).transpose(1, 2)
        assert torch.equal(ours, output), blocks[number - 1]
        assert torch.equal(features_of(network, x, t, condition, [number])[number], found[number])


@torch.no_grad()
def test_must_03_stopping_early_saves_time():
    network = tiny_unet(32, 3, block_out_channels=(32, 64))
    x, t = torch.randn(8, 3, 32, 32, generator=generator(0)), torch.full((8,), 90)
    block = default_block(list_blocks(network))
    runs = {"full": lambda: network(x, t), "cut": lambda: features_of(network, x, t, {}, [block])}
    times = {name: [] for name in runs}
    for _ in range(8):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    ratio = statistics.median(times["cut"][1:]) / statistics.median(times["full"][1:])
    print(f"block {block} of {len(list_blocks(network))}: {ratio:.2f} of the full forward")
    assert ratio < 0.8


def test_must_04_numbering_and_shapes_of_a_two_level_network():
    extractor = DiffusionFeatureExtractor(tiny_unet(8, 1), SCHEDULE, range(1, 10))
    assert extractor.blocks() == [
        (1, "input", "conv_in"), (2, "input", "down_blocks.0.resnets.0"), (3, "input", "down_blocks.0.downsamplers.0"),
        (4, "input", "down_blocks.1.attentions.0"), (5, "middle", "mid_block"),
        (6, "output", "up_blocks.0.attentions.0"), (7, "output", "up_blocks.0.upsamplers.0"),
        (8, "output", "up_blocks.1.resnets.0"), (9, "output", "up_blocks.1.resnets.1"),
    ]  # fmt: skip
    sides = [8, 8, 4, 4, 4, 4, 8, 8, 8]
    channels = [16, 16, 16, 32, 32, 32, 32, 16, 16]
    assert extractor.shapes((1, 8, 8)) == [(c, side, side) for c, side in zip(channels, sides)]
    for block in (0, 10):
        with pytest.raises(ConfigurationError, match="block"):
            DiffusionFeatureExtractor(tiny_unet(8, 1), SCHEDULE, [block])


def test_must_04_the_paper_s_network_has_37_blocks_of_the_official_sizes():
    widths = (256, 256, 512, 512, 1024, 1024)
    with torch.device("meta"):
        network = UNet2DModel(
            256, 3, 3, block_out_channels=widths, layers_per_block=2, attention_head_dim=64,
            down_block_types=("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
            up_block_types=("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
        )  # fmt: skip
        blocks = list_blocks(network)
        assert [sum(b.kind == kind for b in blocks) for kind in ("input", "middle", "output")] == [18, 1, 18]
        assert default_block(blocks) == 24
        with torch.no_grad():
            found = features_of(network, torch.zeros(1, 3, 256, 256), torch.zeros(1), {}, range(1, 38))
    table = GOLDEN["block_table"]
    for number, z in found.items():
        assert (z.shape[1], z.shape[2]) == (table["channels"][str(number)], table["side"][str(number)]), number


def test_must_05_noise_is_fresh_unless_it_is_given_and_hardly_there_at_zero():
    extractor = DiffusionFeatureExtractor(tiny_unet(8, 1), SCHEDULE, [5], [90])
    x = torch.tensor(load_digits().images[:4, None] / 8 - 1, dtype=torch.float32)
    with torch.no_grad():
        assert not torch.equal(extractor(x)[0], extractor(x)[0])
        assert torch.equal(extractor(x, generator(1))[0], extractor(x, generator(1))[0])
        clean = DiffusionFeatureExtractor(extractor.network, SCHEDULE, [5], [0])
        a, b = clean(x, generator(1))[0], clean(x, generator(2))[0]
    assert float((a - b).norm() / a.norm()) < 0.02


def test_probes_and_the_sweep_find_what_can_be_told_apart():
    g = generator(0)
    labels = torch.arange(60) % 3
    features = torch.randn(60, 8, generator=g) + 3 * torch.nn.functional.one_hot(labels, 8)
    train, test = (features[:30], labels[:30]), (features[30:], labels[30:])
    assert min(probe_accuracy(train, test, probe) for probe in ("logistic", "ridge")) > 0.8
    images = torch.randn(60, 1, 8, 8, generator=g).clamp(-1, 1) * 0.3 + (labels.view(-1, 1, 1, 1) - 1)
    pairs = (images[:30], labels[:30]), (images[30:], labels[30:])
    extractor = DiffusionFeatureExtractor(tiny_unet(8, 1), SCHEDULE)
    rows = search_blocks(extractor, *pairs, blocks=[1, 5], timesteps=[10, 999], pools=[1, 8], probe="ridge")
    assert {(row["block"], row["timestep"], row["pool"]) for row in rows} == {
        (1, 10, 1), (1, 999, 1), (1, 10, 8), (1, 999, 8), (5, 10, 1), (5, 999, 1)
    }  # fmt: skip
    assert rows[0]["timestep"] == 10
    assert rows[0]["accuracy"] > 0.9 > rows[-1]["accuracy"]
    named = {row["name"]: row["accuracy"] for row in baseline_rows(*pairs, ["resnet18"])}
    assert set(named) == {"pixels", "resnet18, random weights"}
    assert named["pixels"] > 0.9
