"""The passes over the samples that measure every layer."""
