"""Resume from a checkpoint as if the run had never stopped: at the right batch, with the right random numbers."""
