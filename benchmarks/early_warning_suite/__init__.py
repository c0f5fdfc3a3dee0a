"""The parts of benchmarks/early_warning.py: runs with and without trouble, readings, alarms, and the result page."""
