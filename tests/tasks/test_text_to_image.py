"""effdl.tasks.text_to_image: SD 1.x, 2.x, XL and 3: losses, text, what is refused."""

from __future__ import annotations

import diffusers
import lightning as L
import pytest
import torch

from effdl.core.errors import ConfigurationError
from effdl.core.noise import alpha_sigma, convert
from effdl.tasks import tiny
from effdl.tasks._denoising import logit_normal, min_snr_weight, stream
from tests.tasks.text_to_image_parts import KINDS, PROMPTS, batch, make

# Losses


def test_min_snr_weighs_the_same_error_alike_however_the_network_says_it():
    """Hang et al.: min(SNR, gamma) on the error of x_0; the other two weights mean the same loss."""
    table = diffusers.DDPMScheduler().alphas_cumprod.double()
    t = torch.tensor([0, 20, 150, 400, 999])
    x0, noise, out = (torch.randn(5, 7, dtype=torch.float64, generator=stream([i], "cpu")) for i in range(3))
    a, s = alpha_sigma(table, t, x0)
    x_t = a * x0 + s * noise
    losses = []
    for prediction in ("epsilon", "sample", "v_prediction"):
        said, truth = (convert(e, x_t, a, s, "epsilon", prediction) for e in (out, noise))
        losses.append(min_snr_weight(table, t, prediction, 5.0) * (said - truth).square().sum(1))
    snr = (a / s).square().flatten()
    x0_error = (convert(out, x_t, a, s, "epsilon", "sample") - x0).square().sum(1)
    for loss in losses:
        torch.testing.assert_close(loss, snr.clamp(max=5) * x0_error)
    assert snr.max() > 5 > 1 > snr.min()
    assert min_snr_weight(torch.tensor([0.0]), torch.tensor([0]), "epsilon") == 1  # zero terminal SNR
    assert min_snr_weight(torch.tensor([0.0]), torch.tensor([0]), "sample") == 0


def test_min_snr_is_in_the_training_loss_and_not_in_validations():
    plain, weighted = make(), make(min_snr=5.0)
    outputs = weighted.denoise(batch(), stream([0], "cpu"))
    error = (outputs.prediction - outputs.target).square().mean((1, 2, 3))
    weights = min_snr_weight(weighted.noise_scheduler.alphas_cumprod, outputs.timesteps, "epsilon", 5.0)
    torch.testing.assert_close(weighted.compute_loss(outputs, batch()), (weights * error).mean())
    torch.testing.assert_close(plain.compute_loss(outputs, batch()), error.mean())


def test_a_flow_is_noised_as_its_scheduler_does_at_logit_normal_times():
    module = make("tiny-3")
    out = module.denoise(batch(), stream([0], "cpu"))
    scheduler = module.noise_scheduler
    x0 = module.latents(batch(), stream([0], "cpu"))
    noise = out.target + x0
    near = (scheduler.timesteps[None] - out.timesteps[:, None]).abs().argmin(1)
    theirs = scheduler.scale_noise(x0, scheduler.timesteps[near], noise)  # at the nearest of its 1000 times
    assert (theirs - out.noisy).abs().max() < 2e-3 * (noise - x0).abs().max()
    assert abs(noise.std() - 1) < 0.3
    u = logit_normal(200_000, 3.0, "cpu", stream([0], "cpu"))
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    plain = torch.sigmoid(torch.distributions.Normal(0.0, 1.0).icdf(quantiles))
    torch.testing.assert_close(torch.quantile(u, quantiles), 3 * plain / (1 + 2 * plain), atol=5e-3, rtol=0)


def test_min_snr_and_prediction_are_no_matter_of_a_flow():
    for argument, value in (("min_snr", 5.0), ("prediction", "epsilon")):
        with pytest.raises(ConfigurationError, match=argument):
            make("tiny-3", **{argument: value})


# Text


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_the_pipelines_and_dropped_text_what_it_guides_away_from(kind):
    module = make(kind)
    pipeline = module.surroundings.pipeline
    empty = {"do_classifier_free_guidance": True, "device": "cpu", "num_images_per_prompt": 1}
    more = {"prompt_2": None, "prompt_3": None} if kind == "tiny-3" else {}
    with torch.no_grad():
        theirs = pipeline.encode_prompt(prompt=PROMPTS, **more, **empty)
    ours = module.condition(batch())
    torch.testing.assert_close(ours["encoder_hidden_states"], theirs[0])
    mixed = module.condition(batch(dropped=torch.tensor([True, False])))
    torch.testing.assert_close(mixed["encoder_hidden_states"][0], theirs[1][0])
    torch.testing.assert_close(mixed["encoder_hidden_states"][1], theirs[0][1])
    if len(theirs) == 4:
        pooled = next(ours[key] for key in ("text_embeds", "pooled_projections") if key in ours)
        torch.testing.assert_close(pooled, theirs[2])
    if kind == "tiny-xl":
        assert not mixed["encoder_hidden_states"][0].any()


def test_dropped_prompts_are_a_function_of_seed_epoch_and_batch(monkeypatch):
    def dropped(batch_idx=0, epoch=0, seed=0):
        module, seen = make(seed=seed, prompt_dropout=0.5), []
        monkeypatch.setattr(type(module), "current_epoch", epoch)
        monkeypatch.setattr(module, "log", lambda *a, **k: None)
        monkeypatch.setattr(module, "condition", lambda b: seen.append(b["dropped"]) or {"encoder_hidden_states": text})
        before = torch.get_rng_state()
        module.training_step(big, batch_idx)
        assert torch.equal(before, torch.get_rng_state())
        return seen[0]

    text = torch.zeros(64, 16, 32)
    big = {"image": torch.zeros(64, 3, 16, 16), "prompt": ["x"] * 64}
    base = dropped()
    assert torch.equal(base, dropped())
    assert 16 < int(base.sum()) < 48
    assert all(not torch.equal(base, other) for other in (dropped(1), dropped(epoch=1), dropped(seed=1)))


def test_xl_is_told_the_size_of_the_image_unless_the_batch_says_more():
    module, seen = make("tiny-xl"), []
    module.model.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    module.denoise(batch())
    ids = torch.tensor([[32.0, 48.0, 4.0, 0.0, 16.0, 16.0]]).expand(2, 6)
    module.denoise(batch(time_ids=ids))
    assert seen[0].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    assert torch.equal(seen[1], ids)


def test_a_batch_without_text_is_refused():
    with pytest.raises(ConfigurationError, match="wants text"):
        make().denoise({"image": torch.zeros(1, 3, 16, 16)})


# Training


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for flag in (False, True):
        module = make(gradient_checkpointing=flag)
        module.compute_loss(module.denoise(batch(), stream([0], "cpu")), batch()).backward()
        gradients.append([p.grad.clone() for p in module.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


def test_targets_choose_the_layers():
    module = make(rank=2, targets=["*.attn2.to_v"])
    assert {name.split(".")[-4] for name in module.state_dict() if "lora_A" in name} == {"to_v"}


# Arguments


@pytest.mark.parametrize(
    ("argument", "kwargs"),
    [
        ("model", {"kind": 3}),
        ("model", {"kind": tiny.tiny_ddpm(8)}),
        ("noise_scheduler", {"noise_scheduler": torch.nn.Identity()}),
        ("prediction", {"prediction": "noise"}),
        ("min_snr", {"min_snr": 0}),
        ("prompt_dropout", {"prompt_dropout": 1.5}),
        ("rank", {"rank": 0}),
        ("targets", {"targets": ["*.to_q"]}),
        ("targets", {"rank": 2, "targets": ["*.nothing"]}),
        ("prompts", {"prompts": "a cat"}),
        ("steps", {"steps": -1}),
        ("guidance", {"guidance": -1.0}),
        ("seed", {"seed": -1}),
    ],
)
def test_a_bad_argument_is_named(argument, kwargs):
    with pytest.raises(ConfigurationError, match=argument):
        make(**kwargs)


def test_from_yaml():
    from lightning.pytorch.cli import LightningArgumentParser

    parser = LightningArgumentParser()
    parser.add_subclass_arguments(L.LightningModule, "model")
    inner = {"class_path": "effdl.tasks.tiny.tiny_stable_diffusion", "init_args": {"sample_size": 16}}
    for model in ("tiny-xl", inner):
        arguments = {"model": model, "min_snr": 5.0, "rank": 2, "prompts": ["a cat"]}
        config = parser.parse_object({"model": {"class_path": "effdl.TextToImageModule", "init_args": arguments}})
        module = parser.instantiate(config).model
        assert module.min_snr == 5.0
        assert type(module.model).__name__ == "UNet2DConditionModel"
