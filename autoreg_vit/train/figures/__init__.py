"""What commands draw: plots of a run, pictures of orders, predictions and attention, and their panels."""
