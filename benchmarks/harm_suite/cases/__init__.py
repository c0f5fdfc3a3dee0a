"""All healthy trainings; those of harm_suite.cases.held_out are kept for acceptance."""

from __future__ import annotations

from harm_suite.cases import noisy, planned, rare, tasks

CASES = (*rare.CASES, *tasks.CASES, *planned.CASES, *noisy.CASES)
