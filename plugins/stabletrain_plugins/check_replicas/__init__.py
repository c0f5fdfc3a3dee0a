"""Compare the copies of weights and optimizer state on all ranks, and undo or report silent corruption."""
