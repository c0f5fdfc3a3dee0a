"""Log gradient and weight norms by layer, and name the layer where a gradient became non-finite."""
