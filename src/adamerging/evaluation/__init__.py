"""How good a model is on its tasks: records, no drawing."""

from .scores import Score, accuracy, normalised_accuracy

__all__ = ["Score", "accuracy", "normalised_accuracy"]
