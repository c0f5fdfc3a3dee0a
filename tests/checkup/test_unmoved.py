"""Nothing of the user's moves: module, loaders, generators."""

import copy
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doctor_suite.modules import Mlp, digit_loaders, digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

import stabletrain
from stabletrain.checkup.loader_state import preserved
from stabletrain.checkup.table import CHECKS
from stabletrain.errors import UserError
from stabletrain.runtime import rng
from stabletrain.testing.trainer import quiet_trainer

LEARNING = frozenset(check.name for check in CHECKS if check.family == "learning")
"""Checks that need further steps, which take most of the time."""


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Images with noise of a generator of its own, which counts and remembers what was read."""

    def __init__(self) -> None:
        self.generator, self.numpy, self.python = (
            torch.Generator().manual_seed(1),
            np.random.default_rng(2),
            random.Random(3),
        )
        self.count, self.seen = 0, list[int]()
        self.x, self.y = digits()

    def __len__(self) -> int:
        return 320

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.count += 1
        self.seen.append(index)
        shift = self.numpy.normal() + self.python.gauss(0, 1)
        return self.x[index] + 0.01 * (torch.randn(1, generator=self.generator) + shift).float(), self.y[index]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return bool(a == b)


def test_module_loader_and_random_numbers_are_as_before() -> None:
    """Bugs: weights, gradients, modes or buffers that were trained; a sampler that has drawn; a dataset that counts on;
    a generator of the user's that is further on."""
    module = Mlp(norm=True)
    module.net[1].weight.grad = torch.ones_like(module.net[1].weight)
    module.net.eval()
    data = Augmented()
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(4))
    loader = DataLoader(data, 32, sampler=sampler, generator=torch.Generator().manual_seed(5))
    untouched, later = copy.deepcopy(module), [batch[0] for batch in copy.deepcopy(loader)]
    before = rng.capture()
    stabletrain.doctor(module, loader, loader, seconds=600)
    assert _equal(rng.capture(), before)
    assert _equal(module.state_dict(), untouched.state_dict())
    assert torch.equal(module.net[1].weight.grad, torch.ones_like(module.net[1].weight))
    assert [each.training for each in module.modules()] == [each.training for each in untouched.modules()]
    assert vars(module).keys() == vars(untouched).keys()
    assert data.count == 0
    assert data.seen == []
    assert all(torch.equal(a, b[0]) for a, b in zip(later, loader, strict=True))


def test_gradients_that_are_off_stay_off() -> None:
    """Bugs: Lightning enables them and leaves them so; nothing can be trained in inference mode."""
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            report = stabletrain.doctor(Mlp(), *digit_loaders(), skip=LEARNING)
            assert not torch.is_grad_enabled()
        assert "raises" not in [each.check.name for each in report.findings], str(report)


class Lines(IterableDataset[tuple[Tensor, Tensor]]):
    """Digits by the numbers in an open file."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = digits()
        while line := self.file.readline():
            yield x[int(line)], y[int(line)]


def test_an_open_file_is_where_it_was(tmp_path: Path) -> None:
    """Bug: the lines that doctor has read are missing in the run."""
    (tmp_path / "numbers").write_text("".join(f"{i}\n" for i in range(320)))
    with open(tmp_path / "numbers") as file:
        file.readline()
        report = stabletrain.doctor(Mlp(), DataLoader(Lines(file), 32), skip=LEARNING)
        assert file.readline() == "1\n"
    assert next(each for each in report.results if each.check.name == "loader").answer.kind == "fine"


def test_a_stream_that_cannot_go_back_is_refused() -> None:
    """Bug: what was read of a pipe is lost."""
    ends = os.pipe()
    os.close(ends[1])
    with open(ends[0]) as file, pytest.raises(UserError, match=r"train_loader\.dataset\.file is a stream"):
        stabletrain.doctor(Mlp(), DataLoader(Lines(file), 32))


def test_a_module_that_was_trained_keeps_its_trainer() -> None:
    """Bugs: the Trainer is copied with the module, with all that hangs on it; the module loses its own."""
    module, (train, _) = Mlp(), digit_loaders()
    trainer = quiet_trainer(max_steps=2)
    trainer.not_to_be_copied = (each for each in range(3))  # type: ignore[attr-defined]
    trainer.fit(module, train)
    stabletrain.doctor(module, train, skip=LEARNING)
    assert module.trainer is trainer


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    """Digits for ever, from where it stands."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = digits()
        while True:
            index = self.position % 1400
            self.position += 1
            yield x[index], y[index]


def test_an_endless_dataset_is_read_in_part_and_stays_where_it_stands() -> None:
    """Bugs: it is read for ever; the position of the stream is lost."""
    data = Endless()
    data.position = 7
    skip = LEARNING - {"no better than guessing"}
    report = stabletrain.doctor(Mlp(), DataLoader(data, 32), skip=skip, seconds=600)
    assert data.position == 7
    answers = {each.check.name: each.answer for each in report.results}
    assert answers["loader"].kind == "fine"
    assert "all of an epoch" not in answers["loader"].text
    assert answers["no better than guessing"].kind == "fine"


def test_what_cannot_be_put_back_is_refused_before_it_is_read() -> None:
    """Bug: a stream that is a few batches further on, without a word."""

    class Stream(IterableDataset[int]):
        def __init__(self) -> None:
            self.source = iter(range(100))

        def __iter__(self) -> Iterator[int]:
            return self.source

    data = Stream()
    with pytest.raises(UserError, match=r"val_loader\.dataset\.source is an iterator \(range_iterator\)"):
        stabletrain.doctor(Mlp(), digit_loaders()[0], DataLoader(data, 4))
    assert next(data.source) == 0


def test_the_state_is_put_back_after_an_exception() -> None:
    """Bug: a loader that raises is left moved."""
    data = Augmented()
    state = data.generator.get_state()
    with pytest.raises(IndexError), preserved(DataLoader(data), "loader"):
        data[10**6]
    assert data.count == 0
    assert torch.equal(data.generator.get_state(), state)


def test_a_module_that_cannot_be_copied_is_one_message() -> None:
    """Bug: the original is trained instead, or a traceback of the copy module."""
    module = Mlp()
    module.kept = torch.ones(2, requires_grad=True) * nn.Parameter(torch.ones(2))
    with pytest.raises(UserError, match="Mlp cannot be copied"):
        stabletrain.doctor(module, *digit_loaders())
