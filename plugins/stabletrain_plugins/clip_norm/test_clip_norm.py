"""The bound against torch.nn.utils.clip_grad_norm_, and where that one is wrong."""

import json
import math
from pathlib import Path

import pytest
from argument_ranges import check_range

from stabletrain.core.rule import replay
from stabletrain_plugins.clip_norm.rule import ClipNormRule

VECTORS = json.loads((Path(__file__).parents[3] / "tests" / "vectors" / "torch_clip.json").read_text("utf-8"))


def applied(norms: list[float], max_norm: float = 1.0) -> list[float]:
    return [step.outcome.applied_norm for step in replay(ClipNormRule(max_norm), [(2.0, norm) for norm in norms])]


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["sequence"])
def test_finite_steps_are_what_torch_makes_of_them(case):
    """Bug: a scale other than max_norm / norm."""
    norms = [float(norm) for norm in case["input_norms"]]
    torch_norms = [2.0 * float(element) for element in case["grad_element_after_norm_clip_1.0"]]
    for norm, ours, theirs in zip(norms, applied(norms), torch_norms, strict=True):
        if math.isfinite(norm):
            assert ours == pytest.approx(theirs, rel=1.1e-6)  # torch divides by norm + 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("position", [0, 2, 4])
def test_a_nonfinite_norm_is_not_changed_where_torch_makes_the_whole_gradient_nan(bad, position):
    """Bug: an infinite norm scales the finite elements to 0, or a NaN changes later steps."""
    norms = [0.5, 3.0, 0.5, 3.0, 0.5]
    norms[position] = bad
    expected = [min(1.0, norm) if math.isfinite(norm) else bad for norm in norms]
    assert applied(norms) == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


def test_a_norm_up_to_the_maximum_is_not_changed():
    """Bug: a norm equal to the maximum is multiplied by 1 - epsilon."""
    below = math.nextafter(1.0, 0.0)
    assert applied([below, 1.0, math.nextafter(1.0, 2.0), 0.0]) == [below, 1.0, 1.0, 0.0]


def test_range_of_the_maximum():
    """Bug: a maximum of 0 or NaN is accepted, or an infinite one, which clips nothing, is refused."""
    accepted, refused = ([{"max_norm": x} for x in values] for values in ([5e-324, math.inf], [0.0, -1.0, math.nan]))
    check_range(ClipNormRule, "clip_norm", "plugins.clip", "max_norm", "> 0", accepted, refused)
