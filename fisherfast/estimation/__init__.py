"""Estimate the Fisher information from moments, without a network or processes."""
