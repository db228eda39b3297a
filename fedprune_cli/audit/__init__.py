"""Looking at runs that are there: audits, limits, lists."""
