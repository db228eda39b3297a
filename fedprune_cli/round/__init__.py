"""One round, and what all rounds share."""
