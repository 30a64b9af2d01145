"""Object detection and instance segmentation: `autoreg-vit detect`."""
