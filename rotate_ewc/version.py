"""The version, apart from the package so that building does not import torch."""

__version__ = "0.1.0"
