"""Report when the validation loss rises while the training loss falls."""
