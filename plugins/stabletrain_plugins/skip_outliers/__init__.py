"""Drop steps whose loss or gradient norm is far from its history."""
