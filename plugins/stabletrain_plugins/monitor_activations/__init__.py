"""Log the size of module outputs, attention logits and output logits by layer, read in one step of many."""
