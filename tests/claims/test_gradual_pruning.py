"""gradual-pruning, claims 7-9, on digits, CIFAR-10 and tiny Shakespeare."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn

from effdl.callbacks import PruningCallback
from effdl.compression.gradual_pruning import magnitude_masks
from effdl.core.select import select_weights
from tests.claims.shuffled import Shuffled
from tests.support import load_npz, real_data

pytestmark = pytest.mark.slow
SEEDS = (0, 1, 2)


class Plain(LightningModule):
    """Cross-entropy with Adam; one-cycle when ``steps`` is given."""

    def __init__(self, network, rate=1e-3, steps=None):
        super().__init__()
        self.network, self.rate, self.steps = network, rate, steps

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.network(x).flatten(0, -2), y.flatten())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), self.rate)
        if self.steps is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(module, data, epochs, callbacks=(), **kwargs):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **quiet, **kwargs).fit(module, data)
    return module.eval()


def mlp(*widths):
    layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


@torch.no_grad()
def accuracy(module, x, y):
    return 100 * (module.network(x).argmax(-1) == y).float().mean().item()


def table(name, rows):
    for label, values in rows.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name} | {label} | {statistics.mean(values):.2f} ± {spread:.2f} | {[round(v, 2) for v in values]}")


@pytest.mark.parametrize(("inputs", "seeds"), [("standardised", SEEDS), ("in [0, 1]", range(8))])
def test_claim_07_gradual_beats_one_shot_with_finetuning_at_95_percent(inputs, seeds):
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32), torch.tensor(digits.target)
    x = x / 16 if inputs == "in [0, 1]" else (x - x.mean(0)) / (x.std(0) + 1e-6)
    rows = {"dense": [], "one-shot": [], "one-shot + finetune": [], "gradual": []}
    for seed in seeds:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        train, test = order[:1297], order[1297:]
        torch.manual_seed(seed)
        dense = fit(Plain(mlp(64, 128, 128, 10)), Shuffled(x[train], y[train], 60, seed), 20)
        rows["dense"].append(accuracy(dense, x[test], y[test]))
        state = {k: v.clone() for k, v in dense.state_dict().items()}

        one_shot = Plain(mlp(64, 128, 128, 10))
        one_shot.load_state_dict(state)
        weights = {w.name: w for w in select_weights(one_shot)}
        for name, mask in magnitude_masks(list(weights.values()), 0.95).items():
            weights[name].data.mul_(mask)
        rows["one-shot"].append(accuracy(one_shot.eval(), x[test], y[test]))

        ramps = {"one-shot + finetune": (0, 1), "gradual": (0.75, 10)}
        for label, (stop, every) in ramps.items():
            module = Plain(mlp(64, 128, 128, 10))
            module.load_state_dict(state)
            pruning = PruningCallback(0.95, start=0, stop=stop, every=every)
            fit(module, Shuffled(x[train], y[train], 60, seed), 15, [pruning])
            assert pruning.report()["sparsity"] == pytest.approx(0.95, abs=1e-3)
            rows[label].append(accuracy(module, x[test], y[test]))
    table(f"digits {inputs}, 95 %", rows)
    means = {k: statistics.mean(v) for k, v in rows.items()}
    assert means["gradual"] >= means["one-shot + finetune"] + 4
    assert means["one-shot"] < 30


def test_claim_08_large_sparse_beats_small_dense_on_cifar10():
    data = load_npz("cifar10.npz")
    as_float = lambda v: torch.tensor(v).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)  # noqa: E731
    x, y = as_float(data["x_train"]), torch.tensor(data["y_train"].astype(np.int64))
    x_test, y_test = as_float(data["x_test"]), torch.tensor(data["y_test"].astype(np.int64))
    epochs, steps = 8, 800
    rows = {"dense 256": [], "dense 28 (same nnz)": [], "90 % sparse 256": []}
    for seed in SEEDS:
        for label, width in (("dense 28 (same nnz)", 28), ("90 % sparse 256", 256), ("dense 256", 256)):
            if label == "dense 256" and seed != SEEDS[0]:
                continue
            torch.manual_seed(seed)
            module = Plain(mlp(3072, width, width, 10), 2e-3, steps)
            ramp = PruningCallback(0.9, start=0.17, stop=0.62, every=10)
            fit(module, Shuffled(x, y, 100, seed, flip=True), epochs, [ramp] if "sparse" in label else [])
            rows[label].append(accuracy(module, x_test, y_test))
    table("CIFAR-10 MLP", rows)
    gap = statistics.mean(rows["90 % sparse 256"]) - statistics.mean(rows["dense 28 (same nnz)"])
    assert gap >= 2


class CharLSTM(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.embedding = nn.Embedding(65, 64)
        self.lstm = nn.LSTM(64, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 65)

    def forward(self, x):
        return self.head(self.lstm(self.embedding(x))[0])


class Windows:
    """Random windows of a text; x and the next characters."""

    def __init__(self, text, steps, seed):
        self.text, self.steps, self.generator = text, steps, torch.Generator().manual_seed(seed)

    def __len__(self):
        return self.steps

    def __iter__(self):
        for _ in range(self.steps):
            start = torch.randint(len(self.text) - 65, (32, 1), generator=self.generator)
            window = self.text[start + torch.arange(65)]
            yield window[:, :-1], window[:, 1:]


def test_claim_09_sparse_lstm_beats_small_dense_lstm_on_characters():
    import datasets

    path = str(real_data("tinyshakespeare.parquet"))
    text = datasets.load_dataset("parquet", data_files=path, split="train")[0]["text"]
    symbols = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([symbols[c] for c in text])
    train, test = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]
    held_out = test[: len(test) // 65 * 65].view(-1, 65)
    perplexity = {}
    for label, hidden, sparsity in (("dense 192", 192, None), ("80 % sparse 192", 192, 0.8), ("dense 72", 72, None)):
        torch.manual_seed(0)
        module = Plain(CharLSTM(hidden), 4e-3, 700)
        ramp = [PruningCallback(sparsity, start=0.2, stop=0.6, every=10, targets="lstm")] if sparsity else []
        fit(module, Windows(train, 700, 0), 1, ramp, gradient_clip_val=1.0)
        with torch.no_grad():
            logits = module.network(held_out[:, :-1])
            perplexity[label] = math.exp(F.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten()))
    table("tiny Shakespeare, test perplexity", {k: [v] for k, v in perplexity.items()})
    assert perplexity["80 % sparse 192"] <= 0.97 * perplexity["dense 72"]
