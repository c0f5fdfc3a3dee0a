"""The private attributes of Lightning's loops by which a fit continues in the middle of one."""

import importlib
import os

import fits
import pytest
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Trainer

from stabletrain.runtime.internals import loader as loader_internals
from stabletrain.runtime.internals import resuming
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.internals.restart import complete_counts
from stabletrain.testing.trainer import PACKAGES, trained_with


def make():
    return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


def test_what_is_replaced_exists_and_is_put_back():
    """Bug: a new Lightning has renamed a method, which is then never called; this test names it."""
    trainer = make()
    loop, calls = trainer.fit_loop.epoch_loop, []
    for install, owner, name in [
        (lambda: resuming.before_batch(trainer, calls.clear), loop, "advance"),
        (
            lambda: resuming.around_own_restore(trainer, calls.clear, calls.clear),
            trainer._checkpoint_connector,
            "restore",
        ),
        (
            lambda: resuming.go_on_from(trainer, lambda: None),
            trainer._checkpoint_connector,
            "_restore_modules_and_callbacks",
        ),
        (lambda: resuming.go_on_from(trainer, lambda: None), trainer._checkpoint_connector, "resume_end"),
        (lambda: resuming.around_loading(trainer, print), trainer.fit_loop, "setup_data"),
        (lambda: resuming.around_loading(trainer, print), loop.val_loop, "setup_data"),
    ]:
        assert callable(getattr(type(owner), name))
        undo = install()
        assert name in vars(owner)
        undo()
        assert name not in vars(owner)


def test_two_replacements_are_undone_one_after_the_other():
    """Bug: undoing the second one also removes the first."""
    trainer, calls = make(), []
    owner = trainer.fit_loop
    undo = loader_internals.override(owner, "setup_data", lambda: calls.append(1))
    loader_internals.override(owner, "setup_data", lambda: calls.append(2))()
    owner.setup_data()
    undo()
    assert calls == [1]
    assert "setup_data" not in vars(owner)


def test_the_counts_of_a_batch_that_ended_its_epoch_early_and_of_one_in_progress():
    """Bug: a count of Lightning's has another name, and the repair of a checkpoint's counters does nothing."""
    trainer = make()
    progress = trainer.fit_loop.epoch_loop.batch_progress
    for _ in range(3):
        progress.increment_ready(), progress.increment_started(), progress.increment_processed()
        progress.increment_completed()
    progress.increment_ready(), progress.increment_processed()  # on_train_batch_start returned -1
    complete_counts(trainer)
    assert set(vars(progress.total).values()) == set(vars(progress.current).values()) == {4}
    progress.reset_on_run()
    progress.increment_ready()
    assert resuming.is_in_batch(trainer)
    progress.increment_started(), progress.increment_processed()
    assert not resuming.is_in_batch(trainer)
    progress.increment_completed()
    complete_counts(trainer)
    assert set(vars(progress.total).values()) == {5}
    assert resuming.batch_count(trainer) == (1, 5)
    progress.increment_ready()
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.increment_ready()
    resuming.go_back_to(trainer, resuming.BatchCount(1, 5))
    assert set(vars(progress.total).values()) == {5}
    assert set(vars(progress.current).values()) == {1}
    step = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
    assert step.total.ready == step.total.completed == 0


def test_slurms_handler_and_trials_are_recognized():
    """Bug: the module of Lightning's handler, or the name of the finders' callback, has changed."""
    from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose
    from lightning.pytorch.tuner.lr_finder import _LRCallback

    assert _HandlersCompose.__module__ == type(make()._signal_connector).__module__
    trainer = make()
    assert trainer_internals.requeue_handler(trainer) is None
    assert not trainer_internals.is_trial(trainer)
    trainer.callbacks = [_LRCallback(3)]
    assert trainer_internals.is_trial(trainer)


class GoesOn(fits.EventRecorder):
    """Goes on from a checkpoint that it chooses; counts the calls."""

    def __init__(self, path):
        super().__init__()
        self.path, self.chosen, self.restored = path, 0, []

    def choose(self):
        self.chosen += 1
        return self.path

    def setup(self, trainer, pl_module, stage):
        self.undo = resuming.go_on_from(trainer, self.choose, lambda: self.restored.append(trainer.global_step))

    def teardown(self, trainer, pl_module, stage):
        self.undo()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_fit_goes_on_from_what_a_plugin_chooses(package, tmp_path):
    """Bug: the choice comes too late, so that only the weights, or nothing, are restored; a given ckpt_path is
    overruled; a test after the fit chooses too."""
    items, file = fits.batches(*[fits.HEALTHY] * 8), tmp_path / "a.ckpt"
    module = importlib.import_module(package)

    class Net(module.LightningModule):
        def __init__(self):
            super().__init__()
            inner = fits.Net(scheduler="step")
            self.net = inner.net
            self.__dict__["inner"] = inner

        def training_step(self, batch, batch_idx):
            return self.inner.training_step(batch, batch_idx)

        def configure_optimizers(self):
            return self.inner.configure_optimizers()

    def train(*callbacks, max_epochs, **options):
        with trained_with(package):
            return fits.fit(Net(), items, *callbacks, max_epochs=max_epochs, **options)

    whole = train(max_epochs=2)
    train(max_epochs=1).save_checkpoint(file)
    chooses = GoesOn(file)
    fits.assert_same(fits.everything(train(chooses, max_epochs=2)), fits.everything(whole))
    assert (chooses.chosen, chooses.restored) == (1, [8])
    overruled = GoesOn(tmp_path / "missing.ckpt")
    fits.assert_same(fits.everything(train(overruled, max_epochs=2, ckpt_path=file)), fits.everything(whole))
    assert (overruled.chosen, overruled.restored) == (0, [])
    from_scratch = GoesOn(None)
    fits.assert_same(fits.everything(train(from_scratch, max_epochs=2)), fits.everything(whole))
    assert (from_scratch.chosen, from_scratch.restored) == (1, [])


def test_the_newer_of_slurms_file_and_the_chosen_one_is_taken(tmp_path, monkeypatch):
    """Bug: after a node failed, a job goes back to the file of its last requeue, although the plugin saved later."""
    monkeypatch.setenv("SLURM_NTASKS", "1"), monkeypatch.setenv("SLURM_JOB_NAME", "train")
    monkeypatch.setattr("lightning.fabric.plugins.environments.SLURMEnvironment.validate_settings", lambda *_: None)
    items = fits.batches(*[fits.HEALTHY] * 8)
    options = {"plugins": [LightningEnvironment()], "default_root_dir": tmp_path}
    fits.fit(fits.Net(), items, max_epochs=1).save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
    fits.fit(fits.Net(), items, max_epochs=2).save_checkpoint(tmp_path / "ours.ckpt")
    for age, restored in ((-100, [16]), (100, [])):
        time = (tmp_path / "ours.ckpt").stat().st_mtime
        os.utime(tmp_path / "hpc_ckpt_1.ckpt", (time + age, time + age))
        chooses = GoesOn(tmp_path / "ours.ckpt")
        mine = fits.fit(fits.Net(), items, chooses, max_epochs=3, **options)
        assert (chooses.restored, mine.global_step) == (restored, 24)
