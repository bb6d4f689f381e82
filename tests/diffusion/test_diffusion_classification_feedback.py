"""diffusion-classification: the feedback of DifFeed, decoder features into the encoder of a second pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from effdl import DiffusionFeaturesModule
from effdl.core.errors import ConfigurationError
from effdl.core.random import generator
from effdl.diffusion._unet_blocks import features_of, list_blocks
from effdl.tasks.tiny import tiny_condition_unet, tiny_sd3_transformer, tiny_unet
from tests.diffusion.diffusion_classification_runs import batches, digest, fit

X = torch.rand(4, 1, 8, 8, generator=generator(4)) * 2 - 1
BLOCKS = [6, 8, 9]  # of tiny_unet's 9: they feed 4, 2 and 1


def fed(**settings) -> DiffusionFeaturesModule:
    return DiffusionFeaturesModule(tiny_unet(8, 1), num_classes=4, feedback=BLOCKS, **settings)


def read(module: DiffusionFeaturesModule) -> torch.Tensor:
    return module.features(X, generator(0))[0]


def test_each_decoder_block_feeds_the_encoder_block_whose_skip_it_takes():
    module = fed(block="up_blocks.0.attentions.0")
    assert module.feedback.pairs == {6: 4, 8: 2, 9: 1}
    shapes = {name: tuple(value.shape) for name, value in module.feedback.named_parameters()}
    assert shapes["8.0.weight"] == (16, 16, 1, 1)
    assert shapes["6.0.weight"] == (32, 32, 1, 1)
    assert not any(name.endswith("0.bias") for name in shapes)
    assert fed(block=[4], head="cnn").feedback.pairs == module.feedback.pairs
    named = DiffusionFeaturesModule(tiny_unet(8, 1), feedback=["up_blocks.1.resnets.0"])
    assert named.feedback.pairs == {8: 2}


def test_a_feedback_of_zero_leaves_the_plain_features_bit_by_bit():
    network = tiny_unet(8, 1)
    plain = DiffusionFeaturesModule(network, num_classes=4, timestep=[10, 90], block=[4, 6])
    module = DiffusionFeaturesModule(network, num_classes=4, timestep=[10, 90], block=[4, 6], feedback=BLOCKS)
    wanted = plain.features(X, generator(0))
    for ours, other in zip(module.features(X, generator(0)), wanted, strict=True):
        assert not torch.equal(ours, other)
    for net in module.feedback.values():
        torch.nn.init.zeros_(net[1].weight)
    for ours, other in zip(module.features(X, generator(0)), wanted, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("kind", ["plain", "text"])
@torch.no_grad()
def test_the_second_pass_is_the_stock_forward_with_additions_to_its_encoder(kind):
    """By hooks on the whole network: where the official code adds, bilinear to the block's side."""
    network = tiny_unet(8, 1) if kind == "plain" else tiny_condition_unet(8)
    condition = {} if kind == "plain" else {"encoder_hidden_states": torch.ones(2, 5, 32)}
    channels, blocks = network.config["in_channels"], list_blocks(network)
    x, t = torch.randn(2, channels, 8, 8, generator=generator(0)), torch.tensor([7, 7])
    early = [number for number, block in enumerate(blocks, start=1) if block.kind == "input"]
    plain = features_of(network, x, t, condition, early)
    added = {b: torch.randn(2, plain[b].shape[1], 3, 3, generator=generator(b)) for b in early[::2]}
    found, handles = {}, []

    def add(number):
        def hook(module, args, output):
            z = output[0] if isinstance(output, tuple) else output
            if number in added:
                z = z + F.interpolate(added[number], size=z.shape[2:], mode="bilinear", align_corners=False)
            found[number] = z
            return (z, *output[1:]) if isinstance(output, tuple) else z

        return hook

    for number, block in enumerate(blocks, start=1):
        handles.append(network.get_submodule(block.name).register_forward_hook(add(number)))
    network(x, timestep=t, **condition)
    for handle in handles:
        handle.remove()
    ours = features_of(network, x, t, condition, range(1, len(blocks) + 1), added)
    for number in found:
        torch.testing.assert_close(ours[number], found[number], msg=f"block {number}")
    assert not torch.equal(ours[early[-1] + 1], features_of(network, x, t, condition, [early[-1] + 1])[early[-1] + 1])


def test_both_passes_see_the_same_noise(monkeypatch):
    module, seen = fed(), []
    read_blocks = module.extractor._read
    monkeypatch.setattr(module.extractor, "_read", lambda x, *rest: (seen.append(x), read_blocks(x, *rest))[1])
    module(X)
    assert len(seen) == 2
    assert seen[0] is seen[1]


def test_gradients_reach_the_feedback_and_the_head_and_nothing_else():
    module = fed(timestep=[10, 200])
    F.cross_entropy(module(X), torch.arange(4)).backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in module.feedback.parameters())
    assert all(p.grad is not None for p in module.model.parameters())
    assert all(p.grad is None and not p.requires_grad for p in module.extractor.network.parameters())
    with torch.no_grad():
        assert not read(module).requires_grad


def test_training_moves_the_feedback_and_leaves_the_network():
    torch.manual_seed(0)
    module = fed()
    before, feedback = digest(module.extractor.network), digest(module.feedback)
    fit(module)
    assert digest(module.extractor.network) == before
    assert digest(module.feedback) != feedback
    assert not any(layer.training for layer in module.extractor.network.modules())
    assert {key.split(".")[0] for key in module.state_dict()} == {"model", "feedback"}


def test_a_checkpoint_brings_the_feedback_back_and_refuses_another(tmp_path):
    module = fit(fed(), 1)
    module.trainer.save_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert saved["effdl"]["diffusion-classification"]["feedback"] == BLOCKS
    again = DiffusionFeaturesModule(module.extractor.network, num_classes=4, feedback=BLOCKS)
    again.on_load_checkpoint(saved)
    again.load_state_dict(saved["state_dict"], strict=True)
    assert torch.equal(again.eval()(X, generator(0)), module.eval()(X, generator(0)))
    for other in (None, [6]):
        with pytest.raises(ConfigurationError, match="feedback"):
            DiffusionFeaturesModule(tiny_unet(8, 1), num_classes=4, feedback=other).on_load_checkpoint(saved)
    module.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "feedback.safetensors")
    again.feedback.load_state_dict(weights, strict=True)
    assert not any("8.0" in name for name in load_file(tmp_path / "head.safetensors"))


def test_validation_and_the_sweep_run_with_it():
    module = fed(sweep=8)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert 0 <= trainer.validate(module, batches(16), verbose=False)[0]["val/accuracy"] <= 1
    fit(module, 1)
    assert module.report()["feedback"] == BLOCKS
    assert {"pixels", "conv_in"} <= {row["name"] for row in module.report()["sweep"]}


def test_what_cannot_be_fed_back_is_told():
    def refused(match, network=None, **settings):
        with pytest.raises(ConfigurationError, match=match):
            DiffusionFeaturesModule(network or tiny_unet(8, 1), **settings)

    for wrong in ([], [5], [10], [6, 6], [True], "up_blocks.1.resnets.0", 8):
        refused("feedback", feedback=wrong)
    refused("decoder blocks, 6 to 9", feedback=[3])
    refused("decoder blocks from 8 on", block=2, feedback=[7])
    refused("fine_tune", feedback=[8], fine_tune=True)
    refused("no decoder", tiny_sd3_transformer(8), feedback=[1])
