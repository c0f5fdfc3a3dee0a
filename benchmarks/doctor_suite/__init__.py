"""Modules and data for benchmarks/doctor.py: healthy ones, and ones with a bug that was planted."""
