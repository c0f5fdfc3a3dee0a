"""Adaptive gradient clipping: hold each unit's gradient to a share of its weight norm."""
