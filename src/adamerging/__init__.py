"""Merge experts fine-tuned from one base into one multi-task model, with no training data."""

__version__ = "0.1.0"
