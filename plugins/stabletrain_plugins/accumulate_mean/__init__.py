"""Divide the gradient of a shorter accumulation window by the micro-batches that it holds."""
