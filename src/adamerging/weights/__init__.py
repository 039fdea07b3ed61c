"""Open weights, lazily and read-only, whatever format they are in.

`open_weights` is the way in; `Weights`, `Spec` and `Factors` are what comes out; `Fingerprint` and
`sha256_file` say which bytes it was.
"""

from .fingerprint import Fingerprint, sha256_file
from .opening import open_weights
from .source import Factors, Spec, Weights

__all__ = ["Factors", "Fingerprint", "Spec", "Weights", "open_weights", "sha256_file"]
