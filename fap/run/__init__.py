"""A training run: the loop, its process, its records."""
