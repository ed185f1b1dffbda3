"""Fisher matrices, one structure per file."""
