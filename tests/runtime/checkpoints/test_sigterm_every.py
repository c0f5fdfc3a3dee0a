"""The ranks ask each other for SIGTERM every few batches: all stop at the same one, soon enough, and go on exactly."""

import random
from pathlib import Path
from typing import Any

import fits
import pytest
import rank_pool
import sigterm_on_ranks
from fits import HEALTHY, Net, assert_same, batches
from lightning.pytorch import Callback
from sigterm_on_ranks import Case

from stabletrain import SaveCheckpoints, UserError, check_sigterm_every

BROADCAST = "_broadcast_sigterm_tensor"


def check(folder: Path, kind: str, cases: list[Case]) -> None:
    ranks = rank_pool.on_ranks(sigterm_on_ranks.main, 2, folder, kind, cases, limit=400.0)
    for rank in ranks:
        for case, found in zip(cases, rank, strict=True):
            steps = case.expected // case.window if not case.in_validation else None
            assert (found["code"], found["end"]) == (143, 0), case
            assert found["batches"] == case.expected, case
            assert len(found["saved"]) == 1, case
            assert steps is None or found["saved"] == [f"step-{steps:08d}"], case
            assert_same(found["weights"], found["whole"])


@pytest.mark.slow
def test_all_ranks_stop_at_the_same_batch_and_go_on_exactly(tmp_path: Path) -> None:
    """Bugs: a rank stops alone, and the others wait for it; the signal is acted upon too late, or never at the end of
    an epoch; the stop loses what an accumulation window held."""
    cases = [
        Case(4, {1: 7, 0: 6}),
        Case(50, {1: 2}),
        Case(4, {1: 1}, window=2),
        Case(50, {0: 9}, in_validation=True),
    ]
    check(tmp_path, "ddp", cases)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "number"), [("ddp", 4), ("fsdp2", 3)])
def test_signals_at_random_batches(tmp_path: Path, kind: str, number: int) -> None:
    """Bug: two ranks disagree about the batch, at a place that nobody has thought of."""
    generator = random.Random(0)
    cases = []
    for _ in range(number):
        ranks = generator.choice([(0,), (1,), (0, 1)])
        signals = {rank: generator.randrange(20) for rank in ranks}
        cases.append(Case(generator.choice([1, 3, 7, 50]), signals, window=generator.choice([1, 2])))
    check(tmp_path, kind, cases)


class Sees(Callback):
    def __init__(self) -> None:
        self.left: list[bool] = []

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.left.append(BROADCAST in vars(trainer.fit_loop.epoch_loop))


@pytest.mark.parametrize(
    ("every", "options", "left"), [(1, {}, False), (3, {}, True), (3, {"on_sigterm": False}, None)]
)
def test_lightnings_broadcast(tmp_path: Path, every: int, options: dict[str, Any], left: bool | None) -> None:
    """Bugs: Lightning still broadcasts in each batch; it does not, although its own handler is installed; it never
    does again in this process; a new Lightning has another method, and nothing is saved."""
    sees = Sees()
    mine = fits.trainer(SaveCheckpoints(tmp_path, every=None, **options), sees)
    assert callable(getattr(type(mine.fit_loop.epoch_loop), BROADCAST))
    if left is None:
        with pytest.raises(UserError, match="add SaveCheckpoints"):
            check_sigterm_every(mine, every)
        return
    check_sigterm_every(mine, every)
    fits.run(mine, Net(), batches(*[HEALTHY] * 4))
    assert sees.left == [left] * 4
    assert BROADCAST not in vars(mine.fit_loop.epoch_loop)


@pytest.mark.parametrize("number", [0, -1, 2.5, True, "3"])
def test_a_number_out_of_range(tmp_path: Path, number: Any) -> None:
    """Bug: a division by zero in the first batch."""
    with pytest.raises(UserError, match="whole number >= 1"):
        check_sigterm_every(fits.trainer(SaveCheckpoints(tmp_path)), number)


def test_a_clock_is_looked_at_as_often(tmp_path: Path) -> None:
    """Bug: a checkpoint by time still costs a collective in each batch; or is never saved; intervals in steps wait."""
    saver = SaveCheckpoints(tmp_path, every=["1e-9s", 3], keep_last=None)
    mine = fits.trainer(saver)
    check_sigterm_every(mine, 5)
    fits.run(mine, Net(), batches(*[HEALTHY] * 12))
    assert sorted(int(each.name.split("-")[1]) for each in tmp_path.iterdir()) == [3, 5, 6, 9, 10, 12]
