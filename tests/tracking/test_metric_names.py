"""A module's metrics and the plugins' never share a name; old names are read; docs/metrics.md is what a run writes."""

from __future__ import annotations

import csv
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import HEALTHY, INF_GRAD, Net, batches, fit
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from stabletrain import (
    ClipNorm,
    DetectSpikes,
    MeasureNoiseScale,
    MonitorActivations,
    MonitorGradients,
    SaveCheckpoints,
    ScheduleLR,
    WatchOverfitting,
    default_callbacks,
)
from stabletrain.cli.replay import replay_file
from stabletrain.core.metric_names import without_old_names
from stabletrain.launch.throughput import MeasureThroughput
from stabletrain.tracking import MLflowLogger, compare

ITEMS = batches(*[HEALTHY] * 6)
PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
THEIRS = {"loss": 1000.0, "lr": 2000.0, "grad_norm": 3000.0, "skipped": 4000.0}


class LogsTheSame(Net):
    """Logs other values under our short words: in training, or in validation as well."""

    def __init__(self, names: dict[str, float], prog_bar: bool = False, in_validation: bool = False) -> None:
        super().__init__()
        self.names, self.prog_bar, self.in_validation = names, prog_bar, in_validation
        self.seen: list[dict[str, Any]] = []

    def _log(self) -> None:
        for name, value in self.names.items():
            self.log(name, value, prog_bar=self.prog_bar, on_step=not self.in_validation, on_epoch=True, batch_size=1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if not self.in_validation:
            self._log()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.in_validation:
            self._log()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(dict(self.trainer.progress_bar_metrics))


def column(file: Path, name: str) -> list[float]:
    return [float(row[name]) for row in csv.DictReader(file.read_text().splitlines()) if row[name]]


def test_both_values_are_whole_in_every_logger(tmp_path: Path, uri: str, client: Any) -> None:
    """Bug: `loss`, `lr`, `grad_norm` and `skipped` of the module and of the guard under one key at one step."""
    table, store = CSVLogger(tmp_path), MLflowLogger(uri)
    mine = fit(LogsTheSame(THEIRS), ITEMS, *default_callbacks(), logger=[table, store], log_every_n_steps=2)
    file = Path(table.log_dir) / "metrics.csv"
    for name, value in THEIRS.items():
        step = [point.value for point in client.get_metric_history(store.version, f"{name}_step")]
        assert column(file, f"{name}_step") == step == [value] * 3
        ours = [point.value for point in client.get_metric_history(store.version, f"stability/{name}")]
        assert column(file, f"stability/{name}") == pytest.approx(ours)
        assert len(ours) == 3
        assert max(ours) < 1000
        assert mine.callback_metrics[name] == value
        assert mine.callback_metrics[f"stability/{name}"] == pytest.approx(ours[-1])


def test_both_values_are_whole_in_tensorboard(tmp_path: Path) -> None:
    """Bug: as above, in the event files of TensorBoard."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoardLogger(tmp_path)
    fit(LogsTheSame(THEIRS), ITEMS, *default_callbacks(), logger=board, log_every_n_steps=2)
    events = accumulator.EventAccumulator(board.log_dir).Reload()
    for name, value in THEIRS.items():
        assert {each.value for each in events.Scalars(f"{name}_step")} == {value}
        assert max(each.value for each in events.Scalars(f"stability/{name}")) < 1000


@pytest.mark.parametrize("in_validation", [False, True])
def test_the_progress_bar_and_callback_metrics_keep_what_the_module_put_there(in_validation: bool) -> None:
    """Bug: our loss over the module's, under one word in the progress bar, or under an old name."""
    words = {"loss": 1000.0, "skipped": 4000.0}
    module = LogsTheSame(words, prog_bar=True, in_validation=in_validation)
    mine = fit(module, ITEMS, ClipNorm(), val_items=ITEMS[:1], max_epochs=2)
    names = ("loss", "skipped") if in_validation else ("loss_step", "skipped_step")
    for seen in module.seen[6:]:  # the second epoch: it was validated
        assert [seen[name] for name in names] == [1000.0, 4000.0]
        assert seen["grad_norm"] < 1000.0
        assert "stability/loss" not in seen
    assert mine.callback_metrics["loss"] == 1000.0
    assert mine.callback_metrics["skipped"] == 4000.0
    assert mine.callback_metrics["stability/skipped"] == 0.0
    assert mine.callback_metrics["grad_norm"] == mine.callback_metrics["stability/grad_norm"]


@pytest.mark.parametrize("in_validation", [False, True])
def test_a_modules_own_stability_name_wins(in_validation: bool, tmp_path: Path, caplog: Any) -> None:
    """Bug: two values under one key after all, because the module uses our prefix; a warning at every flush."""
    table = CSVLogger(tmp_path)
    module = LogsTheSame({"stability/loss": 1000.0}, in_validation=in_validation)
    with caplog.at_level(logging.WARNING, "stabletrain"):
        mine = fit(module, ITEMS, ClipNorm(), logger=table, val_items=ITEMS[:1], max_epochs=3)
    assert mine.callback_metrics["stability/loss"] == 1000.0
    file = Path(table.log_dir) / "metrics.csv"
    if in_validation:
        assert column(file, "stability/loss")[6:] == [1000.0] * 3  # after the six steps before it was known
    else:
        assert set(column(file, "stability/loss_step")) == {1000.0}
        assert "stability/loss" not in file.read_text().splitlines()[0].split(",")
    assert len(column(file, "stability/grad_norm")) == 18
    assert caplog.text.count("logs stability/loss") == 1


def test_old_names_are_read_and_named_once(tmp_path: Path, caplog: Any) -> None:
    """Bugs: `monitor="loss"` of an existing script ends in an error; nobody says the new name; old names are logged."""
    table = CSVLogger(tmp_path)
    stop = EarlyStopping("loss", patience=1, min_delta=1e9, check_on_train_epoch_end=True)
    best = ModelCheckpoint(tmp_path / "best", monitor="spike_score", every_n_train_steps=3)
    saver = SaveCheckpoints(tmp_path / "own", every=None, monitor="clipped", background=False)
    others = [ModelCheckpoint(tmp_path / "new", monitor="stability/loss"), ClipNorm(), DetectSpikes()]
    with caplog.at_level(logging.WARNING, "stabletrain"):
        mine = fit(Net(), ITEMS, stop, best, saver, *others, logger=table, val_items=ITEMS[:1], max_epochs=9)
    assert mine.current_epoch == 2
    assert best.best_model_path
    assert saver.best_model_path
    for monitor, name in (("loss", "loss"), ("spike_score", "spike_score"), ("clipped", "clipped_share")):
        assert caplog.text.count(f"monitors '{monitor}'") == 1
        assert f"monitor='stability/{name}'" in caplog.text
    assert caplog.text.count(" monitors ") == 3
    names = (Path(table.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {name for name in names if not name.startswith("stability/")} == {"epoch", "step", "val_loss"}
    metrics = mine.callback_metrics
    assert metrics["skipped"] == metrics["stability/skipped"] == 0
    assert without_old_names(metrics).keys() == {name for name in metrics if "/" in name} | {"val_loss"}


def test_the_page_lists_what_a_run_writes(tmp_path: Path, uri: str, client: Any) -> None:
    """Bug: a metric that is written and on no page, or on the page and written by nothing."""
    store = MLflowLogger(uri)
    items = batches(*[HEALTHY] * 2, INF_GRAD, *[HEALTHY] * 5)  # an overflow of the loss scaler

    class Module(LogsTheSame):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("own", 1.0, batch_size=1)

    module = Module({"mine": math.nan})
    more = [MeasureThroughput(), ScheduleLR("cosine"), MeasureNoiseScale(every=1), WatchOverfitting("own")]
    more.append(MonitorActivations())
    monitor = MonitorGradients(update_ratio=True, rms_t=True, spectral_norm=True)
    options = {"max_epochs": 2, "fp16": True, "accumulate_grad_batches": 2, "val_items": batches(HEALTHY)}
    fit(module, items, *default_callbacks(gradients=monitor), *more, logger=store, **options)
    metrics = client.get_run(store.version).data.metrics
    written = [name for name in metrics if name.startswith(("stability", "throughput"))]
    written = [re.sub("/net.*", "/<layer>", name) for name in written]
    written = [re.sub("^stability_nonfinite/.*", "stability_nonfinite/<metric>", name) for name in written]
    on_page = re.findall(r"^\| `((?:stability|throughput)[^`]+)` \|", PAGE.read_text(), re.MULTILINE)
    of_ranks = {"stability/replica_checks", "stability/replica_differences"}  # of several processes
    # this module has no ReLU, attention, cross-entropy or second moments; the tests of the plugins write these
    of_others = {name for name in on_page if re.search("/(zeros|attention_.*|output_.*|rms_t)($|/)", name)}
    assert len(of_others) == 7
    of_others |= {"stability/qk_logit", "stability/qk_clipped_heads"}
    assert set(on_page) == {*written, *of_ranks, *of_others, "throughput/tokens_per_s"}  # these batches hold no tokens


def test_a_named_instance_has_a_place_of_its_own() -> None:
    """Bug: two detectors write one metric."""
    mine = fit(Net(), ITEMS, DetectSpikes(), DetectSpikes(name="second"))
    assert {"stability/spike_score", "stability/second/spike_score", "second/spike_score"} <= set(mine.callback_metrics)


def test_runs_of_before_are_compared_with_new_ones(uri: str, client: Any) -> None:
    """Bugs: an old run has no value beside a new one; another tool's `loss` is taken for ours."""
    old = {"loss": 2.0, "clipped": 0.5, "skipped": 1.0, "val_loss": 3.0, "mine": 1.0, "grad_norm/net": 4.0}
    new = {
        "stability/loss": 1.0,
        "stability/clipped_share": 0.1,
        "stability/skipped": 0.0,
        "val/loss": 2.5,
        "loss": 9.0,
    }
    ids = {}
    for name, metrics in {"old": old, "new": new, "other": {"loss": 7.0, "val_loss": 6.0}}.items():
        ids[name] = client.create_run("0", run_name=name).info.run_id
        for key, value in metrics.items():
            client.log_metric(ids[name], key, value)
    client.log_param(ids["old"], "model._target_", "stabletrain.workloads.char_gpt.CharGPT")
    found = compare(uri, list(ids.values()))
    assert found.metrics["stability/loss"] == (2.0, 1.0, None)
    assert found.metrics["stability/clipped_share"] == (0.5, 0.1, None)
    assert found.metrics["val/loss"] == (3.0, 2.5, None)
    assert found.metrics["loss"] == (None, 9.0, 7.0)
    assert found.metrics["stability_layers/grad_norm/net"] == (4.0, None, None)
    asked = compare(uri, list(ids.values()), metrics=["clipped", "skipped", "grad_norm/*", "loss"])
    names = ("stability/clipped_share", "stability/skipped", "stability_layers/grad_norm/net", "loss")
    assert tuple(asked.metrics) == names


@pytest.mark.parametrize("header", ["loss,grad_norm", "stability/loss,stability/grad_norm,loss", "grad_norm,loss,lr"])
def test_a_series_is_replayed_under_old_and_new_names(header: str, tmp_path: Path) -> None:
    """Bugs: a file of a new run lacks its columns; the module's own `loss` is replayed in place of ours."""
    rows = [
        [("nan" if step == 2 else "1.0") if name != "lr" else "0" for name in header.split(",")] for step in range(4)
    ]
    if header.endswith(",loss"):
        rows = [[*row[:2], "1e9"] for row in rows]
    file = tmp_path / "series.csv"
    file.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
    assert "4 steps, 0 clipped (0.00%), 1 skipped" in replay_file("skip_nonfinite", str(file))
