"""What travels between a device and the server."""
