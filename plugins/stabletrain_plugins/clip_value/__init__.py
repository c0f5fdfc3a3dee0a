"""Clamp every element of the gradient."""
