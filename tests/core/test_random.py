"""Streams of a method's own, and the global ones put back."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from effdl.core.random import generator, preserved_rng, rng_state, set_rng_state


def draws():
    """One number of each global stream; the second gauss is the one that NumPy and Python keep for later."""
    return [float(torch.rand(1)), float(np.random.rand()), random.random(), np.random.randn(), random.gauss(0, 1)]


def test_a_generator_gives_the_same_numbers_and_leaves_the_global_stream():
    before = torch.get_rng_state()
    assert torch.equal(torch.rand(3, generator=generator(7)), torch.rand(3, generator=generator(7)))
    assert not torch.equal(torch.rand(3, generator=generator(7)), torch.rand(3, generator=generator(8)))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_state_travels_through_a_weights_only_checkpoint(tmp_path):
    draws()  # so that a spare gauss is kept
    torch.save(rng_state(), tmp_path / "state.pt")
    first = [draws() for _ in range(3)]
    set_rng_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draws() for _ in range(3)] == first


def test_a_state_with_other_cuda_devices_still_sets_the_rest():
    state = rng_state()
    first = draws()
    set_rng_state({**state, "cuda": [torch.zeros(16, dtype=torch.uint8)] * 99})
    assert draws() == first


def test_what_is_drawn_inside_is_as_if_it_had_not_been():
    state = rng_state()
    want = draws()
    set_rng_state(state)
    with preserved_rng():
        draws()
    with pytest.raises(ZeroDivisionError), preserved_rng():
        random.seed(draws() and 1 / 0)
    assert draws() == want
