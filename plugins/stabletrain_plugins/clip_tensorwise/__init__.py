"""Clip each tensor's gradient norm by its own history."""
