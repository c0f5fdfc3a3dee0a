"""Shrink the query and key weights of attention heads whose largest logit is above a limit."""
