"""What ranks have to agree on, seen from one of them; `test_distributed_sharing` asks two."""

from __future__ import annotations

from typing import Any

import pytest

from shampoo_core.exchange import agreement


@pytest.mark.parametrize("first_has_it", [True, False])
def test_a_fact_that_one_rank_alone_has_is_named(
    first_has_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler made on one rank leaves an entry in its groups, say."""
    everyone: list[Any] = [{"lr": "1", "initial_lr": "2"}, {"lr": "1"}]
    if not first_has_it:
        everyone.reverse()

    def from_all(value: Any, group: Any) -> list[Any]:
        return everyone if isinstance(value, dict) else ["a digest", "another"]

    monkeypatch.setattr(agreement, "_from_all", from_all)
    mine, theirs = ("2", "absent") if first_has_it else ("absent", "2")
    expected = f"initial_lr is {mine} on rank 0 and {theirs} on rank 1"
    with pytest.raises(ValueError, match=expected):
        agreement.check_agreement("test", everyone[0], None)  # type: ignore[arg-type]
