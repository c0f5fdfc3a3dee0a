"""Clip the gradient norm to a percentile of its own history."""
