"""Cases that are kept for acceptance: no constant of a rule may be chosen on them.

They are run once a change is finished (`benchmarks/harm.py --held-out`), to see whether it holds for trainings that
nobody had in mind. Whoever tunes a rule runs `--shared` and does not look here. A case of this package that was looked
at for the choice of a constant belongs among the shared ones from then on, and a new one must take its place.
"""

from __future__ import annotations

from harm_suite.cases.held_out import adversaries, imbalance, regimes, scales, text

CASES = (*imbalance.CASES, *regimes.CASES, *scales.CASES, *adversaries.CASES, *text.CASES)
