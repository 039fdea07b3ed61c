"""Distribution shift: corruptions of images and texts, at severities 1 to 5."""

from .corrupt import Corrupted, corrupt, fits
from .severities import SEVERITIES
from .table import CORRUPTIONS, Corruption, find

__all__ = ["CORRUPTIONS", "SEVERITIES", "Corrupted", "Corruption", "corrupt", "find", "fits"]
