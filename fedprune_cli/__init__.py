"""fedprune: personalized, pruned federated learning over a modelled radio (see run.py first)."""

__version__ = "0.1.0"
