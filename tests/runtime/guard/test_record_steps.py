"""steps.bin is what the guard has decided at every attempted step, whatever interrupts the run."""

import math
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import recorded_steps
import torch
from fits import (
    HEALTHY,
    LARGE_GRAD,
    NAN_LOSS,
    Net,
    Recorder,
    SaveAfter,
    SkipHighLoss,
    assert_same,
    batches,
    everything,
    fit,
    loader,
)
from gan import Gan
from gan import batches as gan_batches
from lightning.pytorch import Callback
from rank_pool import RanksFailed, on_ranks
from recorded_steps import FAULTS, ITEMS, plugins, train

from stabletrain import Guard, RecordSteps, SkipNonFinite
from stabletrain.runtime.records.record_losses import RecordLosses
from stabletrain.runtime.records.steps_file import StepsFile, flags_of, read_steps


class Choosy(Net):
    """Has no loss for some batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx in (0, 4, 5) else super().training_step(batch, batch_idx)


def bits(path: Path) -> list[Any]:
    steps = read_steps(path)
    return [steps.step.tolist(), steps.loss.tobytes(), steps.grad_norm.tobytes(), steps.flags.tolist()]


def expected(path: Path, outcomes: Any) -> list[Any]:
    """What a file with these outcomes holds."""
    file = StepsFile(path)
    for each in outcomes:
        file.append(each.step, each.loss, each.grad_norm, flags_of(each))
    file.close()
    return bits(path)


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_every_outcome_is_recorded_and_no_bit_of_the_run_changes(mode: Any, tmp_path: Path) -> None:
    """Bugs: a dropped or the last step is missing; the step in flight is lost at the end; the norm after clipping, or
    a rounded loss; weights that differ from those without the record."""
    outcomes, mine = train(tmp_path / "steps.bin", mode=mode)
    assert bits(tmp_path / "steps.bin") == expected(tmp_path / "other.bin", outcomes)
    assert bits(tmp_path / "steps.bin")[3] == [9, 9, 3, 9, 3, 9, 3, 9, 9, 9]
    assert_same(everything(mine), everything(fit(Net("adamw-fused"), ITEMS, *plugins(mode), default_root_dir=tmp_path)))


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_a_resume_at_any_cut_overwrites_what_it_makes_again(mode: Any, tmp_path: Path) -> None:
    """Bugs: the resumed run's steps have other places; the outcome in flight at the checkpoint is missing; the end of
    a run that came further stays behind one that ends earlier; a checkpoint that has a state of the recorder."""
    whole = tmp_path / "whole.bin"
    saves = [SaveAfter(at, tmp_path / f"{at}.ckpt") for at in range(len(ITEMS) - 1)]
    train(whole, *saves, mode=mode)
    path = tmp_path / "steps.bin"
    for at in range(0, len(ITEMS) - 1, 2):
        path.write_bytes(whole.read_bytes()[: 17 * (at + 1)] + b"\1" * 17 * 30 + b"half a record")
        train(path, first=at + 1, mode=mode, ckpt_path=tmp_path / f"{at}.ckpt")
        assert bits(path) == bits(whole), at
    saved = torch.load(tmp_path / "3.ckpt", weights_only=True)
    assert not any("RecordSteps" in key for key in saved["callbacks"])


def test_the_record_alone_continues_its_count(tmp_path: Path) -> None:
    """Bug: without another plugin nobody keeps the number of attempted steps, and a resumed run starts at 0 again."""
    path = tmp_path / "steps.bin"
    fit(Net(), batches(*[HEALTHY] * 6), RecordSteps(path), SaveAfter(2, tmp_path / "a.ckpt"))
    first = bits(path)
    again = RecordSteps(path)
    assert pickle.loads(pickle.dumps(again)).path == path
    fit(Net(), loader(batches(*[HEALTHY] * 6)[3:], sized=False), again, ckpt_path=tmp_path / "a.ckpt")
    assert bits(path) == first
    pickle.dumps(again)


def test_a_killed_process_has_recorded_its_steps(tmp_path: Path) -> None:
    """Bugs: steps wait in a buffer of the process; the file cannot be read after a kill; a fork writes them twice."""
    with pytest.raises(RanksFailed):
        on_ranks(recorded_steps.train_until_killed, 1, tmp_path, 7)
    train(tmp_path / "whole.bin")
    whole, killed = bits(tmp_path / "whole.bin"), bits(tmp_path / "steps.bin")
    known = len(killed[0])
    assert known >= 6  # of seven that were settled, the last ones may be 10 ms old
    assert [killed[0], killed[3]] == [whole[0][:known], whole[3][:known]]
    assert killed[1] == whole[1][: 8 * known]


def test_two_ranks(tmp_path: Path) -> None:
    """Bugs: both ranks write, or the wrong one; the loss is that of one rank; a NaN of another rank is not recorded."""
    for guarded in (True, False):
        seen, _ = on_ranks(recorded_steps.on_two_ranks, 2, tmp_path, guarded)
        steps = read_steps(tmp_path / f"steps-{guarded}-0.bin")
        assert not (tmp_path / f"steps-{guarded}-1.bin").exists()
        assert steps.step.tolist() == list(range(12))
        if guarded:
            assert repr(list(zip(steps.loss.tolist(), steps.grad_norm.tolist(), strict=True))) == repr(seen)
            assert [i for i, flags in enumerate(steps.flags) if flags != 1] == [5]
            assert math.isnan(steps.loss[5])


def test_several_optimizers_are_counted_together(tmp_path: Path) -> None:
    """Bugs: both optimizers' steps at the same places; the losses of one of them only; a dropped step is missing."""
    path, recorder = tmp_path / "steps.bin", Recorder()
    fit(Gan(), gan_batches(["", "generator", "", ""]), recorder, SkipNonFinite(), RecordSteps(path))
    steps = read_steps(path)
    assert steps.step.tolist() == list(range(8))
    assert [i for i, flags in enumerate(steps.flags) if flags & 2] == [3]
    module, bare = Gan(), tmp_path / "bare.bin"
    fit(module, gan_batches([""] * 4), RecordLosses(bare))
    pairs = zip(module.losses["discriminator"], module.losses["generator"], strict=True)
    assert read_steps(bare).loss.tolist() == [loss for pair in pairs for loss in pair]


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 3}, {"fp16": True}, {"fp16": True, "accumulate_grad_batches": 2}]
)
def test_a_run_without_plugins_records_the_same_losses(options: dict[str, Any], tmp_path: Path) -> None:
    """Bugs: a loss that is scaled, or divided by the window's size; a step without a loss has no place; the record
    changes a bit, or adds to the checkpoint."""
    for module in (lambda: Net("adamw-loop"), lambda: Choosy("adamw-loop")):
        paths = [tmp_path / name for name in ("guarded.bin", "bare.bin")]
        items = batches(*[HEALTHY] * 8)
        fit(module(), items, RecordSteps(paths[0]), **options)
        bare = fit(module(), items, RecordLosses(paths[1]), **options)
        assert_same(everything(bare), everything(fit(module(), items, **options)))
        guarded, losses = map(bits, paths)
        assert losses[:2] == guarded[:2]
        assert losses[3] == [flags & ~2 for flags in guarded[3]]
        assert all(math.isnan(norm) for norm in read_steps(paths[1]).grad_norm)


def test_a_run_without_plugins_resumes_its_record(tmp_path: Path) -> None:
    """Bug: a resumed run without plugins numbers its steps from 0."""
    path, items = tmp_path / "steps.bin", batches(*[HEALTHY] * 6)
    fit(Net(), items, RecordLosses(path), SaveAfter(2, tmp_path / "a.ckpt"))
    first = bits(path)
    fit(Net(), loader(items[3:], sized=False), RecordLosses(path), ckpt_path=tmp_path / "a.ckpt")
    assert bits(path) == first


def test_plugins_that_come_or_go_at_a_resume(tmp_path: Path) -> None:
    """Bugs: a run that is resumed with plugins, or without them, numbers its steps from 0, or over those of the dropped
    steps, and removes what was recorded before."""
    items, path = batches(HEALTHY, LARGE_GRAD, HEALTHY, HEALTHY, HEALTHY, HEALTHY), tmp_path / "steps.bin"
    rest = loader(items[3:], sized=False)
    fit(Net(), items, RecordLosses(path), SaveAfter(2, tmp_path / "bare.ckpt"))
    bare = bits(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*its history starts empty")
        fit(Net(), rest, SkipNonFinite(), RecordSteps(path), ckpt_path=tmp_path / "bare.ckpt")
    assert bits(path)[:2] == bare[:2]

    skipping = [SkipHighLoss(), SkipNonFinite()]
    items = batches(HEALTHY, NAN_LOSS, HEALTHY, HEALTHY, HEALTHY, HEALTHY)
    fit(Net(), items, *skipping, RecordSteps(path), SaveAfter(2, tmp_path / "skipped.ckpt"))
    assert read_steps(path).step.tolist() == [*range(6)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint")
        fit(Net(), rest, RecordLosses(path), ckpt_path=tmp_path / "skipped.ckpt")
    assert read_steps(path).step.tolist() == [*range(6)]
    assert read_steps(path).flags.tolist()[:3] == [1, 3, 1]


def test_an_optimizer_that_calls_its_closure_often(tmp_path: Path) -> None:
    """Bug: each call of the closure in one step of LBFGS counts as a step."""

    class Often(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), max_iter=4)

    fit(Often(), batches(*[HEALTHY] * 3), RecordLosses(tmp_path / "steps.bin"))
    assert read_steps(tmp_path / "steps.bin").step.tolist() == [0, 1, 2]


class DiskFails(Callback):
    """Makes the record's writes fail in some batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batches: range) -> None:
        self.monkeypatch, self.batches = monkeypatch, batches

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.monkeypatch.undo()
        if batch_idx in self.batches:

            def fails(self: Any) -> None:
                raise OSError(28, os.strerror(28))

            self.monkeypatch.setattr(StepsFile, "flush", fails)


def test_a_full_disk_ends_nothing_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bugs: the run ends because its record cannot be written; a warning for each step; the steps of that time are
    lost although the disk works again."""
    path = tmp_path / "steps.bin"
    outcomes, _ = train(path, DiskFails(monkeypatch, range(2, 6)), val_items=ITEMS[:1])
    assert bits(path) == expected(tmp_path / "other.bin", outcomes)
    said = [record.message for record in caplog.records if "steps.bin" in record.message]
    assert said == [f"{path} cannot be written: {os.strerror(28)}; training continues"]
    path.unlink()
    path.mkdir()
    train(path)
    assert len(FAULTS) == len(ITEMS)


def test_a_trial_run_writes_nothing(tmp_path: Path) -> None:
    """Bug: fast_dev_run leaves a file."""
    for recorder in (RecordSteps(tmp_path / "a"), RecordLosses(tmp_path / "a")):
        fit(Net(), batches(LARGE_GRAD), recorder, Guard(), fast_dev_run=True)
    assert not list(tmp_path.iterdir())
