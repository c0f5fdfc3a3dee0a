"""Hold each tensor's gradient norm to its own history."""
