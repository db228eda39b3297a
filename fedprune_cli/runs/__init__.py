"""A run's life: begun, continued, branched, finished."""
