"""Weights out and in: `autoreg-vit export` and `autoreg-vit convert`, and the cards they write."""
