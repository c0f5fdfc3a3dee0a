"""What a run of any size will need, found without running it: sharded by its strategy, with tensors without memory."""
