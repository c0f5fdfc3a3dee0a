"""A new level of the loss is accepted in a training, after one rollback; and bad batches are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from announced import Record
from fits import assert_same, everything
from lightning.pytorch.callbacks import Checkpoint
from new_level import AT, QUICK, STEPS, Model, SaveAt, decisions, rules, train

import stabletrain as st
from stabletrain.errors import UserError
from stabletrain.runtime.stop import TrainingStopped
from stabletrain_plugins.rollback.test_rollback import Requests, assert_same_weights, interventions
from stabletrain_plugins.rollback.test_rollback import train as train_regression

ROLLED_BACK, ACCEPTED = AT + 6, AT + 28
"""Attempted steps when the change is rolled back (to step 56), and when it is accepted, 18 steps after it came
again."""
CHANGE = [
    (ROLLED_BACK - 1, "rewarm"),
    (ROLLED_BACK - 1, "rollback"),
    (ACCEPTED - 1, "rewarm"),
    (ACCEPTED - 1, "accept"),
]


def accepted_levels(folder: Path) -> list[dict[str, Any]]:
    return [each for each in interventions(folder) if each["action"] == "accept"]


@pytest.mark.parametrize("baselines", ["restore", "reset"])
def test_a_change_of_the_level_is_accepted_once(tmp_path: Path, baselines: str) -> None:
    """Bugs: rollback after rollback, and a stop; later steps dropped or flagged by the old baselines; batches lost; the
    same level again in the next epoch taken for another incident.

    Without baselines after the rollback, the level is learned as any other.
    """
    stack, rollback = rules(baselines=baselines)
    model = Model()
    epochs = 2 if baselines == "restore" else 1
    trainer, record = train(tmp_path, model, *stack, max_epochs=epochs)
    assert decisions(record) == (CHANGE if baselines == "restore" else CHANGE[:2])
    made = interventions(tmp_path)[0]
    again = {tuple(each) for each in made["excluded"]} if baselines == "reset" else set()
    assert rollback.rollbacks == 1
    assert rollback.excluded == again
    assert rollback._incidents.current is None
    assert not any(each.skipped for each in record.outcomes if each.step >= ACCEPTED)
    assert [event for event in record.events if event.step >= ACCEPTED] == []
    if baselines == "restore":
        assert model.seen[-STEPS:] == list(range(STEPS)), "batches that were excluded are given back"
        assert trainer.global_step == 2 * STEPS - 6 - 17, "6 batches were excluded, 17 were dropped while it waited"


def test_the_rate_climbs_again(tmp_path: Path) -> None:
    """Bug: the first steps at a level that was taken for meant, and is not, have the full learning rate.

    After a rollback the rate climbs for 10 steps here, after an accepted level half as long.
    """
    model = Model()
    stack, _ = rules()
    train(tmp_path, model, *stack, max_epochs=1)
    applied = AT + 1 - 56 + AT + 1  # steps that were applied before the level was accepted
    assert model.rates[applied : applied + 6] == pytest.approx([2e-4 * i for i in range(1, 6)] + [1e-3])


@pytest.mark.parametrize("bad", [range(AT, AT + 6), range(AT, AT + 10), range(AT, AT + 20)], ids=len)
def test_a_burst_of_bad_batches_is_not_accepted(tmp_path: Path, bad: range) -> None:
    """Bug: batches with a wrong loss are trained on again, since they look like a new level."""
    model = Model(lambda batch: 4.0 if batch in bad else 1.0)
    stack, rollback = rules()
    _, record = train(tmp_path, model, *stack)
    kinds = [kind for _, kind in decisions(record)]
    assert kinds[:2] == ["rewarm", "rollback"]
    assert "accept" not in kinds
    assert {("samples", number) for number in range(AT, AT + 6)} <= rollback.excluded
    assert not set(range(AT, AT + 6)) & set(model.seen[-STEPS + len(rollback.excluded) :])


def test_a_rise_that_goes_on_is_accepted_with_its_beginning(tmp_path: Path) -> None:
    """Bug: a weight of a loss term that rises slowly is rolled back once for each factor of two."""
    stack, _ = rules()
    model = Model(lambda batch: 1.0 if batch < AT else 4.0 + 1.5 * max(0, batch - AT - 22))
    _, record = train(tmp_path, model, *stack, max_epochs=1)
    kinds = [kind for _, kind in decisions(record) if kind in ("rollback", "accept", "stop")]
    assert kinds[:3] == ["rollback", "accept", "accept"]
    assert set(kinds[2:]) == {"accept"}


@pytest.mark.parametrize("accept", [None, 18])
def test_never_to_accept_is_the_ladder(tmp_path: Path, accept: int | None) -> None:
    """Bugs: ``accept=None`` has no effect; a level that is accepted counts as a rollback and exhausts the budget."""
    stack, rollback = rules(accept=accept, max_rollbacks=1)
    if accept is None:
        with pytest.raises(TrainingStopped, match="1 rollbacks did not help"):
            train(tmp_path, Model(), *stack)
    else:
        train(tmp_path, Model(), *stack)
    assert rollback.rollbacks == 1


def test_accept_is_at_least_one_step() -> None:
    """Bug: zero, meant as "never", accepts at once."""
    message = r"accept must be >= 1, or null: accept no new level, got 0 \(Rollback\(accept=\.\.\.\)\)"
    with pytest.raises(UserError, match=message):
        st.Rollback(**{**QUICK, "accept": 0})


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_damage_at_the_same_place_is_not_accepted(tmp_path: Path, value: float) -> None:
    """Bug: damaged weights are kept, because they were damaged twice."""
    quick = {**QUICK, "drop": "none", "rewarm": 0}
    damage = {52: value, 53: value, 60: value, 68: value}
    stack = st.SkipOutliers(window=32, min_samples=16, regime_after=6, max_in_a_row=12), st.SkipNonFinite()
    model, _ = train_regression(tmp_path / "b", *stack, st.Rollback(**quick), damage=damage)
    assert len(interventions(tmp_path / "b")) >= 2
    assert accepted_levels(tmp_path / "b") == []
    assert all(weight.isfinite().all() and weight.abs().max() < 100 for weight in model.parameters())


def test_the_same_in_device_mode(tmp_path: Path) -> None:
    """Bug: where outcomes come a step late, other steps are taken for the incident, or the wait never ends.

    Each decision is made one step later, and so one more batch is excluded.
    """
    exact, device = rules(), rules("device")
    models = Model(), Model()
    one, other = (train(tmp_path / str(i), models[i], *each[0]) for i, each in enumerate((exact, device)))
    assert decisions(one[1]) == CHANGE
    assert decisions(other[1]) == [(step + 1 + (step >= ACCEPTED - 1), kind) for step, kind in CHANGE]
    excluded = [each[1]._interventions[0].excluded for each in (exact, device)]
    assert excluded == [tuple(("samples", n) for n in range(AT, AT + count)) for count in (6, 7)]
    assert [each[1]._levels[0].given_back for each in (exact, device)] == excluded
    assert [each[1].excluded for each in (exact, device)] == [set(), set()]
    assert not any(each.skipped for each in other[1].outcomes if each.step >= ACCEPTED + 2)
    assert models[1].seen[-STEPS:] == list(range(STEPS))


@pytest.mark.parametrize("max_in_a_row", [17, 18, 19, 20])
def test_a_request_of_the_step_in_flight_is_answered_too(tmp_path: Path, max_in_a_row: int) -> None:
    """Bug: in device mode, a request by the outcome that came with the acceptance undoes it: the run is rolled back."""
    stack, rollback = rules("device", max_in_a_row=max_in_a_row)
    _, record = train(tmp_path, Model(), *stack)
    assert rollback.rollbacks == 1
    assert [kind for _, kind in decisions(record)] == [kind for _, kind in CHANGE]


# ---- resuming -------------------------------------------------------------------------------------------------------

CUTS = {
    "before the incident": 30,
    "after the rollback": ROLLED_BACK + 1,
    "before it comes again": ROLLED_BACK + 3,
    "at its first step": ROLLED_BACK + 5,
    "in the wait": ROLLED_BACK + 12,
    "at the last step of the wait": ACCEPTED - 1,
    "at the acceptance": ACCEPTED,
    "in the climb": ACCEPTED + 5,
    "in the next epoch": STEPS + 80,
}


@pytest.fixture(scope="module", params=["exact", "device"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted run with a checkpoint at each cut."""
    folder = tmp_path_factory.mktemp(request.param)
    stack, _ = rules(request.param)
    save = SaveAt(folder, *CUTS.values())
    trainer, record = train(folder, Model(), *stack, save)
    return request.param, save, everything(trainer), record, [each.state_dict() for each in stack]


def test_a_checkpoint_saved_with_the_rollback(tmp_path: Path) -> None:
    """Bug: it names the sample of an undone batch as the last one, so that it cannot be resumed."""
    stack, _ = rules()
    save = SaveAt(tmp_path, ROLLED_BACK)
    trainer, _ = train(tmp_path, Model(), *stack, save, max_epochs=1)
    stack, _ = rules()
    resumed, _ = train(tmp_path, Model(), *stack, ckpt_path=save.path(ROLLED_BACK), max_epochs=1)
    assert_same(everything(resumed), everything(trainer))


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_resumed_equals_uninterrupted(whole: Any, cut: int, tmp_path: Path) -> None:
    """Bug: the place, the level, the losses so far or the excluded batches are forgotten, and the resumed run goes back
    again, accepts later, or learns another level."""
    mode, save, expected, events, states = whole
    stack, _ = rules(mode)
    trainer, record = train(tmp_path, Model(), *stack, ckpt_path=save.path(cut))
    assert_same(everything(trainer), expected)
    assert record.events == [event for event in events.events if event.step >= cut]
    assert repr([each.state_dict() for each in stack]) == repr(states)


@pytest.mark.parametrize("cut", range(61, 75))
def test_resumed_in_a_burst_that_is_tolerated(tmp_path: Path, cut: int) -> None:
    """Bug: the heat, or the healthy steps since an outlier, are forgotten: another step is dropped."""
    outliers = {60, 63, 65, 69, 90}
    runs = []
    for folder, options in (("a", {}), ("b", {"ckpt_path": tmp_path / f"{cut}.ckpt"})):
        stack, _ = rules()
        model = Model(lambda batch: 4.0 if batch in outliers else 1.0)
        trainer, record = train(tmp_path / folder, model, *stack, SaveAt(tmp_path, cut), max_epochs=1, **options)
        states = [each.state_dict() for each in stack]
        runs.append((everything(trainer), [each for each in record.events if each.step >= cut], repr(states)))
    assert_same(runs[1][0], runs[0][0])
    assert runs[1][1:] == runs[0][1:]


def test_the_batches_of_a_continued_incident_are_excluded(tmp_path: Path) -> None:
    """Bug: a run that is resumed within an incident rolls back later, and excludes none of its batches."""
    bad = range(AT, AT + 8)
    stack, _ = rules(accept=None)
    model = Model(lambda batch: 4.0 if batch in bad else 1.0)
    save = SaveAt(tmp_path, 40, AT + 3)
    train(tmp_path / "a", model, *stack, save, max_epochs=1, limit_train_batches=AT + 4)
    stack, _ = rules(accept=None)
    (tmp_path / "older").mkdir()
    save.path(40).rename(tmp_path / "older" / "40.ckpt")

    class InFolder(Checkpoint):
        dirpath = str(tmp_path / "older")

    again = Model(model.factor)
    train(tmp_path / "b", again, *stack, InFolder(), ckpt_path=save.path(AT + 3), max_steps=70, max_epochs=-1)
    made = interventions(tmp_path / "b")[0]
    assert made["step"] == AT + 6
    assert made["checkpoint"] == str(tmp_path / "older" / "40.ckpt")
    assert [batch[1] for batch in made["excluded"]] == [AT + 3, AT + 4, AT + 5]


def test_a_restored_checkpoint_does_not_undo_an_acceptance(tmp_path: Path) -> None:
    """Bugs: the batches that were given back are excluded again, or the level is forgotten, because the checkpoint was
    written between the rollback and the acceptance."""
    old = ROLLED_BACK + 3
    (tmp_path / "older").mkdir()

    class InFolder(Checkpoint):
        dirpath = str(tmp_path / "older")

    stack, rollback = rules(max_rollbacks=20)
    model, requests = Model(), Requests().at(*range(116, 124))
    train(tmp_path, model, *stack, requests, SaveAt(tmp_path / "older", old), InFolder())
    level, *again = accepted_levels(tmp_path)
    restored = [each for each in interventions(tmp_path) if each.get("checkpoint")]
    assert restored
    assert [each.step for each in rollback._levels] == [level["step"], *(each["step"] for each in again)]
    assert all(each["given_back"] == [] for each in again), "accepted at once, since it is the same change"
    given_back = {tuple(each) for each in level["given_back"]}
    assert given_back == {("samples", number) for number in range(AT, AT + 6)}
    assert not given_back & rollback.excluded
    assert {number for _, number in given_back} <= set(model.seen[-STEPS + len(rollback.excluded) :])


# ---- the log --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_an_acceptance_is_replayed(tmp_path: Path, mode: str) -> None:
    """Bug: the log lacks something of an accepted level, and the run that repeats it ends in other weights."""
    stack, _ = rules(mode)
    first = Model()
    train(tmp_path / "a", first, *stack, Requests().at(120))
    assert [each["action"] for each in interventions(tmp_path / "a")] == ["rollback", "accept", "rollback"]
    # other snapshots, and no decisions of its own
    stack, _ = rules(mode, every=5, accept=None, replay=str(tmp_path / "a"))
    second = Model()
    train(tmp_path / "b", second, *stack)
    assert_same_weights(first, second)  # type: ignore[arg-type]
    assert first.seen == second.seen
    assert interventions(tmp_path / "b") == interventions(tmp_path / "a")


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_a_repetition_that_healed_is_replayed(tmp_path: Path, mode: str) -> None:
    """Bug: the replay does not know what its rollback was made for, takes the repetition for a new incident, and rolls
    back where the run waited."""

    def run(folder: Path, **changes: Any) -> tuple[Model, st.Rollback, Record]:
        stack, rollback = rules(mode, max_in_a_row=8, **changes)
        model = Model(lambda batch: 4.0 if AT <= batch < AT + 21 else 1.0)
        _, record = train(folder, model, *stack, max_epochs=1)
        return model, rollback, record

    first, waited, record = run(tmp_path / "a")
    second, replayed, again = run(tmp_path / "b", replay=str(tmp_path / "a"))
    assert [kind for _, kind in decisions(record)] == ["rewarm", "rollback"]
    assert waited._accepting.places
    skipped = [each.step for each in record.outcomes if each.skipped and each.step >= ROLLED_BACK + 1]
    assert QUICK["patience"] < len(skipped) < QUICK["accept"], "it came again, and rollbacks were requested"
    assert_same_weights(first, second)  # type: ignore[arg-type]
    assert first.seen == second.seen
    assert again.events == record.events
    assert interventions(tmp_path / "b") == interventions(tmp_path / "a")
    assert replayed._accepting == waited._accepting


@pytest.mark.parametrize("cut", [ROLLED_BACK + 3, ROLLED_BACK + 12, ACCEPTED + 3, 125])
def test_the_log_of_a_resumed_run_is_replayed(tmp_path: Path, cut: int) -> None:
    """Bugs: the log in the new folder lacks the level, or its lines are in an order in which some are not read."""
    stack, _ = rules()
    save = SaveAt(tmp_path, cut)
    first = Model()
    train(tmp_path / "a", first, *stack, Requests().at(120), save)
    stack, _ = rules()
    resumed = Model()
    train(tmp_path / "b", resumed, *stack, Requests().at(120), ckpt_path=save.path(cut))
    log = interventions(tmp_path / "b")
    assert [each["step"] for each in log] == [ROLLED_BACK, ACCEPTED, 120]
    stack, _ = rules(replay=str(tmp_path / "b"))
    replayed = Model()
    train(tmp_path / "c", replayed, *stack)
    assert_same_weights(replayed, resumed)  # type: ignore[arg-type]


def test_a_replay_is_resumed(tmp_path: Path) -> None:
    """Bug: a replay that is killed between a rollback and the acceptance makes one of them twice, or not at all."""
    stack, _ = rules()
    first = Model()
    train(tmp_path / "a", first, *stack)
    log, save = str(tmp_path / "a"), SaveAt(tmp_path, ROLLED_BACK + 7)
    stack, _ = rules(replay=log)
    train(tmp_path / "b", Model(), *stack, save, max_epochs=1)
    stack, _ = rules(replay=log)
    second = Model()
    train(tmp_path / "c", second, *stack, ckpt_path=save.path(ROLLED_BACK + 7))
    assert_same_weights(first, second)  # type: ignore[arg-type]


def test_another_run_starts_without_the_first_ones_incidents(tmp_path: Path) -> None:
    """Bug: a callback that is used again takes the first step of the next run for a repetition, and learns its loss."""
    stack, rollback = rules()
    train(tmp_path / "a", Model(), *stack, max_epochs=1, limit_train_batches=ROLLED_BACK + 8)
    assert rollback._accepting.places
    saved = rollback.state_dict()
    assert saved["incident"]["start"] is not None, "a checkpoint saved after the fit has it"
    _, record = train(tmp_path / "b", Model(), *stack)
    assert decisions(record) == CHANGE
