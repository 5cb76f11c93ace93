"""Which samples, in which order, in which batch."""
