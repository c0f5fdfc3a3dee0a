"""``torch.compile(mode="reduce-overhead")``: inductor replays CUDA graphs, whose outputs the next step overwrites."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fits import HEALTHY, NAN_LOSS, assert_same, batches, everything
from places import Place, Trained, Where

import stabletrain as st
from stabletrain.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def compiled(place: Place) -> dict[str, Any]:
    return {"mode": "reduce-overhead"} if place.on_cuda else {"backend": "aot_eager"}


def test_steps_are_those_of_the_bare_run(place: Place) -> None:
    """Bugs: a loss or gradient that is read after the next graph has overwritten it; a dropped step that leaks."""
    items = batches(*[HEALTHY] * 5, NAN_LOSS, *[HEALTHY] * 6)
    where = Where()
    plugins = [*st.default_callbacks(clip=None, gradients=None), place.guard(fused=True), where]
    stack = place.fit(Trained("adamw-fused", compiled=compiled(place)), items, *plugins)
    torch.compiler.reset()
    never_seen = [item for item in items if item[1] == HEALTHY]
    bare = place.fit(Trained("adamw-fused", compiled=compiled(place)), never_seen)
    assert_same(everything(stack), everything(bare))
    assert where.on_device


def test_accumulation(place: Place) -> None:
    """Bug: an error of torch's in the second backward pass that says nothing of accumulation."""
    module = Trained("adamw-fused", compiled=compiled(place))
    items = batches(*[HEALTHY] * 4)
    if place.on_cuda:
        with pytest.raises(UserError, match="reduce-overhead"):
            place.fit(module, items, st.SkipNonFinite(), accumulate_grad_batches=2)
    else:
        assert place.fit(module, items, st.SkipNonFinite(), accumulate_grad_batches=2).global_step == 2
