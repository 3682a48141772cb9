"""A cached model that leaves Python, or torch: one file for each way."""
