"""Adaptive gradient clipping: clip each unit's gradient to a share of its weight norm."""
