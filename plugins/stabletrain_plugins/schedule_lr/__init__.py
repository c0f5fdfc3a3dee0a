"""Set the learning rate from the number of applied optimizer steps."""
