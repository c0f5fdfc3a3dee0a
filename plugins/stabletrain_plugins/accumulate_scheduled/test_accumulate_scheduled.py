"""Windows that grow during training, compared with a loop in plain torch."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import (
    HEALTHY,
    HIGH_LOSS,
    NAN_LOSS,
    Net,
    Recorder,
    SaveAfter,
    SkipHighLoss,
    assert_same,
    batches,
    everything,
    fit,
    loader,
)
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from stabletrain import (
    AccumulateFixed,
    AccumulateScheduled,
    Guard,
    ResumeExactly,
    Rollback,
    ScheduleLR,
    SkipNonFinite,
    UserError,
)
from stabletrain.runtime.run_length import run_length

ITEMS = batches(*[HEALTHY] * 10)
SCHEDULE = {0: 1, 3: 4, 4: 2}
WINDOWS = [(0,), (1,), (2,), (3, 4, 5, 6), (7, 8), (9,), (0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
"""Of two epochs: the sixth is short."""


def reference(windows: list[tuple[int, ...]]) -> dict[str, Any]:
    module = Net("sgd-momentum", norm=False)
    optimizer = module.configure_optimizers()
    for window in windows:
        optimizer.zero_grad()
        for i in window:
            (Net.training_step(module, ITEMS[i], i) / len(window)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return dict(module.named_parameters())


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("positions", [SCHEDULE, {0: 1, "240tok": 4, "560tok": 2}])
def test_a_change_takes_effect_at_a_windows_start(sized: bool, positions: Any) -> None:
    """Bugs: after a change within an epoch gradients of the last window are added to the next one's; windows of another
    size; the change comes a step late; micro-batches before an epoch's end are not a mean."""
    module, recorder = Net("sgd-momentum", norm=False), Recorder()
    plugin = AccumulateScheduled(positions, samples_per_batch=8, tokens_per_sample=10)
    trainer = fit(module, loader(ITEMS, sized), recorder, plugin, max_epochs=2)
    expected = reference(WINDOWS)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-6)
    assert len(recorder.state) == trainer.global_step == len(WINDOWS)
    assert trainer.accumulate_grad_batches == 1


def test_the_length_of_the_run_is_known() -> None:
    """Bug: a learning-rate schedule takes the first size for the whole run."""
    found = []

    class Look(ScheduleLR):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            found.append(run_length(trainer))

    fit(Net(), ITEMS, Look(), AccumulateScheduled(SCHEDULE), max_epochs=2)
    assert found[0].total_steps == len(WINDOWS)


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_dropped_windows_are_windows_never_seen(mode: Any) -> None:
    """Bug: on the device a dropped step before a change lets it come one window early."""
    windows = [(HEALTHY,), (NAN_LOSS,), (HEALTHY,), (HEALTHY,), (HIGH_LOSS,) * 4, (HEALTHY,) * 4, (NAN_LOSS, HEALTHY)]
    windows += [(HEALTHY, HEALTHY)]
    for first in (windows, windows[1:2] * 3 + windows):
        items = batches(*(fault for window in first for fault in window))
        good, at = [], 0
        for window in first:
            part = items[at : at + len(window)]
            at += len(window)
            good += part if set(window) == {HEALTHY} else []
        ends = []
        for some in (items, good):
            plugins = [SkipNonFinite(), SkipHighLoss(), Guard(mode=mode), AccumulateScheduled(SCHEDULE)]
            ends.append(everything(fit(Net("adamw-fused"), copy.deepcopy(some), *plugins)))
        assert_same(*ends)


def test_resumed_at_any_cut_and_rolled_back(tmp_path: Path) -> None:
    """Bugs: a resumed run begins a window where the epoch's batches are divided by its size; a window that was cut is
    taken for finished; a rollback keeps the size of the step that it undid."""

    def run(*plugins: Any, **options: Any) -> Any:
        fixed = (AccumulateScheduled(SCHEDULE), SkipNonFinite(), ResumeExactly())
        return fit(Net("adamw-foreach"), ITEMS, *fixed, *plugins, max_epochs=2, **options)

    expected = everything(run())
    for cut in (0, 2, 3, 5, 6, 7, 8, 9, 10, 14, 18):
        run(SaveAfter(cut, tmp_path / f"{cut}.ckpt"))
        assert_same(everything(run(ckpt_path=tmp_path / f"{cut}.ckpt")), expected)


def test_rolled_back_over_a_change() -> None:
    """Bug: after a rollback a window goes on with the size, or the gradients, of the step that was undone."""
    sizes: list[int] = []

    class Watch(Net):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            sizes.append(self.trainer.accumulate_grad_batches)

    faults = [HEALTHY] * 8 + [NAN_LOSS] * 8 + [HEALTHY] * 12
    plugins = [
        SkipNonFinite(max_in_a_row=2),
        Rollback(every=2, trust_after=1, rewarm=0),
        AccumulateScheduled({0: 1, 5: 2}),
    ]
    trainer = fit(Watch(), batches(*faults), *plugins)
    assert trainer.global_step > 8
    assert sizes[:5] == [1] * 5
    assert sizes[-4:] == [2] * 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"schedule": {}}, "sizes by position"),
        ({"schedule": {0: 0}}, "sizes that are whole numbers >= 1"),
        ({"schedule": {0: 1.5}}, "sizes that are whole numbers >= 1"),
        ({"schedule": {5: 2}}, "a size from the start"),
        ({"schedule": {0: 1, "3ep": 2}}, "GradientAccumulationScheduler"),
        ({"schedule": {0: 1, "x": 2}}, "expected 500"),
        ({"schedule": {0: 1, "1e3tok": 2}}, "tokens_per_sample must be"),
        ({"schedule": {0: 1, 5: 2, "1e3tok": 2}, "tokens_per_sample": 1}, "got both"),
        ({"schedule": {0: 1, "0": 2}}, "two at step 0"),
        ({"unit": "bytes"}, "unit must be"),
    ],
)
def test_mistakes(arguments: dict[str, Any], says: str) -> None:
    """Bug: a mistake of the user fails late, or is taken for something else."""
    with pytest.raises(UserError, match=says):
        AccumulateScheduled(**arguments)


def test_two_that_set_the_windows() -> None:
    """Bug: the last one to write wins."""
    for name, other, options in (
        ("Lightning's", [GradientAccumulationScheduler({0: 1, 1: 4})], {}),
        ("AccumulateFixed", [AccumulateFixed(1)], {}),
        ("AccumulateFixed", [AccumulateFixed(2)], {}),
        ("Trainer", [], {"accumulate_grad_batches": 3}),
    ):
        for plugins in ([*other, AccumulateScheduled(SCHEDULE)], [AccumulateScheduled(SCHEDULE), *other]):
            with pytest.raises(UserError, match=f"({name}.*|)both set") as caught:
                fit(Net(), ITEMS, *plugins, **options)
            assert name in str(caught.value)
