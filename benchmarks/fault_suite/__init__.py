"""The parts of benchmarks/faults.py: scenarios, contenders, training runs, figures, and the result page."""
