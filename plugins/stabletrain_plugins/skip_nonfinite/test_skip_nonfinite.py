"""What counts as a non-finite step, what ends the count, and what happens at the maximum."""

import math

import pytest
from argument_ranges import check_range

from stabletrain.core.events import Event, Request, RequestKind
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Observation
from stabletrain_plugins.skip_nonfinite.rule import NonFiniteState, SkipNonFiniteRule

RULE = SkipNonFiniteRule(max_in_a_row=3, max_overflows_in_a_row=4, min_scale=0.25, name="mine")


def nonfinite(step: int, loss: float = math.nan, norm: float = 1.0) -> Outcome:
    return Outcome(step, loss, norm, norm, math.nan, skipped=True)


def overflow(step: int, in_a_row: int, scale: float) -> Outcome:
    return Outcome(
        step, 2.0, math.inf, math.inf, math.nan, overflow=True, loss_scale=scale, overflows_in_a_row=in_a_row
    )


def same(got: Observation[NonFiniteState], expected: Observation[NonFiniteState]) -> bool:
    """Equality with NaN equal to NaN."""
    return repr(got) == repr(expected)


@pytest.mark.parametrize(
    ("loss", "norm", "value", "text"),
    [
        (math.nan, 1.5, math.nan, "loss nan, grad_norm 1.5"),
        (2.5, math.inf, math.inf, "loss 2.5, grad_norm inf"),
        (2.5, math.nan, math.nan, "loss 2.5, grad_norm nan"),
        (-math.inf, math.nan, -math.inf, "loss -inf, grad_norm nan"),
    ],
)
def test_the_event_has_the_nonfinite_signal(loss: float, norm: float, value: float, text: str) -> None:
    """Bug: the finite one of the two signals reported as the cause."""
    event = Event(7, "mine", "nonfinite", value, math.nan, f"{text}: step skipped (1 in a row)")
    assert same(RULE.observe(NonFiniteState(), nonfinite(7, loss, norm)), Observation(NonFiniteState(1), (event,)))


def test_too_many_in_a_row_request_a_rollback_and_the_count_starts_again() -> None:
    """Bugs: one step too early or too late; a request in every later step; the wrong config key."""
    reason = "loss nan, grad_norm 1: step skipped"
    event = Event(5, "mine", "nonfinite", math.nan, math.nan, f"{reason} (3 in a row)")
    text = f"3 non-finite steps in a row (plugins.nonfinite.max_in_a_row=3); last: {reason}"
    request = Request(RequestKind.ROLLBACK, "mine", text)
    assert RULE.observe(NonFiniteState(1), nonfinite(4)).requests == ()
    assert same(RULE.observe(NonFiniteState(2), nonfinite(5)), Observation(NonFiniteState(), (event,), (request,)))


def test_only_an_applied_step_ends_the_count() -> None:
    """Bug: NaN, a step that another plugin skipped, NaN ... never reaches the maximum."""
    other = Outcome(1, 2.0, 1.0, 1.0, math.nan, skipped=True)
    applied = Outcome(1, 2.0, 1.0, 1.0, 1.0)
    assert RULE.observe(NonFiniteState(2), other) == Observation(NonFiniteState(2))
    assert RULE.observe(NonFiniteState(2), applied) == Observation(NonFiniteState())
    state, requested = RULE.init(), []
    for step in range(5):
        state, _, requests = RULE.observe(state, other if step % 2 else nonfinite(step))
        requested += [step] * len(requests)
    assert requested == [4]


def test_an_expected_overflow_does_not_count() -> None:
    """Bug: a run in fp16 that ends while its loss scale is still being searched; or a count that an overflow resets."""
    for in_a_row, scale in ((1, 65536.0), (3, 0.5)):
        assert RULE.observe(NonFiniteState(2), overflow(0, in_a_row, scale)) == Observation(NonFiniteState(2))


@pytest.mark.parametrize(
    ("in_a_row", "scale", "value", "limit", "reason"),
    [
        (4, 8.0, 4.0, 4.0, "4 fp16 overflows in a row (loss scale 8)"),
        (9, 0.125, 9.0, 4.0, "9 fp16 overflows in a row (loss scale 0.125)"),
        (1, 0.25, 0.25, 0.25, "fp16 overflow at a loss scale of 0.25"),
    ],
)
def test_overflows_that_do_not_end_count(in_a_row: int, scale: float, value: float, limit: float, reason: str) -> None:
    """Bug: a run whose gradients are never finite again continues for ever."""
    event = Event(6, "mine", "overflow", value, limit, f"{reason} (2 in a row)")
    expected = Observation(NonFiniteState(2), (event,))
    assert RULE.observe(NonFiniteState(1), overflow(6, in_a_row, scale)) == expected


def test_ranges_of_the_arguments() -> None:
    """Bug: a range off by one, or a message with another name, range or key."""
    for argument in ("max_in_a_row", "max_overflows_in_a_row"):
        check_range(
            SkipNonFiniteRule, "skip_nonfinite", "plugins.nonfinite", argument, ">= 1", [{argument: 1}], [{argument: 0}]
        )
    check_range(
        SkipNonFiniteRule,
        "skip_nonfinite",
        "plugins.nonfinite",
        "min_scale",
        "> 0",
        [{"min_scale": 5e-324}],
        [{"min_scale": 0.0}, {"min_scale": math.nan}],
    )


def test_a_change_by_design_does_not_end_the_count() -> None:
    """Bug: a change announced at every step, so that no run of NaN is ever ``max_in_a_row`` long."""
    assert SkipNonFiniteRule().forget(NonFiniteState(3)) == NonFiniteState(3)
