"""A checkpoint that was saved in the middle of an optimizer step: resumed from the step's beginning, or refused."""

import copy
import os
import signal

import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, OnExceptionCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch.utils.data import DataLoader

from stabletrain import ResumeExactly, Rollback, SkipNonFinite, SkipOutliers, UserError
from stabletrain.runtime.data.train_loader import TrainLoader
from stabletrain.runtime.internals import state as state_internals
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.testing.trainer import quiet_trainer
from stabletrain_plugins.resume_exactly.test_resume_exactly import Model, Samples, Stream, assert_same_end

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:.*is not resumable"),
    pytest.mark.filterwarnings(r"ignore:`.fit\(ckpt_path=None\)` was called without a model"),  # OnExceptionCheckpoint
    pytest.mark.filterwarnings(r"ignore:.fit\(ckpt_path=\"last\"\) is set"),
]

LOADERS = {
    "shuffled": lambda: DataLoader(Samples(32), 4, shuffle=True),
    "own generator": lambda: DataLoader(Samples(32), 4, shuffle=True, generator=torch.Generator().manual_seed(4)),
    "stream": lambda: DataLoader(Stream(size=32), 4),
}


class Interrupted(RuntimeError):
    pass


class Fails(Model):
    """Calls ``act`` once, in one hook of one batch of the run."""

    def __init__(self, act=None, hook="", at=0):
        torch.manual_seed(0)
        super().__init__()
        self.act, self.hook, self.at = act, hook, at
        self.batches = self.tries = 0
        self.mean = torchmetrics.MeanMetric()  # changed in place at each update

    def reached(self, hook):
        if self.act is not None and hook == self.hook and self.batches == self.at:
            act, self.act = self.act, None
            act()

    def on_train_batch_start(self, batch, batch_idx):
        self.reached("on_train_batch_start")

    def training_step(self, batch, batch_idx):
        self.reached("before forward")
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.mean.update(loss.detach())
        self.reached("training_step")
        return loss

    def on_train_epoch_end(self):
        self.log("mean", self.mean.compute())
        self.mean.reset()

    def on_after_backward(self):
        self.reached("on_after_backward")

    def on_before_zero_grad(self, optimizer):
        self.reached("on_before_zero_grad")

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.reached("after the update")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.reached("on_train_batch_end")
        self.batches += 1


class FailingSamples(Samples):
    """Raises in the middle of fetching a batch, after random numbers were drawn."""

    calls, fails_at = 0, None

    def __getitem__(self, index):
        self.calls += 1
        sample = super().__getitem__(index)
        if self.calls == self.fails_at:
            raise Interrupted
        return sample


def stack(whole):
    return (
        [SkipNonFinite(), SkipOutliers(), Rollback(every=4, trust_after=1), ResumeExactly()]
        if whole
        else [ResumeExactly()]
    )


def fit(folder, model, loader, callbacks, seed=0, ckpt_path=None, **options):
    seed_everything(seed, verbose=False)
    options = {"max_epochs": 3, "limit_val_batches": 0, "default_root_dir": folder, **options}
    trainer = quiet_trainer(*callbacks, **options)
    trainer.fit(model, loader, DataLoader(Samples(8), 4), ckpt_path=ckpt_path)
    return model, trainer


def fail():
    raise Interrupted


def assert_resumes(folder, make_loader, hook, at, whole=False, batches=None, **options):
    """Compare the run that fails and is resumed with one that does not fail."""
    reference = fit(folder, Fails(), make_loader(), stack(whole), **options)
    saver = OnExceptionCheckpoint(folder)
    with pytest.raises(Interrupted):
        fit(folder, Fails(fail, hook, at), make_loader(), [*stack(whole), saver], **options)
    resumed = fit(folder, Fails(), make_loader(), stack(whole), seed=9, ckpt_path=saver.ckpt_path, **options)
    assert len(resumed[0].seen) == len(reference[0].seen) - (at if batches is None else batches)
    assert_same_end(reference, resumed)
    progress, progress2 = (t.fit_loop.epoch_loop.batch_progress.state_dict() for _, t in (reference, resumed))
    assert progress == progress2
    for name in ("loss_epoch", "mean"):
        if "max_steps" not in options:  # such a run ends within an epoch
            assert torch.equal(reference[1].callback_metrics[name], resumed[1].callback_metrics[name]), name
    assert (
        reference[1].fit_loop.epoch_loop._batches_that_stepped == resumed[1].fit_loop.epoch_loop._batches_that_stepped
    )


@pytest.mark.parametrize("at", [0, 3, 7, 8, 23])
@pytest.mark.parametrize("loader", LOADERS)
def test_after_an_exception_in_the_step_the_whole_step_is_made_again(loader, at, tmp_path):
    """Bug: the generators of the checkpoint are those after the batch was fetched, or the running statistics of batch
    normalisation, epoch means or metrics count the batch twice, or the batch counts as the epoch's last one."""
    assert_resumes(tmp_path, LOADERS[loader], "training_step", at)


@pytest.mark.parametrize(
    ("hook", "options"),
    [
        ("on_train_batch_start", {}),
        ("before forward", {"whole": True}),
        ("on_before_zero_grad", {}),
        ("on_after_backward", {"whole": True}),
        ("training_step", {"limit_val_batches": 1.0, "val_check_interval": 2}),
        ("training_step", {"max_epochs": -1, "max_steps": 20}),
    ],
    ids=str,
)
def test_the_step_is_made_again_wherever_the_exception_comes(hook, options, tmp_path):
    """Bug: as above, in another hook, after a validation, or for a run that is counted in steps."""
    assert_resumes(tmp_path, LOADERS["shuffled"], hook, 10, **options)


@pytest.mark.parametrize(("at", "batches"), [(3, 3), (4, 3), (5, 3), (9, 8), (7, 6)])
def test_from_within_an_accumulation_window_the_whole_window_is_made_again(at, batches, tmp_path):
    """Bug: the gradients of the first micro-batches are not saved, and the first step after resuming lacks them."""
    assert_resumes(tmp_path, LOADERS["shuffled"], "training_step", at, batches=batches, accumulate_grad_batches=3)


def test_a_checkpoint_between_two_micro_batches_resumes_from_the_beginning_of_the_window(tmp_path):
    """Bug: as above, for a checkpoint that a callback saves at the end of a micro-batch."""

    class Early(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if len(pl_module.seen) == 10:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    reference = fit(tmp_path, Fails(), LOADERS["stream"](), [ResumeExactly(), Early()], accumulate_grad_batches=4)
    path = tmp_path / "early.ckpt"
    resumed = fit(tmp_path, Fails(), LOADERS["stream"](), stack(False), 9, path, accumulate_grad_batches=4)
    assert len(resumed[0].seen) == 24 - 8
    assert_same_end(reference, resumed)


@pytest.mark.parametrize("at", [1, 2, 14, 43])
def test_after_an_exception_while_a_batch_is_fetched_it_is_fetched_again(at, tmp_path):
    """Bug: the random numbers that the first samples of the batch have drawn are missing."""
    reference = fit(tmp_path, Fails(), DataLoader(FailingSamples(32), 4, shuffle=True), stack(False))
    samples, saver = FailingSamples(32), OnExceptionCheckpoint(tmp_path)
    samples.fails_at = at
    with pytest.raises(Interrupted):
        fit(tmp_path, Fails(), DataLoader(samples, 4, shuffle=True), [*stack(False), saver])
    loader = DataLoader(FailingSamples(32), 4, shuffle=True)
    resumed = fit(tmp_path, Fails(), loader, stack(False), seed=9, ckpt_path=saver.ckpt_path)
    assert len(resumed[0].seen) == 24 - (at - 1) // 4
    assert_same_end(reference, resumed)


class Counts(Fails):
    """Has a buffer that its forward pass changes, and that is not of a normalisation layer."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("batches_seen", torch.zeros(1))

    def training_step(self, batch, batch_idx):
        self.batches_seen += 1
        return super().training_step(batch, batch_idx)


class Remembers(Fails):
    """Has a tensor in an attribute that its forward pass changes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.memory = torch.zeros(1)

    def training_step(self, batch, batch_idx):
        self.memory = self.memory + 1
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:resume_exactly. this checkpoint is saved in the middle")
@pytest.mark.parametrize(
    ("module", "hook", "match"),
    [
        (Fails, "after the update", "optimizer was updating the weights"),
        (Counts, "training_step", "a buffer of the"),
        (Remembers, "training_step", r"may have changed the hidden state of the module \(memory\)"),
    ],
)
def test_what_cannot_be_made_again_is_refused_with_the_reason(module, hook, match, tmp_path):
    """Bug: the step is made twice, or a buffer or hidden state counts the batch twice, without a word."""
    saver = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(Interrupted):
        fit(tmp_path, module(fail, hook, 3), LOADERS["shuffled"](), [*stack(False), saver])
    with pytest.raises(UserError, match=f"middle of an optimizer step.*{match}.*remove ResumeExactly"):
        fit(tmp_path, module(), LOADERS["shuffled"](), stack(False), ckpt_path=saver.ckpt_path)


@pytest.mark.filterwarnings("ignore:resume_exactly. this checkpoint is saved in the middle")
def test_a_window_with_a_validation_inside_is_refused(tmp_path):
    """Bug: EarlyStopping counts the validation a second time."""
    options = {"accumulate_grad_batches": 4, "val_check_interval": 2, "limit_val_batches": 1.0}
    saver = OnExceptionCheckpoint(tmp_path)
    stopping = EarlyStopping("val", patience=99)
    with pytest.raises(Interrupted):
        fit(
            tmp_path,
            Fails(fail, "training_step", 3),
            LOADERS["shuffled"](),
            [*stack(False), stopping, saver],
            **options,
        )
    with pytest.raises(UserError, match="a validation ran between the micro-batches"):
        fit(tmp_path, Fails(), LOADERS["shuffled"](), stack(False), ckpt_path=saver.ckpt_path, **options)


@pytest.mark.parametrize("hook", ["before forward", "training_step", "after the update", "on_train_batch_end"])
def test_slurms_signal_saves_a_checkpoint_that_resumes_exactly(hook, tmp_path, monkeypatch):
    """Bug: Lightning saves in the signal handler, wherever the step is: after the update, the step is made twice."""
    variables = {"JOB_ID": 1, "NTASKS": 1, "JOB_NAME": "train", "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.signal_connector.call", lambda *args, **kwargs: 0)

    def run(model, seed=0):
        return fit(tmp_path, model, LOADERS["shuffled"](), stack(False), seed, plugins=[SLURMEnvironment()])

    reference = fit(tmp_path / "reference", Fails(), LOADERS["shuffled"](), stack(False))
    run(Fails(lambda: os.kill(os.getpid(), signal.SIGUSR1), hook, 10))
    resumed = run(Fails(), seed=9)
    assert len(resumed[0].seen) in (24 - 10, 24 - 11)
    assert_same_end(reference, resumed)


def test_a_checkpoint_after_a_rollback_is_between_two_steps(tmp_path):
    """Bug: the counts of the loop are those before the last step again, so that step seems to be in progress."""
    found = []

    class GoBack(Callback):
        def setup(self, trainer, pl_module, stage):
            self.loader = TrainLoader.of(trainer)
            self.loader.keep_tape()

        def teardown(self, trainer, pl_module, stage):
            self.loader.close()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if len(pl_module.seen) == 4:
                self.mark, self.progress = self.loader.mark(), copy.deepcopy(state_internals.progress(trainer))
            if len(pl_module.seen) == 5:
                state_internals.set_progress(trainer, self.progress)
                self.loader.rewind(self.mark)
                found.append(trainer_internals.dump_checkpoint(trainer)["callbacks"]["resume_exactly"]["ranks"][0])

    fit(tmp_path, Fails(), LOADERS["shuffled"](), [ResumeExactly(), GoBack()])
    assert found[0]["unfinished"] is None
    assert found[0]["loaders"][0]["batches"] == 4
