"""Merging methods, one file each. Importing this package registers them all.

To add one: write ``<name>.py`` beside this file with a factory decorated by `register`, and import it
here. The contract suite picks it up by itself.
"""

from . import (
    ace,
    average,
    breadcrumbs,
    cart,
    consensus,
    dare,
    della,
    emr,
    iso_c,
    iso_cts,
    karcher,
    lines,
    model_stock,
    pcb,
    rescale,
    slerp,
    tall_masks,
    task_arithmetic,
    ties,
    tsv_m,
    weighted,
    wudi,
)
from .registry import Registration, make_method, methods, register
from .stage import Chunk, Masks, Method, Stage, Stream, chain

__all__ = [
    "Chunk",
    "Masks",
    "Method",
    "Registration",
    "Stage",
    "Stream",
    "ace",
    "average",
    "breadcrumbs",
    "cart",
    "chain",
    "consensus",
    "dare",
    "della",
    "emr",
    "iso_c",
    "iso_cts",
    "karcher",
    "lines",
    "make_method",
    "methods",
    "model_stock",
    "pcb",
    "register",
    "rescale",
    "slerp",
    "tall_masks",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "weighted",
    "wudi",
]
