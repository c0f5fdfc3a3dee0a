"""The private attributes of Lightning and torch behind the train loader."""

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from stabletrain.runtime.internals import loader as loader_internals


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_the_combined_loaders():
    """Bug: a new version of Lightning names them otherwise, and loaders of different lengths are not compared."""
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    assert loader_internals.combined_train_loader(trainer) is None
    assert loader_internals.combined_validation_loader(trainer) is None


def test_the_private_attributes_that_the_train_loader_uses_exist():
    """Bug: a new Lightning or torch has moved one; this test names it."""
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    assert loader_internals.train_loaders(trainer) == []
    assert loader_internals.data_fetcher(trainer) is None
    assert loader_internals.prefetched(trainer) == []
    assert loader_internals.epoch_number(trainer) == 0
    assert not loader_internals.epoch_is_over(trainer)
    loader_internals.count_excluded(trainer, 2)
    assert trainer.fit_loop.epoch_loop.batch_idx == 1
    loader_internals.begin_next_epoch(trainer)  # nothing was restored: nothing to do
    assert trainer.fit_loop.epoch_loop.batch_idx == 1
    loop = trainer.fit_loop.epoch_loop
    assert not trainer.fit_loop.is_resuming
    assert "_resuming_from_checkpoint" in vars(trainer.fit_loop)
    for undo, name, owner in [
        (loader_internals.after_train_start(trainer, print), "on_run_start", trainer.fit_loop),
        (loader_internals.silence_resume_warning(trainer), "reset", loop),
        (loader_internals.around_validation(trainer, print, print), "run", loop.val_loop),
        (loader_internals.around_fetching(trainer, print, print), "_on_before_fetch", loop),
        (loader_internals.wrap_train_loaders(trainer, iter), "process_dataloader", trainer.strategy),
    ]:
        assert name in vars(owner)
        undo()
        assert name not in vars(owner)
    loader = DataLoader(TensorDataset(torch.arange(12)), 4)
    assert loader_internals.takes_index_sampler(loader)
    assert not loader_internals.takes_index_sampler(DataLoader(Stream(), 4))
    assert not loader_internals.reuses_workers(loader)
    assert next(iter(loader_internals.index_sampler(loader))) == [0, 1, 2, 3]
    other = iter([[9, 8]])
    assert [batch.tolist() for (batch,) in loader_internals.iterate_with(loader, other)] == [[9, 8]]
    assert next(iter(loader))[0].tolist() == [0, 1, 2, 3]


def test_workers_of_another_owner_are_left_alone():
    """Bug: persistent workers, or those of an iterator that its loader returns each time, are ended in mid-run."""

    class Endless(DataLoader):
        def __iter__(self):
            if not hasattr(self, "kept"):
                self.kept = super().__iter__()
            return self.kept

    data = TensorDataset(torch.arange(12))
    plain, endless = DataLoader(data, 4, num_workers=1), Endless(data, 4, num_workers=1)
    persistent = DataLoader(data, 4, num_workers=1, persistent_workers=True)
    iterators = [iter(each) for each in (plain, endless, persistent)]
    try:
        for loader, iterator in zip((plain, endless, persistent), iterators, strict=True):
            loader_internals.stop_workers(loader, iterator)
        loader_internals.stop_workers([], iter([]))
        loader_internals.stop_workers(plain, None)
        assert [each._shutdown for each in iterators] == [True, False, False]
        assert not any(worker.is_alive() for worker in iterators[0]._workers)
        assert len(next(iterators[1])[0]) == len(next(iterators[2])[0]) == 4
    finally:
        for each in iterators:
            each._shutdown_workers()
