"""Windows of micro-batches with different numbers of tokens, compared with one big batch."""

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import Recorder, SaveAfter, assert_same, everything, fit
from lightning.pytorch import LightningModule
from tokens import COUNTS, Tokens, batch, batches, error, moved, together

from stabletrain import AccumulateTokens, Guard, ResumeExactly, SkipNonFinite, UserError


def one_big(*counts: int, **options: Any) -> tuple[torch.Tensor, Any]:
    module, recorder = Tokens(), Recorder()
    fit(module, [together(batches(*counts))], recorder, **options)
    return moved(module), recorder.state[0]


def windowed(items: Any, module: Tokens, *plugins: Any, **options: Any) -> tuple[torch.Tensor, Any]:
    recorder = Recorder()
    fit(module, items, *plugins, recorder, **{"accumulate_grad_batches": 4, **options})
    return moved(module), recorder.state


@pytest.mark.parametrize("counts", [COUNTS, (3, 0, 30, 7), (0, 0, 5, 0), (0, 7)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_window_equals_one_big_batch(counts: tuple[int, ...], reduction: Any) -> None:
    """Bugs: a mean of means; NaN of a micro-batch without labels; a short window divided by the size of a full one."""
    expected, big = one_big(*counts)
    mine, (small,) = windowed(batches(*counts), Tokens(reduction), AccumulateTokens("labels", reduction=reduction))
    assert error(mine, expected) < 1e-6
    assert small.loss == pytest.approx(big.loss, rel=1e-6)
    assert small.grad_norm == pytest.approx(big.grad_norm, rel=1e-6)


def test_without_it_the_window_is_a_mean_of_means() -> None:
    """Bug: the comparison above would not notice missing weights."""
    expected, _ = one_big(*COUNTS)
    mine, _ = windowed(batches(*COUNTS), Tokens())
    assert error(mine, expected) > 0.5


@pytest.mark.parametrize("count", [lambda b: (b["labels"] != -100).sum(), lambda b: int((b["labels"] != -100).sum())])
@pytest.mark.parametrize("mode", ["exact", "device"])
def test_decided_on_the_device_and_counted_by_a_function(count: Any, mode: Any) -> None:
    """Bugs: the weights are not part of the decision on the device; a window without tokens is applied there."""
    expected, big = one_big(*COUNTS)
    items = batches(*COUNTS, 0, 0, 0, 0)
    mine, (small,) = windowed(items, Tokens(fused=True), AccumulateTokens(count), Guard(mode=mode))
    assert error(mine, expected) < 1e-6
    assert small.loss == pytest.approx(big.loss, rel=1e-6)


def test_fp16_stays_in_range() -> None:
    """Bug: weights of the size of a token count leave fp16's range, and the loss scale falls."""
    expected, _ = one_big(*COUNTS, fp16=True)
    module = Tokens()
    trainer = fit(module, batches(*COUNTS), AccumulateTokens("labels"), accumulate_grad_batches=4, fp16=True)
    assert error(moved(module), expected) < 2e-3
    assert trainer.precision_plugin.scaler.get_scale() == 1024.0


def test_dropped_windows_are_windows_never_seen(tmp_path: Path) -> None:
    """Bugs: what a NaN or an empty window leaves behind; the reference of the weights changes the bits; a resumed run
    weights differently."""
    good = [batches(3, 30), batches(7, 17), batches(12, 5)]
    bad = batch(9, 77)
    spoilt, empty = [batch(4, 78), bad], batches(0, 0)

    class Spoiling(Tokens):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if torch.equal(batch["labels"], bad["labels"]) else loss

    def train(windows: list[list[Any]], *plugins: Any, **options: Any) -> Any:
        items = [copy.deepcopy(each) for window in windows for each in window]
        plugins = (AccumulateTokens("labels"), SkipNonFinite(), *plugins)
        return fit(Spoiling(), items, *plugins, accumulate_grad_batches=2, **options)

    expected = everything(train(good))
    seen = [empty, good[0], spoilt, good[1], empty, good[2]]
    assert_same(everything(train(seen)), expected)
    for cut in (1, 2, 4, 5, 9):
        path = tmp_path / f"{cut}.ckpt"
        train(seen, ResumeExactly(), SaveAfter(cut, path))
        assert_same(everything(train(seen, ResumeExactly(), ckpt_path=path)), expected)


class ByHand(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"count": lambda b: 7.0}, "7.0 of type float"),
        ({"count": lambda b: True}, "True of type bool"),
        ({"count": lambda b: -1}, "-1 of type int"),
        ({"count": lambda b: torch.tensor(7.0)}, "float32 on cpu"),
        ({"count": lambda b: torch.tensor([1, 2])}, r"shape \(2,\)"),
        ({"count": lambda b: torch.tensor(3, device="meta")}, "on meta"),
        ({"count": lambda b: None}, "NoneType"),
        ({"count": "lables"}, "no entry 'lables'.* 'labels'"),
        ({"count": 3}, "no entry 3"),
        ({"count": 1.5}, "count must be a function"),
        ({"count": "labels", "reduction": "max"}, 'reduction must be "mean" or "sum"'),
        ({"ignore_index": 0.5}, "ignore_index must be"),
    ],
)
def test_mistakes(arguments: dict[str, Any], says: str) -> None:
    """Bug: a count that is no number of tokens weights the run without a word."""
    with pytest.raises(UserError, match=says):
        fit(Tokens(), batches(*COUNTS), AccumulateTokens(**arguments), accumulate_grad_batches=4)


def test_a_count_that_is_always_0_and_modules_that_step_by_hand() -> None:
    """Bugs: a run that trains nothing goes on; a module that divides its losses itself is weighted twice."""
    with pytest.raises(UserError, match="first 100 micro-batches is 0"):
        fit(Tokens(), batches(*COUNTS) * 25, AccumulateTokens(lambda b: 0))
    with pytest.raises(UserError, match="ByHand steps by hand"):
        fit(ByHand(), batches(*COUNTS), AccumulateTokens("labels"))


class Unknown:
    """A batch without anything that could be counted."""


class Rows(Tokens):
    """Takes rows without labels out of the batch by itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if isinstance(batch, dict) else None


def test_rows_are_counted_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Bugs: what counts by default is not said, or at every batch; a batch of an unknown class."""
    with caplog.at_level(logging.WARNING, "stabletrain"):
        full = [together(batches(32, 32)), batch(32, 2)]
        expected, _ = one_big_of(full)
        mine, _ = windowed(full, Tokens(), AccumulateTokens())
    assert error(mine, expected) < 1e-6
    (said,) = [r.getMessage() for r in caplog.records if "first dimension" in r.getMessage()]
    assert "8 of shape (8, 8)" in said
    with pytest.raises(UserError, match="the batch is Unknown, without a tensor"):
        fit(Rows(), [Unknown()], AccumulateTokens())


def one_big_of(items: list[Any]) -> tuple[torch.Tensor, LightningModule]:
    module = Tokens()
    fit(module, [together(items)])
    return moved(module), module
