"""In a Trainer: what is saved when, that a resumed run equals an uninterrupted one, and how a signal ends a run."""

import contextlib
import copy
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from fits import HEALTHY, Batch, Net, assert_same, batches
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import HELPERS, environment

from stabletrain import ResumeExactly, SaveCheckpoints, SkipNonFinite, UserError
from stabletrain.runtime.checkpoints import CheckpointError, Store, load

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty:UserWarning"),
]

ITEMS = batches(*[HEALTHY] * 16)


class Model(Net):
    """Logs the numbers of ``val`` as its validation loss, one in each validation."""

    def __init__(self, val: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.val = list(val)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 0:
            self.log("val_loss", self.val.pop(0), batch_size=1)


def fit(
    *callbacks: Callback,
    steps: int = 10,
    resume: Any = None,
    model: Model | None = None,
    val: bool = False,
    **options: Any,
) -> Model:
    model = model or Model()
    options = {"max_steps": steps, "max_epochs": -1, **options}
    fits.fit(model, ITEMS, *callbacks, ckpt_path=resume, val_items=ITEMS if val else None, **options)
    return model


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def steps_of(folder: Path) -> list[int]:
    return [entry.manifest.info.step for entry in Store(folder).entries()]


def assert_same_weights(one: Model, other: Model) -> None:
    assert_same(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("background", [True, False])
def test_resumed_equals_uninterrupted(tmp_path: Path, background: bool) -> None:
    """Everything must be in it: weights, moments, counters, BatchNorm, other plugins' state. Cut at an epoch's end,
    since Lightning by itself restarts the data of an epoch."""
    whole = fit(SkipNonFinite(), steps=32)
    fit(SkipNonFinite(), SaveCheckpoints(tmp_path, every=None, background=background), steps=16)
    assert steps_of(tmp_path) == [16]
    counts = SkipNonFinite()
    assert_same_weights(fit(counts, SaveCheckpoints(tmp_path, every=None), steps=32, resume=tmp_path), whole)
    assert counts._guard is not None
    assert counts._guard.counters.attempted == 32


def test_it_holds_all_that_lightnings_own_holds(tmp_path: Path) -> None:
    """Bug: a part of the state that Lightning saves is missing, or is of another step."""
    peer = ModelCheckpoint(tmp_path / "peer", every_n_train_steps=5)
    fit(SaveCheckpoints(tmp_path / "ours", every=5, keep_last=None), peer, steps=5)
    ours = load(tmp_path / "ours")
    theirs = torch.load(peer.best_model_path, weights_only=True)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], tensor)
    assert ours["loops"] == theirs["loops"]
    assert ours["optimizer_states"][0]["param_groups"] == theirs["optimizer_states"][0]["param_groups"]


def test_steps_and_the_end_of_the_run(tmp_path: Path) -> None:
    """Bug: checkpoints at other steps than multiples of ``every``, or none at the end."""
    fit(SaveCheckpoints(tmp_path, every=[4, "10min"], keep_last=None), steps=10)
    assert steps_of(tmp_path) == [4, 8, 10]


def test_an_end_that_is_saved_already_is_not_saved_twice(tmp_path: Path) -> None:
    """Bug: a second checkpoint of the last step, which displaces an older one."""
    fit(SaveCheckpoints(tmp_path, every=5, keep_last=None), steps=10)
    assert steps_of(tmp_path) == [5, 10]


def test_an_interval_of_time(tmp_path: Path) -> None:
    """Bug: an interval of time has no effect."""
    fit(SaveCheckpoints(tmp_path, every="0.000001s", keep_last=None), steps=3)
    assert steps_of(tmp_path) == [1, 2, 3]


def test_with_accumulation_it_waits_for_the_window(tmp_path: Path) -> None:
    """A checkpoint in the middle of a window loses the gradients collected so far."""
    fit(SaveCheckpoints(tmp_path, every="0.000001s", keep_last=None), steps=3, accumulate_grad_batches=3)
    batches = [load(entry.path)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
               for entry in Store(tmp_path).entries()]  # fmt: skip
    assert batches == [3, 6, 9]


def test_the_best_is_kept_and_is_of_the_weights_that_were_validated(tmp_path: Path) -> None:
    """Bug: a NaN counts as the best value; the best one is deleted, or has weights of later steps."""
    saver = SaveCheckpoints(tmp_path, every=None, keep_last=1, monitor="val_loss")
    model = Model(val=(3.0, float("nan"), 1.0, 2.0))
    fit(saver, model=model, steps=16, val=True, val_check_interval=4)
    assert steps_of(tmp_path) == [12, 16]
    assert Path(saver.best_model_path).name == "step-00000012"
    assert saver.last == str(tmp_path / "step-00000016")


@pytest.mark.filterwarnings(
    "ignore:resume_exactly. this checkpoint is saved in the middle of an optimizer step:UserWarning"
)
def test_a_run_goes_on_from_a_checkpoint_that_has_all_gradients(tmp_path: Path) -> None:
    """Bug: the best one, made by a validation within an accumulation window, is the newest: resumed from there, the
    window's gradients are missing and the end is another."""

    class Killed(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
            if batch_idx == 14:  # the next one after the validation
                raise KeyboardInterrupt

    def train(folder: Path, *others: Callback, resume: object = None) -> tuple[Model, SaveCheckpoints]:
        model = Model(val=tuple(range(9, 0, -1)))
        saver = SaveCheckpoints(folder, every=4, keep_last=1, monitor="val_loss")
        options: dict[str, Any] = {"accumulate_grad_batches": 3, "val_check_interval": 14, "max_epochs": 4}
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            fit(ResumeExactly(), saver, *others, model=model, resume=resume, val=True, **options)
        return model, saver

    whole, _ = train(tmp_path / "whole")
    _, saver = train(tmp_path / "cut", Killed())
    info = [entry.manifest.info for entry in Store(tmp_path / "cut").entries()]
    assert [(each.step, each.whole) for each in info] == [(4, True), (4, False)]
    assert saver.last == str(tmp_path / "cut" / "step-00000004")
    assert Path(saver.best_model_path).name == "step-00000004-2"
    resumed, _ = train(tmp_path / "cut", resume=tmp_path / "cut")
    assert_same_weights(resumed, whole)


def test_a_missing_metric_is_an_error_that_names_those_there_are(tmp_path: Path) -> None:
    """Bug: a misspelt metric goes unnoticed, and there is no best checkpoint at the end."""
    with pytest.raises(UserError, match=r"got 'acc'; there are: .*val_loss"):
        fit(SaveCheckpoints(tmp_path, monitor="acc"), model=Model(val=(1.0,)), steps=16, val=True)


def test_ckpt_path_falls_back_to_the_previous_good_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a damaged checkpoint ends the resume, although the one before it is good."""
    fit(SaveCheckpoints(tmp_path, every=4), steps=8)
    (tmp_path / "step-00000008" / "tensors.safetensors").write_bytes(b"")
    seen = []

    class ReadStep(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(trainer.global_step)

    fit(ReadStep(), SaveCheckpoints(tmp_path, every=None), steps=9, resume=tmp_path / "step-00000008")
    assert seen == [4]
    assert "step-00000008 is damaged: tensors.safetensors has 0 bytes" in caplog.text


def test_ckpt_path_without_any_good_one_is_an_error(tmp_path: Path) -> None:
    """Bug: training starts from the beginning instead of an error."""
    fit(SaveCheckpoints(tmp_path, every=None), steps=2)
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        fit(SaveCheckpoints(tmp_path), resume=tmp_path)


def test_files_of_lightnings_are_read_as_before(tmp_path: Path) -> None:
    """Bug: with this callback, ``ckpt_path`` no longer accepts a file of Lightning's."""
    peer = ModelCheckpoint(tmp_path / "peer", every_n_train_steps=2, filename="x")
    fit(peer, steps=2)
    fit(peer, SaveCheckpoints(tmp_path / "ours", every=None), steps=4, resume=tmp_path / "peer" / "x.ckpt")
    assert steps_of(tmp_path / "ours") == [4]


def test_a_resumed_run_keeps_its_identity_and_its_number_of_checkpoints(tmp_path: Path) -> None:
    """Bug: the checkpoints of before the resume are never deleted, as if they were another run's."""
    fit(SaveCheckpoints(tmp_path, every=2), steps=4)
    fit(SaveCheckpoints(tmp_path, every=2), steps=8, resume=tmp_path)
    assert steps_of(tmp_path) == [6, 8]
    assert len({entry.manifest.info.run for entry in Store(tmp_path).entries()}) == 1


def test_a_new_run_in_a_used_folder_deletes_nothing_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a new run deletes another run's checkpoints."""
    fit(SaveCheckpoints(tmp_path, every=2), steps=4)
    fit(SaveCheckpoints(tmp_path, every=2), steps=6)
    assert steps_of(tmp_path) == [2, 4, 4, 6]
    assert "checkpoints of another run (step-00000002, step-00000004)" in caplog.text


def test_a_second_fit_of_one_trainer_is_the_same_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Else nothing of the first would ever be deleted."""
    saver = SaveCheckpoints(tmp_path, every=2)
    trainer = fits.trainer(saver, max_steps=4, max_epochs=-1)
    model = Model()
    fits.run(trainer, model, ITEMS)
    trainer.fit_loop.epoch_loop.max_steps = 8
    fits.run(trainer, model, ITEMS)
    assert steps_of(tmp_path) == [6, 8]
    assert "another run" not in caplog.text


def test_a_failed_run_is_not_saved_but_what_was_being_written_is(tmp_path: Path) -> None:
    """Bug: state after an error is saved as good, or a write in the background is lost."""

    class Fail(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                raise RuntimeError("planned")

    with pytest.raises(RuntimeError, match="planned"):
        fit(Fail(), SaveCheckpoints(tmp_path, every=2))
    assert steps_of(tmp_path) == [2, 4]


def test_a_state_that_is_no_data_is_refused_after_the_first_step(tmp_path: Path) -> None:
    """Bug: found only at the first checkpoint, hours later."""

    class Mine(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"made": object()}

    with pytest.raises(CheckpointError, match=r"callbacks\..*Mine\.made is a builtins\.object"):
        fit(Mine(), SaveCheckpoints(tmp_path, every=None))


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    """Bug: ``fast_dev_run`` writes checkpoints."""
    fit(SaveCheckpoints(tmp_path / "x", every=1), fast_dev_run=2)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"keep_last": 0}, "keep_last"),
        ({"mode": "best"}, r"got .best. \(SaveCheckpoints\(mode=\.\.\.\)\)"),
        ({"tokens_per_step": 0}, "tokens_per_step"),
        ({"every": "soon"}, "every"),
        ({"every": 0}, "every"),
    ],
)
def test_arguments_without_effect_are_refused(options: dict[str, Any], word: str) -> None:
    """Bug: accepted arguments with which nothing is ever saved or kept."""
    with pytest.raises(UserError, match=word):
        SaveCheckpoints(**options)


def test_copies_and_pickles(tmp_path: Path) -> None:
    """Bug: a thread or lock within the callback cannot be copied; a copy shares the original's state."""
    saver = SaveCheckpoints(tmp_path, every=2)
    fit(saver, steps=2)
    for twin in (copy.deepcopy(saver), pickle.loads(pickle.dumps(saver))):
        fit(twin, steps=4, resume=tmp_path / "step-00000002")
    assert saver.last == str(tmp_path / "step-00000004-2")


def test_last_is_none_before_the_first(tmp_path: Path) -> None:
    """Bug: ``ckpt_path=saver.last`` is a path that does not exist yet."""
    saver = SaveCheckpoints(tmp_path / "none yet")
    assert saver.last is None
    fit(saver, steps=2, resume=saver.last)
    assert saver.last is not None


SCRIPT = """
import sys, time, signal, torch
sys.path.insert(0, {here!r})
from test_save_checkpoints import *

class Slow(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            print("ready", flush=True)
            time.sleep(0.5)

if __name__ == "__main__":
    {extra}
    saver = SaveCheckpoints({folder!r}, every=None)
    fit(Slow(), saver, **{options!r})
"""


def run_script(tmp_path: Path, options: dict[str, Any] | None = None, extra: str = "pass") -> "subprocess.Popen[str]":
    script = tmp_path / "script.py"
    here = str(Path(__file__).parent)
    text = textwrap.dedent(SCRIPT).format(
        here=here, folder=str(tmp_path / "c"), options={"steps": 100_000, **(options or {})}, extra=extra
    )
    script.write_text(text)
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(HELPERS),
    )  # fmt: skip


def wait_until_ready(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ready"):
            return
    raise AssertionError(process.communicate()[1])


def test_sigterm_saves_and_ends_with_143(tmp_path: Path) -> None:
    """Lightning alone saves nothing and exits with 0: a scheduler takes the job for done."""
    process = run_script(tmp_path)
    wait_until_ready(process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert load(tmp_path / "c")["global_step"] == 4
    assert "step-00000004" in errors


def test_a_handler_of_the_scripts_own_stays_in_charge(tmp_path: Path) -> None:
    """Bug: the script's own handler of SIGTERM is replaced."""
    process = run_script(tmp_path, extra="signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))")
    wait_until_ready(process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 7
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_two_processes_stop_together_and_agree_on_what_they_load(tmp_path: Path) -> None:
    """One process gets the signal; the other must not be left in a collective."""
    options = {"strategy": "ddp", "devices": 2}
    process = run_script(tmp_path, options)
    wait_until_ready(process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    found = load(tmp_path / "c")
    entry = Store(tmp_path / "c").entries()[-1]
    assert entry.manifest.info.world_size == 2
    reached = found["global_step"]
    process = run_script(tmp_path, {**options, "steps": reached + 2, "resume": str(tmp_path / "c")})
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert load(tmp_path / "c")["global_step"] == reached + 2
