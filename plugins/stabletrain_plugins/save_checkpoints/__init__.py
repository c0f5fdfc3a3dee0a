"""Save checkpoints that survive a kill, a full disk and a flipped bit, while training continues."""
