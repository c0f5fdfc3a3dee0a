"""Add noise to the gradients that decays over the run."""
