"""Analyses: spectrum, importance, effective dimension, scores, consolidation."""
