"""A run killed at every checkpoint and resumed does what the uninterrupted run did after it, no less and no more.

Compared are all that loggers, callbacks and schedulers got after the checkpoint, and the weights at the end. Run as a
script, this file is also the run of a slow test in two processes.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    ProgressBar,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from stabletrain import ResumeExactly, UserError
from stabletrain.launch.progress import ProgressLines
from stabletrain.runtime.internals import results as results_internals
from stabletrain.testing.checks.equality import differences

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric"),
]

BATCHES = 4


def plateau(**options: Any) -> Any:
    def make(optimizer: Any) -> dict[str, Any]:
        scheduler = ReduceLROnPlateau(optimizer, patience=0, threshold=10.0, threshold_mode="abs")
        return {"scheduler": scheduler, "monitor": "val", **options}

    return make


def step_lr(optimizer: Any) -> dict[str, Any]:
    return {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "epoch"}


class Model(LightningModule):
    """Logs means, an extremum and metrics; the loss depends on random numbers.

    Args:
        schedule: makes the scheduler of an optimizer; None: none.
        norm: whether it has batch normalisation.
    """

    def __init__(self, schedule: Any = None, norm: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4) if norm else nn.Tanh(), nn.Dropout(0.3))
        self.net.append(nn.Linear(4, 1))
        self.schedule = schedule
        self.mae = torchmetrics.MeanAbsoluteError()
        self.both = torchmetrics.MetricCollection([torchmetrics.MeanMetric(), torchmetrics.MaxMetric()])
        self.by_hand, self.val_mae = torchmetrics.CatMetric(), torchmetrics.MeanAbsoluteError()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        y = self.net(x)
        loss = (y - x.sum(1, keepdim=True)).square().mean()
        self.mae(y.detach(), x.sum(1, keepdim=True))
        self.both.update(loss.detach())
        self.by_hand.update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=self.trainer.world_size > 1)
        self.log("mae", self.mae, on_step=True, on_epoch=True)
        self.log("worst", loss, on_step=False, on_epoch=True, reduce_fx="max")
        if self.current_epoch == 0 and batch_idx == 0:
            self.log("only once", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("total", self.by_hand.compute().sum())
        self.log_dict(self.both.compute())
        self.by_hand.reset()
        self.both.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        (x,) = batch
        y = self.net(x)
        self.val_mae(y, x.sum(1, keepdim=True))
        loss = (y - x.sum(1, keepdim=True)).square().mean() + torch.rand(())
        self.log("val", loss, sync_dist=self.trainer.world_size > 1)  # a checkpoint holds EarlyStopping of rank 0
        self.log("val_mae", self.val_mae)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)} if self.schedule else optimizer


class Record(Logger):
    """Keeps what it is told to log."""

    name, version, experiment = "record", 0, None

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.seen.append(("logged", step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Watch(Callback):
    """Records rates, metrics and the state of other callbacks in hooks."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def add(self, hook: str, trainer: Trainer) -> None:
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        metrics = {key: value.clone() for key, value in trainer.callback_metrics.items()}
        stops = [each.state_dict() for each in trainer.callbacks if isinstance(each, EarlyStopping)]
        self.seen.append((hook, trainer.current_epoch, trainer.global_step, rates, metrics, stops))

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.add("batch start", trainer)

    def on_validation_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        self.add("validation start", trainer)

    def on_validation_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        self.add("validation end", trainer)

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        self.add("epoch start", trainer)

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        self.add("epoch end", trainer)


class SaveAlways(Checkpoint):
    """Saves in every hook in which checkpoints are saved; remembers how much had been recorded before each."""

    def __init__(self, folder: Path, seen: list[Any]) -> None:
        self.folder, self.seen, self.saved = folder, seen, []

    def save(self, trainer: Trainer, name: str) -> None:
        path = self.folder / f"{len(self.saved):03}-{name}.ckpt"
        trainer.save_checkpoint(path)
        names = [each[0] for each in self.seen]
        again = names[::-1].index("validation start") + 1 if name == "in-validation" else 0
        self.saved.append((path, len(names) - again))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.save(trainer, "batch-end")

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if args[3] == 0:
            self.save(trainer, "in-validation")

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        self.save(trainer, "after-validation")

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.is_last_batch:  # from within an epoch, a run that has ended is not continued: it may be extended
            self.save(trainer, "epoch-end")


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(torch.arange(24.0).reshape(-1, 3) / 24)


def data(sized: bool = True) -> DataLoader:
    dataset = TensorDataset(torch.arange(24.0).reshape(-1, 3) / 24)
    return DataLoader(dataset, 2, shuffle=True) if sized else DataLoader(Stream(), 2, collate_fn=stacked)


def stacked(items: list[Tensor]) -> list[Tensor]:
    return [torch.stack(items)]


def fit(folder: Path, make: Any, callbacks: Any = list, saves: bool = False, seed: int = 1, **options: Any) -> Any:
    seed_everything(seed, verbose=False)
    ckpt_path, sized = options.pop("ckpt_path", None), options.pop("sized", True)
    model, logger = make(), Record()
    saver = SaveAlways(folder, logger.seen)
    mine = [ResumeExactly(), *callbacks(), Watch(logger.seen), *([saver] if saves else [])]
    trainer = Trainer(
        **{
            "max_epochs": 3,
            "accelerator": "cpu",
            "devices": 1,
            "logger": logger,
            "log_every_n_steps": 2,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": saves,
            "default_root_dir": folder,
            **({"strategy": DDPStrategy(process_group_backend="gloo")} if options.get("devices") == 2 else {}),
            **options,
        },
        callbacks=mine,
    )
    trainer.fit(
        model, data(sized), DataLoader(TensorDataset(torch.arange(18.0).reshape(6, 3) / 9), 2), ckpt_path=ckpt_path
    )
    return model, trainer, logger.seen, saver.saved


def assert_resumes_everywhere(folder: Path, make: Any, **options: Any) -> None:
    options = {"limit_train_batches": BATCHES, **options}
    model, trainer, seen, saved = fit(folder, make, saves=True, **options)
    assert len(saved) > 5
    for path, before in saved:
        again, resumed, seen_again, _ = fit(folder, make, seed=99, ckpt_path=path, **options)
        different = list(differences(seen[before:], seen_again, path.stem))
        assert not different, different[:5]
        assert not list(differences(model.state_dict(), again.state_dict(), path.stem))
        assert (resumed.global_step, resumed.current_epoch) == (trainer.global_step, trainer.current_epoch), path


def stops() -> list[Callback]:
    return [EarlyStopping("val", patience=2, min_delta=10.0)]


def averages() -> list[Callback]:
    return [StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)]


CASES: dict[str, Any] = {
    "at the epoch's end": {"make": lambda: Model(plateau()), "callbacks": stops, "max_epochs": 5},
    "within the epoch": {"make": lambda: Model(plateau()), "callbacks": stops, "val_check_interval": 2},
    "across epochs": {
        "make": lambda: Model(plateau(interval="step", frequency=3, strict=False)),
        "callbacks": stops,
        "check_val_every_n_epoch": None,
        "val_check_interval": 3,
    },
    "every second epoch": {"make": lambda: Model(plateau(monitor="loss_epoch")), "check_val_every_n_epoch": 2},
    "plateau of a step's value": {"make": lambda: Model(plateau(interval="step", monitor="loss_step"))},
    "accumulation": {"make": lambda: Model(step_lr), "accumulate_grad_batches": 3, "max_epochs": 4},
    "max_steps": {"make": lambda: Model(plateau()), "callbacks": stops, "max_steps": 11, "max_epochs": -1},
    "stream": {"make": lambda: Model(plateau()), "callbacks": stops, "sized": False, "limit_train_batches": 1.0},
    "weight averaging": {"make": lambda: Model(step_lr), "callbacks": averages},
    "weight averaging, batch norm": {"make": lambda: Model(step_lr, norm=True), "callbacks": averages},
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.filterwarnings("ignore:.*SWA is currently only supported")
@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_at_any_checkpoint_goes_on_as_the_uninterrupted_one(case, tmp_path):
    """Bugs: a validation due at the checkpoint is left out, so that EarlyStopping never advances over restarts; one
    that was broken off counts its last batches only; ReduceLROnPlateau is not stepped at the end of a resumed epoch;
    epoch means and metrics are those of the batches after the checkpoint; SWA has no scheduler until the next epoch."""
    assert_resumes_everywhere(tmp_path, **CASES[case])


def test_an_early_stop_is_not_forgotten_and_that_of_a_timer_is(tmp_path):
    """Bugs: killed between the validation that stops the run and its end, it trains on; a run that a Timer has ended
    could never be resumed with more time."""

    class StopAfter(Timer):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = True

    options: dict[str, Any] = {"limit_train_batches": BATCHES, "val_check_interval": 2}
    *_, saved = fit(tmp_path, Model, stops, saves=True, **options)
    path, _ = [each for each in saved if "after-validation" in each[0].name][-1]
    _, trainer, seen, _ = fit(tmp_path, Model, stops, ckpt_path=path, **options)
    assert trainer.should_stop
    assert [each[0] for each in seen] == ["epoch end", "logged"]
    *_, saved = fit(tmp_path, Model, lambda: [*stops(), StopAfter("00:00:01:00")], saves=True, **options)
    _, trainer, *_ = fit(tmp_path, Model, ckpt_path=saved[-1][0], **options, max_epochs=2)
    assert trainer.global_step == 2 * BATCHES


def test_changed_arguments_of_log_are_those_of_the_new_code(tmp_path):
    """Bug: a resumed run with another prog_bar, on_epoch or reduction in ``self.log`` ends with Lightning's error that
    log was called twice with different arguments."""

    class Changed(Model):
        def log(self, name: str, value: Any, **options: Any) -> None:  # type: ignore[override]
            changes = {"loss": {"prog_bar": True}, "worst": {"reduce_fx": "min"}, "mae": {"on_step": False}}
            super().log(name, value, **{**options, **changes.get(name, {})})

    *_, before, saved = fit(tmp_path, Model, saves=True, limit_train_batches=BATCHES)
    _, trainer, seen, _ = fit(tmp_path, Changed, ckpt_path=saved[1][0], limit_train_batches=BATCHES)
    ended = next(each[2] for each in seen if each[0] == "logged" and "worst" in each[2])
    expected = next(each[2] for each in before if each[0] == "logged" and "worst" in each[2])
    assert ended["loss_epoch"] == expected["loss_epoch"], "the mean of the whole epoch"
    assert ended["worst"] < expected["worst"]
    assert "loss_step" in trainer.progress_bar_metrics


def test_a_metric_that_is_too_large_is_named_and_not_saved(tmp_path, monkeypatch):
    """Bug: a checkpoint grows by all predictions of the epoch."""
    monkeypatch.setattr(results_internals, "LARGEST_METRIC", 4)
    with pytest.warns(UserWarning, match="resume_exactly: the states of the metrics mae, .* are larger than"):
        *_, saved = fit(tmp_path, Model, saves=True, max_epochs=1)
    checkpoint = torch.load(saved[0][0], weights_only=True)
    assert "mae" not in checkpoint["callbacks"]["resume_exactly"]["ranks"][0]["epoch"]["metrics"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("shown"),
        lambda state: state["shown"]["_callback_metrics"].update(loss="text"),
        lambda state: state["logged"][0].update(reduce="prod"),
        lambda state: state["logged"][0].update(name=3),
        lambda state: state["logged"][0]["state"].update(value="text"),
        lambda state: state["logged"][0]["state"].pop("cumulated_batch_size"),
        lambda state: state["logged"][0]["state"].update(update="code"),
        lambda state: state["metrics"]["mae"].update(states={"total": "text"}),
    ],
)
def test_a_state_of_another_form_is_one_message(damage, tmp_path):
    """Bug: a traceback from inside Lightning at the first value that is logged, or an attribute that is overwritten."""
    *_, saved = fit(tmp_path, Model, saves=True, max_epochs=1)
    checkpoint = torch.load(saved[0][0], weights_only=True)
    damage(checkpoint["callbacks"]["resume_exactly"]["ranks"][0]["epoch"])
    torch.save(checkpoint, saved[0][0])
    with pytest.raises(UserError, match="resume_exactly: its state in the checkpoint cannot be restored"):
        fit(tmp_path, Model, ckpt_path=saved[0][0])


@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_the_progress_bar_of_a_resumed_epoch_counts_its_batches(kind, tmp_path):
    """Bug: tqdm shows 7/? and rich nothing until the next epoch, since the bar is set up at an epoch's start."""

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if not shown:
                shown.append(numbers(trainer))

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            shown.append(numbers(trainer))

    def numbers(trainer: Trainer) -> tuple[int, int]:
        bar: Any = trainer.progress_bar_callback.train_progress_bar  # type: ignore[union-attr]
        return (getattr(bar, "n", None) or getattr(bar, "completed", 0), bar.total)

    *_, saved = fit(tmp_path, Model, saves=True, max_epochs=1)
    shown: list[tuple[int, int]] = []
    bars = {"enable_progress_bar": True, "max_epochs": 1}
    fit(tmp_path, Model, lambda: [kind(refresh_rate=1), Look()], ckpt_path=saved[1][0], **bars)
    assert shown == [(2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("kind", [ProgressBar, ProgressLines])
def test_other_progress_bars_are_left_alone(kind, tmp_path):
    """Bug: a resumed run fails on a progress bar that has no switch, such as that of the command line."""
    *_, saved = fit(tmp_path, Model, saves=True, max_epochs=1)
    trainer = fit(tmp_path, Model, lambda: [kind()], ckpt_path=saved[1][0], enable_progress_bar=True, max_epochs=1)[1]
    assert trainer.global_step == 4


@pytest.mark.slow
def test_two_processes_killed_at_any_checkpoint_go_on_as_uninterrupted(tmp_path):
    """Bugs: a rank gets the epoch means of another; one rank validates or stops, and the other waits for it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run([*command, str(tmp_path)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-5000:]


if __name__ == "__main__":
    for case in ("within the epoch", "weight averaging"):
        options = {**CASES[case], "devices": 2, "limit_train_batches": 2, "val_check_interval": 1}
        assert_resumes_everywhere(Path(sys.argv[1]), **options)
