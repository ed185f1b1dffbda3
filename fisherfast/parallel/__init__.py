"""Several processes that measure together, on torch.distributed."""
