"""Reads a user's network and leaves it as it was."""
