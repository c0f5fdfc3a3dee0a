"""Detect and report loss spikes, divergences and level shifts."""
