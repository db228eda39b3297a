"""What fedprune costs, measured against bare references in the same run."""
