"""Hold the gradient norm to its own history, by a z-score."""
