"""Version of the package. Importing this file does not import torch."""

__version__ = "0.2.0"
