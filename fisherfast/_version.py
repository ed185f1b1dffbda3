"""The one place where the version of fisherfast is written."""

__version__ = "0.1.0"
