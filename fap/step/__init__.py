"""One training step: its passes, rows, weights and metrics, run eagerly or as one CUDA graph."""
