"""Restore a healthy snapshot when training diverges, exclude the offending batches, and continue."""
