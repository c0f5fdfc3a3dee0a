"""Accumulate gradients over more micro-batches as training goes on."""
