"""diffusion-classification: the module, from images to logits, and short runs."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from safetensors.torch import load_file

from effdl import DiffusionFeaturesModule, DiffusionModule
from effdl.core.errors import ConfigurationError
from effdl.core.random import generator
from effdl.diffusion._feature_heads import pooled
from effdl.tasks.tiny import tiny_condition_unet, tiny_sd3_transformer, tiny_stable_diffusion_xl, tiny_unet
from tests.diffusion.diffusion_classification_runs import batches, digest, fit


def test_must_06_the_network_stays_as_it_was_and_gets_no_gradient():
    network = tiny_unet(8, 1)
    before = digest(network)
    module = fit(DiffusionFeaturesModule(network, num_classes=4))
    assert digest(network) == before
    assert all(p.grad is None for p in network.parameters())
    assert not any(module.training for module in network.modules())
    assert all(key.startswith("model.") for key in module.state_dict())


def test_must_06_fine_tuning_trains_the_blocks_up_to_the_one_that_is_read():
    network = tiny_unet(8, 1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fit(DiffusionFeaturesModule(network, block=5, num_classes=4, fine_tune=True))
    after = network.state_dict()
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert {"conv_in", "down_blocks", "mid_block", "time_embedding"} <= changed
    assert not changed & {"up_blocks", "conv_norm_out", "conv_out"}


def test_must_10_attention_over_two_blocks_learns_64_samples_by_heart():
    settings = {"dim": 32, "heads": 4, "depth": 2}
    torch.manual_seed(0)
    module = DiffusionFeaturesModule(
        tiny_unet(8, 1), [4, 5], 0, "attention", num_classes=4, head_kwargs=settings,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 3e-3),
    )  # fmt: skip
    fit(module, 40)
    images, labels = (torch.cat(parts) for parts in zip(*batches()))
    module.eval()
    with torch.no_grad():
        assert float((module(images, generator(0)).argmax(1) == labels).float().mean()) == 1


@pytest.mark.parametrize("head", ["linear", "mlp", "cnn", "attention"])
def test_heads_fuse_blocks_and_timesteps_of_different_sizes(head):
    extra = {"mlp": {"hidden": [8]}, "cnn": {"width": 8}, "attention": {"dim": 8, "heads": 2, "depth": 1}}
    module = DiffusionFeaturesModule(
        tiny_unet(8, 1), [2, 5], [10, 90], head, num_classes=4, head_kwargs=extra.get(head, {})
    )
    logits = module(torch.zeros(3, 1, 8, 8))
    assert logits.shape == (3, 4)
    logits.sum().backward()
    assert all(p.grad is not None for p in module.model.parameters())


def test_layer_norm_ties_the_head_to_a_size_and_batch_norm_does_not():
    module = DiffusionFeaturesModule(tiny_unet(8, 1), 5, head="attention", head_kwargs={"dim": 8, "heads": 2})
    with pytest.raises(ConfigurationError, match="for which the head was made"):
        module(torch.zeros(1, 1, 16, 16))
    module = DiffusionFeaturesModule(
        tiny_unet(8, 1), 5, head="attention", head_kwargs={"dim": 8, "heads": 2, "norm": "batch"}
    )
    assert module(torch.zeros(2, 1, 16, 16)).shape == (2, 10)


def test_a_pool_too_large_names_the_side():
    with pytest.raises(ConfigurationError, match="at most 4"):
        DiffusionFeaturesModule(tiny_unet(8, 1), block=5, pool=5)


def test_class_and_latent_networks_say_what_they_want():
    with pytest.raises(ConfigurationError, match="null_class"):
        DiffusionFeaturesModule(tiny_unet(8, 1, num_classes=4))
    module = DiffusionFeaturesModule(tiny_unet(8, 1, num_classes=4), null_class=3)
    assert module(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    with pytest.raises(ConfigurationError, match="VAE"):
        DiffusionFeaturesModule(tiny_condition_unet(8))(torch.zeros(1, 3, 32, 32))
    transformer = tiny_sd3_transformer(8)  # without a pipeline: a prompt of zeros
    channels = transformer.config["in_channels"]
    assert DiffusionFeaturesModule(transformer, pool=1)(torch.zeros(1, channels, 8, 8)).shape == (1, 10)


def test_a_whole_text_to_image_pipeline_is_read_under_the_empty_prompt():
    module = DiffusionFeaturesModule(tiny_stable_diffusion_xl())
    assert "text_embeds" in module.extractor.condition
    size = 8 * module.extractor.network.config["sample_size"]
    assert module(torch.zeros(2, 3, size, size)).shape == (2, 10)


def test_images_in_the_wrong_range_are_told():
    module = DiffusionFeaturesModule(tiny_unet(8, 1), num_classes=4)
    module.log = lambda *args, **kwargs: None
    with pytest.warns(UserWarning, match=r"\[-1, 1\]"):
        module.training_step((torch.rand(4, 1, 8, 8), torch.arange(4)), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.training_step((torch.rand(4, 1, 8, 8), torch.arange(4)), 1)


def test_draws_average_the_logits():
    module = DiffusionFeaturesModule(tiny_unet(8, 1), num_classes=4, draws=16, timestep=300).eval()
    x = torch.rand(8, 1, 8, 8, generator=generator(0)) * 2 - 1
    with torch.no_grad():
        many = [module._averaged(x, [seed]) for seed in (1, 2)]
        module.draws = 1
        one = [module._averaged(x, [seed]) for seed in (1, 2)]
    ratio = float((many[0] - many[1]).norm() / (one[0] - one[1]).norm())
    assert ratio == pytest.approx(1 / math.sqrt(16), rel=0.6)


def test_saved_and_reported(tmp_path):
    source = DiffusionModule(tiny_unet(8, 1))
    source.save_pretrained(tmp_path / "pipeline")
    module = fit(DiffusionFeaturesModule(str(tmp_path / "pipeline"), num_classes=4, sweep=16))
    module.save_pretrained(tmp_path / "head")
    plain = torch.nn.Linear(32 * 4, 4)
    saved = load_file(tmp_path / "head" / "head.safetensors")
    plain.load_state_dict({name.removeprefix("0."): value for name, value in saved.items()})
    x = torch.rand(3, 1, 8, 8) * 2 - 1
    (features,) = module.features(x, generator(0))
    torch.testing.assert_close(plain(pooled([features], 2)), module(x, generator(0)))
    told = module.report()
    assert told["block"] == [6]
    assert {"pixels", "conv_in"} <= {row["name"] for row in told["sweep"]}
    module.figures(tmp_path)
    assert (tmp_path / "features.png").stat().st_size > 1000
    fit(DiffusionFeaturesModule(tiny_unet(8, 1), 5, num_classes=4, fine_tune=True)).save_pretrained(tmp_path / "tuned")
    assert (tmp_path / "tuned" / "unet").is_dir() or (tmp_path / "tuned" / "model_index.json").is_file()
