"""SaRACallback: official numbers on a Trainer, what moves, memory, resuming around the second selection, the end."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from effdl.callbacks import SaRACallback
from effdl.core.errors import ConfigurationError
from effdl.core.export import export_program
from effdl.diffusion.sara import apply_deltas
from effdl.tasks.diffusion import DiffusionModule
from effdl.tasks.tiny import tiny_unet
from tests.diffusion.test_sara import GOLD, Golden
from tests.support import BARE, quiet_fit


class Regression(LightningModule):
    """A network, its squared error, AdamW on all that ``parameters()`` gives; losses are kept."""

    def __init__(self, model: nn.Module, lr: float = 0.01, task: float = 1.0) -> None:
        super().__init__()
        self.model, self.lr, self.task, self.losses = model, lr, task, []

    def training_step(self, batch, batch_idx):
        loss = F.mse_loss(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss * self.task

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.01)


def wide(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 3))


def rows(count: int, seed: int = 0) -> DataLoader:
    g = torch.Generator().manual_seed(seed)
    batches = [(torch.randn(16, 8, generator=g), torch.randn(16, 3, generator=g)) for _ in range(count)]
    return DataLoader(batches, batch_size=None)


def fit(module, data, callbacks, steps, **kwargs):
    return quiet_fit(module, data, *callbacks, **{"max_steps": steps, "num_sanity_val_steps": 0, **kwargs})


class See(Callback):
    """Calls a function behind every step, and before each optimizer step."""

    def __init__(self, after=lambda *_: None, before=lambda *_: None) -> None:
        self.after, self.before = after, before

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.after(trainer, pl_module)


def test_must_01_golden_parity_on_a_trainer():
    batch = (torch.tensor(GOLD["X"]), torch.tensor(GOLD["Y"]))
    module = Regression(Golden(), GOLD["lr"])
    sara = SaRACallback(GOLD["threshold"], reselect=GOLD["progressive_iter"], lambda_rank=0.0)
    fit(module, DataLoader([batch] * 6, batch_size=None), [sara], 6)  # one call of the official seven is idle
    expected = GOLD["loss_before_each_call"]
    torch.testing.assert_close(
        torch.tensor(module.losses), torch.tensor(expected[:3] + expected[4:]), atol=1e-6, rtol=0
    )
    for name, value in module.model.named_parameters():
        torch.testing.assert_close(value.detach(), torch.tensor(GOLD["final_weights"][name]), atol=1e-6, rtol=0)


def test_must_02_and_03_what_moves_and_what_is_kept_in_memory():
    module, at = Regression(wide()), {}
    base = copy.deepcopy(module.model)
    sara = SaRACallback(fraction=0.3, reselect=4, rank_min=20)

    def look(trainer, pl_module):
        (optimizer,) = trainer.optimizers
        numel = {k: sum(s[k].numel() for s in optimizer.state.values()) for k in ("exp_avg", "exp_avg_sq")}
        leaves = {name: weight.leaf for name, weight in sara.weights.items()}
        trained = sum(leaf.numel() for leaf in leaves.values())
        at[trainer.global_step] = {
            "values": {name: leaf.detach().clone() for name, leaf in leaves.items()},
            "active": {n: None if w.active is None else w.active.clone() for n, w in sara.weights.items()},
            "moments": (numel, trained), "steps": [int(s["step"]) for s in optimizer.state.values()],
        }  # fmt: skip
        for name, parameter in pl_module.named_parameters():
            if not name.endswith("_sara"):
                assert parameter.grad is None, name
                assert not parameter.requires_grad, name

    def gradients(trainer, pl_module):
        for name, weight in sara.weights.items():
            assert weight.leaf.grad.shape == weight.index.shape, name

    fit(module, rows(9), [sara, See(look, gradients)], 9)
    trained = sum(w.index.numel() for w in sara.weights.values())
    assert 0 < trained < 0.31 * sum(p.numel() for p in base.parameters())
    for step, seen in at.items():
        if step != 4:  # behind the second selection the state is empty until the next step
            assert seen["moments"] == ({"exp_avg": trained, "exp_avg_sq": trained}, trained)
            assert set(seen["steps"]) == {step if step < 4 else step - 4}
    learned, last = at[4], at[9]
    frozen = 0
    for name, active in learned["active"].items():
        out = active == 0
        frozen += int(out.sum())
        assert torch.equal(learned["values"][name][out], last["values"][name][out]), name
        assert not torch.equal(learned["values"][name][~out], last["values"][name][~out]) or not (~out).any()
        threshold = sara.weights[name].threshold
        assert torch.equal(active > 0, learned["values"][name].abs() < threshold)
    assert 0 < frozen < trained
    for name, parameter in base.named_parameters():
        weight = sara.weights.get(f"model.{name}")
        outside = ~weight.mask() if weight else torch.ones_like(parameter, dtype=torch.bool)
        assert torch.equal(dict(module.model.named_parameters())[name][outside], parameter[outside]), name


def test_must_04_the_leaf_receives_the_rank_gradient():
    seen = {}
    for of, factor in (("weights", 0.0), ("weights", 1.0), ("delta", 1.0)):
        grads = []
        sara = SaRACallback(fraction=0.3, lambda_rank=factor, rank_of=of, rank_min=20, reselect=None)
        see = See(before=lambda t, m, s=sara, g=grads: g.append(s.weights["model.2.weight"].leaf.grad.clone()))
        fit(Regression(wide(), lr=1e-4, task=1e-6), rows(2), [sara, see], 2)
        seen[of, factor] = grads
    zero, weights, delta = seen.values()
    # the only matrix wider than 20; at the first step nothing was learned, so Delta P is zero
    assert (weights[0] - zero[0]).abs().max() > 1e-2
    torch.testing.assert_close(delta[0], zero[0])
    assert (delta[1] - zero[1]).abs().max() > 1e-2


@pytest.mark.parametrize("saved_at", [3, 5])
def test_must_09_resume_one_step_before_and_after_the_second_selection(saved_at, tmp_path):
    def make():
        return SaRACallback(fraction=0.3, reselect=4, rank_min=20)

    whole = Regression(wide())
    fit(whole, rows(8), [make()], 8)
    save = ModelCheckpoint(tmp_path, filename="at", every_n_train_steps=saved_at, save_top_k=-1)
    fit(Regression(wide()), rows(8), [make(), save], saved_at)
    state = torch.load(tmp_path / "at.ckpt", weights_only=True)["state_dict"]
    Regression(wide()).load_state_dict(state)  # dense, under the module's own names
    resumed = Regression(wide(seed=5))  # the base too is the checkpoint's
    left = DataLoader(list(rows(8))[saved_at:] * 9, batch_size=None)
    sara = make()
    try:
        fit(resumed, left, [sara], 8, ckpt_path=tmp_path / "at.ckpt", max_epochs=-1)
    finally:
        assert whole.losses[saved_at:] == pytest.approx(resumed.losses, abs=0)
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(ConfigurationError, match="ckpt_path"):
        fit(Regression(wide()), left, [SaRACallback(fraction=0.2)], 8, ckpt_path=tmp_path / "at.ckpt", max_epochs=-1)


def test_must_05_and_10_merged_network_and_delta(tmp_path):
    module = Regression(wide())
    base = copy.deepcopy(module.model)
    sara = SaRACallback(fraction=0.3, delta="delta.safetensors")
    fit(module, rows(4), [sara], 4, default_root_dir=tmp_path)
    for part in module.modules():
        assert not hasattr(type(part), "_effdl_swapped")
        assert not any(len(value) for key, value in vars(part).items() if key.endswith("_hooks"))
    assert all(p.requires_grad for p in module.parameters())
    x = torch.randn(2, 8)
    want = module.model(x)
    program = export_program(module.model.eval(), (x,), tmp_path / "model.pt2")
    torch.testing.assert_close(program.module()(x), want)
    torch.testing.assert_close(apply_deltas(base, tmp_path / "delta.safetensors")(x), want, rtol=0, atol=0)
    told = sara.report()
    stored = load_file(tmp_path / "delta.safetensors")
    assert told["trained"] == sum(values.numel() for values in stored.values())
    assert set(stored) == {name.removeprefix("model.") for name in told["layers"]}
    assert told["delta_bytes"] == 4 * told["trained"]
    assert 0.2 < told["share"] < 0.31
    # a Trainer that goes on goes on with the same entries, and with the same base for its delta
    index = {name: weight.index for name, weight in sara.weights.items()}
    again = Trainer(callbacks=[sara], **BARE, max_steps=2, default_root_dir=tmp_path)
    again.fit(module, rows(2))
    first = {name: weight.index for name, weight in sara.weights.items()}
    assert any(not torch.equal(first[name], index[name]) for name in first)  # a new Trainer chooses anew
    before = {name: weight.initial for name, weight in sara.weights.items()}
    again.fit_loop.epoch_loop.max_steps = 4
    again.fit(module, rows(2))
    assert all(torch.equal(weight.index, first[name]) for name, weight in sara.weights.items())
    assert all(torch.equal(weight.initial, before[name]) for name, weight in sara.weights.items())


def test_finished_pipeline_opens_with_stock_diffusers(tmp_path):
    from diffusers import DDPMPipeline, UNet2DModel

    unet = tiny_unet(8, 1, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    base = copy.deepcopy(unet)
    module = DiffusionModule(unet, optimizer=lambda p: torch.optim.AdamW(p, 1e-3))
    g = torch.Generator().manual_seed(0)
    data = DataLoader([{"image": torch.randn(4, 1, 8, 8, generator=g)} for _ in range(4)], batch_size=None)
    sara = SaRACallback(fraction=0.2)
    fit(module, data, [sara], 4)
    module.save_pretrained(tmp_path / "pipeline")
    sara.save(tmp_path / "delta.safetensors")
    images = [
        DDPMPipeline(model, module.noise_scheduler)(
            1, torch.Generator().manual_seed(3), num_inference_steps=3, output_type="np"
        ).images
        for model in (
            module.model.eval(),
            UNet2DModel.from_pretrained(tmp_path / "pipeline" / "unet", low_cpu_mem_usage=False),
            apply_deltas(base, tmp_path / "delta.safetensors"),
        )
    ]
    assert images[0] == pytest.approx(images[1], abs=1e-6)
    assert images[0] == pytest.approx(images[2], abs=1e-6)


def test_compiled_before_training_learns_the_same():
    ends = []
    for compiled in (False, True):
        module = Regression(wide())
        if compiled:
            module.model = torch.compile(module.model, backend="aot_eager")
        fit(module, rows(4), [SaRACallback(fraction=0.3, reselect=2)], 4)
        ends.append([p.detach() for p in module.parameters()])
    for a, b in zip(*ends):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_what_it_does_not_go_with():
    from effdl.callbacks import PruningCallback

    module = Regression(wide())
    for other in (PruningCallback(0.5), SaRACallback(fraction=0.1)):
        with pytest.raises(ConfigurationError, match="SaRACallback"):
            fit(module, rows(2), [SaRACallback(fraction=0.3), other], 2)
    assert all(p.requires_grad for p in module.parameters())

    trainer = Trainer(**BARE)
    trainer.strategy.__class__ = type("FSDPStrategy", (type(trainer.strategy),), {})
    with pytest.raises(ConfigurationError, match="strategy"):
        SaRACallback(fraction=0.3).attach(trainer, module, "fit")
    with pytest.raises(ConfigurationError, match="needs a fit"):
        SaRACallback().report()
    with pytest.warns(UserWarning, match="does not reach"):
        fit(module, rows(2), [SaRACallback(fraction=0.3, reselect=7)], 2)


def test_benchmark_of_fine_tuning():
    pytest.importorskip("peft")
    from benchmarks._finetune import finetune, table

    lora, few, fifth = rows_of = finetune(pairs=1, batch=2, memory=False)
    assert 0.9 < few["trained"] / lora["trained"] < 1.1
    assert lora["optimizer_bytes"] < 0.1 * lora["bare_optimizer_bytes"]
    assert fifth["optimizer_bytes"] == pytest.approx(0.2 * fifth["bare_optimizer_bytes"], rel=0.05)
    assert fifth["gradient_bytes"] == 4 * fifth["trained"]
    assert len({len(line) for line in table(rows_of)}) == 1
