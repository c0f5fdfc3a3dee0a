"""Training runs that are killed and restarted, for benchmarks/kills.py."""
