"""A change that was announced or expected leads to no rollback, and is announced again after one to before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import announced
import pytest
from announced import AT, TERM, Announcer, Model, Record, train
from fits import assert_same, everything, fit
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

import stabletrain as st
from stabletrain.core.outcome import Outcome
from stabletrain_plugins.rollback.incidents import IncidentTracker
from stabletrain_plugins.rollback.test_rollback import QUICK, Requests, interventions


def train_sized(model: Model, folder: Path, *callbacks: Any, steps: int = AT + 30) -> Any:
    """On data that can be rewound."""
    data: Any = DataLoader(range(steps), batch_size=None)  # type: ignore[arg-type]
    return fit(model, data, *callbacks, default_root_dir=folder)


@pytest.mark.parametrize("how", ["silent", "announced", "expected"])
def test_the_default_stack_and_a_loss_four_times_as_large(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a second loss term that was announced is rolled back, skipped or clipped all the same."""
    monkeypatch.setattr(announced, "AT", 200)
    record = Record()
    callbacks = [each for each in st.default_callbacks() if not isinstance(each, st.Rollback)]
    rollback = st.Rollback(expect=[200] if how == "expected" else None)
    model = Model("training_step" if how == "announced" else None)
    train_sized(model, tmp_path, *callbacks, rollback, record, steps=330)
    assert (rollback.rollbacks > 0) == (how == "silent")
    if how != "silent":
        assert record.kinds("not_learning") == ["announced"], "the loss is at its minimum from the start"
        at = record.outcomes[200]
        assert at.applied
        assert at.applied_norm == at.grad_norm


@pytest.mark.parametrize("mode", ["exact", "device"])
@pytest.mark.parametrize("where", ["training_step", "callback before", "callback after", "expect"])
def test_a_rollback_to_before_the_change_passes_it_again(where: str, mode: Any, tmp_path: Path) -> None:
    """Bugs: the steps after the restored snapshot judged by its baselines; a restore that is not exact around it."""

    def run(folder: Path, record: Record, *requests: int) -> Any:
        before, after = ([Announcer()] if where == f"callback {place}" else [] for place in ("before", "after"))
        quick = {**QUICK, "drop": "none", "expect": [AT] if where == "expect" else None}
        plugins = [st.SkipOutliers.olmo(window=32, keep_outliers=False), st.Rollback(**quick), st.Guard(mode=mode)]
        model = Model("training_step" if where == "training_step" else None)
        return train_sized(model, folder, *before, Requests().at(*requests), *plugins, *after, record)

    once, twice = Record(), Record()
    expected = run(tmp_path / "once", once)
    mine = run(tmp_path / "twice", twice, AT + 2)
    (made,) = interventions(tmp_path / "twice")
    assert made["to"] < AT
    assert once.kinds() == ["announced"]
    assert twice.kinds() == ["announced", "rollback", "announced"]
    assert_same(everything(mine), everything(expected))


def test_a_snapshot_between_the_announcement_and_its_step(tmp_path: Path) -> None:
    """Bug: a rollback to just before the change, which had been announced by then and is not again."""
    assert AT % 6 == 0
    quick = {**QUICK, "drop": "none", "every": 6}
    record, rollback = Record(), st.Rollback(**quick)
    outliers = st.SkipOutliers.olmo(window=32, keep_outliers=False)
    train_sized(Model(), tmp_path, Announcer(), Requests().at(AT + 5), outliers, rollback, record)
    (made,) = interventions(tmp_path)
    assert made["to"] == AT
    assert record.kinds() == ["announced", "rollback", "announced"]
    first, back, again = record.events
    assert (first.step, again.step, again.value, again.reason) == (AT, back.step + 1, AT, TERM)


class AtEachAttempt(Callback):
    """Announces the change at each attempt of step `AT`, counted in applied steps."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == AT:
            st.announce(trainer, TERM)


@pytest.mark.parametrize("mode", ["exact", "device"])
@pytest.mark.parametrize("how", ["expect", "announce"])
def test_an_incident_at_the_change_stays_open(how: str, mode: Any, tmp_path: Path) -> None:
    """Bugs: each attempt of its step closes the incident, and the rollback excludes the last of its bad batches only;
    or the change is forgotten once the rollback has gone back to before it."""

    def run(folder: Path, *announces: Callback, expect: list[int] | None = None) -> Record:
        record, rollback = Record(), st.Rollback(**{**QUICK, "patience": 12}, expect=expect)
        stack = [st.SkipNonFinite(max_in_a_row=10), rollback, st.Guard(mode=mode)]
        model = Model(nan=range(AT, AT + 10), factor=1.0)
        train_sized(model, folder, *announces, *stack, record, steps=AT + 40)
        return record

    plain = run(tmp_path / "plain")
    announces = [AtEachAttempt()] if how == "announce" else []
    record = run(tmp_path / "changed", *announces, expect=[AT] if how == "expect" else None)
    (expected,), (made,) = interventions(tmp_path / "plain"), interventions(tmp_path / "changed")
    assert len(expected["excluded"]) >= 10
    for key in ("step", "applied", "excluded"):
        assert made[key] == expected[key]
    assert made["applied"][1] < AT
    assert plain.kinds("nonfinite") == ["rollback"]
    assert record.kinds("nonfinite") == ["announced", "rollback", "announced"]
    first, _, again = (event for event in record.events if event.kind != "nonfinite")
    assert first.step == AT
    assert again.step == made["step"] + AT - made["applied"][1]


@pytest.mark.parametrize("after", [AT - 1, AT, AT + 1, AT + 20])
@pytest.mark.parametrize("how", ["callback", "expect"])
def test_resumed_equals_uninterrupted(how: str, after: int, tmp_path: Path) -> None:
    """Bug: the history of the weights' speed, forgotten in one run and not in the other."""

    def members(record: Record) -> list[Any]:
        rollback = st.Rollback(**{**QUICK, "expect": [AT] if how == "expect" else None})
        return [*([Announcer()] if how == "callback" else []), rollback, record]

    whole, resumed = members(Record(after, tmp_path / "at.ckpt")), members(Record())
    expected = train(Model(), *whole, steps=AT + 40)
    path = tmp_path / "at.ckpt"
    mine = train(Model(), *resumed, start=after + 1, steps=AT + 40, ckpt_path=path)
    assert_same(everything(mine), everything(expected))
    assert repr(resumed[-2].state_dict()) == repr(whole[-2].state_dict())


def test_an_announcement_closes_the_incident_and_forgets_the_speeds() -> None:
    """Bugs: batches of before the change excluded with a later incident; new weights too fast for the old ones."""
    tracker = IncidentTracker(4)
    mark: Any = "mark"
    tracker.on_step_end(0, 0, mark)
    tracker.on_outcome(False, Outcome(0, 1.0, 1.0, 1.0, 1.0), 0)
    assert tracker.current is not None
    tracker.close()
    assert tracker.current is None
    assert tracker.oldest_mark == mark
    rollback = st.Rollback(**QUICK)
    found: dict[int, bool] = {}

    class Probe(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: int, batch_idx: int) -> None:
            found[batch] = rollback._incidents.current is not None

    nan = range(AT - 2, AT)
    train(Model("training_step", nan=nan), rollback, st.SkipNonFinite(), Probe(), steps=AT + 9)
    assert [found[batch] for batch in range(AT - 3, AT + 2)] == [False, True, True, False, False]
    assert len(rollback.state_dict()["weights"]["speeds"]) == 2
