"""The data tape, and how far a rollback goes back, in runs with unhealthy steps all the time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import assert_same
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import stabletrain as st
from stabletrain.core.bytes import shown
from stabletrain.testing.toy import quiet
from stabletrain.testing.trainer import quiet_trainer
from stabletrain_plugins.rollback import memory
from stabletrain_plugins.rollback.test_rollback import Requests

EVERY, KEEP = 5, 3
RING = KEEP * EVERY
"""Applied steps that a full ring goes back."""
TAPE = 2 * RING
"""The most batches that are stored: as many again for an incident, in which no snapshot is taken."""
QUICK: dict[str, Any] = {"every": EVERY, "keep": KEEP, "trust_after": 4, "rewarm": 0, "check_every": 1000}


PATIENT = {**QUICK, "window": 500, "patience": 500, "accept": None}
STUBBORN = st.SkipNonFinite(max_in_a_row=500), st.Rollback(**PATIENT)
"""Skips step after step without a rollback."""


class Model(LightningModule):
    """One weight; records the numbers of its batches, the bad ones of which have a loss that is NaN."""

    def __init__(self, bad: Callable[[int], bool]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(1, 1)
        self.bad = bad
        self.seen: list[int] = []

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        number = int(batch[0][0])
        self.seen.append(number)
        loss = (self.layer(torch.ones(1, 1)) - 0.001 * (number % 7)).square().sum()
        return loss * torch.nan if self.bad(number) else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class Numbers(IterableDataset[Tensor]):
    """Batches of a number each; every ``skip``-th one is bad from batch ``start`` on, and ``size(i)`` numbers large."""

    def __init__(self, count: int, skip: int = 0, start: int = 30, size: Any = lambda i: 1) -> None:
        self.count, self.skip, self.start, self.size = count, skip, start, size

    def __iter__(self) -> Any:
        return (torch.full((self.size(i),), float(i)) for i in range(self.count))

    def bad(self, number: int) -> bool:
        return bool(self.skip) and number >= self.start and number % self.skip == 0


class Watch(Callback):
    """Records the largest tape, and the greatest age of the newest trusted snapshot after the first 30 batches."""

    def __init__(self) -> None:
        self.batches = self.nbytes = self.age = 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        (rollback,) = (each for each in trainer.callbacks if isinstance(each, st.Rollback))  # type: ignore[attr-defined]
        guard, loader = rollback._guard_and_loader()
        self.batches = max(self.batches, *(each.tape.batches for each in loader.loaders))
        self.nbytes = max(self.nbytes, sum(each.tape.nbytes for each in loader.loaders))
        if guard.counters.attempted > 30 and len(rollback._ring):
            self.age = max(self.age, trainer.global_step - rollback._ring.trusted[-1].applied)


def train(
    folder: Path, data: Numbers | list[Numbers], *callbacks: Callback, resume: Path | None = None, **options: Any
) -> Model:
    data = data if isinstance(data, list) else [data]
    model = Model(data[0].bad)
    defaults: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 0, "default_root_dir": folder}
    trainer = quiet_trainer(*callbacks, **{**defaults, **options})
    with quiet():
        trainer.fit(model, tuple(DataLoader(each, batch_size=None) for each in data), ckpt_path=resume)
    return model


def interventions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "interventions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("skip", [20, 3, 2])
def test_tape_and_age_stay_within_what_was_announced(tmp_path: Path, skip: int) -> None:
    """Bug: with a skipped step now and then the tape grows for ever, and a rollback goes back to where that began.

    With one in 3 or in 2 an incident never ends, and no snapshot becomes trusted by its healthy steps.
    """
    watch = Watch()
    train(tmp_path, Numbers(600, skip), st.SkipNonFinite(), st.Rollback(**QUICK), watch)
    assert watch.batches == math.ceil(RING * skip / (skip - 1)) <= TAPE, "those of as many applied steps"
    assert watch.age <= RING


def test_a_run_without_applied_steps_keeps_no_more_batches(tmp_path: Path) -> None:
    """Bug: where no step is applied any more, no snapshot is taken, and the tape is never cut."""
    watch = Watch()
    train(tmp_path, Numbers(300, skip=1), *STUBBORN, watch)
    assert watch.batches == TAPE
    assert watch.age == 5


class Weights(Callback):
    """Records the count of applied steps and the weight after each batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.seen.append((trainer.global_step, pl_module.layer.weight.detach().clone()))


def test_a_rollback_beyond_the_tape_leaves_the_data_position(tmp_path: Path) -> None:
    """Bug: the run stops, or the tape raises, or batches are read from the wrong place, where the tape is too short."""
    weights = Weights()
    data = Numbers(120, skip=1, start=60)
    model = train(tmp_path, data, Requests().at(100), *STUBBORN, weights)
    (made,) = interventions(tmp_path)
    assert (made["applied"], made["rewound"]) == ([60, 55], False)
    assert len(made["excluded"]) == TAPE - 1, "those of the incident that are stored; one is fetched ahead"
    assert model.seen == list(range(120))
    assert weights.seen[99][0] == 55
    assert torch.equal(weights.seen[99][1], weights.seen[54][1])


@pytest.mark.parametrize("every", [EVERY, 7])
def test_a_rollback_beyond_the_tape_is_replayed(tmp_path: Path, every: int) -> None:
    """Bugs: the replay rewinds what the run did not; or it cannot rewind, because its own arguments bound the tape.

    One rollback restores the data position, the other one does not.
    """
    data = Numbers(120, skip=1, start=60)
    first = train(tmp_path / "a", data, Requests().at(44, 100), *STUBBORN, max_epochs=2)
    assert [each["rewound"] for each in interventions(tmp_path / "a")] == [True, False]
    log = st.Rollback(**{**PATIENT, "every": every}, replay=str(tmp_path / "a"))
    watch = Watch()
    second = train(tmp_path / "b", data, st.SkipNonFinite(max_in_a_row=500), log, watch, max_epochs=2)
    assert first.seen == second.seen
    assert_same(first.state_dict(), second.state_dict())
    assert interventions(tmp_path / "b") == interventions(tmp_path / "a")
    assert watch.batches <= 2 * KEEP * every


def test_a_run_with_such_a_rollback_resumes_exactly(tmp_path: Path) -> None:
    """Bug: the batches that it excluded, or its data position, are not part of the checkpoint."""
    data = Numbers(100, skip=4, start=58)
    save = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=10, save_top_k=-1)
    rollback = {**QUICK, "trust_after": 5}
    stack = Requests().at(70), st.SkipNonFinite(), st.ResumeExactly()
    whole = train(tmp_path / "a", data, *stack, st.Rollback(**rollback), save, max_epochs=2)
    assert len(interventions(tmp_path / "a")) == 1
    again = train(
        tmp_path / "b",
        data,
        *(Requests().at(70), st.SkipNonFinite(), st.ResumeExactly()),
        st.Rollback(**rollback),
        resume=tmp_path / "ckpt" / "step=80.ckpt",
        max_epochs=2,
    )
    assert whole.seen[-len(again.seen) :] == again.seen
    assert_same(whole.state_dict(), again.state_dict())


def limit_for(batches: float) -> dict[str, Any]:
    """Arguments with which the tape may hold so many batches of one number, besides the snapshots of the model."""
    return {**QUICK, "max_memory": f"{KEEP * 2 * 4 + int(batches * 4)}B"}


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(memory.logger, level, lambda text, *values: found.append(text % values))
    return found


def test_larger_batches_are_held_to_the_memory(tmp_path: Path, messages: list[str]) -> None:
    """Bug: batches that are larger than the first one take more memory than announced, or than there is."""
    watch = Watch()
    data = Numbers(60, size=lambda i: 1 if i < 30 else 4)
    train(tmp_path, data, st.Rollback(**limit_for(TAPE + 1)), watch)
    assert watch.nbytes == 4 * (TAPE + 1)
    assert watch.age <= EVERY + 4, "snapshots are trusted as ever"
    _, warning = messages
    assert f"{TAPE} batches take more than {shown(4 * (TAPE + 1))}" in warning
    assert "plugins.spike.max_memory" in warning


def test_a_rollback_beyond_the_memory_leaves_the_data_position(tmp_path: Path) -> None:
    """Bug: with a tape of a batch or none the state cannot be restored."""
    data = Numbers(80, size=lambda i: 1 if i < 30 else 64)
    model = train(tmp_path, data, Requests().at(58), st.Rollback(**limit_for(TAPE)))
    (made,) = interventions(tmp_path)
    assert (made["to"], made["rewound"], made["excluded"]) == (50, False, [])
    assert model.seen == list(range(80))


@pytest.mark.parametrize("large", [20, 4])
def test_the_tapes_of_several_loaders_share_the_memory(tmp_path: Path, large: int) -> None:
    """Bugs: each loader takes all of it; or only one loader's tape is cut."""
    watch = Watch()
    data = [Numbers(60), Numbers(60, size=lambda i: 1 + large * (i > 9))]
    train(tmp_path, data, st.Rollback(**limit_for(2 * TAPE)), watch)
    assert watch.batches <= RING
    assert 4 * TAPE < watch.nbytes <= 4 * 2 * TAPE


def test_accumulation_bounds_the_tape_by_the_largest_window(tmp_path: Path, messages: list[str]) -> None:
    """Bug: where a later epoch accumulates more batches, more are stored than announced, or positions are lost."""
    watch = Watch()
    schedule = GradientAccumulationScheduler({0: 1, 1: 3})
    train(tmp_path, Numbers(90), st.Rollback(**QUICK), watch, schedule, max_epochs=3)
    assert watch.batches == 3 * RING
    assert f"{3 * TAPE} batches of 4 B" in messages[0]


def test_sample_indices_take_no_memory_and_change_nothing(tmp_path: Path, messages: list[str]) -> None:
    """Bugs: batches are kept in memory although they can be fetched again; the run differs; the announced memory."""
    ends = []
    for tape in ("batches", "indices"):
        model, watch = Model(lambda number: False), Watch()
        rollback = st.Rollback(**QUICK, tape=tape)  # type: ignore[arg-type]
        options: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 0, "default_root_dir": tmp_path / tape}
        trainer = quiet_trainer(Requests().at(44), rollback, watch, **options)
        data: Any = [torch.full((100,), float(i)) for i in range(80)]
        with quiet():
            trainer.fit(model, DataLoader(data, batch_size=1))
        assert len(interventions(tmp_path / tape)) == 1
        ends.append((model.seen, model.state_dict(), watch.nbytes))
    (seen, weights, nbytes), (seen_again, weights_again, few) = ends
    assert seen == seen_again
    assert_same(weights, weights_again)
    assert (nbytes, few) == (400 * (RING - 1), 0), "the epoch's first batch is kept, but not for long"
    announced = [each for each in messages if "needs up to" in each]
    assert f"{TAPE} batches of 400 B" in announced[0]
    assert f"the sample indices of {TAPE} batches: 24 B of memory" in announced[1]


class Noisy(Dataset[Tensor]):
    """Numbers with random noise."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return index + 0.1 * torch.rand(100)


def test_batches_with_random_numbers_are_announced_whole(tmp_path: Path, messages: list[str]) -> None:
    """Bug: at the first snapshot, after one batch, it is not known yet that they cannot be fetched again."""
    model = Model(lambda number: False)
    trainer = quiet_trainer(st.Rollback(**QUICK, tape="indices"), max_epochs=1, default_root_dir=tmp_path)
    with quiet():
        trainer.fit(model, DataLoader(Noisy(), batch_size=1, shuffle=True))
    assert any(f"{TAPE} batches of 400 B" in each for each in messages)
