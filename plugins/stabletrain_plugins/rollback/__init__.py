"""Go back to a healthy state in memory, leave out the offending batches, and go on."""
