"""One rule per kind of layer: its block of the Fisher matrix."""
