"""Which reader opens which file: a table, first match wins. A new file format is one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import WeightsError
from .safetensors_file import open_safetensors, open_sharded_safetensors
from .source import Weights
from .torch_file import open_sharded_torch, open_torch_file


@dataclass(frozen=True, slots=True)
class Format:
    """One file format.

    Attributes:
        name: as messages call it.
        endings: how file names end, lower case.
        open: the reader.
    """

    name: str
    endings: tuple[str, ...]
    open: Callable[[Path], Weights]


FORMATS: tuple[Format, ...] = (
    Format("sharded safetensors", (".safetensors.index.json",), open_sharded_safetensors),
    Format("safetensors", (".safetensors",), open_safetensors),
    Format(
        "sharded torch file",
        tuple(f"{end}.index.json" for end in (".bin", ".pt", ".pth")),
        open_sharded_torch,
    ),
    Format("torch file", (".pt", ".pth", ".bin", ".ckpt"), open_torch_file),
)

# Endings that are known and not read, with what to do instead.
NOT_READ: tuple[tuple[tuple[str, ...], str], ...] = (
    ((".gguf",), "GGUF is a quantised format; use the safetensors checkpoint that it was converted from"),
    (
        (".pkl", ".pickle"),
        "Opening a pickle runs code stored in it; save the model's state_dict as safetensors",
    ),
    ((".h5", ".msgpack", ".onnx", ".npz", ".npy", ".tflite"), "Save the model's state_dict as safetensors"),
)


def format_of(name: str) -> Format | None:
    """The first format whose ending a file name has, if any.

    Args:
        name: a file name; the file need not exist.

    Returns:
        The record from `FORMATS`, or None.
    """
    return next((kind for kind in FORMATS if name.lower().endswith(kind.endings)), None)


def open_file(path: Path) -> Weights:
    """Open one file (or one index of shards) by the ending of its name.

    Args:
        path: an existing file.

    Returns:
        Weights labelled with the path, without `Weights.folder`.

    Raises:
        WeightsError: the format is not one of `FORMATS`, or the file is damaged or quantised.
        UnsafeFileError: opening it would run code.
    """
    kind = format_of(path.name)
    if kind is not None:
        return kind.open(path)
    for endings, remedy in NOT_READ:
        if path.name.lower().endswith(endings):
            raise WeightsError(f"{path} is of a format that is not read. {remedy}.")
    readable = ", ".join(ending for kind in FORMATS for ending in kind.endings)
    raise WeightsError(f"{path} has no ending of a weight file. Known endings: {readable}.")
