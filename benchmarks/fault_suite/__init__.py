"""The parts of benchmarks/faults.py: what goes wrong, who protects, how it is run, how it is judged and shown."""
