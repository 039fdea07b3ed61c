"""Write a merged model: whole or not at all."""

from .folder import OutputFolder
from .tensors import TensorWriter, sharded

__all__ = ["OutputFolder", "TensorWriter", "sharded"]
