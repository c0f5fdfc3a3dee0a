"""Inputs that somebody else made, damaged or with intent, for benchmarks/hostile.py."""
