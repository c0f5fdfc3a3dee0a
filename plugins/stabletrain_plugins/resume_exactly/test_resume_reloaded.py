"""Resuming where Lightning's own counters and reloads are wrong, and around what saves and restores before training."""

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, Subset

from stabletrain import ResumeExactly, Rollback, SaveCheckpoints, SkipNonFinite, SkipOutliers
from stabletrain.runtime import rng
from stabletrain.testing.trainer import quiet_trainer
from stabletrain_plugins.resume_exactly.test_resume_exactly import Model, Samples, optimizer_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*is not resumable"),
]
BATCHES = 6
MID = {"val_check_interval": 4}
STEPS = {"max_epochs": -1, "max_steps": 16}


class Data(LightningDataModule):
    """Other samples in each epoch in which it is asked, by its number and by chance."""

    batch_size = 4

    def __init__(self):
        super().__init__()
        self.asked = []

    def samples(self, size):
        epoch = self.trainer.current_epoch
        return Subset(Samples(100), [(5 * epoch + int(i)) % 100 for i in torch.randperm(size)])

    def train_dataloader(self):
        self.asked.append(self.trainer.current_epoch)
        return DataLoader(self.samples(4 * BATCHES), self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.samples(8), 4, shuffle=True)


class Net(Model):
    """Ends an epoch early at some batches of the run."""

    def __init__(self, ends=(), lr=0.01):
        torch.manual_seed(0)
        super().__init__()
        self.ends, self.lr, self.validated = ends, lr, []

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if (self.current_epoch, batch_idx) in self.ends else None

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.validated.append((self.global_step, batch[2].tolist(), torch.rand(1).item()))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def everything(model, trainer):
    callbacks = {
        type(each).__name__: each.state_dict() for each in trainer.callbacks if isinstance(each, EarlyStopping)
    }
    loops = trainer.fit_loop.state_dict()
    for name, counts in loops.pop("epoch_loop.batch_progress")["total"].items():
        if name == "ready" or not model.ends:  # Lightning counts a batch that ends its epoch in some of these only
            loops[name] = counts
    return loops, callbacks, trainer.fit_loop._last_train_dl_reload_epoch


def fit(folder, model=None, save=True, callbacks=None, seed=0, ckpt_path=None, data=None, **options):
    seed_everything(seed, verbose=False)
    mine = (
        [ResumeExactly(), EarlyStopping("val", patience=99, check_on_train_epoch_end=False)]
        if callbacks is None
        else callbacks
    )
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False)
    trainer = quiet_trainer(
        *mine, *([saver] if save else []), **{"max_epochs": 4, "default_root_dir": folder, **options}
    )
    model = model or Net()
    trainer.fit(model, datamodule=data or Data(), ckpt_path=ckpt_path)
    return model, trainer


def assert_resumes_from_each(folder, model, **options):
    reference = fit(folder, model(), **options)
    paths = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    assert len(paths) > 12
    if "max_steps" in options:
        paths.pop()  # of the last step: Lightning does not enter the loop again
    for path in paths[:: max(1, len(paths) // 14)]:
        resumed = fit(folder, model(), save=False, seed=7, ckpt_path=path, **options)
        assert len(resumed[0].seen) == len(reference[0].seen) - int(path.stem.removeprefix("step="))
        assert_same_losses(reference, resumed)
        assert everything(*resumed) == everything(*reference), path
        assert resumed[0].validated == reference[0].validated[len(reference[0].validated) - len(resumed[0].validated) :]


def assert_same_losses(reference, resumed):
    (model, trainer), (model2, trainer2) = reference, resumed
    assert model2.seen == model.seen[-len(model2.seen) :] or not model2.seen
    for key, value in model.state_dict().items():
        assert torch.equal(value, model2.state_dict()[key]), key
    for a, b in zip(optimizer_tensors(trainer), optimizer_tensors(trainer2), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("every", "options"),
    [
        (1, {}),
        (2, MID),
        (3, {}),
        *(pytest.param(n, options, marks=pytest.mark.slow) for n, options in ((1, MID), (2, {}), (3, MID))),
    ],
    ids=str,
)
def test_loaders_are_reloaded_in_the_epochs_of_the_uninterrupted_run(every, options, tmp_path):
    """Bug: Lightning does not save the epoch of the last reload: a run that resumes in epoch 1 reloads in 3 instead of
    2, and the method that returns the loader sees another epoch and draws other random numbers."""
    assert_resumes_from_each(tmp_path, Net, reload_dataloaders_every_n_epochs=every, **options)


@pytest.mark.parametrize(
    ("ends", "options"),
    [
        ([(0, 4)], {}),
        ([(1, 0)], STEPS),
        ([(0, 3), (2, 5)], {}),
        *(
            pytest.param(ends, options, marks=pytest.mark.slow)
            for ends, options in (([(0, 4)], STEPS), ([(1, 0)], {}), ([(0, 3), (2, 5)], STEPS))
        ),
    ],
    ids=str,
)
def test_an_epoch_that_the_module_ends_early_does_not_shift_what_comes_after(ends, options, tmp_path):
    """Bug: Lightning counts the batch at which on_train_batch_start returned -1 in part, and takes later checkpoints
    for ones that were saved elsewhere: batch_idx is one less, and the epoch one batch longer."""
    assert_resumes_from_each(tmp_path, lambda: Net(ends), **options)


# ---- what saves and restores before training ------------------------------------------------------------------------


def stack(folder):
    return [
        SkipNonFinite(),
        SkipOutliers(),
        Rollback(every=4, trust_after=1),
        ResumeExactly(),
        SaveCheckpoints(folder / "ours", every=5, keep_last=None),
    ]


FINDERS = {
    "learning rate": lambda: LearningRateFinder(num_training_steps=10, early_stop_threshold=None),
    "batch size": lambda: BatchSizeFinder(steps_per_trial=2, max_trials=2, init_val=2),
}


@pytest.mark.parametrize("finder", FINDERS)
def test_a_finder_leaves_no_trace(finder, tmp_path):
    """Bug: a fresh fit with a finder dies, since its restore is taken for that of a resumed run; its trial steps are
    counted, saved, or move the position in the data; a resumed fit forgets the optimizer and the step that it resumes
    from, since Lightning restores only one of the two checkpoints."""
    record = []

    class Record(Callback):
        def on_train_start(self, trainer, pl_module):
            record.append(rng.capture()["torch"])

    def run(folder, callbacks, **options):
        return fit(folder, Net(), False, [FINDERS[finder](), Record(), *callbacks], data=Data(), **options)

    bare, mine, alone = (run(tmp_path, each) for each in ([], stack(tmp_path), [ResumeExactly()]))
    assert_same_losses(bare, mine)
    assert_same_losses(bare, alone)
    assert all(torch.equal(record[0], each) for each in record)
    assert bare[0].seen == mine[0].seen
    skip = mine[1].callbacks[2]
    assert skip._guard.counters.attempted == mine[1].global_step
    assert not (tmp_path / "events.jsonl").exists()
    steps = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "ours").iterdir())
    assert steps == [*range(5, mine[1].global_step + 1, 5), *([mine[1].global_step] if mine[1].global_step % 5 else [])]
    path, left = tmp_path / "ours" / f"step-{steps[1]:08d}", mine[1].global_step - steps[1]
    resumed = run(tmp_path, stack(tmp_path), seed=7, ckpt_path=path)
    resumed[0].seen = resumed[0].seen[-left:]  # without the trials
    assert_same_losses(mine, resumed)


@pytest.mark.parametrize("what", ["lr_find", "scale_batch_size"])
def test_the_tuner_before_a_fit_leaves_no_trace(what, tmp_path):
    """Bug: as above; the second fit of the Trainer starts with the counts or the position of the trial."""

    def run(callbacks):
        seed_everything(0, verbose=False)
        trainer = quiet_trainer(*callbacks, max_epochs=2, default_root_dir=tmp_path)
        model, data = Net(), Data()
        if what == "lr_find":
            Tuner(trainer).lr_find(model, datamodule=data, num_training=10, update_attr=True)
        else:
            Tuner(trainer).scale_batch_size(model, datamodule=data, steps_per_trial=2, max_trials=2)
        trainer.fit(model, datamodule=data)
        return model, trainer

    bare, mine = run([]), run(stack(tmp_path))
    assert_same_losses(bare, mine)
    assert bare[0].seen == mine[0].seen
    assert mine[1].callbacks[0]._guard.counters.attempted == mine[1].global_step


def test_a_finder_between_epochs_leaves_no_trace(tmp_path):
    """Bug: the optimizer that the guard has wrapped counts trial steps, or positions are set back to the start."""

    class EachEpoch(LearningRateFinder):
        def on_fit_start(self, *args):
            return

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch in (0, 2):
                self.lr_find(trainer, pl_module)

    def run(callbacks):
        finder = EachEpoch(num_training_steps=8, early_stop_threshold=None, max_lr=0.01)
        return fit(tmp_path, Net(), False, [finder, *callbacks])

    bare, mine = run([]), run(stack(tmp_path))
    assert bare[0].seen == mine[0].seen
    assert_same_losses(bare, mine)
    assert mine[1].callbacks[1]._guard.counters.attempted == mine[1].global_step


def test_a_checkpoint_from_before_the_fit_starts_one(tmp_path):
    """Bug: its states of plugins, which have seen nothing yet, are taken for those of another version."""
    seed_everything(0, verbose=False)
    model, trainer = Net(), quiet_trainer(*stack(tmp_path), max_epochs=2, default_root_dir=tmp_path)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "early.ckpt")
    resumed = fit(tmp_path, Net(), False, stack(tmp_path), ckpt_path=tmp_path / "early.ckpt", max_epochs=2)
    assert_same_losses(fit(tmp_path, Net(), False, stack(tmp_path / "b"), max_epochs=2), resumed)


def test_several_fits_of_one_trainer_with_validations_between_go_on_as_without_plugins(tmp_path):
    """Bug: the second fit starts at the position, or with the generators, of the first one."""

    def run(callbacks):
        seed_everything(0, verbose=False)
        trainer = quiet_trainer(*callbacks, max_epochs=2, default_root_dir=tmp_path)
        model, data = Net(), Data()
        trainer.validate(model, datamodule=data, verbose=False)
        trainer.fit(model, datamodule=data)
        trainer.validate(model, datamodule=data, verbose=False)
        trainer.fit_loop.max_epochs = trainer.fit_loop.epoch_progress.current.processed + 2
        trainer.fit(model, datamodule=data)
        return model, trainer

    bare, mine = run([]), run(stack(tmp_path))
    assert len(bare[0].seen) == 4 * BATCHES
    assert bare[0].seen == mine[0].seen
    assert bare[0].validated == mine[0].validated
    resumed = fit(tmp_path, Net(), False, stack(tmp_path), 7, tmp_path / "ours" / "step-00000020", max_epochs=4)
    assert_same_losses(mine, resumed)
