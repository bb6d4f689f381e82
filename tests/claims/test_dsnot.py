"""dsnot, check 7: what the masks cost a small language model; and that time grows with the number of weights."""

from __future__ import annotations

import copy
import math
import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from effdl.compression.dsnot import Settings, sparsify
from tests.support import real_data

pytestmark = pytest.mark.slow
SEEDS = (0, 1, 2)
LENGTH = 64
CHARACTERS = {"train": 120_000, "test": 20_000}


def text(name):
    """Characters of the train and test part, and the vocabulary's size."""
    import datasets

    rows = datasets.load_dataset("parquet", data_files=str(real_data(name)), split="train")["text"]
    characters = "\n".join(rows)[: sum(CHARACTERS.values())]
    symbols = {c: i for i, c in enumerate(sorted(set(characters)))}
    ids = torch.tensor([symbols[c] for c in characters])
    return ids[: CHARACTERS["train"]], ids[CHARACTERS["train"] :], len(symbols)


def llama(vocabulary, width=96, layers=3, length=LENGTH):
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=length, bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip


def windows(ids, count, g, length=LENGTH):
    return ids[torch.randint(len(ids) - length, (count, 1), generator=g) + torch.arange(length)]


def trained(ids, vocabulary, seed, steps=700):
    torch.manual_seed(seed)
    model, g = llama(vocabulary), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        batch = windows(ids, 32, g)
        logits = model(batch, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.no_grad()
def perplexity(model, ids):
    batch = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    logits = model(batch, use_cache=False).logits
    return math.exp(F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()))


KINDS = {
    "wanda": {"refine": False},
    "wanda + DSnoT": {},
    "magnitude, rows": {"init": "magnitude", "skip": "*"},  # everything skipped: the initial mask of each row
    "magnitude, rows + DSnoT": {"init": "magnitude"},
    "magnitude, matrix": {"init": "magnitude", "refine": False},
    "sparsegpt": {"init": "sparsegpt", "refine": False},
    "sparsegpt mask + DSnoT": {"init": "sparsegpt"},
    "release flags, from wanda": {"same_sign": False},
    "release flags, 3 cycles": {"same_sign": False, "cycles": 3},
}


def measured(name, seed):
    """``{kind: {sparsity: perplexity}}`` of one dense model."""
    train, test, vocabulary = text(name)
    dense = trained(train, vocabulary, seed)
    calibration = windows(train, 64, torch.Generator().manual_seed(100 + seed)).split(8)
    found = {"dense": {s: perplexity(dense, test) for s in (0.5, 0.6, 0.7)}}
    for kind, options in KINDS.items():
        found[kind] = {}
        for sparsity in (0.5, 0.6, 0.7):
            model = copy.deepcopy(dense)
            sparsify(model, [{"input_ids": ids} for ids in calibration], Settings(sparsity, **options))
            found[kind][sparsity] = perplexity(model, test)
    return found


@pytest.mark.parametrize("name", ["wikitext2_valid.parquet", "tinyshakespeare.parquet"])
def test_must_07_perplexity_of_a_small_language_model(name):
    start = time.perf_counter()
    runs = [measured(name, seed) for seed in SEEDS]
    for kind in runs[0]:
        cells = []
        for s in (0.5, 0.6, 0.7):
            values = [run[kind][s] for run in runs]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}")
        print(f"{name} | {kind} | {' | '.join(cells)}")
    print(f"{time.perf_counter() - start:.0f} s for {len(SEEDS)} seeds")
    for seed, run in zip(SEEDS, runs):
        ratios = {s: run["wanda + DSnoT"][s] / run["wanda"][s] for s in (0.5, 0.6, 0.7)}
        rows = {s: run["magnitude, rows + DSnoT"][s] / run["magnitude, rows"][s] for s in (0.5, 0.6, 0.7)}
        print(seed, "DSnoT / wanda", ratios, "DSnoT / magnitude rows", rows)
        others = (run[k][0.7] for k in run if k not in ("dense", "sparsegpt"))
        assert run["sparsegpt"][0.7] < min(others)
    for s in (0.5, 0.6, 0.7):
        for kind in ("wanda", "magnitude, rows"):
            assert mean(runs, f"{kind} + DSnoT", s) <= 1.002 * mean(runs, kind, s), (kind, s)
    assert mean(runs, "wanda + DSnoT", 0.7) <= 0.98 * mean(runs, "wanda", 0.7)


def mean(runs, kind, sparsity):
    return statistics.mean(run[kind][sparsity] for run in runs)


def test_time_grows_linearly_with_the_number_of_weights():
    g = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 256, (8, 128), generator=g)} for _ in range(4)]
    rows = {}
    for init, refine in (("wanda", False), ("wanda", True), ("sparsegpt", False)):
        for width, layers in ((128, 2), (128, 4), (128, 8), (256, 4), (512, 4)):
            model = llama(256, width, layers, 128)
            done = min((sparsify(copy.deepcopy(model), batches, Settings(0.5, init=init, refine=refine))
                        for _ in range(2)), key=lambda d: d.seconds)  # fmt: skip
            millions = sum(m.numel() for m in done.masks.values()) / 1e6
            masks = sum(row["seconds"] for row in done.layers.values())
            rows[init, refine, width, layers] = done.seconds_per_million
            kind = f"{init}{' + DSnoT' if refine else ''}"
            print(f"{kind} | {width} | {layers} | {millions:.2f} M | {done.seconds:.2f} s | {masks:.2f} s | "
                  f"{done.seconds_per_million:.2f} s/M")  # fmt: skip
    for init, refine in (("wanda", False), ("wanda", True), ("sparsegpt", False)):
        deep = [rows[init, refine, 128, layers] for layers in (2, 4, 8)]
        assert (
            deep[-1] <= 1.5 * deep[0]
        )  # four times the layers: at most four times the time, measured on a busy machine
        assert rows[init, refine, 512, 4] <= 1.5 * rows[init, refine, 128, 4]  # sixteen times the weights of a layer
