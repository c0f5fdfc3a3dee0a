"""Which batches on the tape are excluded."""

from __future__ import annotations

from typing import Any

import pytest

from stabletrain.runtime.data.tape import TapedBatch
from stabletrain_plugins.rollback import exclusion
from stabletrain_plugins.rollback.decision import Exclusion
from stabletrain_plugins.rollback.exclusion import batches_to_exclude, last_windows
from stabletrain_plugins.rollback.incidents import Incident, IncidentTracker

TAPE = [TapedBatch(None, epoch, position) for epoch in (0, 1) for position in range(7)]
"""Two epochs of 7 micro-batches: with windows of 4, each ends with one of 3."""


class Loader:
    """Marks are indices on the tape."""

    def __init__(self, loaders: int = 1) -> None:
        self.loaders = [None] * loaders

    def batches_since(self, mark: Any) -> dict[int, TapedBatch]:
        return dict(enumerate(TAPE[mark:]))


def excluded(given: Exclusion, incident: int | None, mark: int | None, window: int = 1, loaders: int = 1) -> list[int]:
    incidents = IncidentTracker(4)
    incidents.current = None if incident is None else Incident(incident, incident, incident)  # type: ignore[arg-type]
    loader: Any = Loader(loaders)
    batches = batches_to_exclude(given, incidents, loader, mark, window)  # type: ignore[arg-type]
    return [TAPE.index(each) for each in batches]


@pytest.mark.parametrize(
    ("given", "incident", "mark", "expected"),
    [
        (Exclusion("offending"), 11, 2, [11, 12, 13]),
        (Exclusion("offending"), None, 2, []),
        (Exclusion("offending", at_least=2), None, 2, [12, 13]),
        (Exclusion("offending", at_least=2), 11, 2, [11, 12, 13]),
        (Exclusion("offending", at_least=5), 11, 2, [9, 10, 11, 12, 13]),
        (Exclusion("offending", at_least=99), 11, 10, [10, 11, 12, 13]),
        (Exclusion("offending"), 3, 12, [12, 13]),
        (Exclusion("offending", at_least=5), 12, None, [12, 13]),  # a checkpoint: no data position is restored
        (Exclusion("since_snapshot"), 12, 9, [9, 10, 11, 12, 13]),
        (Exclusion("none"), 11, 2, []),
        (Exclusion("none"), 11, None, []),
    ],
)
def test_batches_to_exclude(given: Exclusion, incident: int | None, mark: int | None, expected: list[int]) -> None:
    """Bug: a batch of the incident is trained on again, or others are lost with it."""
    assert excluded(given, incident, mark) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, []), (1, [11, 12, 13]), (3, [11, 12, 13]), (4, [7, 8, 9, 10, 11, 12, 13]), (8, list(range(4, 14)))],
)
def test_whole_accumulation_windows_are_excluded(count: int, expected: list[int]) -> None:
    """Bug: half a window is left, so that all later windows are shifted; a window that spans two epochs."""
    assert [TAPE.index(each) for each in last_windows(TAPE, count, window=4)] == expected


def test_several_train_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a rollback that ends in an error of the loader, which can exclude nothing then."""
    warnings: list[str] = []
    monkeypatch.setattr(exclusion.logger, "warning", lambda line, *values: warnings.append(line % values))
    assert excluded(Exclusion("offending"), 11, 2, loaders=2) == []
    assert excluded(Exclusion("none"), 11, 2, loaders=2) == []
    (warning,) = warnings
    assert "with 2 train loaders" in warning
