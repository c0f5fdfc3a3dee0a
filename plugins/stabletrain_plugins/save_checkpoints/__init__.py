"""Checkpoints that survive a kill, a full disk and a flipped bit, written while training goes on."""
