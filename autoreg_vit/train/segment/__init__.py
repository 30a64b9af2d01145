"""Semantic segmentation: `autoreg-vit segment`."""
