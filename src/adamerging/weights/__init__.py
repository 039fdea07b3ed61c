"""Open weights, lazily and read-only, whatever format they are in.

`open_weights` is the way in; `Weights`, `Spec` and `Factors` are what comes out; `Fingerprints` and
`sha256_file` say which bytes it was, and load no torch.
"""

from typing import TYPE_CHECKING

from ..lazy import names_from
from .fingerprint import Fingerprints, sha256_file

if TYPE_CHECKING:
    from .opening import open_weights
    from .source import Factors, Spec, Weights

__all__ = ["Factors", "Fingerprints", "Spec", "Weights", "open_weights", "sha256_file"]

__getattr__ = names_from(
    __name__, {"Factors": "source", "Spec": "source", "Weights": "source", "open_weights": "opening"}
)
