"""One test for each private attribute of Lightning and torch: a new version that moves one breaks here, by name."""

import inspect
from typing import Any

import pytest
import torch
from fits import FUSED, HEALTHY, OPTIMIZERS, Net, batches, fit, scaler, trainer
from lightning.pytorch import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy

from stabletrain.runtime.internals import trainer as trainer_internals

ITEMS = batches(*[HEALTHY] * 4)


class Probe(Callback):
    """Calls a function at the end of a batch."""

    def __init__(self, function: Any, batch: int = 1) -> None:
        self.function, self.batch, self.result = function, batch, None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            self.result = self.function(trainer)


def probed(function: Any, batch: int = 1, **options: Any) -> Any:
    probe = Probe(function, batch)
    fit(Net("adamw-fused", options.pop("scheduler", None)), ITEMS, probe, **options)
    return probe.result


def test_hooks_exist_and_silenced_ones_are_not_called() -> None:
    """Bug: a hook that Lightning has renamed, or one that stays silenced."""
    for hook in trainer_internals.STEP_HOOKS:
        assert inspect.isfunction(getattr(Callback, hook))

    class Quiet(Callback):
        def on_after_backward(self, *args: Any) -> None:
            self.heard = True

    quiet = Quiet()
    trainer_internals.silence_step_hooks(quiet, among=Callback)
    assert quiet.on_train_batch_end is None
    fit(Net(), ITEMS, quiet)
    assert quiet.heard
    trainer_internals.restore_step_hooks(quiet)
    assert callable(quiet.on_train_batch_end)


def test_undo_global_step() -> None:
    """Bug: the global step is read from elsewhere, and a skipped step counts."""

    def undo(mine: Any) -> tuple[int, int]:
        before = mine.global_step
        trainer_internals.undo_global_step(mine)
        return before, mine.global_step

    assert probed(undo) == (2, 1)


def test_hide_output() -> None:
    """Bugs: callbacks get the output of a hidden batch; nothing is undone."""

    class Outputs(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            numbers = iter(range(100))
            self.seen: list[bool] = []
            self.loop = trainer.fit_loop.epoch_loop.automatic_optimization
            self.undo = trainer_internals.hide_output(trainer, lambda: next(numbers) == 1)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(outputs == {})
            assert outputs == {} or list(outputs) == ["loss"]

    outputs = Outputs()
    fit(Net(), ITEMS, outputs)
    assert outputs.seen == [False, True, False, False]
    outputs.undo()
    assert "run" not in vars(outputs.loop)


def test_logger_step() -> None:
    """Bug: metrics are logged at micro-batches instead of steps."""
    assert probed(trainer_internals.logger_step, batch=3, accumulate_grad_batches=2) == 1


def test_publish_metrics() -> None:
    """Bug: metrics that callbacks, loggers or the progress bar do not see."""

    def publish(mine: Any) -> Any:
        trainer_internals.publish_metrics(mine, {"a": 1.0}, {"b": 2.0})
        return mine.callback_metrics["a"], mine.logged_metrics["a"], mine.progress_bar_metrics["b"]

    assert probed(publish) == (torch.tensor(1.0), torch.tensor(1.0), 2.0)


def test_before_checkpoint(tmp_path: Any) -> None:
    """Bug: a checkpoint is saved before outcomes in flight are read, or the wrapper stays."""
    calls: list[str] = []
    mine = fit(Net(), ITEMS)
    undo = trainer_internals.before_checkpoint(mine, lambda: calls.append("prepared"))
    mine.save_checkpoint(tmp_path / "a.ckpt")
    undo()
    mine.save_checkpoint(tmp_path / "b.ckpt")
    assert calls == ["prepared"]
    assert trainer_internals.dump_checkpoint(mine)["global_step"] == 4


def test_grad_scaler_and_its_state() -> None:
    """Bug: an overflow is not seen, or gradients are unscaled twice."""
    assert trainer_internals.grad_scaler(trainer()) is None
    assert trainer_internals.grad_scaler(trainer(plugins=[scaler(enabled=False)])) is None
    mine = trainer_internals.grad_scaler(trainer(fp16=True))
    assert isinstance(mine, torch.amp.GradScaler)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], 0.1)
    for factor, overflow in ((1.0, False), (float("inf"), True)):
        mine.scale((weight * factor).sum()).backward()
        assert not trainer_internals.scaler_has_unscaled(mine, optimizer)
        mine.unscale_(optimizer)
        assert trainer_internals.scaler_has_unscaled(mine, optimizer)
        assert trainer_internals.scaler_found_overflow(mine, optimizer) is overflow
        assert trainer_internals.scale_on_device(mine) == mine.get_scale()
        mine.step(optimizer)
        mine.update()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_supports_device_decisions(name: str) -> None:
    """Bug: a skip by ``found_inf`` with an optimizer that ignores it."""
    optimizer = OPTIMIZERS[name]([torch.nn.Parameter(torch.ones(64))])
    assert trainer_internals.supports_device_decisions(optimizer) == (name in FUSED)


def test_handles_own_steps() -> None:
    """Bugs: an ordinary trainer is taken for one with DeepSpeed; one with DeepSpeed is guarded, and never skips."""

    class Engine(SingleDeviceStrategy):
        handles_gradient_accumulation = True

    assert trainer_internals.handles_own_steps(trainer()) is False
    assert trainer_internals.handles_own_steps(trainer(strategy=Engine("cpu"))) is True


def test_scheduler_interval() -> None:
    """Bug: a scheduler by epochs is treated as one by steps."""

    def intervals(mine: Any) -> Any:
        return trainer_internals.scheduler_interval(
            mine, mine.lr_scheduler_configs[0].scheduler
        ), trainer_internals.scheduler_interval(mine, 1)

    assert probed(intervals, scheduler="epoch") == ("epoch", None)


def test_small_queries_of_the_trainer() -> None:
    """Bug: an attribute with another meaning in a new version of Lightning."""
    assert trainer_internals.is_fast_dev_run(trainer(fast_dev_run=1))
    assert not trainer_internals.is_fast_dev_run(trainer())
    assert trainer_internals.log_interval(trainer(log_every_n_steps=7)) == 7
    assert trainer_internals.log_interval(trainer(log_every_n_steps=0)) > 10**9
    assert probed(trainer_internals.window_is_open, batch=0, accumulate_grad_batches=2) is True
    assert probed(trainer_internals.window_is_open, batch=1, accumulate_grad_batches=2) is False
    assert probed(trainer_internals.batches_seen, batch=2) == 3
    assert not trainer_internals.reads_own_checkpoints(trainer())


def test_resumes_from_checkpoint(tmp_path: Any) -> None:
    """Bug: a resumed fit is taken for a new one, and histories start empty."""
    assert probed(trainer_internals.resumes_from_checkpoint) is False
    path = tmp_path / "a.ckpt"
    fit(Net("adamw-fused"), ITEMS).save_checkpoint(path)
    assert probed(trainer_internals.resumes_from_checkpoint, ckpt_path=path, max_epochs=2) is True


@pytest.mark.parametrize(("batch", "options", "last"), [(1, {}, False), (3, {}, True), (1, {"max_steps": 2}, True)])
def test_may_be_last_batch(batch: int, options: dict[str, Any], last: bool) -> None:
    """Bug: a run ends with metrics that were never flushed."""
    assert probed(trainer_internals.may_be_last_batch, batch, **options) is last


def test_unwrapped() -> None:
    module = Net()
    assert trainer_internals.unwrapped(torch.compile(module, backend="eager")) is module  # type: ignore[arg-type]
    assert trainer_internals.unwrapped(module) is module
