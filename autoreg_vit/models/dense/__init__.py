"""Networks of dense prediction on an encoder: the neck, UPerNet and Mask R-CNN."""
