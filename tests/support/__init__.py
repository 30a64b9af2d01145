"""What several test files share: runs, weights, pictures and references."""
