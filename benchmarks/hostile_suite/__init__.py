"""Hostile inputs, signals, kills and faults of storage, for benchmarks/hostile.py."""
