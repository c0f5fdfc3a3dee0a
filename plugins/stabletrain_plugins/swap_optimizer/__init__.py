"""Replace the optimizer of a module, and keep its groups and schedulers."""
