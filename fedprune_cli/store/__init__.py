"""What a run knows, and its folder on disk."""
