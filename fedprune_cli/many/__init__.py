"""Many runs: sweeps, and comparisons side by side."""
