"""A dropped step is a batch never seen: equal bit for bit to a run over the other batches."""

from typing import Any

import pytest
from fits import HEALTHY, HIGH_LOSS, INF_GRAD, NAN_GRAD, NAN_LOSS, SkipHighLoss, assert_same, batches, everything
from places import FUSED, READ_BY_HOST, Place, Trained, Where

import stabletrain as st


def compare(place: Place, optimizer: str, fault: int, at: int, precision: str, **options: Any) -> None:
    """Train with a bad batch and without it; nothing may differ."""
    if optimizer == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    window = options.get("accumulate_grad_batches", 1)
    items = batches(*(fault if i == at else HEALTHY for i in range(8)))
    first = at - at % window
    compiled = options.pop("compiled", None)
    fused, where = optimizer in FUSED, Where()
    plugins = [st.SkipNonFinite(), SkipHighLoss(), place.guard(fused, precision), where]
    made, expected = Trained(optimizer, compiled=compiled), Trained(optimizer, compiled=compiled)
    skipped = place.fit(made, items, *plugins, precision=precision, **options)
    never_seen = items[:first] + items[first + window :]
    assert_same(everything(skipped), everything(place.fit(expected, never_seen, precision=precision, **options)))
    assert skipped.global_step == 8 // window - 1
    assert where.on_device == (fused and precision != "16-mixed")


@pytest.mark.parametrize("at", [0, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", [NAN_LOSS, NAN_GRAD, INF_GRAD, HIGH_LOSS])
@pytest.mark.parametrize("optimizer", [*FUSED, *READ_BY_HOST])
def test_in_bf16(place: Place, optimizer: str, fault: int, at: int) -> None:
    """Bugs: a kernel that moves something in a step that it drops; running statistics; the first step's own paths."""
    compare(place, optimizer, fault, at, "bf16-mixed")


@pytest.mark.parametrize("fault", [NAN_LOSS, HIGH_LOSS])
@pytest.mark.parametrize("optimizer", [*FUSED, *READ_BY_HOST])
def test_with_a_loss_scaler(place: Place, optimizer: str, fault: int) -> None:
    """Bugs: the scale or its growth moves for bad content; a fused kernel that gets scaled gradients."""
    compare(place, optimizer, fault, 3, "16-mixed")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("optimizer", ["adamw-fused", "adamw-foreach"])
def test_a_whole_window(place: Place, optimizer: str, precision: str) -> None:
    """Bug: one micro-batch of the window is undone, and not the others."""
    compare(place, optimizer, NAN_LOSS, 3, precision, accumulate_grad_batches=2)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("optimizer", ["adamw-fused", "adamw-foreach"])
def test_compiled(place: Place, optimizer: str) -> None:
    """Bug: a compiled module keeps the buffers of another step."""
    compiled = {"backend": "inductor" if place.on_cuda else "aot_eager"}
    compare(place, optimizer, NAN_LOSS, 3, "bf16-mixed", compiled=compiled)
