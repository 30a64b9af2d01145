"""Weights in and out: by name, exported, converted, with their cards."""
