"""Compute the activations of chosen blocks again in the backward pass, instead of keeping them."""
