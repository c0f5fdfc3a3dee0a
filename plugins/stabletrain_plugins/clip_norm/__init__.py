"""Clip the global gradient norm to a fixed maximum."""
