"""All healthy trainings; those of harm_suite.cases.held_out are kept for acceptance."""

from __future__ import annotations

from harm_suite.cases import classes, lazy, losses, noisy, planned, rare, tasks
from harm_suite.cases.held_out import CASES as HELD_OUT

CASES = (
    *rare.CASES,
    *classes.CASES,
    *tasks.CASES,
    *lazy.CASES,
    *planned.CASES,
    *losses.CASES,
    *noisy.CASES,
    *HELD_OUT,
)
