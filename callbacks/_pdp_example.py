"""pdp: what the contract suite runs."""

from __future__ import annotations

from effdl.core.contract import ContractExample


def example() -> ContractExample:
    """Arguments of PDPCallback, and for each a value that it refuses."""
    return ContractExample(
        kwargs={"sparsity": 0.5, "temperature": "auto", "start": 2, "stop": 12, "every": 2},
        bad={
            "sparsity": [1.0, -0.1, float("nan"), None],
            "temperature": [0, -1e-4, float("nan"), float("inf"), "warm"],
            "start": [-1, 1.5, "3 parsecs"],
            "stop": [-1, 1.5, 1],
            "every": [0, -3],
            "freeze": [-1, 1.5, 1],
            "granularity": ["2:2", "4x1", "blocks"],
            "scope": "everywhere",
            "eval_hard": "yes",
            "compact": ["yes", True],
            "targets": ["no.such.layer", 3],
            "exclude": "no.such.layer",
        },
    )
