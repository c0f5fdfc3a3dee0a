"""What a plan says of tokens, operations, the learning rate, time and cost."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger
from planned_runs import Again, Data, module, planned
from printed_plans import PLAN, printed
from torch.utils.data import DataLoader, IterableDataset

import stabletrain as st
from stabletrain.cli import plan_numbers as numbers
from stabletrain.config.compose import compose
from stabletrain.config.validate import check
from stabletrain.errors import UserError
from stabletrain.launch.measured_steps import MeasureOptions, forecast, measured_config
from stabletrain.planning.plan import Flops, PluginPlan, as_json, from_json
from stabletrain.runtime.records.measure_steps import MeasureSteps
from stabletrain.runtime.stop import EndReached
from stabletrain.runtime.windows.counted_throughput import CountedThroughput

FLOPS = Flops(micro_batch=4_000_000_000, attention=1_000_000_000, samples=8, tokens=1024, embeddings=10**9)
FULL = replace(PLAN, flops=FLOPS, samples=8, tokens=1024, readers=16, steps=10, steps_per_epoch=4.0, rate=0.1)
TIMES = {"seconds": [0.5, 1.0, 1.0, 1.0, 9.0], "device": "cpu", "peak_flops": None}


class Endless(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            yield torch.randint(0, 84, (17,))


class EndlessData(LightningDataModule):
    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(Endless(), batch_size=4)


class ManyBatches(Data):
    def train_dataloader(self) -> Again:
        return Again(torch.randint(0, 84, (4, 17)), 40)


def without_validation() -> Any:
    made = module()
    made.validation_step = None  # type: ignore[assignment,method-assign]
    return made


def test_all_numbers_are_printed_and_survive_json(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: ranks or micro-batches are forgotten in a step's numbers; a field is lost between two processes; a line is
    wider than the terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    schedule = PluginPlan(key="schedule", name="ScheduleLR", text="linear", curve=(0.5, 1.0, 0.0))
    plan = replace(FULL, micro_batches=2, plugins=[schedule])
    plan = replace(plan, measured=forecast(plan, {**TIMES, "peak_flops": 10**12}, 2.5))
    content = json.loads(json.dumps(as_json(plan)))
    assert json.loads(json.dumps(as_json(from_json(content)))) == content
    text = printed(capsys, (plan, None))
    flat = " ".join(text.split())
    assert "16 billion parameters, 1 billion of them in embeddings" in flat
    assert "2.5 epochs, 2 micro-batches in each; 256 samples with 32768 tokens in a step" in flat
    assert "327.7 k tokens, those of 2.5 epochs together: 2.05e-05 for each parameter." in flat
    assert "about 20 make the best use of the compute (Hoffmann et al. 2022)" in flat
    assert "counted 128 GFLOP" in flat
    assert "of these, attention 32 GFLOP (25.0%)" in flat
    assert f"6 x parameters x tokens 3.146 PFLOP ({6 * 16e9 * 32768 / 128e9:.3f} of the counted)" in flat
    assert "learning rate: at most 0.1, at the end 0" in flat
    assert "share of the peak (MFU) 0.8%" in flat
    assert "cost, at 2.5 per hour of each of 16 0.111" in flat
    assert max(map(len, text.splitlines()[1:])) <= 80


def test_a_long_reason_is_wrapped(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the line that says why no step could be traced runs out of the terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    why = "module.py, line 12: the step needs the values of tensors " * 3
    text = printed(capsys, (replace(PLAN, stopped_by=why, no_flops_since=why), None))
    assert max(map(len, text.splitlines()[1:])) <= 80
    assert "The operations could not be counted: module.py, line 12" in " ".join(text.split())


def test_what_is_unknown_is_said(capsys: Any) -> None:
    """Bugs: samples are called tokens; an unknown length is zero hours; operations that were not counted are hidden."""
    flops = replace(FLOPS, tokens=None, uncounted=["LSTM"])
    plan = replace(FULL, flops=flops, tokens=None, steps=None)
    plan = replace(plan, measured=forecast(plan, TIMES, 1.0))
    assert plan.measured is not None
    assert (plan.measured.hours, plan.measured.cost, plan.measured.mfu) == (None, None, None)
    text = " ".join(printed(capsys, (plan, None)).split())
    assert "tokens" not in text.partition("Not counted in the memory")[0]
    assert "6 x parameters x samples" in text
    assert "so there are more operations than shown: LSTM." in text
    assert "the run's steps unknown: so is their number" in text
    assert "unknown: Lightning knows no peak of cpu" in text
    assert "cost, at 1 per hour of each of 16 unknown" in text


def test_the_length_of_a_run_on_a_dataset_without_an_end_is_unknown() -> None:
    """Bugs: the plan reads an endless dataset to its end, or says that the run has no steps."""
    plan = planned("single", 1, {"max_steps": -1}, data=EndlessData())
    assert (plan.stopped_by, plan.steps, plan.epochs) == (None, None, None)
    assert numbers.tokens(plan) is not None
    assert "unknown number of steps" in numbers.steps(plan)


@pytest.mark.parametrize("kind", ["constant", "cosine"])
def test_the_drawn_curve_is_that_of_the_run(kind: Any) -> None:
    """Bugs: the curve of another length is drawn; a constant rate has no line."""
    schedule = st.ScheduleLR(kind, lr_warmup=2)
    plan = planned("single", 1, {"max_steps": 8}, plugins=[("schedule", schedule)])
    (found,) = plan.plugins
    assert plan.rate == 5e-3
    assert found.curve[:3] == (0.5, 1.0, 1.0)
    assert len(found.curve) == 8
    lines = list(numbers.learning_rate(plan))
    assert lines[0].startswith("learning rate: at most 0.005, at the end 0.00")
    without = replace(plan, plugins=[])
    assert list(numbers.learning_rate(without)) == ["learning rate: 0.005, constant"]
    own = replace(without, scheduler="StepLR")
    assert "the module's own StepLR, which is not drawn" in next(numbers.learning_rate(own))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 4}, "--measure: expected at least 5 steps, got 4"),
        ({"steps": 20, "price": 0.0}, "--price: expected a price of a device for an hour, above 0, got 0"),
        ({"steps": 20, "price": -2.5}, "above 0, got -2.5"),
        ({"steps": 20, "price": float("nan")}, "above 0, got nan"),
        ({"price": 2.5}, "--price needs the time of a step: add --measure 20"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    """Bug: a run that costs nothing, or less."""
    with pytest.raises(UserError, match=message):
        MeasureOptions(**options)


def test_measured_steps_are_written_and_the_fit_is_ended(tmp_path: Path) -> None:
    """Bugs: micro-batches count as steps; steps to warm up are measured; a run that is too short says nothing."""

    def fit(steps: int, **options: Any) -> tuple[pl.Trainer, dict[str, Any]]:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(
            accelerator="cpu", callbacks=[MeasureSteps(steps)], default_root_dir=tmp_path, limit_val_batches=0,
            enable_model_summary=False, **quiet, **options,
        )  # fmt: skip
        trainer.fit(without_validation(), datamodule=ManyBatches())
        return trainer, json.loads((tmp_path / "step_times.json").read_text())

    with pytest.raises(EndReached, match="ended after 8 steps"):
        fit(5, max_steps=20, accumulate_grad_batches=2)
    found = json.loads((tmp_path / "step_times.json").read_text())
    assert len(found["seconds"]) == 5
    assert min(found["seconds"]) > 0
    assert (found["device"], found["peak_flops"]) == ("cpu", None)
    trainer, found = fit(20, max_steps=6)
    assert trainer.global_step == 6
    assert len(found["seconds"]) == 3


def test_the_measured_run_is_the_run_without_its_files() -> None:
    """Bugs: the schedule is that of a shorter run; checkpoints or metrics are written; the recipe's config changes."""
    composed = compose("char_gpt", ["callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping"])
    before = json.dumps(composed.config)
    config = measured_config(composed.config, 20, Path("/nowhere/run"))
    assert json.dumps(composed.config) == before
    assert config["trainer"]["max_steps"] == 1500
    assert config["plugins"]["checkpoints"] is None
    assert config["plugins"]["clip"] == composed.config["plugins"]["clip"]
    assert list(config["callbacks"]) == ["measure_steps"]
    assert "mlflow" not in json.dumps(config["logger"])


def test_callbacks_of_lightning_are_options_that_can_be_built() -> None:
    """Bugs: an option names a class that configs may not build; the override that a plan prints is refused."""
    flags = ["callbacks/device_stats=monitor", "callbacks/model_summary=deep", "logger=none"]
    composed = compose("char_gpt", [*numbers.throughput_override(FLOPS).split(), *flags])
    assert not check(composed)
    assert composed.config["callbacks"]["throughput"]["flops_per_batch"] == 4_000_000_000
    with pytest.raises(UserError, match="flops_per_batch: expected at least 1, got 0"):
        CountedThroughput(flops_per_batch=0)


def test_the_throughput_monitor_logs_operations_and_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    """Bugs: Lightning's callback does not find the number; the user's module keeps an attribute of ours."""
    logger, trained = CSVLogger(tmp_path), without_validation()
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=[CountedThroughput(flops_per_batch=1000, window_size=2)], logger=logger,
        log_every_n_steps=1, max_steps=6, limit_val_batches=0, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(trained, datamodule=ManyBatches())
    with (Path(logger.log_dir) / "metrics.csv").open(encoding="utf-8") as file:
        logged = list(csv.DictReader(file))
    rates = [each for each in logged if float(each.get("train/device/flops_per_sec") or 0) > 0]
    assert rates
    for each in rates:
        ratio = float(each["train/device/flops_per_sec"]) / float(each["train/device/samples_per_sec"])
        assert ratio == pytest.approx(1000 / 4)
    assert not hasattr(trained, "flops_per_batch")
