"""Drop steps whose loss or gradient norm is far above its history."""
