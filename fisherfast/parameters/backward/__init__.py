"""Backward passes that give per-sample gradients and sensitivities."""
