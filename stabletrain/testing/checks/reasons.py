"""Every event and every request has a reason with a number."""

from __future__ import annotations

import typing

from stabletrain.core.events import Event, EventKind, Request, RequestKind
from stabletrain.testing.checks.replaying import all_series, run
from stabletrain.testing.failure import wrong
from stabletrain.testing.series import Series, burst, calm, nonfinite
from stabletrain.testing.subject import Subject, choice

_KINDS = typing.get_args(EventKind)


def events_have_reasons(subject: Subject) -> None:
    """Events have the step, the rule's label, a known kind and a reason with a digit; requests likewise."""
    for option in subject.options:
        rule = subject.build(option)
        for name, series in {**all_series(), **_long_faults()}.items():
            for _, outcome, observation in run(rule, series, rule.init()):
                case = f"at step {outcome.step} of the series {name!r} ({choice(option)})"
                for event in observation.events:
                    _check_event(event, rule.label, outcome.step, case)
                for request in observation.requests:
                    _check_request(request, rule.label, case)


def _check_event(event: Event, label: str, step: int, case: str) -> None:
    if not isinstance(event, Event):
        wrong(f"an Event {case}", repr(event))
    if type(event.step) is not int or event.step != step:
        wrong(f"an event with step={step} {case}", f"step={event.step!r}")
    if event.plugin != label:
        wrong(f"an event of {label!r} {case}; use self.label", f"plugin={event.plugin!r}")
    if event.kind not in _KINDS:
        wrong(f"a kind of event among {', '.join(_KINDS)} {case}", repr(event.kind))
    for field in ("value", "limit"):
        if not isinstance(getattr(event, field), int | float):
            wrong(f"a number as {field} of the event {case}", repr(getattr(event, field)))
    _check_reason(event.reason, f"event {case}")


def _check_request(request: Request, label: str, case: str) -> None:
    if not isinstance(request, Request) or not isinstance(request.kind, RequestKind):
        wrong(f"a Request {case}", repr(request))
    if request.plugin != label:
        wrong(f"a request of {label!r} {case}; use self.label", f"plugin={request.plugin!r}")
    _check_reason(request.reason, f"request {case}")


def _check_reason(reason: str, case: str) -> None:
    if not isinstance(reason, str) or not any(character.isdigit() for character in reason):
        wrong(f"a reason with a number in the {case}", repr(reason))


def _long_faults() -> dict[str, Series]:
    return {
        "NaN to the end": nonfinite(calm(150), at=range(90, 150)),
        "a raised loss to the end": burst(calm(200), at=120, length=80, norm=10.0, loss=10.0),
    }
