"""Accumulation windows on two gloo ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accumulate_on_two_ranks as script
import pytest
import torch
from fits import Recorder, assert_same, everything, fit
from out_of_memory import Hungry
from tokens import Tokens, error, moved, together

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ends(on_two_ranks: Callable[[str], Path]) -> list[Any]:
    folder = on_two_ranks(script.__file__)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("mode", ["exact", "device"])
@pytest.mark.parametrize("case", script.TOKENS)
def test_tokens_of_both_ranks_are_one_big_batch(ends: list[Any], case: str, mode: str) -> None:
    """Bugs: each rank divides by its own tokens; a rank without any is left behind, or its NaN reaches the other; the
    first window without tokens is applied."""
    module, recorder = Tokens(), Recorder()
    fit(module, [together(script.counted(case))], recorder)
    for end in ends:
        assert error(end[case, mode]["moved"], moved(module)) < 1e-6
        assert end[case, mode]["losses"] == pytest.approx([recorder.state[0].loss], rel=1e-6)
    assert_same(ends[0][case, mode]["end"], ends[1][case, mode]["end"])


@pytest.mark.parametrize("case", script.MEMORY)
def test_one_rank_is_out_of_memory(ends: list[Any], case: str) -> None:
    """Bugs: a rank that fails leaves the other in a collective; only one of them runs in pieces; gradients are averaged
    twice, or not at all."""
    limits, _, accumulate = script.MEMORY[case]
    module, recorder = Hungry(10**9), Recorder()
    expected = everything(fit(module, script.rows(), recorder, accumulate_grad_batches=accumulate))
    for rank, end in enumerate(ends):
        for key, value in end[case]["end"].items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6, msg=key)
        assert end[case]["losses"] == pytest.approx([each.loss for each in recorder.state], rel=1e-5)
        assert bool(end[case]["failures"]) == (limits[rank] < 4)
    assert_same(ends[0][case]["end"], ends[1][case]["end"])
