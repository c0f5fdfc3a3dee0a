"""Tell loss spikes, divergences and new levels apart, and report them."""
