"""Trainings that are killed and started again, for benchmarks/kills.py."""
