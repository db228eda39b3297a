"""What is learnt: models, personalization, pruning, a device's work and the server's (torch)."""
