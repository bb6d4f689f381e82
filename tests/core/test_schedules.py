"""Points in training."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from effdl.core.errors import ConfigurationError
from effdl.core.schedules import check_point, resolve_point, steps_per_epoch


def trainer(total=100, batches=40, accumulate=4, epochs=10):
    return SimpleNamespace(estimated_stepping_batches=total, num_training_batches=batches,
                           accumulate_grad_batches=accumulate, max_epochs=epochs)  # fmt: skip


@pytest.mark.parametrize(
    ("point", "steps"), [(0, 0), (7, 7), (0.5, 50), (1.0, 100), (0.0, 0), ("3ep", 30), ("0.5ep", 5), ("2 ep", 20)]
)
def test_resolve(point, steps):
    check_point("start", point)
    assert resolve_point("start", point, trainer()) == steps


def test_an_interval_is_at_least_one_step():
    assert resolve_point("every", 0.001, trainer(), interval=True) == 1


def test_an_epoch_with_an_incomplete_accumulation_counts_its_last_step():
    assert steps_per_epoch(trainer(batches=41)) == 11


@pytest.mark.parametrize("bad", [-1, 1.5, -0.1, "3", "ep", "-1ep", True, None, float("nan")])
def test_illegal_points_name_the_argument(bad):
    with pytest.raises(ConfigurationError, match="start="):
        check_point("start", bad)


@pytest.mark.parametrize("bad", [0, 0.0, "0ep"])
def test_an_interval_of_nothing_is_illegal(bad):
    with pytest.raises(ConfigurationError, match="every="):
        check_point("every", bad, positive=True)


@pytest.mark.parametrize("point", [0.5, "3ep"])
def test_a_run_of_unknown_length_has_no_fractions(point):
    endless = trainer(total=math.inf, batches=math.inf, epochs=-1)
    with pytest.raises(ConfigurationError, match="stop="):
        resolve_point("stop", point, endless)
    assert resolve_point("stop", 12, endless) == 12
