"""The private attributes of Lightning's loops by which a fit continues in the middle of one."""

from lightning.pytorch import Trainer

from stabletrain.runtime.internals import loader as loader_internals
from stabletrain.runtime.internals import resuming
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.internals.restart import complete_counts


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
