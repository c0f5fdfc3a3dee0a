"""A change that was announced or expected: baselines are learned anew, from the right step on, and only there."""

import math
import types
from pathlib import Path
from typing import Any

import announced
import pytest
import torch
from announced import AT, TERM, Announcer, Model, Record, stack, train
from fits import HEALTHY, Net, assert_same, batches, everything, fit, run, trainer
from lightning.pytorch import Callback

import stabletrain as st
from stabletrain.errors import UserError

MODES = ["exact", "device"]
HOOKS = ["on_train_batch_start", "training_step", "on_train_batch_end", "callback before", "callback after"]


def members(where: str | None, mode: str, record: Record, **options: Any) -> tuple[Model, list[Any]]:
    """A module and callbacks in which ``where`` announces."""
    before, after = ([Announcer()] if where == f"callback {place}" else [] for place in ("before", "after"))
    return Model(where), [*before, *stack(mode, **options), *after, record]


@pytest.mark.parametrize("mode", MODES)
def test_without_an_announcement_the_change_is_judged(mode: str) -> None:
    """Bug: a change that nothing objects to, with which the other tests prove nothing."""
    record = Record()
    model, callbacks = members(None, mode, record)
    train(model, *callbacks)
    assert record.outcomes[AT].skipped
    assert {"skip", "spike", "divergence"} <= set(record.kinds())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", HOOKS)
def test_an_announced_change_is_not_judged(where: str, mode: str) -> None:
    """Bugs: the first step of the change judged by the old limits, which the device has already; in force a step early,
    when the old level is learned as the new one, or a step late."""
    record = Record()
    model, callbacks = members(where, mode, record)
    mine = train(model, *callbacks)
    assert [(e.step, e.plugin, e.value, e.reason) for e in record.events] == [(AT, "guard", AT, TERM)]
    assert record.kinds() == ["announced"]
    assert mine.global_step == announced.STEPS
    assert record.outcomes[AT].applied_norm == record.outcomes[AT].grad_norm
    detector = next(each for each in callbacks if isinstance(each, st.DetectSpikes))
    assert detector.state.seen == announced.STEPS  # counts are not forgotten
    assert min(detector.state.loss.past.window.values) > 3.0  # the baseline is the new level's alone


@pytest.mark.parametrize("mode", MODES)
def test_the_baselines_learned_anew_judge_again(mode: str) -> None:
    """Bug: protection that an announcement switches off for good."""

    class Again(Model):
        def training_step(self, batch: int, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (20.0 if batch == AT + 50 else 1.0)

    record = Record()
    train(Again("training_step"), *stack(mode), record)
    assert record.kinds() == ["announced", "skip", "spike"]
    assert record.outcomes[AT + 50].skipped


@pytest.mark.parametrize("mode", MODES)
def test_the_step_before_is_judged_by_the_old_baselines(mode: str) -> None:
    """Bug: in device mode the outcome of the step before, still in flight, is observed after all was forgotten."""

    class High(Model):
        def training_step(self, batch: int, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (5.0 if batch == AT - 1 else 1.0)

    record = Record()
    train(High("on_train_batch_end", factor=1.0), *stack(mode), record)
    assert record.outcomes[AT - 1].skipped
    assert record.kinds() == ["skip", "spike", "announced"]


def test_a_window_announces_once() -> None:
    """Bug: one event for each of the micro-batches in which a module announces the same change."""

    class Each(Model):
        def training_step(self, batch: int, batch_idx: int) -> Any:
            if batch // 4 == 10:
                st.announce(self.trainer, TERM)
                st.announce(self.trainer, f"{TERM} again")
            return super().training_step(batch, batch_idx)

    record = Record()
    train(Each(factor=1.0), *stack(), record, accumulate_grad_batches=4, steps=80, max_steps=20)
    assert [(event.step, event.reason) for event in record.events] == [(10, f"{TERM}; {TERM} again")]


@pytest.mark.parametrize("mode", MODES)
def test_a_run_of_nan_is_not_hidden(mode: str) -> None:
    """Bug: counts of non-finite steps that start again with every announcement, so that a dead run never stops."""

    class Always(Model):
        def training_step(self, batch: int, batch_idx: int) -> Any:
            st.announce(self.trainer, TERM)
            return super().training_step(batch, batch_idx)

    record = Record()
    callbacks = [st.SkipNonFinite(max_in_a_row=6), *stack(mode)[:3], st.Guard(mode=mode), record]  # type: ignore[arg-type]
    with pytest.raises(st.TrainingStopped, match="6 non-finite steps in a row"):
        train(Always(nan=range(20, 40)), *callbacks)


# ---- expected changes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("position", [AT, str(AT), "2ep", "50%"])
def test_an_expected_change_is_not_judged(position: Any, mode: str) -> None:
    """Bugs: epochs or percent resolved to another step; a position counted in attempted steps."""
    record = Record()
    items: Any = torch.utils.data.DataLoader(range(30), batch_size=None)  # type: ignore[arg-type]

    class Epochs(Model):
        def training_step(self, batch: int, batch_idx: int) -> Any:
            number = self.current_epoch * 30 + batch
            return super().training_step(number, batch_idx)

        on_train_batch_start = on_train_batch_end = None  # type: ignore[assignment]

    fit(Epochs(), items, *stack(mode, expect=[10, position]), record, max_epochs=4)
    at = {"50%": '"50%"', "2ep": '"2ep"'}.get(str(position), f"{AT}")
    texts = [(e.step, e.plugin, e.kind, e.reason) for e in record.events]
    assert texts == [
        (step, "detect_spikes", "announced", f"DetectSpikes(expect={value})") for step, value in ((10, "10"), (AT, at))
    ]
    assert not record.outcomes[AT].skipped


class Repeats(Callback):
    """Announces the change in one hook, whenever a given number of steps has been applied."""

    def __init__(self, hook: str, at: int) -> None:
        self.at, self.calls = at, 0
        setattr(self, hook, self.call)

    def call(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.at:
            self.calls += 1
            st.announce(trainer, TERM)


def dropped_ten_times(how: str, mode: str) -> tuple[list[Repeats], list[Any]]:
    """What announces the change, if it is not expected, and a stack that does not stop for ten NaN steps in a row."""
    members = stack(mode, expect=[AT] if how == "expect" else None)
    callbacks = [st.SkipNonFinite(max_in_a_row=12) if isinstance(each, st.SkipNonFinite) else each for each in members]
    at = AT + (mode == "device")  # there a step counts as applied until its outcome is known
    return [] if how == "expect" else [Repeats(how, at)], callbacks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["expect", "on_train_batch_start", "on_before_zero_grad", "on_train_batch_end"])
def test_a_change_is_in_force_once_while_its_step_is_dropped(how: str, mode: str) -> None:
    """Bug: its step is NaN ten times, and ten times all is learned anew and an event is written."""
    record = Record()
    repeats, callbacks = dropped_ten_times(how, mode)
    train(Model(nan=range(AT, AT + 10)), *repeats, *callbacks, record)
    late = mode == "device" and how != "expect"
    assert [event.step for event in record.events if event.kind == "announced"] == [AT + late]
    assert [each.step for each in record.outcomes if not each.applied] == list(range(AT, AT + 10))
    assert how == "expect" or repeats[0].calls >= 10
    assert set(record.kinds()) == {"announced", "nonfinite"}, "the first steps with the larger loss are not judged"


def test_positions_are_applied_steps() -> None:
    """Bug: after three dropped steps a change is expected three steps too early."""
    record = Record()
    train(Model(nan=range(5, 8), factor=1.0), *stack(expect=[20]), record)
    assert [event.step for event in record.events if event.kind == "announced"] == [23]


@pytest.mark.parametrize(
    ("positions", "options", "message"),
    [
        ([130], {}, "expected positions before the end of the run, after 130 steps, got 130, which never comes"),
        ([10, "100%"], {}, "got '100%', step 130, which never comes"),
        (["10%"], {"max_steps": -1}, "10% cannot be turned into steps without total_steps; the run has no known end"),
        (["3ep"], {}, "3ep cannot be turned into steps without steps_per_epoch; the training data has no known length"),
    ],
)
def test_positions_that_never_come_are_errors(positions: Any, options: Any, message: str) -> None:
    """Bugs: a change that is silently never expected; a length that is guessed."""
    with pytest.raises(UserError, match=rf"^\w+\(expect=\.\.\.\): .*{message}"):
        train(Model(), *stack(expect=positions), **options)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        *(([each], None) for each in (0, -5, "-5", "0%", math.nan, 1.5, True, "soon", "10min", "1e9tok", None)),
        ([600, "600"], "expected different positions, got '600' twice"),
        ("3ep", "expected a list of positions such as .*, got '3ep'"),
        (600, "expected a list of positions such as .*, got 600"),
    ],
)
@pytest.mark.parametrize("plugin", [st.DetectSpikes, st.Rollback])
def test_bad_positions_are_errors_at_once(plugin: Any, positions: Any, message: str | None) -> None:
    """Bugs: a mistake found after hours of training, or with a traceback of a comparison."""
    message = message or f"expected positions after the start of the run, such as .*, got {positions[0]!r}$"
    with pytest.raises(UserError, match=rf"^{plugin.__name__}\(expect=\.\.\.\): {message}"):
        plugin(expect=positions)


def test_a_quick_try_needs_no_position() -> None:
    """Bug: fast_dev_run fails because none of the positions comes within its one step."""
    train(Model(), *stack(expect=[600, "10%"]), fast_dev_run=True)


# ---- resumed runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [AT - 2, AT - 1, AT, AT + 1, AT + 20])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["training_step", "callback before", "callback after", "expect"])
def test_resumed_equals_uninterrupted(where: str, mode: str, after: int, tmp_path: Path) -> None:
    """Bugs: an announcement lost that was made between the last step before a checkpoint and the next one; an expected
    position that is passed for an error in a resumed run, or expected again."""
    options: dict[str, Any] = {"expect": [AT]} if where == "expect" else {}
    record = Record(after, tmp_path / "at.ckpt")
    model, whole = members(where, mode, record, **options)
    steps = AT + 30
    expected = train(model, *whole, steps=steps)
    model, resumed = members(where, mode, Record(), **options)
    mine = train(model, *resumed, start=after + 1, steps=steps, ckpt_path=tmp_path / "at.ckpt")
    assert_same(everything(mine), everything(expected))
    for one, other in zip(resumed, whole, strict=True):
        assert repr(one.state_dict()) == repr(other.state_dict())


@pytest.mark.parametrize("after", [AT, AT + 1, AT + 8])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["expect", "on_train_batch_start"])
def test_resumed_while_its_step_is_dropped(how: str, mode: str, after: int, tmp_path: Path) -> None:
    """Bug: a run that is resumed there learns everything anew once more."""
    whole, resumed = Record(after, tmp_path / "at.ckpt"), Record()
    nan, options = range(AT, AT + 10), {"max_steps": AT + 10, "steps": AT + 20}
    repeats, expected = dropped_ten_times(how, mode)
    train(Model(nan=nan), *repeats, *expected, whole, **options)
    repeats, mine = dropped_ten_times(how, mode)
    path = tmp_path / "at.ckpt"
    train(Model(nan=nan), *repeats, *mine, resumed, start=after + 1, **options, ckpt_path=path)
    assert repr(resumed.events) == repr([event for event in whole.events if event.step > after])
    assert repr([each.state_dict() for each in mine]) == repr([each.state_dict() for each in expected])


# ---- where it does nothing, and where it is a mistake ----------------------------------------------------------------


class Calls(Callback):
    """Announces in one hook, and remembers what was raised."""

    def __init__(self, hook: str) -> None:
        self.error: Exception | None = None
        setattr(self, hook, self.call)

    def call(self, trainer: Any, *_: Any, **__: Any) -> None:
        try:
            st.announce(trainer, TERM)
        except UserError as error:
            self.error = error


def test_a_trainer_without_plugins_ignores_it() -> None:
    """Bug: a module that announces cannot be trained without stabletrain's plugins."""
    model = Model("training_step")
    train(model, steps=AT + 2)


def test_outside_a_fit_it_is_an_error() -> None:
    """Bugs: a change announced to nobody; an AttributeError of a guard that is gone."""
    mine = trainer(*stack())
    outside = f"announce: '{TERM}' was announced outside a fit"
    with pytest.raises(UserError, match=outside):
        st.announce(mine, TERM)
    run(mine, Net("sgd-fused"), batches(*[HEALTHY] * 3))
    with pytest.raises(UserError, match=outside):
        st.announce(mine, TERM)
    bare = trainer()
    with pytest.raises(UserError, match=outside):
        st.announce(bare, TERM)
    calls = Calls("on_test_batch_start")
    tested = trainer(calls, *stack())
    tested.test(Net(), torch.utils.data.DataLoader([batches(HEALTHY)[0]], batch_size=None), verbose=False)  # type: ignore[arg-type]
    assert outside in str(calls.error)


@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end", "teardown"])
def test_after_the_training_it_is_an_error(hook: str) -> None:
    """Bug: a change announced after the last step, which nothing learns any more, is accepted in silence."""
    calls = Calls(hook)
    fit(Net("sgd-fused"), batches(*[HEALTHY] * 3), *stack(), calls)
    assert "before or after training" in str(calls.error)


@pytest.mark.parametrize(("hook", "fails"), [("setup", True), ("on_train_start", False), ("on_validation_end", False)])
def test_from_the_start_of_training_on(hook: str, fails: bool) -> None:
    """Bugs: an announcement lost because no guard exists yet; one of a validation within the fit refused."""
    calls, record = Calls(hook), Record()
    items = batches(*[HEALTHY] * 4)
    fit(Net("sgd-fused"), items, calls, *stack(), record, val_items=items, val_check_interval=2)
    assert (calls.error is not None) == fails
    if fails:
        assert "before or after training" in str(calls.error)
    else:
        assert [event.step for event in record.events] == [0 if hook == "on_train_start" else 2]


@pytest.mark.parametrize("arguments", [(None, TERM), (TERM, None), ("trainer", ""), ("trainer", "  "), ("trainer", 3)])
def test_wrong_arguments_are_errors(arguments: Any) -> None:
    """Bug: `announce(self, ...)` with the module instead of its Trainer, or no reason to read in the log."""
    mine = trainer() if arguments[0] == "trainer" else Net()
    with pytest.raises(UserError, match=r'^announce: expected a Trainer and what changes, as \(trainer, "second'):
        st.announce(mine, arguments[1])  # type: ignore[arg-type]


def test_what_has_a_trainers_state_is_a_trainer() -> None:
    """Bug: a Trainer of pytorch_lightning, or one that another library wraps, taken for a mistake."""
    state = types.SimpleNamespace(fn="fit", status="running")
    st.announce(types.SimpleNamespace(state=state, callbacks=[object()]), TERM)  # type: ignore[arg-type]
