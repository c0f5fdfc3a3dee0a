"""Accumulate gradients over a number of micro-batches, samples or tokens."""
