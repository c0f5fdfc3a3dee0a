"""`EndAfter` ends a fit after attempted steps, and changes nothing before."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import recorded_steps
from fits import Net, assert_same, everything, fit
from lightning.pytorch import LightningModule, Trainer
from rank_pool import on_ranks
from recorded_steps import ITEMS, plugins, train

from stabletrain.errors import UserError
from stabletrain.runtime.checkpoints.end_after import EndAfter
from stabletrain.runtime.records.record_repeat import RecordRepeat
from stabletrain.runtime.records.steps_file import read_steps
from stabletrain.runtime.stop import EndReached


class Ended:
    """The weights and counts at the end of a fit that `EndAfter` has ended."""

    def __init__(self, folder: Path, steps: int, *, mode: Any = "exact", save: bool = False, **options: Any) -> None:
        self.kept = Kept()
        with pytest.raises(EndReached, match=f"after {steps} attempted steps") as raised:
            train(folder / "steps.bin", EndAfter(steps, save), self.kept, mode=mode, **options)
        self.error = raised.value
        self.steps = read_steps(folder / "steps.bin")


class Kept(EndAfter):
    """Keeps what the fit had at its end."""

    def __init__(self) -> None:
        self.state: Any = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, o: Any, b: Any, i: int) -> None: ...

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.state = everything(trainer)


@pytest.mark.parametrize("mode", ["exact", "device"])
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_fit_ends_after_attempted_steps(steps: int, mode: Any, tmp_path: Path) -> None:
    """Bugs: dropped steps (2, 4, 6) do not count; the outcome in flight is not recorded; one step more or less; weights
    that differ from those of a fit that ends there by itself; ``min_steps`` wins."""
    ended = Ended(tmp_path, steps, mode=mode, min_steps=20, max_steps=30)
    assert ended.steps.step.tolist() == list(range(steps))
    whole, mine = train(tmp_path / "whole.bin", mode=mode, limit_train_batches=steps)
    assert [each.loss for each in whole] == pytest.approx(ended.steps.loss.tolist(), abs=0, nan_ok=True)
    assert_same(ended.kept.state, everything(mine))


def test_it_saves_what_a_resume_needs(tmp_path: Path) -> None:
    """Bugs: the checkpoint lacks the last step; a resumed run counts from 0 again, and ends too late or at once."""
    (tmp_path / "checkpoints").mkdir()
    ended = Ended(tmp_path, 5, save=True, max_steps=30)
    path = ended.error.checkpoint
    assert path is not None
    with pytest.raises(EndReached):
        train(tmp_path / "steps.bin", EndAfter(8), first=5, ckpt_path=path)
    train(tmp_path / "whole.bin")
    again, whole = read_steps(tmp_path / "steps.bin"), read_steps(tmp_path / "whole.bin")
    assert again.step.tolist() == list(range(8))
    assert again.loss.tobytes() == whole.loss[:8].tobytes()


def test_without_plugins_applied_steps_count_and_windows_are_complete(tmp_path: Path) -> None:
    """Bugs: micro-batches are counted; the fit ends within an accumulation window."""
    with pytest.raises(EndReached, match="after 2 attempted"):
        fit(Net(), ITEMS, EndAfter(2), accumulate_grad_batches=2, default_root_dir=tmp_path)


def test_all_ranks_end_together(tmp_path: Path) -> None:
    """Bug: one rank ends, and the others wait for it."""
    assert on_ranks(recorded_steps.ended_on_two_ranks, 2, tmp_path, 4) == [4, 4]


@pytest.mark.parametrize("steps", [0, -1, True, 2.5])
def test_a_wrong_number_is_one_message(steps: Any) -> None:
    """Bug: a fit that never ends, or ends at once."""
    with pytest.raises(UserError, match="steps: expected a number of steps"):
        EndAfter(steps)


class Scattered(Net):
    """Uses an operator of which torch warns."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for name in ("index_add_cuda_", "cumsum_cuda_kernel", "index_add_cuda_"):
            text = f"{name} does not have a deterministic implementation, but you set 'torch.use_deterministic_"
            warnings.warn(text, stacklevel=2)
        return super().training_step(batch, batch_idx)


def test_a_repeat_records_its_imports_and_what_torch_has_warned_of(tmp_path: Path) -> None:
    """Bugs: no file after an exception, so that every package counts as imported; an operator is named twice; the
    warnings are not shown any more, or noted after the fit, too."""
    record = RecordRepeat("in/repeat.json")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        before = warnings.showwarning
        with pytest.raises(EndReached):
            fit(Scattered(), ITEMS, *plugins(), record, EndAfter(2), default_root_dir=tmp_path)
        assert warnings.showwarning is before
    assert sum("index_add_cuda_" in str(each.message) for each in shown) == 4
    content = json.loads((tmp_path / "in" / "repeat.json").read_text())
    assert {"torch", "lightning.pytorch", "stabletrain.runtime.stop"} <= set(content["modules"])
    assert content["undetermined"] == ["index_add_cuda_", "cumsum_cuda_kernel"]
