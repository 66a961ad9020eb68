"""Weights to start from: files, and what torchvision, timm and the Hugging Face Hub publish."""
