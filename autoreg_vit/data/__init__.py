"""Images, labels, masks and boxes: where they come from, and how they become batches."""
