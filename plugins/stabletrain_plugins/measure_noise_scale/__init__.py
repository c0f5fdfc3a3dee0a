"""Measure the gradient noise scale from the norms of micro-batches and of the whole batch."""
