"""A resumed run against an uninterrupted one, bit for bit, and the messages if that is impossible.

Run as a script, this file is also the run that a slow test starts in two processes; benchmarks/kills.py kills runs.
"""

import argparse
import hashlib
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from stabletrain import ResumeExactly, UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]

BATCHES = 16


class Samples(Dataset):
    """Each sample is drawn with noise from the global generators, of all three kinds."""

    def __init__(self, size: int = 4 * BATCHES, noise: bool = True) -> None:
        generator = torch.Generator().manual_seed(3)
        self.inputs, self.targets = torch.randn(size, 6, generator=generator), torch.randn(size, 1, generator=generator)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        noise = torch.randn(6) + random.random() + np.random.randn() if self.noise else 0.0
        return self.inputs[index] + 0.1 * noise, self.targets[index], index


class Stream(IterableDataset):
    def __init__(self, **kwargs) -> None:
        self.samples = Samples(**kwargs)

    def __iter__(self):
        return (self.samples[index] for index in range(len(self.samples)))


class Batches:
    def __iter__(self):
        return iter(DataLoader(Samples(), 4))

    def __len__(self) -> int:
        return BATCHES


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.seen: list[tuple[list[int], float, int]] = []

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.seen.append((batch[2].tolist(), loss.item(), batch_idx))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", (self.net(batch[0]) - batch[1] + torch.rand(1)).square().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def plain(**kwargs):
    return DataLoader(Samples(), 4, **kwargs)


LOADERS = {
    "in order": plain,
    "shuffled": lambda: plain(shuffle=True),
    "shuffled, 2 workers": lambda: plain(shuffle=True, num_workers=2),
    "own generator": lambda: plain(shuffle=True, generator=torch.Generator().manual_seed(5)),
    "weighted": lambda: plain(sampler=WeightedRandomSampler([1.0, 2.0] * (2 * BATCHES), 4 * BATCHES)),
    "one by one": lambda: DataLoader(Samples(BATCHES), batch_size=None, shuffle=True, collate_fn=one),
    "stream": lambda: DataLoader(Stream(), 4),
    "stream, 2 workers": lambda: DataLoader(Stream(size=2 * BATCHES), 4, num_workers=2),
    "no DataLoader": lambda: Batches(),
    "two loaders": lambda: {"a": plain(shuffle=True), "b": DataLoader(Samples(size=20), 4, shuffle=True)},
}


def one(sample):
    inputs, targets, index = sample
    return inputs.expand(2, 6) * torch.tensor([[1.0], [2.0]]), targets.expand(2, 1), torch.tensor([index])


class TwoLoaders(Model):
    def training_step(self, batch, batch_idx):
        first, second = batch["a"], batch["b"]
        both = [torch.cat([x, y]) for x, y in zip(first, second, strict=True)]
        return super().training_step(both, batch_idx)


class Save(Checkpoint):
    """Saves a checkpoint in one hook, after these optimizer steps."""

    def __init__(self, folder, *steps, hook="on_train_batch_end"):
        self.folder, self.steps = Path(folder), steps
        setattr(self, hook, self.save)

    def save(self, trainer, *args):
        path = self.folder / f"{trainer.global_step}.ckpt"
        if trainer.global_step in self.steps and not path.exists():
            trainer.save_checkpoint(path)
            self.batches = len(trainer.lightning_module.seen)


def fit(folder, make_loader, save=None, seed=0, validates=False, callbacks=None, model=None, ckpt_path=None, **kwargs):
    """Run one fit with a small model."""
    seed_everything(seed, verbose=False)
    loader = make_loader()
    model = model or (TwoLoaders() if isinstance(loader, dict) else Model())
    callbacks = [ResumeExactly()] if callbacks is None else callbacks
    arguments = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": save is not None,
        "limit_val_batches": 1.0 if validates else 0,
        "default_root_dir": folder,
        **kwargs,
    }
    trainer = Trainer(**arguments, callbacks=callbacks if save is None else [*callbacks, save])
    trainer.fit(model, loader, DataLoader(Samples(8), 4), ckpt_path=ckpt_path)
    return model, trainer


def optimizer_tensors(trainer):
    state = trainer.optimizers[0].state_dict()["state"]
    return [value for each in state.values() for value in each.values()]


def assert_same_end(reference, resumed):
    (model, trainer), (model2, trainer2) = reference, resumed
    assert model2.seen == model.seen[-len(model2.seen) :], "other batches, losses or batch numbers"
    assert trainer2.global_step == trainer.global_step
    for key, value in model.state_dict().items():
        assert torch.equal(value, model2.state_dict()[key]), key
    for a, b in zip(optimizer_tensors(trainer), optimizer_tensors(trainer2), strict=True):
        assert torch.equal(a, b)
    assert trainer.optimizers[0].param_groups[0]["lr"] == trainer2.optimizers[0].param_groups[0]["lr"]


def assert_resumes(folder, make_loader, step, hook="on_train_batch_end", **kwargs):
    save = Save(folder, step, hook=hook)
    reference = fit(folder, make_loader, save=save, **kwargs)
    resumed = fit(folder, make_loader, ckpt_path=folder / f"{step}.ckpt", seed=123, **kwargs)
    assert len(resumed[0].seen) == len(reference[0].seen) - save.batches
    assert_same_end(reference, resumed)


@pytest.mark.parametrize("step", [5, BATCHES, BATCHES + 2])
@pytest.mark.parametrize(
    "loader", [pytest.param(name, marks=[pytest.mark.slow] if "workers" in name else []) for name in LOADERS]
)
def test_a_resumed_run_ends_like_an_uninterrupted_one(loader, step, tmp_path):
    """Bug: the epoch restarts at sample 0, in another order, with other random numbers, as with Lightning alone."""
    assert_resumes(tmp_path, LOADERS[loader], step)


CASES = {
    "accumulation": ({"accumulate_grad_batches": 2}, 3),
    "accumulation, end of an epoch": ({"accumulate_grad_batches": 2}, BATCHES // 2),
    "accumulation, short last window": ({"accumulate_grad_batches": 3}, 6),
    "max_steps": ({"max_epochs": -1, "max_steps": 40}, 5),
    "max_steps, end of an epoch": ({"max_epochs": -1, "max_steps": 40}, BATCHES),
    "max_steps, epoch-end hook": ({"max_epochs": -1, "max_steps": 40, "hook": "on_train_epoch_end"}, BATCHES),
    "epoch-end hook": ({"hook": "on_train_epoch_end"}, BATCHES),
    "epoch-end hook, validation": ({"hook": "on_train_epoch_end", "validates": True}, 2 * BATCHES),
    "max_steps, epoch-end hook, validation": (
        {"max_epochs": -1, "max_steps": 40, "hook": "on_train_epoch_end", "validates": True},
        BATCHES,
    ),
    "between validations": ({"validates": True, "val_check_interval": 4}, 6),
    "before a validation": ({"validates": True, "val_check_interval": 4}, 8),
    "after a validation": ({"validates": True, "val_check_interval": 4, "hook": "on_validation_end"}, 8),
    "in a validation": ({"validates": True, "val_check_interval": 4, "hook": "on_validation_batch_start"}, 8),
    "after an epoch's validation": ({"validates": True, "hook": "on_validation_end"}, BATCHES),
    "before an epoch's validation": ({"validates": True}, BATCHES),
    "before the first batch": ({"hook": "on_train_start"}, 0),
    "before the first epoch": ({"hook": "on_train_epoch_start"}, 0),
    "epoch-start hook": ({"hook": "on_train_epoch_start"}, BATCHES),
    "epoch-start hook, validation": ({"hook": "on_train_epoch_start", "validates": True}, 2 * BATCHES),
    "max_steps, epoch-start hook": ({"max_epochs": -1, "max_steps": 40, "hook": "on_train_epoch_start"}, BATCHES),
    "limited epochs": ({"limit_train_batches": 7}, 7),
    "within limited epochs": ({"limit_train_batches": 7}, 9),
    "reloaded every epoch": ({"reload_dataloaders_every_n_epochs": 1}, BATCHES + 3),
    "reloaded at the end of an epoch": ({"reload_dataloaders_every_n_epochs": 1}, BATCHES),
}


@pytest.mark.parametrize("loader", ["shuffled", pytest.param("shuffled, 2 workers", marks=pytest.mark.slow), "stream"])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_like_an_uninterrupted_one_wherever_it_was_saved(case, loader, tmp_path):
    """Bug: Lightning's counts of batches and epochs, or its prefetched batch, are those of another point of the run."""
    kwargs, step = CASES[case]
    assert_resumes(tmp_path, LOADERS[loader], step, **kwargs)


class DrawInHooks(Callback):
    """Draws in hooks that a resumed fit calls before the loop, and in those of an epoch's start and end."""

    def __init__(self, epoch_end):
        self.epoch_end = epoch_end

    def on_train_start(self, trainer, pl_module):
        torch.rand(3)

    def on_train_epoch_start(self, trainer, pl_module):
        torch.rand(1)

    def on_train_epoch_end(self, trainer, pl_module):
        torch.rand(self.epoch_end)


@pytest.mark.parametrize("draws_first", [False, True])
@pytest.mark.parametrize(
    ("step", "hook", "kwargs"),
    [
        (0, "on_train_start", {}),
        (5, "on_train_batch_end", {}),
        (BATCHES, "on_train_batch_end", {}),
        (BATCHES, "on_train_epoch_end", {}),
        (BATCHES, "on_validation_end", {"validates": True}),
        (BATCHES, "on_train_batch_end", {"reload_dataloaders_every_n_epochs": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("loader", ["shuffled", "stream"])
def test_draws_before_the_loop_do_not_count_and_those_of_an_epochs_hooks_do(
    loader, step, hook, kwargs, draws_first, tmp_path
):
    """Bug: what a callback or the module draws before the loop changes the resumed run; what they draw in the hooks of
    an epoch's start or end is undone, or comes after the draws of a batch that was prefetched too early."""

    def callbacks():
        draw = DrawInHooks(1)
        return [draw, ResumeExactly()] if draws_first else [ResumeExactly(), draw]

    save = Save(tmp_path, step, hook=hook)
    reference = fit(tmp_path, LOADERS[loader], save=save, callbacks=callbacks(), **kwargs)
    path = tmp_path / f"{step}.ckpt"
    resumed = fit(tmp_path, LOADERS[loader], ckpt_path=path, seed=9, callbacks=callbacks(), **kwargs)
    assert_same_end(reference, resumed)


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_end"])
@pytest.mark.parametrize("steps", [21, 2 * BATCHES])
@pytest.mark.parametrize("loader", ["shuffled", "stream"])
def test_a_finished_run_can_be_extended(loader, steps, hook, tmp_path):
    """Bug: a checkpoint saved after a fit that stopped within an epoch has no position or another batch_idx; one saved
    after an epoch continues within that epoch."""
    reference = fit(tmp_path, LOADERS[loader], max_epochs=-1, max_steps=40)
    fit(tmp_path, LOADERS[loader], save=Save(tmp_path, steps, hook=hook), max_epochs=-1, max_steps=steps)
    path = tmp_path / f"{steps}.ckpt"
    resumed = fit(tmp_path, LOADERS[loader], ckpt_path=path, seed=9, max_epochs=-1, max_steps=40)
    assert len(resumed[0].seen) == 40 - steps
    assert_same_end(reference, resumed)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end", "on_train_end"])
@pytest.mark.parametrize("validates", [False, True])
def test_a_finished_run_that_is_resumed_ends_with_its_random_numbers_and_position(validates, hook, tmp_path):
    """Bug: a run was killed after its last checkpoint. No batch is left, Lightning may call no hook of training, the
    generators are those of the new process, and a checkpoint saved from it has no position in the data."""

    def end(**kwargs):
        _, trainer = fit(tmp_path, LOADERS["shuffled"], max_epochs=2, validates=validates, **kwargs)
        return trainer, (torch.rand(1), np.random.rand(), random.random())

    saved = tmp_path / f"{2 * BATCHES}.ckpt"
    _, drawn = end(save=Save(tmp_path, 2 * BATCHES, hook=hook))
    again, drawn_again = end(ckpt_path=saved, seed=123)
    assert drawn_again == drawn
    again.save_checkpoint(tmp_path / "again.ckpt")
    longer = fit(tmp_path, LOADERS["shuffled"], ckpt_path=tmp_path / "again.ckpt", seed=9, validates=validates)
    assert_same_end(fit(tmp_path, LOADERS["shuffled"], ckpt_path=saved, validates=validates), longer)


@pytest.mark.parametrize("how", ["indices", "batches"])
def test_fast_forward_decides_whether_skipped_batches_are_fetched(how, tmp_path):
    calls = []

    class Counting(Samples):
        def __getitem__(self, index):
            calls.append(index)
            return super().__getitem__(index)

    def loader():
        return DataLoader(Counting(), 4, shuffle=True)

    reference = fit(tmp_path, loader, save=Save(tmp_path, 6))
    calls.clear()
    resumed = fit(tmp_path, loader, ckpt_path=tmp_path / "6.ckpt", callbacks=[ResumeExactly(fast_forward=how)])
    assert_same_end(reference, resumed)
    assert len(calls) == 4 * (3 * BATCHES - (6 if how == "indices" else 0))


@pytest.mark.slow
def test_indices_are_skipped_that_workers_would_fetch(tmp_path):
    """Bug: a loader with processes makes the sampler's iterator twice, and the second begins at the first batch."""
    reference = fit(tmp_path, LOADERS["shuffled, 2 workers"], save=Save(tmp_path, 6))
    callbacks = [ResumeExactly(fast_forward="indices")]
    resumed = fit(tmp_path, LOADERS["shuffled, 2 workers"], ckpt_path=tmp_path / "6.ckpt", callbacks=callbacks)
    # the random numbers of the workers differ, as the card says
    assert [samples for samples, _, _ in resumed[0].seen] == [samples for samples, _, _ in reference[0].seen[6:]]


@pytest.mark.slow
def test_with_persistent_workers_the_order_is_right_and_a_warning_is_given(tmp_path):
    """Bug: another order of samples. The random state of the old worker processes cannot be restored."""

    def loader():
        return DataLoader(Samples(noise=False), 4, shuffle=True, num_workers=2, persistent_workers=True)

    reference = fit(tmp_path, loader, save=Save(tmp_path, BATCHES, BATCHES + 3))
    for step in (BATCHES, BATCHES + 3):
        with pytest.warns(UserWarning, match="persistent workers are new processes"):
            resumed = fit(tmp_path, loader, ckpt_path=tmp_path / f"{step}.ckpt", seed=5)
        assert_same_end(reference, resumed)


@pytest.mark.slow
def test_persistent_workers_serve_a_second_fit_without_us(tmp_path):
    """Bug: Lightning shuts the workers down through an attribute of the loader, which is set on the wrapper only."""
    loader = DataLoader(Samples(), 4, num_workers=2, persistent_workers=True)
    fit(tmp_path, lambda: loader, max_epochs=1)
    model, _ = fit(tmp_path, lambda: loader, max_epochs=1, callbacks=[])
    assert len(model.seen) == BATCHES


def checkpoint_within_an_epoch(folder, **kwargs):
    fit(folder, LOADERS["in order"], save=Save(folder, 5), max_epochs=1, **kwargs)
    return folder / "5.ckpt"


@pytest.mark.parametrize(
    ("loader", "match"),
    [
        (lambda: DataLoader(Samples(80), 4), "dataset has 80 samples, expected 64 and the train loader has 20 batches"),
        (lambda: DataLoader(Samples(), 8), r"train loader has 8 batches an epoch, expected 16.*plugins\.resume=none"),
        (lambda: plain(sampler=list(reversed(range(64)))), "order .* has changed: batch 4 of epoch 0 held .* 16, 17"),
        (lambda: {"a": plain(), "b": plain()}, r"saved with 1 train loaders, got 2.*plugins\.resume=none"),
        (lambda: {name: DataLoader(Stream(), 4) for name in "ab"}, "saved with 1 train loaders, got 2"),
    ],
)
def test_other_data_within_an_epoch_are_refused(loader, match, tmp_path):
    """Bug: the run trains on some samples twice and on others never, without an error."""
    path = checkpoint_within_an_epoch(tmp_path)
    with pytest.raises(UserError, match=match):
        fit(tmp_path, loader, ckpt_path=path)


def test_a_stream_that_has_become_too_short_is_refused(tmp_path):
    fit(tmp_path, LOADERS["stream"], save=Save(tmp_path, 9), max_epochs=1)
    with pytest.raises(UserError, match="after batch 9 of an epoch, and the train loader now ends after 4"):
        fit(tmp_path, lambda: DataLoader(Stream(size=16), 4), ckpt_path=tmp_path / "9.ckpt")


def test_other_data_between_epochs_give_a_warning(tmp_path):
    fit(tmp_path, LOADERS["in order"], save=Save(tmp_path, BATCHES, hook="on_train_epoch_end"))
    with pytest.warns(UserWarning, match="dataset has 80 samples"):
        model, _ = fit(tmp_path, lambda: DataLoader(Samples(80), 4), ckpt_path=tmp_path / "16.ckpt")
    assert len(model.seen) == 2 * 20


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_checkpoint_without_our_state_gives_a_warning_and_resumes_as_lightning_does(tmp_path):
    path = checkpoint_within_an_epoch(tmp_path, callbacks=[])
    lightning, _ = fit(tmp_path, LOADERS["in order"], ckpt_path=path, callbacks=[], max_epochs=1)
    with pytest.warns(UserWarning, match="holds no state of ResumeExactly"):
        ours, _ = fit(tmp_path, LOADERS["in order"], ckpt_path=path, max_epochs=1)
    assert [seen[0] for seen in ours.seen] == [seen[0] for seen in lightning.seen]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.filterwarnings("ignore:resume_exactly. the checkpoint holds no state")
def test_a_checkpoint_of_another_version_gives_a_warning(tmp_path):
    """Bug: a TypeError from inside, where every other plugin warns and starts with an empty history."""
    path = checkpoint_within_an_epoch(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["callbacks"]["resume_exactly"]["ranks"][0]["loaders"][0]
    state["renamed"] = state.pop("batches")
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="resume_exactly: the checkpoint is of another version"):
        model, _ = fit(tmp_path, LOADERS["in order"], ckpt_path=path, max_epochs=1)
    assert len(model.seen) == BATCHES - 5


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_checkpoint_with_our_state_loads_without_us(tmp_path):
    path = checkpoint_within_an_epoch(tmp_path)
    model, _ = fit(tmp_path, LOADERS["in order"], ckpt_path=path, callbacks=[], max_epochs=1)
    assert len(model.seen) == BATCHES - 5


def test_a_checkpoint_of_another_number_of_processes_gives_a_warning(tmp_path):
    path = checkpoint_within_an_epoch(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["resume_exactly"]["ranks"] *= 2
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="saved by 2 processes, and training resumes with 1"):
        model, _ = fit(tmp_path, LOADERS["in order"], ckpt_path=path, max_epochs=1)
    assert len(model.seen) == BATCHES - 5


def test_a_loader_with_a_position_of_its_own_is_refused(tmp_path):
    class Own(Batches):
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    with pytest.raises(UserError, match="got Own, which saves its own position"):
        fit(tmp_path, Own)


def test_an_unknown_fast_forward_is_refused_by_its_name():
    with pytest.raises(UserError, match=r"fast_forward must be .* got 'fast' .*ResumeExactly\(fast_forward="):
        ResumeExactly(fast_forward="fast")


def test_it_can_be_pickled_after_a_fit_and_leaves_nothing_behind(tmp_path):
    callback = ResumeExactly()
    _, trainer = fit(tmp_path, LOADERS["in order"], callbacks=[callback], max_epochs=1)
    pickle.loads(pickle.dumps(callback))
    assert "process_dataloader" not in vars(trainer.strategy)
    loop = trainer.fit_loop.epoch_loop
    for owner in (trainer.fit_loop, loop, loop.val_loop, trainer._checkpoint_connector):
        replaced = {name for name, value in vars(owner).items() if callable(value) and hasattr(type(owner), name)}
        assert not replaced, replaced


# ---- real processes -------------------------------------------------------------------------------------------------


def digest(model, trainer):
    tensors = [*model.state_dict().values(), *optimizer_tensors(trainer)]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


def start(folder, *arguments):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, str(folder), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["shuffled", "shuffled, 2 workers"])
def test_two_processes_resume_exactly_with_another_seed(loader, tmp_path):
    """Bug: the distributed sampler takes the order from the new seed, or a rank gets another rank's generators."""
    reference = start(tmp_path, "--processes", 2, "--loader", loader)
    assert reference.returncode == 0, reference.stderr
    expected = [(tmp_path / f"{rank}.digest").read_text() for rank in (0, 1)]
    for step in (5, BATCHES // 2, BATCHES // 2 + 2):
        for path in tmp_path.glob("step=*.ckpt"):
            if int(path.stem.split("=")[1]) > step:
                path.unlink()
        resumed = start(tmp_path, "--processes", 2, "--loader", loader, "--seed", step, "--at", step)
        assert resumed.returncode == 0, resumed.stderr
        assert [(tmp_path / f"{rank}.digest").read_text() for rank in (0, 1)] == expected, step
    fewer = start(tmp_path, "--loader", loader, "--at", 5)
    assert fewer.returncode == 0, fewer.stderr


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--loader", default="shuffled")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at", type=int)
    options = parser.parse_args()
    found = sorted(options.folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    path = options.folder / f"step={options.at}.ckpt" if options.at else (found[-1] if found else None)
    saver = ModelCheckpoint(
        options.folder, "{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False
    )
    kwargs = {} if options.processes == 1 else {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo")}
    model, trainer = fit(
        options.folder,
        LOADERS[options.loader],
        saver,
        options.seed,
        validates=True,
        val_check_interval=4,
        ckpt_path=path,
        **kwargs,
    )
    (options.folder / f"{trainer.global_rank}.digest").write_text(digest(model, trainer))


if __name__ == "__main__":
    main()
