"""Version of the package. Importing this file does not import torch."""

__version__ = "0.1.0"
