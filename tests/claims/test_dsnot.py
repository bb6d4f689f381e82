"""dsnot, check 7: what the masks cost a small language model; and that time grows with the number of weights."""

from __future__ import annotations

import copy
import math
import statistics
import time
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from effdl.compression.dsnot import Settings, sparsify
from tests.support import real_data

pytestmark = pytest.mark.slow
SEEDS = {"pydoc": (0, 1, 2), "wikitext2_valid.parquet": (0,)}
SPARSITIES = (0.5, 0.6, 0.7)
LENGTH = 64
CHARACTERS = {"train": 120_000, "test": 20_000}


def text(name):
    """Characters of the train and test part, and the vocabulary's size; ``"pydoc"``: topics of Python's ``help()``."""
    from pydoc_data.topics import topics

    import datasets

    if name == "pydoc":
        rows = [topics[topic] for topic in sorted(topics)]
    else:
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
    "release flags, from wanda": {"same_sign": False},
}


def measured(name, seed):
    """``{kind: {sparsity: perplexity}}`` of one dense model."""
    train, test, vocabulary = text(name)
    dense = trained(train, vocabulary, seed)
    calibration = windows(train, 64, torch.Generator().manual_seed(100 + seed)).split(8)
    found = {"dense": {s: perplexity(dense, test) for s in SPARSITIES}}
    for kind, options in KINDS.items():
        found[kind] = {}
        for sparsity in SPARSITIES:
            model = copy.deepcopy(dense)
            sparsify(model, [{"input_ids": ids} for ids in calibration], Settings(sparsity, **options))
            found[kind][sparsity] = perplexity(model, test)
    return found


@lru_cache
def all_runs(name):
    start, runs = time.perf_counter(), []
    for seed in SEEDS[name]:
        runs.append(measured(name, seed))
        for kind, values in runs[-1].items():
            print(f"{name} | seed {seed} | {kind} | {values}", flush=True)
    for kind in runs[0]:
        columns = [[run[kind][s] for run in runs] for s in SPARSITIES]
        cells = [f"{statistics.mean(c):.3f} ± {statistics.stdev(c) if len(c) > 1 else 0:.3f}" for c in columns]
        print(f"{name} | {kind} | {' | '.join(cells)}")
    print(f"{time.perf_counter() - start:.0f} s for {len(runs)} seeds")
    return runs


def ratio(runs, ours, other, sparsity):
    """Of the mean perplexities."""
    mean = {kind: statistics.mean(run[kind][sparsity] for run in runs) for kind in (ours, other)}
    return mean[ours] / mean[other]


@pytest.mark.parametrize("name", SEEDS)
def test_must_07_sparsegpt_is_best_in_a_small_language_model(name):
    for run in all_runs(name):
        assert run["sparsegpt"][0.7] < min(run[k][0.7] for k in run if k not in ("dense", "sparsegpt"))
        for s in SPARSITIES:  # eps overshoots without the sign test
            assert run["release flags, from wanda"][s] > run["wanda"][s]


@pytest.mark.parametrize("name", SEEDS)
def test_must_07_rewiring_does_not_raise_perplexity(name):
    runs = all_runs(name)
    for initial in ("wanda", "magnitude, rows"):
        ratios = {s: ratio(runs, f"{initial} + DSnoT", initial, s) for s in SPARSITIES}
        print(f"{name}: {initial} + DSnoT against {initial}", ratios)
        assert max(share for s, share in ratios.items() if initial != "wanda" or s < 0.7) <= 1.002


@pytest.mark.xfail(reason="from Wanda at 70 % the sign depends on how the network was trained: docs/results.md")
@pytest.mark.parametrize("name", SEEDS)
def test_must_07_rewiring_wanda_at_70_percent_gains_two_percent(name):
    assert ratio(all_runs(name), "wanda + DSnoT", "wanda", 0.7) <= 0.98


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
