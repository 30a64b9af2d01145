"""How good features, classes, masks and boxes are."""
