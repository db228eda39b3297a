"""What protects the devices' data: secure sums that know nested masks, clipping and noise, and what they spend."""
