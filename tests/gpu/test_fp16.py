"""Loss scaling on the device makes the decisions that it makes on the CPU."""

from typing import Any

import pytest
from fits import HEALTHY, INF_GRAD, NAN_GRAD, NAN_LOSS, Recorder, batches
from places import CPU, Place, Trained

import stabletrain as st

FAULTS = [HEALTHY] * 10 + [INF_GRAD, HEALTHY, NAN_LOSS, HEALTHY, NAN_GRAD, HEALTHY] + [HEALTHY] * 8


def decisions(place: Place, optimizer: str) -> list[tuple[Any, ...]]:
    recorder = Recorder()
    module = Trained(optimizer, norm=False)
    trainer = place.fit(
        module, batches(*FAULTS), recorder, st.SkipNonFinite(), st.ClipNorm(100.0),
        precision="16-mixed", init_scale=2.0**12, growth_interval=5,
    )  # fmt: skip
    steps = [(each.step, each.loss_scale, each.overflow, each.skipped) for each in recorder.state]
    return [*steps, trainer.global_step, trainer.precision_plugin.state_dict()]  # type: ignore[list-item]


@pytest.mark.parametrize("optimizer", ["adamw-foreach", "adamw-fused", "sgd-fused"])
def test_scales_and_counts(place: Place, optimizer: str) -> None:
    """Bugs: an overflow that is dropped as content, or content that lowers the scale; a fused kernel's own flag."""
    found = decisions(place, optimizer)
    assert found == decisions(CPU, optimizer)
    steps = found[: len(FAULTS)]
    assert [overflow for _, _, overflow, _ in steps].count(True) == 2, "infinite gradients are the scaler's business"
    assert [step for step, _, _, skipped in steps if skipped] == [FAULTS.index(NAN_LOSS)]
    assert steps[13][1] == steps[12][1], "content leaves the scale alone"
