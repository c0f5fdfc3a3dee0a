"""One process: where ``training_step`` or the loader gives None, the run is Lightning's own, and steps are counted."""

import math
from typing import Any

import pytest
from fits import (
    FUSED,
    HEALTHY,
    HIGH_LOSS,
    NAN_LOSS,
    EventRecorder,
    Net,
    Recorder,
    SkipHighLoss,
    assert_same,
    batches,
    everything,
    fit,
)

from stabletrain import Guard, SkipNonFinite, SkipOutliers
from stabletrain.runtime.guard.dropped_steps import warning
from stabletrain.runtime.guard.metrics import Counters

ITEMS = batches(*[HEALTHY] * 9)


class Choosy(Net):
    """Has no loss for some batches: ``before`` or after the forward pass, which changes the running statistics."""

    def __init__(self, missing: Any, *args: Any, before: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.missing, self.before = missing, before

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.before and batch_idx in self.missing:
            return None
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in self.missing or not loss.isfinite() else loss


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize(("optimizer", "before"), [("adamw-loop", False), ("adamw-fused", True)])
@pytest.mark.parametrize(
    ("missing", "size", "without"),
    [
        ((0, 4, 5, 8), 1, (4, 4)),
        ((1, 4), 3, (0, 0)),
        ((2, 8), 3, (0, 2)),
        ((3, 4, 5), 3, (1, 1)),
        (range(9), 1, (9, 9)),
    ],
    ids=["alone", "inside windows", "last of windows", "a whole window", "all"],
)
def test_training_is_lightnings(
    missing: Any, size: int, without: tuple[int, int], optimizer: str, fp16: bool, before: bool
) -> None:
    """Bugs: a schedule or a global step behind those without plugins; a window that is thrown away; a loss scaler that
    is never updated again; NaN rules that count it and stop the run; a step in no count; its losses in the next one."""
    options = {"accumulate_grad_batches": size, "fp16": fp16}
    bare = fit(Choosy(missing, optimizer, "step", before=before), ITEMS, **options)
    recorder, skip = Recorder(), SkipNonFinite(max_in_a_row=1, max_overflows_in_a_row=1)
    mine = fit(Choosy(missing, optimizer, "step", before=before), ITEMS, recorder, skip, **options)
    assert_same(everything(mine), everything(bare))
    steps = without[fp16]  # with a loss scaler Lightning does not step if the last micro-batch has no loss
    assert mine.callback_metrics["skipped"] == steps
    assert len(recorder.state) == 9 // size - steps
    assert all(math.isfinite(o.loss) and o.loss < 100 for o in recorder.state)


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_decided_on_host_and_device(mode: Any) -> None:
    """Bugs: the step after a dropped one is taken for dropped, too; in device mode nothing is decided for it."""
    results = []
    for plugins in ([], [Guard(mode=mode), SkipNonFinite()]):
        results.append(everything(fit(Choosy((2, 4), FUSED[0], "epoch"), ITEMS, *plugins)))
    assert_same(*results)
    guard = [Guard(mode=mode), SkipHighLoss()]
    items = batches(HEALTHY, HIGH_LOSS, HEALTHY, HEALTHY)
    mine = fit(Choosy((2,), FUSED[0], "epoch"), items, *guard)
    assert (mine.global_step, mine.callback_metrics["skipped"]) == (3, 2)


def test_a_scheduler_advances_after_a_dropped_step() -> None:
    """Bug: a step without a loss still has the mark of the one before it, which was dropped."""
    items = batches(HEALTHY, HIGH_LOSS, HEALTHY, HEALTHY)
    mine = fit(Choosy((2,), "sgd-momentum", "step"), items, SkipHighLoss())
    assert mine.global_step == 3
    assert mine.lr_scheduler_configs[0].scheduler.last_epoch == 3
    assert mine.callback_metrics["skipped"] == 2


@pytest.mark.parametrize("size", [1, 3])
def test_a_nan_that_the_module_itself_leaves_out_does_not_stay_in_batch_normalisation(size: int) -> None:
    """Bug: the running statistics are NaN for ever, because no rule has dropped the step."""
    items = batches(*[NAN_LOSS if i in (1, 5, 8) else HEALTHY for i in range(9)])
    mine = fit(Choosy((), "adamw-loop"), items, SkipNonFinite(), accumulate_grad_batches=size)
    assert_same(everything(mine), everything(mine))  # all finite
    if size == 1:
        good = [item for item in items if item[1] == HEALTHY]
        never = everything(fit(Choosy((), "adamw-loop"), good, SkipNonFinite()))
        assert_same({**everything(mine), "global_step": never["global_step"]}, never)


def test_a_dropped_window_that_began_without_a_loss() -> None:
    """Bug: the buffers are restored to what the first micro-batch, which had no loss, has made of them."""
    items = batches(*[HIGH_LOSS if i == 4 else HEALTHY for i in range(9)])
    module = Choosy((3,), "adamw-loop")
    mine = fit(module, items, SkipHighLoss(), accumulate_grad_batches=3)
    never = fit(Choosy((), "adamw-loop"), [*items[:3], *items[6:]], SkipHighLoss(), accumulate_grad_batches=3)
    assert_same(everything(mine), everything(never))


@pytest.mark.parametrize("missing", [(1,), (2,), (3, 4, 5), (8,)])
def test_a_batch_that_is_none(missing: tuple[int, ...]) -> None:
    """Bug: Lightning passes over the batch, and the losses of its window are counted in the next one."""
    items: Any = [None if i in missing else item for i, item in enumerate(ITEMS)]
    results, recorder = [], Recorder()
    for plugins in ([], [recorder, SkipNonFinite()]):
        results.append(everything(fit(Net("sgd-momentum"), list(items), *plugins, accumulate_grad_batches=3)))
    assert_same(*results)
    steps = [i for i in range(3) if 3 * i + 2 not in missing]
    assert len(recorder.state) == len(steps)
    seen = Recorder()
    for step, outcome in zip(steps, recorder.state, strict=True):
        window = [item for item in items[3 * step : 3 * step + 3] if item is not None]
        if step == 0:
            fit(Net("sgd-momentum"), window, seen, accumulate_grad_batches=3)
            assert outcome.loss == seen.state[-1].loss


def test_only_what_rules_dropped_is_warned_of() -> None:
    """Bug: a module that leaves batches out on purpose ends with a warning that its data or its limits are wrong."""
    counters = Counters(attempted=1000, skipped=300, without_loss=300)
    assert warning(counters, {}) is None
    text = warning(counters._replace(skipped=350, dropped_by={"skip_nonfinite": 50}), {})
    assert text is not None
    assert text.startswith("50 of 1000 attempted steps (5.0%) were dropped, 50 of them by skip_nonfinite")


def test_the_trainers_clip_replaces_the_fallback_of_a_rule() -> None:
    """Bug: a tolerated outlier is clipped twice, by the rule's own limit and by the Trainer."""
    items = batches(*[HEALTHY] * 40, seed=3)
    items[30] = (items[30][0] * 30, HEALTHY)
    norms = []
    for options in ({}, {"gradient_clip_val": 1e6}):
        recorder = Recorder()
        fit(Net(norm=False), items, recorder, SkipOutliers(window=16, min_samples=8), **options)
        norms.append((recorder.state[30].applied_norm, recorder.state[30].grad_norm))
    (held, _), (applied, norm) = norms
    assert held < norm == applied


def test_no_event_for_what_lightning_supports() -> None:
    """Bug: a line on the terminal for each batch that a module leaves out on purpose."""
    events = EventRecorder()
    fit(Choosy((2, 3)), ITEMS, SkipNonFinite(), events)
    assert events.events == []
