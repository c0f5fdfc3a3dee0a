"""Checks of a module and its data before a run: ``stabletrain.doctor`` and ``stabletrain doctor``.

The table of all checks is in `stabletrain.checkup.table`. They are asked about a `stabletrain.checkup.case.Case`, which
reads the first batches once and trains deep copies of the module for a few steps.
"""
