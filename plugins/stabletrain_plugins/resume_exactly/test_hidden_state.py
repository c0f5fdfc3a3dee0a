"""Tensors in attributes of modules, and in buffers that no state_dict holds, are saved and restored."""

import os
from pathlib import Path

import pytest
import torch
from fits import SaveAfter, assert_same
from lightning.pytorch import Callback
from recurrent import KINDS, STEPS, Recurrent, data, end, train

from stabletrain import ResumeExactly, SaveCheckpoints, SkipNonFinite

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning"),
]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "named tuple"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(kind: str, guarded: bool) -> None:
    """Bug: a resumed run starts with an empty hidden state; an epoch's list of losses lacks those before."""
    bad = (4, 7) if guarded else ()

    def callbacks() -> list[Callback]:
        return [*([SkipNonFinite()] if guarded else []), ResumeExactly()]

    reference = Recurrent(kind)
    save = SaveCheckpoints("saved", every=1, keep_last=None)
    mine = train(reference, data(bad), *callbacks(), save)
    expected = end(reference, mine)
    folders = sorted(name for name in os.listdir("saved") if name.startswith("step-"))
    assert len(folders) == STEPS - len(bad)
    for name in folders[:-1:3]:
        resumed = Recurrent(kind)
        theirs = train(
            resumed, data(bad), *callbacks(), SaveCheckpoints("again", every=None), ckpt_path=f"saved/{name}"
        )
        assert_same(end(resumed, theirs), expected)


def test_a_list_that_a_hook_clears_does_not_reach_the_next_epoch() -> None:
    """Bug: saved after an epoch's last batch, before the hook that clears it, which a resumed fit does not call."""
    reference, resumed = Recurrent(), Recurrent()
    save = SaveCheckpoints("saved", every=STEPS, keep_last=None)
    train(reference, data(), ResumeExactly(), save, max_epochs=2)
    again = SaveCheckpoints("again", every=None)
    train(resumed, data(), ResumeExactly(), again, max_epochs=2, ckpt_path=f"saved/step-{STEPS:08d}")
    assert resumed.means[-1] == reference.means[-1]


def test_lightnings_own_checkpoints_hold_it_too() -> None:
    """Bug: content that torch.load refuses with weights_only."""
    reference, resumed = Recurrent("dict"), Recurrent("dict")
    mine = train(reference, data(), ResumeExactly(), SaveAfter(5, Path("mine.ckpt")))
    torch.load("mine.ckpt", weights_only=True)
    theirs = train(resumed, data(), ResumeExactly(), SaveAfter(99, Path("other.ckpt")), ckpt_path="mine.ckpt")
    assert_same(end(resumed, theirs), end(reference, mine))


def test_what_cannot_be_saved_is_said() -> None:
    """Bug: a named tuple, whose class a file cannot name, is lost without a word, or stops the run."""
    with pytest.warns(UserWarning, match=r"resume_exactly: cell\.state cannot be saved"):
        train(Recurrent("named tuple"), data(), ResumeExactly(), SaveAfter(5, Path("mine.ckpt")))


def test_constants_are_not_saved() -> None:
    """Bug: a large table in an attribute makes every checkpoint larger."""
    module = Recurrent()
    module.table = torch.zeros(10)
    train(module, data(), ResumeExactly(), SaveAfter(5, Path("mine.ckpt")))
    saved = torch.load("mine.ckpt", weights_only=True)["callbacks"]["resume_exactly"]["ranks"][0]["hidden"]
    assert set(saved) == {"cell.state", "step_outputs", "mean", "last"}
