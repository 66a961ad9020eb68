"""A run's model for others: plain weights, ONNX, a folder of the Hugging Face Hub."""
