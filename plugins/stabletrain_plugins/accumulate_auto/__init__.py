"""After an out-of-memory error, run each micro-batch in pieces that fit."""
