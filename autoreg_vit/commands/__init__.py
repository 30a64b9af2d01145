"""What `autoreg-vit` does: a module a command."""
