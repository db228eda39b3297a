"""Privacy: secure sums that know nested masks, clipping and noise, what they spend, and what an update gives away."""
