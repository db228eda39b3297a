"""A model to take home: one device's own network out of a run, as a file that needs no run; and what it predicts."""
