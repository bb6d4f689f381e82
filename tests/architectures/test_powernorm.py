"""PowerNorm (slug ``powernorm``): identities, official numbers, models, and the callback."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError, gradcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from effdl.architectures.powernorm import PowerNorm, group_scale, power_norm
from effdl.architectures.powernorm_models import FoldedNorm, attention_heads, fold_power_norm, powernorm_model
from effdl.callbacks import PowerNormCallback
from effdl.core.errors import ConfigurationError
from tests.architectures import powernorm_ranks
from tests.support import golden

BUFFERS = ("running_phi", "ema_gz", "iters")


def double(value: list) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trained(steps: int = 6, channels: int = 8, **options) -> PowerNorm:
    """A float64 layer some steps behind its warm-up, with gamma, beta, phi and ema_gz all off their start."""
    norm = PowerNorm(channels, **{"group_num": 2, "warmup_iters": 3, **options}).double()
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * tokens(channels, seed=90))
        norm.bias.copy_(0.2 * tokens(channels, seed=91))
    for step in range(steps):
        norm(1.5 * tokens(4, 6, channels, seed=step)).backward(tokens(4, 6, channels, seed=50 + step))
    norm.zero_grad()
    return norm


# --- what the paper and the official code say -----------------------------------------------------------------------


def test_must_01_golden_parity():
    numbers = golden("powernorm")
    norm = PowerNorm(8, group_num=2, warmup_iters=numbers["warmup_iters"], backward_scale="batch").double()
    with torch.no_grad():
        norm.weight.copy_(double(numbers["weight"]))
        norm.bias.copy_(double(numbers["bias"]))
    worst = 0.0
    for step in numbers["steps"]:
        x = double(step["x"]).requires_grad_()
        mask = None if step["pad_mask"] is None else torch.tensor(step["pad_mask"]).T
        norm.zero_grad()
        y = norm(x, mask)
        y.backward(double(step["grad_out"]))
        got = {"y": y, "grad_x": x.grad, "grad_weight": norm.weight.grad, "grad_bias": norm.bias.grad}
        got |= {"running_phi_after": norm.running_phi, "ema_gz_after": norm.ema_gz}
        for key, value in got.items():
            worst = max(worst, float((value.detach() - double(step[key])).abs().max()))
            torch.testing.assert_close(value, double(step[key]), atol=1e-6, rtol=0, msg=key)
        assert norm.iters == step["iters_after"]
    y = norm.eval()(double(numbers["eval"]["x"]))
    torch.testing.assert_close(y, double(numbers["eval"]["y"]), atol=1e-6, rtol=0)
    print(f"golden: largest deviation {worst:.1e}")


@pytest.mark.parametrize("scale", ["running", "batch"])
def test_must_02_nu_identity(scale):
    norm = trained(backward_scale=scale, group_num=None)
    x, grad_y = tokens(5, 7, 8, seed=20), tokens(5, 7, 8, seed=21)
    nu, phi = (1 - norm.alpha_bwd) * norm.ema_gz, norm.running_phi.clone()
    norm(x).backward(grad_y)
    z, g = x / (phi + norm.eps).sqrt(), grad_y * norm.weight.detach()
    gamma, lam = z.square().mean((0, 1)), (g * z).mean((0, 1))
    expected = nu * (1 - (1 - norm.alpha_bwd) * gamma) + (1 - norm.alpha_bwd) * lam
    torch.testing.assert_close((1 - norm.alpha_bwd) * norm.ema_gz, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("scale", ["running", "batch"])
def test_backward_follows_the_paper_written_out(scale):
    norm = trained(backward_scale=scale)
    x, grad_y = tokens(5, 7, 8, seed=20).requires_grad_(), tokens(5, 7, 8, seed=21)
    nu, phi = (1 - norm.alpha_bwd) * norm.ema_gz, norm.running_phi.clone()
    scaled = group_scale(x, 2)
    z = (scaled / (phi + norm.eps).sqrt()).detach()
    divisor = phi if scale == "running" else scaled.detach().square().mean((0, 1))
    direct = (grad_y * norm.weight.detach() - nu * z) / (divisor + norm.eps).sqrt()
    (expected,) = torch.autograd.grad(scaled, x, direct)
    norm(x).backward(grad_y)
    torch.testing.assert_close(x.grad, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(norm.weight.grad, (grad_y * z).sum((0, 1)), atol=1e-12, rtol=0)
    torch.testing.assert_close(norm.bias.grad, grad_y.sum((0, 1)), atol=1e-12, rtol=0)


def test_must_03_batch_independence():
    norm, batch_norm = trained(), nn.BatchNorm1d(8).double()
    x = tokens(4, 6, 8, seed=30)
    loud = torch.cat((x[:1], 100 * x[1:]))
    y, y_loud = (copy.deepcopy(norm)(batch)[0] for batch in (x, loud))
    torch.testing.assert_close(y, y_loud, atol=1e-6, rtol=0)
    y, y_loud = (batch_norm(batch.flatten(0, 1))[:6] for batch in (x, loud))
    assert (y - y_loud).abs().max() > 0.1


def test_must_04_train_and_eval_agree_after_warmup():
    norm, x = trained(), tokens(4, 6, 8, seed=30)
    before = norm.eval()(x)
    torch.testing.assert_close(norm.train()(x), before, atol=1e-6, rtol=0)


def test_must_05_mean_stays():
    x = 5 + tokens(16, 32, 8)
    assert PowerNorm(8).double()(x).mean() > 0.5
    assert nn.BatchNorm1d(8).double()(x.flatten(0, 1)).mean().abs() < 1e-6


def test_must_06_first_gradient_treats_the_scale_as_a_constant():
    norm = PowerNorm(8, group_num=None, warmup_iters=10).double()
    x, grad_y = tokens(4, 6, 8).requires_grad_(), tokens(4, 6, 8, seed=1)
    norm(x).backward(grad_y)
    moment = x.square().mean((0, 1))
    (constant,) = torch.autograd.grad(x / (moment.detach() + norm.eps).sqrt(), x, grad_y)
    (plain,) = torch.autograd.grad(x / (moment + norm.eps).sqrt(), x, grad_y)
    torch.testing.assert_close(x.grad, constant, atol=1e-12, rtol=0)
    assert (x.grad - plain).abs().max() > 1e-3
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        gradcheck(norm, (x,))


def test_must_07_stationary_fixed_point_and_step_change():
    norm, batches = PowerNorm(8, group_num=None, warmup_iters=20).double(), torch.Generator().manual_seed(3)
    for _ in range(200):
        norm(2 * torch.randn(1024, 8, generator=batches, dtype=torch.float64))
    torch.testing.assert_close(norm.running_phi, torch.full_like(norm.running_phi, 4), rtol=0.05, atol=0)

    norm, signs = PowerNorm(8, group_num=None, warmup_iters=0).double(), tokens(64, 8).sign()
    norm(signs)
    for step in range(1, 30):
        norm(2 * signs)
        torch.testing.assert_close(norm.running_phi, torch.full((8,), 4 - 3 * 0.9**step).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("group_num", [2, None])
def test_must_08_fold(group_num):
    norm = trained(group_num=group_num).float()
    model = nn.Sequential(norm, nn.Linear(8, 5)).eval()
    x = tokens(4, 6, 8, seed=30, dtype=torch.float32)
    folded = fold_power_norm(model, x)
    torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=0)
    assert isinstance(folded[0], nn.Identity if group_num is None else FoldedNorm)
    assert not list(folded[0].parameters())
    assert isinstance(model[0], PowerNorm)


# --- the layer ------------------------------------------------------------------------------------------------------


def test_statistics_update_by_the_card():
    norm, phi = PowerNorm(8, group_num=None, warmup_iters=4).double(), torch.ones(8).double()
    for t in range(1, 8):
        x = t * tokens(4, 6, 8, seed=t)
        s = x.square().mean((0, 1))
        norm(x)
        if t < 4:
            phi = phi * (t - 1) / t + s / t
        phi = 0.9 * phi + 0.1 * s
        torch.testing.assert_close(norm.running_phi, phi, atol=1e-12, rtol=0)


def test_vanilla_mode_has_the_exact_gradient_also_with_padding():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, 3:] = True
    norm = trained(mode="vanilla")
    assert gradcheck(norm, (tokens(4, 6, 8).requires_grad_(),))
    assert gradcheck(norm, (tokens(4, 6, 8).requires_grad_(), mask))
    assert norm.ema_gz.abs().max() == 0


def test_mask_backward_takes_padding_out_everywhere():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, 3:] = True
    norm = trained(mask_backward=True)
    alone = copy.deepcopy(norm)
    x, grad_y = tokens(4, 6, 8, seed=1).requires_grad_(), tokens(4, 6, 8, seed=2)
    norm(x, mask).backward(grad_y)
    packed = x.detach()[~mask].requires_grad_()
    alone(packed).backward(grad_y[~mask])
    torch.testing.assert_close(x.grad[~mask], packed.grad)
    assert not x.grad[mask].any()
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(norm, name).grad, getattr(alone, name).grad)
    for name in BUFFERS:
        torch.testing.assert_close(getattr(norm, name), getattr(alone, name))


def test_eval_form_is_the_function():
    norm, x = trained().eval(), tokens(4, 6, 8)
    assert torch.equal(norm(x), power_norm(x, norm.running_phi, norm.weight, norm.bias, group_num=2))


def test_a_second_backward_moves_nothing_and_sees_the_same_nu():
    norm, x = trained(), tokens(4, 6, 8).requires_grad_()
    y = norm(x)
    (first,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    state = norm.ema_gz.clone()
    (second,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(first, second)
    assert torch.equal(norm.ema_gz, state)


class Block(nn.Module):
    """Calls its norm twice, as models with shared layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = PowerNorm(8, group_num=2, warmup_iters=2, alpha_fwd=0.6)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.norm(self.first(self.norm(x)).tanh()))


@pytest.mark.parametrize("fresh", [True, False], ids=["other data each step", "the same data each step"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_a_forward_once(reentrant, fresh):
    torch.manual_seed(0)
    plain = nn.ModuleList([Block(), Block()])
    again = copy.deepcopy(plain)
    for step in range(6):
        x, y = (tokens(4, 6, 8, seed=step * fresh, dtype=torch.float32).requires_grad_() for _ in range(2))
        out, out_again = x, y
        for block, block_again in zip(plain, again):
            out = block(out)
            out_again = checkpoint(block_again, out_again, use_reentrant=reentrant)
        out.square().sum().backward()
        out_again.square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    for value, value_again in zip(plain.state_dict().values(), again.state_dict().values()):
        torch.testing.assert_close(value, value_again)
    for parameter, parameter_again in zip(plain.parameters(), again.parameters()):
        torch.testing.assert_close(parameter.grad, parameter_again.grad)
    assert plain[0].norm.iters == again[0].norm.iters == 12


def test_half_precision_keeps_float32_state():
    norm = trained().float().bfloat16()
    assert norm.weight.dtype == torch.bfloat16
    assert norm.running_phi.dtype == norm.ema_gz.dtype == torch.float32
    x = tokens(4, 6, 8, dtype=torch.float32)
    y = norm(x.bfloat16().requires_grad_())
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert norm.weight.grad.dtype == torch.bfloat16
    assert norm.running_phi.dtype == torch.float32


def test_fp16_overflow_leaves_the_state_alone_and_the_scale_cancels():
    plain, scaled = trained(), trained()
    scaled.loss_scale = torch.tensor(1024.0, dtype=torch.float64)
    x, grad_y = tokens(4, 6, 8, seed=1), tokens(4, 6, 8, seed=2)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    plain(a).backward(grad_y)
    scaled(b).backward(1024 * grad_y)
    torch.testing.assert_close(1024 * a.grad, b.grad)
    torch.testing.assert_close(plain.ema_gz, scaled.ema_gz)
    scaled(x * float("inf")).backward(grad_y * float("inf"))
    torch.testing.assert_close(plain.ema_gz, scaled.ema_gz)
    assert scaled.running_phi.isfinite().all()


def test_lost_state_is_reported_with_the_layers_name():
    norm = PowerNorm(8)
    norm.name = "blocks.3.norm1"
    norm(torch.full((4, 8), float("nan")))
    for _ in range(PowerNorm._CHECK_EVERY - 2):
        norm(torch.ones(4, 8))
    with pytest.raises(FloatingPointError, match="blocks.3.norm1"):
        norm(torch.ones(4, 8))


def test_nu_clip_bounds_nu():
    norm = trained(nu_clip=0.01)
    assert (0.1 * norm.ema_gz).abs().max() <= 0.01 + 1e-12
    assert (0.1 * trained().ema_gz).abs().max() > 0.01


def test_official_shapes_load():
    norm, fresh = trained(), PowerNorm(8, group_num=2).double()
    state = norm.state_dict()
    state |= {"running_phi": state["running_phi"].view(1, 8, 1, 1), "ema_gz": state["ema_gz"].view(1, 8, 1, 1)}
    state["iters"] = state["iters"].view(1)
    fresh.load_state_dict(state)
    assert all(torch.equal(getattr(norm, name), getattr(fresh, name)) for name in BUFFERS)
    assert fresh.iters.shape == ()


def test_eval_before_training_warns_once():
    norm = PowerNorm(8).eval()
    with pytest.warns(UserWarning, match="before any training step"):
        norm(torch.ones(2, 8))
    norm(torch.ones(2, 8))


BAD = {
    "num_features": 0, "group_num": 3, "warmup_iters": -1, "alpha_fwd": 1.0, "alpha_bwd": 0.0, "eps": 0.0,
    "group_eps": -1.0, "backward_scale": "run", "mode": "plain", "nu_clip": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("argument", BAD)
def test_bad_arguments_are_named(argument):
    with pytest.raises(ConfigurationError, match=argument):
        PowerNorm(**{"num_features": 8, argument: BAD[argument]})


def test_bad_inputs_are_named():
    norm = PowerNorm(8)
    with pytest.raises(ConfigurationError, match="x="):
        norm(torch.ones(2, 7))
    with pytest.raises(ConfigurationError, match="padding_mask"):
        norm(torch.ones(2, 3, 8), torch.zeros(3, 2, dtype=torch.bool))
    with pytest.raises(ConfigurationError, match="padding_mask"):
        norm(torch.ones(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))
    assert norm.iters == 0


# --- whole models ---------------------------------------------------------------------------------------------------


def tiny_vit() -> nn.Module:
    import timm

    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 4, "num_classes": 3}
    return timm.models.VisionTransformer(**options)


def images(count: int = 2, seed: int = 0) -> Tensor:
    return tokens(count, 3, 16, 16, seed=seed, dtype=torch.float32)


def settle(model: nn.Module, *inputs: Tensor, steps: int = 5) -> nn.Module:
    for _ in range(steps):
        out = model.train()(*inputs)
        (out if isinstance(out, Tensor) else out.last_hidden_state).square().mean().backward()
    return model.eval()


def test_timm_vit_is_converted_and_folded():
    model = powernorm_model(tiny_vit(), warmup_iters=2)
    norms = [m for m in model.modules() if isinstance(m, PowerNorm)]
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())
    assert len(norms) == 5
    assert all(norm.group_num == 4 for norm in norms)
    x = images()
    folded = fold_power_norm(settle(model, x), x)
    torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=0)
    assert not list(folded.blocks[0].norm1.parameters())  # folded into qkv
    assert not any(isinstance(m, PowerNorm) for m in folded.modules())
    torch.export.export(folded, (x,))


def test_huggingface_encoders_are_converted_and_folded():
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    shared = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    bert = BertModel(BertConfig(vocab_size=11, **shared)).eval()
    vit = ViTModel(ViTConfig(image_size=16, patch_size=8, **shared)).eval()
    ids = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
    for model, x in ((bert, ids), (vit, images())):
        settle(powernorm_model(model, warmup_iters=2), x)
        assert all(m.group_num == 4 for m in model.modules() if isinstance(m, PowerNorm))
        folded = fold_power_norm(model, x)
        torch.testing.assert_close(folded(x).last_hidden_state, model(x).last_hidden_state, atol=1e-5, rtol=0)
    remainders = [m for m in folded.modules() if isinstance(m, FoldedNorm)]
    assert [m.weight is None for m in remainders] == [True, True, False]  # before q, k, v; before the MLP; the last


def test_language_models_are_converted_and_folded():
    from effdl.tasks.tiny import tiny_gpt2, tiny_llama

    ids = torch.randint(256, (2, 6), generator=torch.Generator().manual_seed(0))
    for model in (tiny_gpt2(), tiny_llama()):
        powernorm_model(model, warmup_iters=2).train()
        for _ in range(4):
            model(input_ids=ids, labels=ids).loss.backward()
        folded = fold_power_norm(model.eval(), ids)
        torch.testing.assert_close(folded(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
        remainders = [m for m in folded.modules() if isinstance(m, FoldedNorm)]
        assert [m.weight is None for m in remainders] == [True] * 4 + [False]  # the last is sliced before the head


@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_encoder_leaves_its_fast_path(norm_first):
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = powernorm_model(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first), warmup_iters=2)
    x = tokens(2, 6, 16, dtype=torch.float32)
    settle(model, x)
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(model(x), fast)
    folded = fold_power_norm(model, x)
    torch.testing.assert_close(folded(x), fast, atol=1e-5, rtol=0)


def test_selection_heads_and_affine():
    model = tiny_vit()
    with torch.no_grad():
        model.norm.weight.fill_(2.0)
    model.norm.weight.requires_grad_(False)
    powernorm_model(model, targets="norm", group_num=None)
    assert isinstance(model.norm, PowerNorm)
    assert isinstance(model.blocks[0].norm1, nn.LayerNorm)
    assert model.norm.weight[0] == 2
    assert not model.norm.weight.requires_grad
    assert attention_heads(model, "blocks.1.norm1", 16) == 4
    with pytest.raises(ConfigurationError, match="group_num"):
        powernorm_model(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
    plain = powernorm_model(nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.RMSNorm(8)), group_num=2)
    assert plain[0].weight is None
    assert torch.equal(plain[1].weight, torch.ones(8))
    image_norm = nn.Sequential(nn.LayerNorm((3, 8, 8)))
    with pytest.raises(ConfigurationError, match="targets"):
        powernorm_model(image_norm, group_num=1)
    assert isinstance(image_norm[0], nn.LayerNorm)


def test_fold_leaves_a_weight_that_others_read_alone():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm = nn.Embedding(11, 8), trained().float()
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.norm(self.embedding(ids)))

    model, ids = Tied().eval(), torch.arange(6).view(2, 3)
    folded = fold_power_norm(model, ids)
    torch.testing.assert_close(folded(ids), model(ids), atol=1e-5, rtol=0)
    assert folded.norm.weight is not None


# --- the callback ---------------------------------------------------------------------------------------------------


class Net(LightningModule):
    """A foreign module: a torch encoder over sequences (B, 5, 8), SGD or anything."""

    def __init__(self, optimizers=lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), norm_first=True):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.norm, self.head, self.optimizers_of = nn.LayerNorm(8), nn.Linear(8, 3), optimizers
        self.losses: list[Tensor] = []

    def forward(self, x):
        return self.head(self.norm(self.encoder(x).mean(1)))

    def training_step(self, batch, batch_idx):
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return self.optimizers_of(self.parameters())


def rows(count: int = 6, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 5, 8, generator=g), torch.randint(0, 3, (size,), generator=g)) for _ in range(count)]


def fit(module, callbacks, batches=None, val=None, ckpt_path=None, **kwargs):
    trainer = Trainer(**{
        "max_epochs": 2, "callbacks": callbacks, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    } | kwargs)  # fmt: skip
    loader = DataLoader(batches or rows(), batch_size=None)
    trainer.fit(module, loader, val, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def norms_of(module: nn.Module) -> list[PowerNorm]:
    return [m for m in module.modules() if isinstance(m, PowerNorm)]


def test_must_09_resume_is_bit_identical(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    fit(whole := Net(), [PowerNormCallback(warmup_iters=4), save], rows(12), max_epochs=1)
    fit(
        again := Net(),
        [PowerNormCallback(warmup_iters=4)],
        rows(12)[7:],  # the loader of the resumed run goes on where the other was
        ckpt_path=tmp_path / "step=7.ckpt",
        max_steps=12,
        max_epochs=-1,
    )
    assert len(again.losses) == 5
    assert torch.equal(torch.stack(whole.losses[7:]), torch.stack(again.losses))
    state, state_again = whole.state_dict(), again.state_dict()
    assert state.keys() == state_again.keys()
    assert all(torch.equal(state[key], state_again[key]) for key in state)
    assert norms_of(again)[0].iters == 12


def test_checkpoint_opens_in_the_rebuilt_architecture_without_a_trainer(tmp_path):
    save = ModelCheckpoint(tmp_path, save_last=True)
    fit(module := Net(), [PowerNormCallback(warmup_iters=4), save])
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    fresh = powernorm_model(Net())
    fresh.load_state_dict(state)
    x = rows()[0][0]
    assert torch.equal(fresh.eval()(x), module.eval()(x))
    dense = fold_power_norm(module, x)
    torch.testing.assert_close(dense(x), module(x), atol=1e-5, rtol=0)


def test_every_stage_alone_and_again_replaces_once(tmp_path):
    callback, loader = PowerNormCallback(warmup_iters=4, exclude="norm"), DataLoader(rows(2), batch_size=None)
    trainer = fit(module := Net(), [callback, ModelCheckpoint(tmp_path, save_last=True)], val=loader)
    layers = norms_of(module)
    trainer.validate(module, loader, verbose=False)
    fit(module, [callback])
    assert norms_of(module) == layers
    assert list(callback.layers) == ["encoder.norm1", "encoder.norm2"]
    assert isinstance(module.norm, nn.LayerNorm)
    assert all(layer.padding_mask is None and layer.loss_scale is None for layer in layers)
    fresh = Net()
    alone = Trainer(callbacks=[PowerNormCallback(warmup_iters=4, exclude="norm")], logger=False, accelerator="cpu")
    alone.validate(fresh, loader, ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True)
    assert norms_of(fresh)[0].iters == 12


def test_accumulation_counts_micro_batches_and_state_is_logged():
    trainer = fit(module := Net(), [PowerNormCallback(warmup_iters=4)], accumulate_grad_batches=3)
    assert trainer.global_step == 4
    assert norms_of(module)[0].iters == 12
    expected = max(float(norm.ema_gz.abs().max()) for norm in norms_of(module))
    assert float(trainer.callback_metrics["powernorm/ema_gz_absmax"]) == pytest.approx(expected)


def test_report_names_layers():
    callback = PowerNormCallback(warmup_iters=4)
    with pytest.raises(ConfigurationError, match="needs a fit"):
        callback.report()
    fit(Net(), [callback])
    assert callback.matched(None) == ["encoder.norm1", "encoder.norm2", "norm"]
    row = callback.report()["layers"]["encoder.norm1"]
    assert (row["features"], row["groups"], row["iters"]) == (8, 2, 12)


def scheduled(make, interval="step"):
    def optimizers(parameters):
        optimizer = torch.optim.SGD(parameters, 0.01)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": interval}}

    return optimizers


def sequential(optimizer):
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

    return SequentialLR(optimizer, [LinearLR(optimizer, 0.1), CosineAnnealingLR(optimizer, 9)], milestones=[2])


def transformers_warmup(optimizer):
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, 3, 10)


@pytest.mark.parametrize(
    ("make", "interval", "expected"),
    [
        (sequential, "step", 2 * 2),
        (transformers_warmup, "step", 3 * 2),
        (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10, pct_start=0.3), "step", 3 * 2),
        (lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=1), "epoch", 6),
    ],
)
def test_warmup_auto_follows_the_scheduler(make, interval, expected):
    callback = PowerNormCallback(warmup_iters="auto")
    fit(module := Net(scheduled(make, interval)), [callback], accumulate_grad_batches=2)
    assert [norm.warmup_iters for norm in norms_of(module)] == [expected] * 3
    assert callback.state_dict() == {"warmup_iters": expected}


def test_warmup_auto_needs_a_scheduler_that_tells():
    steps = scheduled(lambda o: torch.optim.lr_scheduler.StepLR(o, 2))
    for module in (Net(), Net(steps)):
        with pytest.raises(ConfigurationError, match="warmup_iters"):
            fit(module, [PowerNormCallback(warmup_iters="auto")])


def test_training_that_ends_in_the_warmup_warns():
    with pytest.warns(UserWarning, match="warm-up"):
        fit(Net(), [PowerNormCallback(warmup_iters=100)])


def test_layers_left_in_eval_mode_are_pointed_out():
    module = Net()
    module.eval()
    with pytest.warns(UserWarning, match="in eval mode"):
        fit(module, [PowerNormCallback(warmup_iters=4)])


def test_sanity_check_does_not_warn_of_untrained_statistics(recwarn):
    fit(Net(), [PowerNormCallback(warmup_iters=4)], val=DataLoader(rows(1), batch_size=None))
    assert not [w for w in recwarn if "before any training step" in str(w.message)]


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_mixed_precision(kind):
    from lightning.pytorch.plugins.precision import MixedPrecision

    if kind == "bf16":
        options = {"precision": "bf16-mixed"}
    else:  # the first scales overflow: those steps are skipped and must not reach the statistics
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        options = {"plugins": MixedPrecision("16-mixed", "cpu", scaler=scaler)}
    fit(reference := Net(), [PowerNormCallback(warmup_iters=4)])
    fit(module := Net(), [PowerNormCallback(warmup_iters=4)], **options)
    for norm, exact in zip(norms_of(module), norms_of(reference)):
        assert norm.running_phi.dtype == norm.ema_gz.dtype == torch.float32
        skipped = 0.0 if kind == "bf16" else 2.0
        torch.testing.assert_close(norm.running_phi, exact.running_phi, atol=0.1, rtol=0.1 + skipped)
        # in units of the unscaled loss
        torch.testing.assert_close(norm.ema_gz.norm(), exact.ema_gz.norm(), atol=0.1, rtol=0.1 + skipped)
    assert kind == "bf16" or scaler.get_scale() < 2.0**20


def test_padding_of_the_batch_stays_out_of_the_statistics():
    x, y = rows(1)[0]
    keep = torch.ones(4, 5, dtype=torch.int64)
    keep[:, 3:] = 0
    loud = torch.where(keep.bool().unsqueeze(-1), x, 1000.0)

    def phi(data, **options):
        batch = {"x": data, "y": y, "attention_mask": keep}
        fit(module := Net(), [PowerNormCallback(warmup_iters=4, group_num=None, **options)], [batch], max_epochs=1)
        return module.encoder.norm1.running_phi

    torch.testing.assert_close(phi(x), phi(loud))
    assert phi(loud, padding_key=None).max() > 1000


def test_late_layers_and_weight_averaging():
    class Late(Net):
        def configure_model(self):
            if not isinstance(self.norm, PowerNorm):
                self.norm = nn.LayerNorm(8)

        def __init__(self):
            super().__init__()
            self.norm, self.encoder = None, nn.Identity()

    fit(module := Late(), [PowerNormCallback(warmup_iters=4, group_num=2)])
    assert isinstance(module.norm, PowerNorm)
    fit(module := Net(), [PowerNormCallback(warmup_iters=4), EMAWeightAveraging(decay=0.9)])
    assert len(norms_of(module)) == 3
    with pytest.raises(ConfigurationError, match="before EMAWeightAveraging"):
        fit(Net(), [EMAWeightAveraging(decay=0.9), PowerNormCallback()])


def test_compiled_training_does_not_crash_and_agrees():
    model = nn.Sequential(nn.Linear(8, 8), PowerNorm(8, group_num=2, warmup_iters=1), nn.Linear(8, 3))
    again, x = copy.deepcopy(model), tokens(4, 6, 8, dtype=torch.float32)
    compiled = torch.compile(again, backend="aot_eager")
    for _ in range(3):
        model(x).square().mean().backward()
        compiled(x).square().mean().backward()
    for value, value_again in zip(model.state_dict().values(), again.state_dict().values()):
        torch.testing.assert_close(value, value_again)
    torch.testing.assert_close(compiled.eval()(x), model.eval()(x))


def test_bad_callback_arguments_are_named():
    example = PowerNormCallback.contract_example()
    for argument, values in example.bad.items():
        for value in values if isinstance(values, list) else [values]:
            module = Net()
            with pytest.raises(ConfigurationError, match=argument):
                fit(module, [PowerNormCallback(**{**example.kwargs, argument: value})])
            assert not norms_of(module)


# --- two processes --------------------------------------------------------------------------------------------------


@pytest.mark.ddp
def test_two_processes_end_where_one_does(tmp_path):
    torch.multiprocessing.spawn(powernorm_ranks.run, (str(tmp_path),), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for options, first, second in zip(powernorm_ranks.OPTIONS, *states):
        single = powernorm_ranks.train(powernorm_ranks.batches(), ddp=False, **options)
        for key, value in single.items():
            assert torch.equal(first[key], second[key])
            torch.testing.assert_close(first[key], value, msg=f"{options} {key}")
