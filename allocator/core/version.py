"""The version of this package: results depend on it, and on a cluster the package may not be installed."""

__version__ = "0.1.0"
