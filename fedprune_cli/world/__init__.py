"""What is given: data, who owns it, devices and the channel (numpy)."""
