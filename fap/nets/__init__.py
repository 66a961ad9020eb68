"""Models: by name, with dual batch norms."""
