"""Micro-batches that do not fit in memory, against the same run with enough of it."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fits import HEALTHY, NAN_LOSS, Recorder, SaveAfter, assert_same, batches, everything, fit
from out_of_memory import Hungry
from torch import nn

from stabletrain import AccumulateAuto, AccumulateTokens, ResumeExactly, Rollback, SkipNonFinite, UserError
from stabletrain.runtime.windows.pieces import split

ITEMS = batches(*[HEALTHY] * 8)


def close(mine: Any, theirs: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert mine.keys() == theirs.keys()
    for key in mine:
        torch.testing.assert_close(
            mine[key], theirs[key], rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("where", ["forward", "backward", "cpu"])
@pytest.mark.parametrize(("limit", "since", "accumulate"), [(3, 0, 1), (5, 1, 2), (1, 3, 3), (8, 0, 1)])
def test_it_trains_as_with_enough_memory(where: str, limit: int, since: int, accumulate: int) -> None:
    """Bugs: gradients of the failed attempt, or of earlier micro-batches, are lost or counted twice; buffers count the
    failed attempt; the loss of the step counts each piece as a micro-batch; without failures something changes."""
    ends, losses = [], []
    for limited in (10**9, limit):
        module, recorder = Hungry(limited, where, since), Recorder()
        trainer = fit(module, ITEMS, recorder, AccumulateAuto(), accumulate_grad_batches=accumulate)
        ends.append(everything(trainer))
        losses.append([outcome.loss for outcome in recorder.state])
        assert module.failures == {10**9: 0, 8: 0, 5: 1, 3: 2, 1: 3}[limited]
    close(ends[1], ends[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    bare = everything(fit(Hungry(10**9), ITEMS, SkipNonFinite(), accumulate_grad_batches=accumulate))
    if 8 % accumulate == 0:
        assert_same(ends[0], bare)


@pytest.mark.parametrize("first", [True, False])
def test_weighted_by_tokens(first: bool) -> None:
    """Bug: each piece counts with the weight of its whole micro-batch, so that the gradient is too small by the number
    of pieces, or a failed attempt counts."""
    items = [(x[: 2 + 3 * (i % 3)], fault) for i, (x, fault) in enumerate(ITEMS)]
    ends, losses = [], []
    for limited in (10**9, 3):
        recorder, plugins = Recorder(), [AccumulateTokens(), AccumulateAuto()]
        module = Hungry(limited, "backward", since=1)
        trainer = fit(module, items, recorder, *(plugins if first else plugins[::-1]), accumulate_grad_batches=3)
        ends.append(everything(trainer))
        losses.append([outcome.loss for outcome in recorder.state])
        assert bool(module.failures) is (limited == 3)
    close(ends[1], ends[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_random_numbers_go_back_too() -> None:
    """Bug: the masks of dropout depend on how often an attempt has failed."""
    ends = []
    for where in ("forward", "backward"):
        torch.manual_seed(3)
        ends.append(everything(fit(Hungry(3, where, dropout=0.3), ITEMS, AccumulateAuto())))
    assert_same(*ends)


def test_dropped_resumed_and_fp16(tmp_path: Path) -> None:
    """Bugs: a NaN in a piece stays; a resumed run begins with whole batches, whose bits are others; loss scales."""

    def run(items: Any, *plugins: Any, **options: Any) -> Any:
        mine = (AccumulateAuto(), SkipNonFinite(), ResumeExactly(), *plugins)
        return fit(Hungry(3, since=0), items, *mine, accumulate_grad_batches=2, **options)

    expected = everything(run(ITEMS))
    for cut in (1, 3, 5):
        run(ITEMS, SaveAfter(cut, tmp_path / f"{cut}.ckpt"))
        assert_same(everything(run(ITEMS, ckpt_path=tmp_path / f"{cut}.ckpt")), expected)
    spoilt = [*ITEMS[:4], (ITEMS[4][0], HEALTHY), (ITEMS[5][0], NAN_LOSS), *ITEMS[6:]]
    assert_same(everything(run(spoilt)), everything(run([*ITEMS[:4], *ITEMS[6:]])))
    halves = {"accumulate_grad_batches": 2, "fp16": True}
    whole = fit(Hungry(10**9), ITEMS, *(AccumulateAuto(), SkipNonFinite(), ResumeExactly()), **halves)
    close(everything(run(ITEMS, fp16=True)), everything(whole), 0.01, 0.01)  # gradients are rounded to fp16


def test_not_even_a_row_fits() -> None:
    """Bug: the pieces double for ever, or the error does not say what was tried."""
    with pytest.raises(torch.OutOfMemoryError, match="simulated") as caught:
        fit(Hungry(0), ITEMS, AccumulateAuto())
    (note,) = caught.value.__notes__
    assert note.endswith("rows at once that were tried: 8, 4, 2, 1")
    module = Hungry(10**9)
    module.raise_at = 0
    with pytest.raises(RuntimeError, match="own bug"):
        fit(module, ITEMS, AccumulateAuto())


class Contrastive(Hungry):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        super().training_step(batch, batch_idx)
        h = self.net[:3](batch[0])
        return nn.functional.cross_entropy(h @ h.T, torch.arange(len(h)))


class Normed(Hungry):
    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.net[1] = nn.BatchNorm1d(16)


class Summed(Hungry):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * len(batch[0])


class Unknown:
    def __init__(self, x: Any) -> None:
        self.x = x


@pytest.mark.parametrize(
    ("module", "items", "says"),
    [
        (lambda: Normed(4), ITEMS, r"net.1 \(BatchNorm1d\) normalises over the rows"),
        (lambda: Contrastive(4), ITEMS, "no mean over the rows"),
        (lambda: Summed(4), ITEMS, "no mean over the rows"),
        (lambda: Hungry(4), [[torch.ones(8, 6), torch.ones(3)]], r"8 rows and another has the shape \(3,\)"),
        (lambda: Hungry(4), [[torch.ones(8, 6), Unknown(1)]], "contains Unknown"),
    ],
)
def test_where_it_would_be_wrong(module: Any, items: Any, says: str) -> None:
    """Bug: another gradient, without a word."""
    with pytest.raises(UserError, match=says):
        fit(module(), items, AccumulateAuto())


def test_the_check_leaves_no_trace() -> None:
    """Bug: the check of the loss changes the run: what it logs, buffers, random numbers, modes."""
    ends = []
    for check in (True, False):
        torch.manual_seed(3)
        module = Hungry(3, dropout=0.5)
        ends.append({**everything(fit(module, ITEMS, AccumulateAuto(check_loss=check))), "next": torch.rand(1)})
        assert module.training
    assert_same(*ends)


def test_a_rollback_keeps_the_number_of_pieces() -> None:
    """Bug: what did not fit is tried again after each rollback."""
    module = Hungry(3)
    faults = [HEALTHY] * 8 + [NAN_LOSS] * 4 + [HEALTHY] * 8
    plugins = [SkipNonFinite(max_in_a_row=2), Rollback(every=2, trust_after=1, rewarm=0), AccumulateAuto()]
    fit(module, batches(*faults), *plugins)
    assert module.failures == 2


class Pair(NamedTuple):
    x: torch.Tensor
    names: list[str]


def test_pieces_of_batches() -> None:
    """Bugs: rows are lost, or not where they belong; fewer pieces than asked; an entry that is no tensor."""
    batch = {"a": torch.arange(10), "b": Pair(torch.arange(20).view(10, 2), list("abcdefghij")), "c": 3, "d": None}
    parts = split(batch, 4, "it")
    assert [size for _, size in parts] == [3, 3, 2, 2]
    assert torch.equal(torch.cat([part["a"] for part, _ in parts]), batch["a"])  # type: ignore[arg-type]
    assert torch.equal(torch.cat([part["b"].x for part, _ in parts]), batch["b"].x)  # type: ignore[union-attr]
    assert "".join(name for part, _ in parts for name in part["b"].names) == "abcdefghij"
    assert all(part["c"] == 3 and part["d"] is None for part, _ in parts)
    assert len(split(torch.ones(3), 8, "it")) == 3
