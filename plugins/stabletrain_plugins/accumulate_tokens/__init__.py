"""Weight each micro-batch by the tokens that count in its mean loss."""
