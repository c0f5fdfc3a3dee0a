"""The train loader: rewinding in a running fit and excluding batches, against fits that never did."""

import copy
import multiprocessing
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler

from stabletrain.errors import UserError
from stabletrain.runtime import rng
from stabletrain.runtime.data.fetched_again import FetchedAgain
from stabletrain.runtime.data.tape import TapedBatch
from stabletrain.runtime.data.train_loader import TrainLoader
from stabletrain.runtime.internals import loader as loader_internals
from stabletrain.testing.trainer import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

BATCHES = 8


class Samples(Dataset):
    def __init__(self, noise=False, size=4 * BATCHES):
        self.inputs = torch.randn(size, 5, generator=torch.Generator().manual_seed(1))
        self.noise = noise

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        noise = torch.randn(5) + random.random() + np.random.randn() if self.noise else torch.zeros(5)
        return self.inputs[index] + 0.1 * noise, index


class Stream(IterableDataset):
    def __init__(self, noise=False, without=()):
        self.samples, self.without = Samples(noise), without

    def __iter__(self):
        return (self.samples[i] for i in range(len(self.samples)) if i // 4 not in self.without)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 1))
        self.seen, self.validated_after = [], []

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).square().mean()
        self.seen.append((batch[1].tolist(), loss.item()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.validated_after.append(self.global_step)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]  # by the epoch


class GoBack(Callback):
    """Marks after every ``every`` batches; after each of ``at`` rewinds once, to the oldest of ``keep`` marks."""

    on_other_content = None

    def __init__(self, *at, every=3, keep=2, exclude=0, names=()):
        self.at, self.every, self.keep, self.exclude, self.names = set(at), every, keep, exclude, names
        self.count, self.snapshots, self.excluded = 0, [], []

    def setup(self, trainer, pl_module, stage):
        self.loader = TrainLoader.of(trainer)
        self.loader.keep_tape(self.on_other_content)
        if self.names:
            self.loader.exclude(self.names)

    def teardown(self, trainer, pl_module, stage):
        self.loader.close()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.count += 1
        if self.count in self.at:
            mark, state = self.snapshots[0]
            since = self.loader.batches_since(mark)
            offending = self.choose(since)
            self.excluded += [since[item].identity for item in offending]
            self.restore(trainer, pl_module, state)
            with rng.preserved():
                self.loader.rewind(mark, frozenset(offending))
            del self.snapshots[1:]
        elif self.count % self.every == 0:
            self.snapshots = [*self.snapshots, (self.loader.mark(), self.take(trainer, pl_module))][-self.keep :]
            self.loader.forget_before(self.snapshots[0][0])

    def choose(self, since):
        return list(since)[len(since) - self.exclude :]

    def take(self, trainer, module):
        optimizer, schedule = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
        state = [module.state_dict(), optimizer.state_dict(), schedule.state_dict(), trainer.fit_loop.state_dict()]
        return copy.deepcopy(state), rng.capture()

    def restore(self, trainer, module, snapshot):
        (weights, optimizer, schedule, loops), state = copy.deepcopy(snapshot)
        module.load_state_dict(weights)
        trainer.optimizers[0].load_state_dict(optimizer)
        trainer.lr_scheduler_configs[0].scheduler.load_state_dict(schedule)
        for path, progress in loops.items():
            owner = trainer.fit_loop
            *parents, name = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            if hasattr(getattr(owner, name, None), "load_state_dict"):
                getattr(owner, name).load_state_dict(progress)
        rng.restore(state)


def fit(loader, *callbacks, epochs=2, **kwargs):
    seed_everything(0, verbose=False)
    model = Model()
    trainer = quiet_trainer(*callbacks, max_epochs=epochs, **kwargs)
    trainer.fit(model, loader, DataLoader(Samples(size=4), 4))
    return model, trainer


def assert_same(one, other):
    for (model, trainer), (model2, trainer2) in [(one, other)]:
        assert trainer.global_step == trainer2.global_step
        for a, b in zip(model.parameters(), model2.parameters(), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(
            trainer.optimizers[0].state_dict()["state"].values(),
            trainer2.optimizers[0].state_dict()["state"].values(),
            strict=True,
        ):
            assert all(torch.equal(a[key], b[key]) for key in a)
        rates = [t.optimizers[0].param_groups[0]["lr"] for t in (trainer, trainer2)]
        assert rates[0] == rates[1]
        assert model.validated_after[-1] == model2.validated_after[-1], "no validation at the end of the last epoch"


LOADERS = {
    "in order": lambda: DataLoader(Samples(), 4),
    "shuffled": lambda: DataLoader(Samples(), 4, shuffle=True),
    "noisy": lambda: DataLoader(Samples(noise=True), 4, shuffle=True),
    "noisy, 2 workers": lambda: DataLoader(Samples(noise=True), 4, shuffle=True, num_workers=2),
    "stream": lambda: DataLoader(Stream(), 4),
    "noisy stream": lambda: DataLoader(Stream(noise=True), 4),
}


@pytest.mark.parametrize("at", [[7], [10], [8], [16], [5, 11, 12]], ids=str)
@pytest.mark.parametrize(
    "loader", [pytest.param(name, marks=[pytest.mark.slow] if "workers" in name else []) for name in LOADERS]
)
def test_a_rewound_run_ends_like_one_that_never_rewound(loader, at):
    """Bug: a lost or repeated batch or another random number, if a run rewinds within an epoch, over its end, at its
    last batch, at the run's last batch, or repeatedly."""
    reference = fit(LOADERS[loader]())
    callback = GoBack(*at)
    model, trainer = fit(LOADERS[loader](), callback)
    assert len(model.seen) > len(reference[0].seen)
    final = {(*samples, loss) for samples, loss in model.seen}
    assert {(*samples, loss) for samples, loss in reference[0].seen} == final
    assert_same(reference, (model, trainer))


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("kind", ["in order", pytest.param("2 workers", marks=pytest.mark.slow), "stream"])
@pytest.mark.parametrize(
    ("at", "count", "missing"),
    [(5, 1, [4]), (5, 2, [3, 4]), (8, 1, [7]), (8, 2, [6, 7]), (7, 1, [6]), (8, 5, [3, 4, 5, 6, 7])],
)
def test_a_rewind_that_excludes_batches_ends_like_a_loader_without_them(at, count, missing, kind, epochs):
    """Bug: no validation or learning-rate step at the end of an epoch whose last batches, or all batches after the
    mark, are excluded; or these batches are not counted as completed."""

    def loader(without=()):
        if kind == "stream":
            return DataLoader(Stream(without=without), 4)
        order = [i for i in range(4 * BATCHES) if i // 4 not in without]
        return DataLoader(Samples(), 4, sampler=order, num_workers=2 if kind == "2 workers" else 0)

    class FirstEpochWithout(GoBack):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.fit_loop._data_source.instance = loader()
            self.generators = rng.capture()

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch > 0:
                rng.restore(self.generators)  # Lightning calls iter() once more on a reloaded loader, which draws

    reference = fit(loader(missing), FirstEpochWithout(), epochs=epochs, reload_dataloaders_every_n_epochs=1)
    callback = GoBack(at, exclude=count)
    result = fit(loader(), callback, epochs=epochs)
    assert [name[0] for name in callback.excluded] == ["batch" if kind == "stream" else "samples"] * count
    assert result[1].fit_loop.epoch_loop.batch_progress.total.completed == BATCHES * epochs
    assert_same(reference, result)


@pytest.mark.parametrize(
    "kind", ["in order", pytest.param("2 workers", marks=pytest.mark.slow), "stream", "by position"]
)
@pytest.mark.parametrize("missing", [[0], [3], [3, 4], [7], [6, 7]], ids=str)
def test_batches_excluded_by_identity_never_come(missing, kind):
    """Bug: after a restart the tape is empty, and a batch that is only known from the tape comes again."""

    def loader(without=()):
        if kind == "stream":
            return DataLoader(Stream(without=without), 4)
        order = [i for i in range(4 * BATCHES) if i // 4 not in without]
        return DataLoader(Samples(), 4, sampler=order, num_workers=2 if kind == "2 workers" else 0)

    if kind in ("stream", "by position"):
        names = [["batch", epoch, position] for position in missing for epoch in (0, 1)]
    else:
        names = [["samples", *range(4 * position, 4 * position + 4)] for position in missing]
    reference = fit(loader(missing))
    result = fit(loader(), GoBack(names=names, every=99))
    assert result[0].seen == reference[0].seen
    assert_same(reference, result)


def test_a_rewind_over_the_end_of_an_epoch_that_excludes_a_batch_draws_the_next_order_again():
    """Bug: the next epoch is replayed in the order that was drawn after the batch that is now excluded."""

    class ExcludeFirst(GoBack):
        def choose(self, since):
            return list(since)[:1]

    callback = ExcludeFirst(10)  # back to the mark after batch 5
    model, trainer = fit(LOADERS["shuffled"](), callback)
    reference = fit(LOADERS["shuffled"](), GoBack(names=[("batch", 0, 6)], every=99))
    assert len(callback.excluded) == 1
    assert model.seen[10:] == reference[0].seen[6:]
    assert_same(reference, (model, trainer))


def test_a_batch_of_the_tape_can_be_excluded_by_its_position():
    """Bug: a batch that is known by its samples comes again after a rewind, although its position is excluded."""

    class ByPosition(GoBack):
        def choose(self, since):
            self.loader.exclude([list(since.values())[-1].position_key])
            return []

    model, trainer = fit(LOADERS["shuffled"](), ByPosition(5))
    reference = fit(LOADERS["shuffled"](), GoBack(names=[("batch", 0, 4)], every=99))
    assert model.seen[5:] == reference[0].seen[3:]
    assert_same(reference, (model, trainer))


class BatchNumbers(Callback):
    """Records the position in the epoch and the batch_idx of each batch, for loaders that return samples in order."""

    def __init__(self):
        self.positions, self.numbers = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.positions.append(batch[1][0].item() // 4)
        self.numbers.append(batch_idx)


@pytest.mark.parametrize("limit", [BATCHES, 6], ids=["", "limited"])
@pytest.mark.parametrize("kind", ["in order", "stream"])
@pytest.mark.parametrize("missing", [[0], [1], [4], [1, 2], [0, 2, 4]], ids=str)
def test_excluded_batches_count_for_batch_idx_validation_and_progress(missing, kind, limit):
    """Bug: excluded batches are not counted, of a loader without a length either, so that batch_idx is too small,
    validation comes too late, and a limited epoch has as many batches more."""
    numbers, kwargs = BatchNumbers(), {"val_check_interval": 3}
    if limit != BATCHES:
        kwargs["limit_train_batches"] = limit  # Lightning then takes the limit as the stream's length
    names = [("batch", epoch, position) for epoch in (0, 1) for position in missing]
    model, trainer = fit(LOADERS[kind](), GoBack(names=names, every=99), numbers, **kwargs)
    expected = [position for position in range(limit) if position not in missing]
    assert numbers.positions == numbers.numbers == expected * 2
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == 2 * limit
    steps = [step for step, number in enumerate(numbers.numbers, 1) if number in (2, 5)]
    assert model.validated_after == steps


@pytest.mark.parametrize("kind", ["in order", "stream"])
@pytest.mark.parametrize(("missing", "limit"), [([7], BATCHES), ([6, 7], BATCHES), ([5, 6, 7], 6)], ids=str)
def test_batches_excluded_at_the_end_of_an_epoch_count_for_its_validation(missing, limit, kind):
    """Bug: no validation at the end of the epoch, because they are not counted if the loader has no length, or because
    batches beyond `limit_train_batches` are counted too."""
    numbers, kwargs = BatchNumbers(), {"val_check_interval": limit}
    if limit != BATCHES:
        kwargs["limit_train_batches"] = limit
    names = [("batch", epoch, position) for epoch in (0, 1) for position in missing]
    model, trainer = fit(LOADERS[kind](), GoBack(names=names, every=99), numbers, **kwargs)
    last = missing[0] - 1
    assert numbers.positions == [*range(last), last] * 2
    assert numbers.numbers == [*range(last), limit - 1] * 2
    assert model.validated_after == [last + 1, 2 * (last + 1)]
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == 2 * limit


def test_an_epoch_that_stops_before_an_excluded_batch_does_not_count_it_in_the_next_one():
    """Bug: the count of batches excluded before the prefetched one survives the end of the epoch."""

    class StopEpoch(BatchNumbers):
        def setup(self, trainer, pl_module, stage):
            pl_module.on_train_batch_start = lambda batch, batch_idx: -1 if batch_idx == 2 else None

    numbers = StopEpoch()
    fit(LOADERS["stream"](), GoBack(names=[("batch", 0, 3)], every=99), numbers)
    assert numbers.positions == numbers.numbers == [0, 1] * 2


@pytest.mark.parametrize("exclude", [0, 1])
@pytest.mark.parametrize("kind", ["in order", "stream"])
def test_batch_idx_is_right_after_a_rewind_from_just_before_an_excluded_batch(kind, exclude):
    """Bug: the batch that was excluded before the prefetched one is counted although the run went back before it."""
    numbers = BatchNumbers()
    fit(LOADERS[kind](), numbers, GoBack(3, every=1, names=[("batch", 0, 3)], exclude=exclude), epochs=1)
    replayed = [1, 2] if exclude == 0 else [1]
    assert numbers.numbers == numbers.positions == [0, 1, 2, *replayed, 4, 5, 6, 7]


@pytest.mark.parametrize("kind", ["in order", "stream"])
def test_batch_idx_is_right_after_a_rewind_to_just_before_an_excluded_batch(kind):
    """Bug: the excluded batch is counted twice by the fetcher, and the epoch ends a batch too early."""
    numbers = BatchNumbers()
    fit(LOADERS[kind](), numbers, GoBack(3, every=1, names=[("batch", 0, 1)]), epochs=1)
    assert numbers.numbers == numbers.positions == [0, 2, 3, 2, 3, 4, 5, 6, 7]


def test_nothing_is_stored_without_keep_tape():
    """Bug: a tape that nobody rewinds holds every batch of the run in memory."""

    class TapeLength(Callback):
        longest = 0

        def setup(self, trainer, pl_module, stage):
            self.loader = TrainLoader.of(trainer)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            tape = self.loader.loaders[0].tape
            self.longest = max(self.longest, tape.end - tape.first)

        def teardown(self, trainer, pl_module, stage):
            self.loader.close()

    length = TapeLength()
    fit(LOADERS["in order"](), length)
    assert length.longest == 0


def test_two_users_share_one_train_loader_and_the_last_close_uninstalls_it():
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    first, second = TrainLoader.of(trainer), TrainLoader.of(trainer)
    assert first is second
    first.close()
    assert loader_internals.train_loader_wrapper(trainer) is not None
    second.close()
    assert loader_internals.train_loader_wrapper(trainer) is None
    assert "process_dataloader" not in vars(trainer.strategy)


def test_a_dropped_mark_is_refused_and_so_is_excluding_from_two_loaders():
    class Late(GoBack):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                self.early = self.loader.mark()
            if batch_idx == 3:
                self.loader.forget_before(self.loader.mark())
                assert not self.loader.can_rewind(self.early)
                with pytest.raises(ValueError, match="does not reach back"):
                    self.loader.rewind(self.early)

    fit(LOADERS["in order"](), Late(), epochs=1)

    class Pair(Model):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    trainer = quiet_trainer(GoBack(names=[("batch", 0, 0)]), max_epochs=1)
    with pytest.raises(UserError, match="single train loader, got 2"):
        trainer.fit(Pair(), {name: LOADERS["in order"]() for name in "ab"}, DataLoader(Samples(size=4), 4))


class Workers(GoBack):
    """The most worker processes that were alive at a batch's end."""

    most = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.most = max(self.most, len(multiprocessing.active_children()))


@pytest.mark.parametrize("case", ["replaced by a rewind", "reloaded", "error"])
def test_workers_of_an_abandoned_iterator_end_at_once(case):
    """Bug: they live on until the garbage collector finds the iterator, and then hold the process for 5 s each."""
    workers = Workers(*([10] if case == "replaced by a rewind" else []), exclude=5)
    model = Model()
    if case == "error":
        model.on_train_epoch_end = lambda: 1 / 0
    reload = int(case == "reloaded")
    trainer = quiet_trainer(workers, max_epochs=3, reload_dataloaders_every_n_epochs=reload)
    before = len(multiprocessing.active_children())
    try:
        trainer.fit(model, DataLoader(Samples(), 4, num_workers=2), DataLoader(Samples(size=4), 4))
    except ZeroDivisionError:
        assert case == "error"
    assert workers.most == before + 2
    assert len(multiprocessing.active_children()) == before


class ByIndices(GoBack):
    """Fetches again what it can; notes the largest number of whole batches on the tape, and whether content differs."""

    whole, others = 0, 0

    def on_other_content(self):
        self.others += 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        tape = self.loader.loaders[0].tape
        events = [tape[number] for number in range(tape.first, tape.end)]
        batches = [event.batch for event in events if isinstance(event, TapedBatch)]
        self.whole = max(self.whole, sum(not isinstance(each, FetchedAgain) for each in batches))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class Single(Samples):
    """Of one sample each, for a loader that makes no batches."""

    def __getitem__(self, index):
        return self.inputs[[index]], torch.tensor([index])


class OneList(SequentialSampler):
    """Batches of four, all of them the same list object."""

    def __iter__(self):
        batch = []
        for index in super().__iter__():
            batch.append(index)
            if len(batch) == 4:
                yield batch
                batch.clear()

    def __len__(self):
        return len(self.data_source) // 4


OWN = {
    "one list": lambda: DataLoader(Samples(), batch_sampler=OneList(Samples())),
    "own generator": lambda: DataLoader(Samples(), 4, shuffle=True, generator=torch.Generator().manual_seed(5)),
    "no batches": lambda: DataLoader(Single(size=BATCHES), None, shuffle=True),
}


@pytest.mark.parametrize("kind", ["in order", "shuffled", "noisy", "stream", *OWN])
def test_batches_that_are_fetched_again_are_the_same(kind):
    """Bugs: fetching again moves the sampler or a generator, so that later batches differ; a batch whose dataset drew
    random numbers is not kept; or all batches are kept all the same."""
    loader = {**LOADERS, **OWN}[kind]
    reference = fit(loader())
    callback = ByIndices(7, 10, 16)
    model, trainer = fit(loader(), callback)
    assert len(model.seen) > len(reference[0].seen)
    final = {(*samples, loss) for samples, loss in model.seen}
    assert {(*samples, loss) for samples, loss in reference[0].seen} == final
    assert_same(reference, (model, trainer))
    assert callback.others == 0
    assert (callback.whole > 1) == (kind in ("noisy", "stream")), "the first of an epoch is kept"


def test_other_content_for_the_same_samples_is_reported_once():
    """Bug: a dataset that returns something else each time is replayed with other data, and nobody is told."""

    class Counting(Samples):
        fetched = 0

        def __getitem__(self, index):
            self.fetched += 1
            return self.inputs[index] + self.fetched, index

    callback = ByIndices(7, 8)
    fit(DataLoader(Counting(), 4), callback, epochs=1)
    assert callback.others == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_epoch_ends_where_the_validation_has_begun_the_same_iterator_anew():
    """Bug: persistent workers have one iterator; a validation within the epoch begins it anew, the positions go back,
    Lightning counts batches down, and the epoch never ends."""

    class Ends(Callback):
        batches = 0

        def on_train_batch_end(self, trainer, *_):
            self.batches += 1
            assert self.batches <= BATCHES

    def train(*callbacks):
        loader = DataLoader(Samples(), 4, num_workers=1, persistent_workers=True, multiprocessing_context="fork")
        seed_everything(0, verbose=False)
        model = Model()
        options = {"val_check_interval": 3, "limit_val_batches": 1}
        quiet_trainer(*callbacks, Ends(), max_epochs=1, **options).fit(model, loader, loader)
        return model.seen

    assert train(GoBack()) == train()
