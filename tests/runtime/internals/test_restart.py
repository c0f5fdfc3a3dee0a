"""The private attributes of Lightning and torchmetrics behind `restart`, `results` and `epoch_start`."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torchmetrics import MeanMetric

from stabletrain.runtime.internals import epoch_start
from stabletrain.runtime.internals import restart as restart_internals
from stabletrain.runtime.internals import results as results_internals
from stabletrain.runtime.internals.restart import Place, Restart


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.metric = MeanMetric(nan_strategy="disable")


@pytest.fixture
def trainer() -> Trainer:
    mine = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    mine.strategy.connect(Module())
    mine.strategy._lightning_module = mine.strategy.model  # type: ignore[assignment]
    return mine


def test_the_private_attributes_of_the_loops_exist(trainer):
    """Bug: a new Lightning has moved one; this test names it."""
    fit_loop = trainer.fit_loop
    loop = fit_loop.epoch_loop
    for owner, names in (
        (fit_loop, {"_restart_stage", "_restarting", "_loaded_from_state_dict", "epoch_progress"}),
        (
            loop,
            {"_restart_stage", "_skip_next_val", "_batches_that_stepped", "max_steps", "_results", "batch_progress"},
        ),
        (loop.val_loop, {"_restart_stage", "_restarting", "_results", "batch_progress"}),
        (trainer._logger_connector, {"_first_loop_iter", *results_internals.SHOWN}),
    ):
        assert names <= set(vars(owner)), owner
    for owner, method in (
        (fit_loop, "setup_data"),
        (fit_loop, "reset"),
        (fit_loop, "on_run_start"),
        (loop, "advance"),
        (loop, "update_lr_schedulers"),
        (trainer._logger_connector, "on_batch_end"),
        (trainer._logger_connector, "on_epoch_end"),
        (trainer._logger_connector, "epoch_end_reached"),
        (trainer._logger_connector, "update_train_step_metrics"),
        (trainer._logger_connector, "update_train_epoch_metrics"),
    ):
        assert callable(getattr(owner, method)), method
    average = vars(StochasticWeightAveraging(0.1))
    assert {"_scheduler_state", "_initialized"} <= set(average)
    restart = Restart(trainer, lambda within: None, lambda: False)
    assert Restart.of(trainer) is restart
    restart.remove()
    assert not {"setup_data", "reset", "on_run_start"} & set(vars(fit_loop))
    assert Restart.of(trainer) is None
    epoch_start.restore_weight_averaging(trainer)  # there is none
    epoch_start.show_progress(trainer, False)


@pytest.mark.parametrize(
    ("epoch", "batch", "validation", "place"),
    [  # ready, started, processed, completed of the epoch and its batches; ready and completed of the validation
        ((0, 0, 0, 0), (0, 0, 0, 0), (0, 0), Place.ELSEWHERE),
        ((1, 0, 0, 0), (0, 0, 0, 0), (0, 0), Place.ELSEWHERE),
        ((1, 1, 0, 0), (0, 0, 0, 0), (0, 0), Place.ELSEWHERE),
        ((1, 1, 0, 0), (3, 3, 2, 2), (0, 0), Place.ELSEWHERE),
        ((1, 1, 0, 0), (3, 3, 3, 2), (0, 0), Place.BATCH_END),
        ((1, 1, 0, 0), (3, 3, 3, 3), (0, 0), Place.IN_VALIDATION),
        ((1, 1, 0, 0), (3, 3, 3, 3), (2, 1), Place.IN_VALIDATION),
        ((1, 1, 0, 0), (3, 3, 3, 3), (2, 2), Place.AFTER_VALIDATION),
        ((1, 1, 1, 0), (4, 4, 4, 4), (2, 2), Place.EPOCH_END),
        ((1, 1, 1, 0), (3, 3, 3, 3), (2, 2), Place.ELSEWHERE),
        ((1, 1, 1, 1), (4, 4, 4, 4), (2, 2), Place.ELSEWHERE),
        ((2, 1, 1, 1), (4, 4, 4, 4), (2, 2), Place.ELSEWHERE),
    ],
)
def test_the_place_of_a_checkpoint_follows_from_the_counts(epoch, batch, validation, place, trainer):
    """Bug: what was due after the checkpoint is done twice, or not at all."""
    fit_loop = trainer.fit_loop
    loop = fit_loop.epoch_loop
    fit_loop.max_batches = 4
    names = ("ready", "started", "processed", "completed")
    vars(fit_loop.epoch_progress.current).update(zip(names, epoch, strict=True))
    vars(loop.batch_progress.current).update(zip(names, batch, strict=True))
    counts: Any = loop.val_loop.batch_progress.current
    counts.ready, counts.completed = validation
    loop.val_loop.batch_progress.is_last_batch = validation == (2, 2)
    assert restart_internals.place_of(trainer) is place


@pytest.mark.parametrize("value", [1.5, float("nan"), float("inf")])
def test_logged_values_and_metrics_are_the_same_after_a_round_trip(value, trainer):
    """Bugs: a mean of the batches after the checkpoint only; a non-finite value that is lost."""
    results = trainer.fit_loop.epoch_loop._results
    metric = trainer.lightning_module.metric
    metric.update(value)
    for reduction in ("mean", "sum", "min", "max"):
        options: Any = {"on_step": True, "on_epoch": True, "reduce_fx": reduction, "batch_size": 3}
        results.log("training_step", reduction, torch.tensor(value, dtype=torch.float64), **options)
    results.log("training_step", "metric", metric, metric_attribute="metric")
    trainer._logger_connector._callback_metrics["a"] = torch.tensor(value)
    trainer._logger_connector._callback_metrics["another name"] = trainer._logger_connector._callback_metrics["a"]
    logged = results_internals.logged(results_internals.logged_now(trainer))
    shown = results_internals.shown(results_internals.shown_now(trainer))
    metrics, too_large = results_internals.metric_states(trainer)
    assert not too_large
    before = {key: each.compute() for key, each in results.items()}
    metric.reset()
    results.clear()
    trainer._logger_connector._callback_metrics.clear()
    for plain in logged:
        results_internals.check_logged(plain)
    for plain in metrics.values():
        results_internals.check_metric_state(plain)
    results_internals.set_metric_states(trainer, metrics)
    results_internals.set_logged(trainer, logged)
    results_internals.set_shown(trainer, {key: results_internals.checked_shown(each) for key, each in shown.items()})
    after = {key: each.compute() for key, each in results.items()}
    assert before.keys() == after.keys()
    for key, expected in before.items():
        assert torch.equal(torch.nan_to_num(expected, 7.0), torch.nan_to_num(after[key], 7.0)), key
        assert expected.dtype == after[key].dtype
    assert results["training_step.metric"].value is metric
    assert str(trainer.callback_metrics["a"].item()) == str(value)
    assert trainer.callback_metrics["another name"] is trainer.callback_metrics["a"]
