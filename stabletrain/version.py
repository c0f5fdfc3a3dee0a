"""The version, where modules can read it without importing the package that exports them."""

__version__ = "0.1.0"
