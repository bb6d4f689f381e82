"""C7: the page of combinations is what really happens."""

from __future__ import annotations

from tests.contract.combinations import page
from tests.support import ROOT


def test_c07_the_page_of_combinations_is_current():
    assert (ROOT / "docs" / "combinations.md").read_text(encoding="utf-8") == page()
