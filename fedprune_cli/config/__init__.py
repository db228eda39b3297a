"""Hydra's configuration -> one frozen, checked Experiment."""
