"""Training and its commands; needs the `train` extra (`pip install "autoreg-vit[train]"`)."""
