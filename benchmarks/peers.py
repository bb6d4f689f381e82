"""The same job done by somebody else's code: ``python -m benchmarks peers``.

- pytorch-grad-cam's GradCAM++ and SmoothGradCAMpp(n_samples=1, sigma=0): time and agreement of the maps;
- Lightning's ModelPruning and PruningCallback: time of a step, and what a resumed run ends with;
- zennit and core.lrp: time of a relevance pass, and agreement of the relevance;
- torch-pruning alone and core.structure: time of taking dead filters out, and what the network computes afterwards;
- torchao's own int8 and core.deploy: time of a forward pass, and how far the outputs are apart;
- Composer's rule for ranks and core.factorize: time of a forward pass.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import Tensor, nn

from benchmarks.kernels import int8, low_rank
from benchmarks.overhead import classifier, lightning_pruning
from benchmarks.race import images, in_turns, race, ratios
from benchmarks.relevance import agreement, relevance, slicing

EPOCHS = 6


def gradcam(pairs: int, batch: int) -> list[dict[str, Any]]:
    """Time ratio ours / theirs, and how far the maps in [0, 1] are apart; resnet18 at 64x64, its 4x4 maps of layer3."""
    try:
        from pytorch_grad_cam import GradCAMPlusPlus
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError:
        return [{"name": "GradCAM++: pytorch-grad-cam is not installed (pip install 'effdl[bench]')"}]
    import timm

    from effdl.attribution.smooth_gradcampp import SmoothGradCAMpp

    torch.manual_seed(0)
    model, x = timm.create_model("resnet18", num_classes=10).eval(), images(batch, 64)["image"]
    classes = model(x).argmax(1).tolist()
    theirs = GradCAMPlusPlus(model=model, target_layers=[model.layer3])
    ours = SmoothGradCAMpp(model, "layer3", n_samples=1, sigma=0.0)
    wanted = [ClassifierOutputTarget(c) for c in classes]
    runs = {"theirs": lambda: torch.from_numpy(theirs(x, wanted)), "ours": lambda: ours(x, classes)["layer3"]}
    maps, times = {name: run() for name, run in runs.items()}, in_turns(runs, pairs)
    return [{"name": "GradCAM++, ours / pytorch-grad-cam", **ratios(times, "ours", "theirs"), **agreement(**maps)}]


def pruning_step(pairs: int, batch: int) -> list[dict[str, Any]]:
    """The step with masks, of both, over the bare one; the three runs take turns."""
    from effdl.callbacks import PruningCallback

    makers = {
        "bare": lambda: (classifier("resnet18"), []),
        "ours": lambda: (classifier("resnet18"), [PruningCallback(0.9, start=0, stop=0)]),
        "theirs": lambda: (classifier("resnet18"), [lightning_pruning(0.9)]),
    }
    times = race(makers, images(batch), pairs)
    names = {"ours": "PruningCallback / bare", "theirs": "ModelPruning / bare"}
    found = [{"name": title, **ratios(times, name, "bare")} for name, title in names.items()]
    return [*found, {"name": "PruningCallback / ModelPruning", **ratios(times, "ours", "theirs")}]


class _Small(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def sparsity(module: nn.Module) -> float:
    """Share of zeros in the weight matrices, masks applied."""
    weights = [layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


class _Interruption(Exception):
    pass


class _Interrupt(lightning.Callback):
    """Ends the run by an error half-way; the checkpoint of the epoch before is there."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == EPOCHS // 2:
            raise _Interruption


def _train(callbacks: list[Any], folder: str, resume: bool = False) -> tuple[float, Tensor]:
    """Sparsity and weights after so many epochs of eight batches; ``last.ckpt`` lies in the folder afterwards."""
    g = torch.Generator().manual_seed(1)
    data = [(torch.randn(32, 16, generator=g), torch.randint(0, 4, (32,), generator=g)) for _ in range(8)]
    save = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    module = _Small()
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, callbacks=[*callbacks, save], accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    path = Path(folder) / "last.ckpt" if resume else None
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), ckpt_path=path)
    return sparsity(module), torch.cat([p.detach().flatten() for p in module.parameters()])


def resume_row(name: str, make: Callable[[], Any]) -> dict[str, Any]:
    """Train through; train half-way, and resume from the checkpoint with everything new: do both end the same?"""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        whole, weights = _train([make()], one)
        with contextlib.suppress(_Interruption):
            _train([make(), _Interrupt()], two)
        result: dict[str, Any] = {"name": f"resume: {name}", "uninterrupted_sparsity": whole}
        try:
            resumed, again = _train([make()], two, resume=True)
        except Exception as error:  # what a user of the peer sees is the result
            said = " ".join(str(error).split())[:200]
            return {**result, "raises": f"{type(error).__name__}: {said}", "equal": False}
    equal = weights.shape == again.shape and bool(torch.equal(weights, again))
    return {**result, "resumed_sparsity": resumed, "equal": equal}


def resume() -> list[dict[str, Any]]:
    """Three ways to prune to about 80 %, each interrupted half-way."""
    from effdl.callbacks import PruningCallback

    share = 1 - 0.2 ** (1 / EPOCHS)  # of what is left, after every epoch

    def theirs(permanent: bool) -> Callable[[], Any]:
        return lambda: ModelPruning(
            "l1_unstructured", amount=share, use_lottery_ticket_hypothesis=False, make_pruning_permanent=permanent
        )

    return [
        resume_row("PruningCallback", lambda: PruningCallback(0.8, start=0, stop=1.0, every="1ep")),
        resume_row("ModelPruning", theirs(permanent=True)),
        resume_row("ModelPruning(make_pruning_permanent=False)", theirs(permanent=False)),
    ]


def measure(pairs: int, batch: int) -> list[dict[str, Any]]:
    """All rows."""
    rows = [*gradcam(pairs, batch), *pruning_step(pairs, batch), *resume()]
    return [*rows, *relevance(pairs, batch), *slicing(pairs), *int8(pairs, batch), *low_rank(pairs, batch)]


def table(results: list[dict[str, Any]]) -> list[list[str]]:
    """For printing: a header and a row per result."""
    lines = [["what", "median", "minimum", "cpu", "result"]]
    for r in results:
        ratio = [f"{r[key]:.3f}" if key in r else "" for key in ("median", "minimum", "cpu")]
        lines.append([r["name"], *ratio, _said(r)])
    return lines


def _said(r: dict[str, Any]) -> str:
    if "correlation" in r:
        return f"correlation {r['correlation']:.4f} (lowest {r['lowest_correlation']:.4f})"
    if "ours_difference" in r:
        return (
            f"parameters {r['ours_parameters']:,} / {r['theirs_parameters']:,}; outputs differ by "
            f"{r['ours_difference']:.1e} / {r['theirs_difference']:.1e}"
        )
    if "raises" in r:
        return f"raises {r['raises'][:90]}"
    if "resumed_sparsity" in r:
        same = "bit-equal" if r["equal"] else "DIFFERENT"
        return f"sparsity {r['uninterrupted_sparsity']:.3f}, resumed {r['resumed_sparsity']:.3f}: {same}"
    told = f"{r['step_ms']:.1f} ms, against {r['bare_ms']:.1f} ms" if "step_ms" in r else ""
    told += f"; outputs differ by {r['difference']:.1e} of the largest" if "difference" in r else ""
    return told + (f"; parameters {r['parameters']:.2f}" if "parameters" in r else "")
