"""Clip the gradient norm by its z-score against its own history."""
