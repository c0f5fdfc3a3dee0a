"""Drop steps whose loss or gradient is NaN or infinite."""
