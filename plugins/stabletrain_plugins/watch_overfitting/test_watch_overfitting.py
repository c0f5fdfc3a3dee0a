import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import EventRecorder, SaveAfter
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from stabletrain import ResumeExactly, SkipNonFinite, UserError, WatchOverfitting
from stabletrain.testing.trainer import quiet_trainer


class Losses(LightningModule):
    """Has the losses that it is given.

    Args:
        train: of the steps, four to a validation.
        validation: of the validations.
    """

    def __init__(self, train: list[float], validation: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.train_losses, self.validation_losses = train, validation

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.train_losses[self.trainer.current_epoch * 4 + batch_idx] + 0.0 * self.weight

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", torch.tensor(self.validation_losses[self.trainer.current_epoch]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def run(means: list[float], validation: list[float], *callbacks: Any, noise: float = 0.1, **options: Any) -> list[Any]:
    """The events of overfitting, as (step, value, limit), and the gap at the end."""
    train = [mean + sign * noise for mean in means for sign in (1, -1, 1, -1)]
    recorder, watch = EventRecorder(), WatchOverfitting("val", patience=2)
    path = options.pop("ckpt_path", None)
    trainer = quiet_trainer(watch, recorder, *callbacks, max_epochs=len(means), **options)
    trainer.fit(Losses(train, validation), DataLoader(torch.zeros(4)), DataLoader(torch.zeros(1)), ckpt_path=path)
    found = [(e.step, e.value, e.limit) for e in recorder.events if e.kind == "overfitting"]
    return [found, float(trainer.callback_metrics["stability/overfitting_gap"])]


pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.mark.parametrize(
    ("train", "validation", "steps"),
    [
        ([5.0, 4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 3.1, 3.2, 3.3], [15]),
        ([5.0, 4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0, 0.5], []),
        ([5.0, 4.0, 4.0, 4.0, 4.0], [4.0, 3.0, 3.1, 3.0, 3.1], []),
        ([5.0, 4.0, 6.0, 7.0, 8.0], [4.0, 3.0, 3.1, 3.2, 3.3], []),
        ([5.0, 4.0, 3.0, 2.0, 1.0], [4.0, 3.0, math.nan, 3.1, 3.2], [19]),
        ([6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5], [4.0, 4.1, 4.2, 3.0, 3.1, 3.2, 3.3], [11, 23]),
    ],
)
def test_it_reports_a_validation_loss_that_stops_while_the_other_falls(
    train: list[float], validation: list[float], steps: list[int]
) -> None:
    """Bugs: healthy or stopped runs reported; reported at every validation; a NaN taken for the best loss."""
    found, gap = run(train, validation)
    assert [step for step, *_ in found] == steps
    assert gap == pytest.approx(validation[-1] - train[-1])


def test_dropped_steps_do_not_count() -> None:
    """Bug: the NaN of a dropped step makes the training loss NaN for the rest of the run."""
    train = [5.0, 4.0, math.nan, 2.0, 1.0]
    found, gap = run(train, [4.0, 3.0, 3.1, 3.2, 3.3], SkipNonFinite())
    assert [step for step, *_ in found] == [19]  # the third validation has no training loss, and is left out
    assert gap == pytest.approx(2.3)


@pytest.mark.parametrize("cut", [3, 6, 8, 11, 13])
def test_a_resumed_run_reports_in_the_same_validation(cut: int, tmp_path: Path) -> None:
    """Bug: the validations before the checkpoint are forgotten, or one is counted twice."""
    arguments = [5.0, 4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 3.1, 3.2, 3.3]
    whole = run(*arguments, ResumeExactly(), SaveAfter(cut, tmp_path / "cut.ckpt"))
    assert run(*arguments, ResumeExactly(), ckpt_path=tmp_path / "cut.ckpt") == whole


def test_a_metric_that_is_not_logged_is_refused() -> None:
    """Bug: nothing is watched, without a word; or a message that does not say which names there are."""
    trainer = quiet_trainer(WatchOverfitting("loss"), max_epochs=1)
    with pytest.raises(
        UserError, match=r"expected monitor to be a metric that the validation logs, got 'loss'; it logs: val "
    ):
        trainer.fit(Losses([1.0] * 4, [1.0]), DataLoader(torch.zeros(4)), DataLoader(torch.zeros(1)))


@pytest.mark.parametrize("arguments", [{"monitor": ""}, {"patience": 0}, {"min_delta": -1.0}, {"min_delta": math.nan}])
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    """Bug: a watch that can never report, or reports at once, is accepted."""
    with pytest.raises(UserError, match=f"watch_overfitting: {next(iter(arguments))} must be"):
        WatchOverfitting(**arguments)


@pytest.mark.parametrize(
    ("argument", "values"),
    [("monitor", ["", None, 3]), ("patience", [0, 1.5, "3", None]), ("min_delta", [-1, math.nan, "a"])],
)
def test_wrong_arguments_are_one_message(argument: str, values: list[Any]) -> None:
    """Bug: with a patience of 1.5 nothing is ever reported; a TypeError without the argument's name."""
    for value in values:
        with pytest.raises(UserError, match=f"{argument} must be .*, got "):
            WatchOverfitting(**{argument: value})
