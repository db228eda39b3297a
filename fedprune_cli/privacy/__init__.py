"""Privacy, measured: what an update gives away."""
