"""What a run says of the steps that it dropped: their samples in events, and the sentence at its end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import HEALTHY, HIGH_LOSS, NAN_LOSS, EventRecorder, Net, SkipHighLoss, batches, fit, run, trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from stabletrain import Guard, ResumeExactly, Rollback, SkipNonFinite
from stabletrain.core.events import Event, Request, RequestKind
from stabletrain.core.rule import Observation
from stabletrain.runtime.guard import dropped_steps, metrics
from stabletrain.runtime.guard.dropped_steps import DroppedStep, warning
from stabletrain.runtime.guard.metrics import Counters
from stabletrain.runtime.records import event_log

Sample = tuple[Tensor, int, int]
BAD = frozenset({9, 17, 18, 40})


class Samples(Dataset[Sample]):
    """A sample's target and number; the loss of a batch with a bad one is NaN."""

    def __init__(self, size: int = 64) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        return torch.ones(6) * index, int(index in BAD), index


class Stream(IterableDataset[Sample]):
    def __iter__(self) -> Iterator[Sample]:
        return (Samples()[i] for i in range(64))


class Unsized:
    """A batch sampler without a length: Lightning then fetches a batch ahead."""

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(i, i + 4)) for i in range(0, 64, 4))


class Model(Net):
    """Records the samples of each micro-batch."""

    def __init__(self, optimizer: str = "adamw-fused") -> None:
        super().__init__(optimizer)
        self.seen: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, bad, index = batch
        self.seen.append(index.tolist())
        loss = super().training_step((x, HEALTHY), batch_idx)
        return loss * math.nan if int(bad.sum()) else loss


LOADERS = {
    "in order": lambda: DataLoader(Samples(), 4),
    "shuffled": lambda: DataLoader(Samples(), 4, shuffle=True),
    "without a length": lambda: DataLoader(Samples(), batch_sampler=Unsized()),  # type: ignore[arg-type]
}


def drops(recorder: EventRecorder) -> dict[int, tuple[int | str, ...]]:
    return {event.step: event.samples for event in recorder.events if event.kind == "nonfinite"}


@pytest.mark.parametrize("mode", ["exact", "device"])
@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_events_name_the_samples_of_a_dropped_step(tmp_path: Path, mode: Any, name: str, accumulate: int) -> None:
    """Bugs: those of the batch before or after it, of one micro-batch alone, or of the step after it (device mode)."""
    torch.manual_seed(0)
    recorder, model = EventRecorder(), Model()
    callbacks = SkipNonFinite(max_in_a_row=9), Guard(mode=mode), ResumeExactly(), recorder
    fit(model, LOADERS[name](), *callbacks, accumulate_grad_batches=accumulate, max_epochs=2, default_root_dir=tmp_path)
    per_epoch = [model.seen[:16], model.seen[16:]]
    windows = [epoch[i : i + accumulate] for epoch in per_epoch for i in range(0, 16, accumulate)]
    samples = [tuple(index for batch in window for index in batch) for window in windows]
    expected = {step: each for step, each in enumerate(samples) if BAD & set(each)}
    assert len(expected) >= 3
    assert drops(recorder) == expected
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert {line["step"]: tuple(line["samples"]) for line in lines} == expected
    assert all("more_samples" not in line for line in lines)


def test_where_samples_are_not_known_none_are_named(tmp_path: Path) -> None:
    """Bug: positions in a stream, or indices of one of several loaders, are taken for samples."""
    data = {"one": LOADERS["in order"](), "two": LOADERS["in order"]()}

    class Two(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["one"], batch_idx)

    cases: list[tuple[LightningModule, Any, list[Callback]]] = [
        (Model(), DataLoader(Stream(), 4), [ResumeExactly()]),
        (Two(), data, [ResumeExactly()]),
        (Model(), LOADERS["in order"](), []),  # no plugin has wrapped the loader
    ]
    for number, (model, items, more) in enumerate(cases):
        recorder = EventRecorder()
        fit(model, items, SkipNonFinite(), recorder, *more, default_root_dir=tmp_path / str(number))
        assert list(drops(recorder).values()) == [(), (), ()]
        assert "samples" not in (tmp_path / str(number) / "events.jsonl").read_text()


class Requesting(SkipNonFinite):  # type: ignore[misc]
    """Requests a rollback after the attempted step 14."""

    plugin = "requesting"

    def observe(self, state: Any, outcome: Any) -> Any:
        request = Request(RequestKind.ROLLBACK, self.label, "requested")
        return Observation(state, (), (request,) if outcome.step == 13 else ())


@pytest.mark.parametrize("name", ["in order", "without a length"])
def test_a_rollback_undoes_no_counts(tmp_path: Path, name: str) -> None:
    """Bugs: the counts become those of the snapshot; a batch that comes again after a rollback has other samples."""
    recorder, model = EventRecorder(), Model("adamw-foreach")
    quick: dict[str, Any] = {"every": 4, "trust_after": 2, "rewarm": 0, "drop": "none"}
    rollback = Rollback(**quick)
    fit(model, LOADERS[name](), Requesting(), rollback, recorder, default_root_dir=tmp_path)
    (made,) = (event for event in recorder.events if event.kind == "rollback")
    assert made.value >= 1
    bad = {step: tuple(samples) for step, samples in enumerate(model.seen) if BAD & set(samples)}
    assert len(bad) >= 4, "at least one comes twice"
    assert {event.step: event.samples for event in recorder.events if event.samples} == bad
    assert rollback._guard is not None
    counters = rollback._guard.counters
    assert (counters.attempted, counters.skipped) == (len(model.seen), len(bad))
    assert sum(counters.dropped_samples.values()) == 4 * len(bad)
    assert counters.dropped_by == {"requesting": len(bad)}


def test_only_the_plugins_that_dropped_a_step_are_counted() -> None:
    """Bug: a plugin is blamed for the steps of another one, and the user loosens the wrong limit."""
    guard = Guard()
    faults = [HEALTHY, NAN_LOSS, HIGH_LOSS, HIGH_LOSS, HEALTHY]
    fit(Net(), batches(*faults), SkipNonFinite(), SkipHighLoss(), guard)
    assert guard._guard is not None
    assert guard._guard.counters.dropped_by == {"skip_nonfinite": 1, "skip_high_loss": 2}


def test_a_long_list_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a batch of 100,000 samples writes a line of 700 KB at each dropped step, or all of them stay in memory."""
    monkeypatch.setattr(dropped_steps, "_MAX_IN_EVENT", 3)
    dropped = DroppedStep(7, (5, 6, 7, 8, 9))
    event = Event(7, "skip", "skip", 2.0, 1.0, "2 > 1")
    assert dropped.describe(event) == event._replace(samples=(5, 6, 7), more_samples=2)
    assert json.loads(dropped.describe(event).to_json())["more_samples"] == 2
    assert dropped.describe(event._replace(step=8)) == event._replace(step=8)
    assert dropped.describe(event._replace(kind="rollback")) == event._replace(kind="rollback")


def test_counts_of_samples_are_bounded_and_keep_the_frequent_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the counts of a long run fill memory and checkpoints, or the sample in every dropped step is lost."""
    monkeypatch.setattr(metrics, "MAX_COUNTED_SAMPLES", 4)
    counters = Counters()
    for i in range(200):
        before = counters
        counters = counters.add_drop(["skip"], [-1, *range(3 * i, 3 * i + 2)])
        assert len(counters.dropped_samples) <= 4
    assert counters.dropped_samples[-1] >= 200 - 600 / 4
    assert counters.dropped_by == {"skip": 200}
    assert before.dropped_by == {"skip": 199}, "earlier counts are not changed"


def test_the_sentence_says_how_many_by_whom_and_which() -> None:
    """Bugs: wrong numbers; a sentence in a run that dropped few steps; the most frequent samples last."""
    counters = Counters(1000, 11, dropped_by={"a": 2, "b": 9}, dropped_samples={i: min(i, 9) for i in range(20)})
    text = warning(counters, {"a": "plugins.one", "b": "plugins.two"})
    assert text == (
        "11 of 1000 attempted steps (1.1%) were dropped, 9 of them by b. Samples that were in them most often: "
        "9 (9 times), 10 (9 times), 11 (9 times), 12 (9 times), 13 (9 times). Look at the samples of these steps "
        "(events.jsonl names them): if they are wrong, remove them from the data; if they are right, loosen the limits "
        "of b (config key plugins.two), or remove it"
    )
    assert warning(counters._replace(skipped=10), {}) is None, "1 % is not more than 1 %"
    assert warning(Counters(99, 99), {}) is None, "a short run"
    once = warning(counters._replace(dropped_samples={1: 1, 2: 1}), {})
    assert once is not None
    assert "No sample was in two of them" in once
    unknown = warning(counters._replace(dropped_samples={}), {})
    assert unknown is not None
    assert "Look at the data of these steps (events.jsonl has the reasons)" in unknown


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(event_log.logger, "warning", lambda text, *values: found.append(text % values))
    return found


class Interrupts(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 90:
            raise KeyboardInterrupt


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_sentence_ends_a_run_once(said: list[str], interrupted: bool) -> None:
    """Bug: it is said in every epoch, or not at all where the run is interrupted."""
    more = [Interrupts()] if interrupted else []
    options: dict[str, Any] = {"max_epochs": 7 if not interrupted else 20}
    try:
        fit(Model(), LOADERS["in order"](), SkipNonFinite(), ResumeExactly(), *more, **options)
    except (KeyboardInterrupt, SystemExit):
        assert interrupted
    sentences = [each for each in said if "attempted steps" in each]
    assert len(sentences) == 1
    expected = "21 of 112" if not interrupted else "21 of 111"
    assert f". {expected}" in sentences[0]
    assert "8 (7 times), 9 (7 times), 10 (7 times), 11 (7 times), 16 (7 times)." in sentences[0]


@pytest.mark.parametrize("cut", [20, 32, 41])
def test_resumed_equals_uninterrupted(tmp_path: Path, said: list[str], cut: int) -> None:
    """Bug: a resumed run counts from 0, or counts the steps before the checkpoint twice."""
    save = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = SkipNonFinite()
    fit(Model(), LOADERS["in order"](), whole, ResumeExactly(), save, max_epochs=8, default_root_dir=tmp_path)
    again, mine = SkipNonFinite(), trainer(max_epochs=8, default_root_dir=tmp_path / "again")
    mine.callbacks += [again, ResumeExactly()]  # type: ignore[attr-defined]
    run(mine, Model(), LOADERS["in order"](), ckpt_path=tmp_path / "ckpt" / f"step={cut}.ckpt")
    assert whole._guard is not None
    assert again._guard is not None
    assert again._guard.counters == whole._guard.counters
    assert whole._guard.counters.skipped == 24
    first, second = (each.split(". ", 1)[1] for each in said if "attempted steps" in each)  # after the file's name
    assert first == second
