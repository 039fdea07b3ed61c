"""What a file really holds, from its first bytes: the usual ways in which a download is not the weights."""

from __future__ import annotations

from pathlib import Path

from ..errors import WeightsError

# (first bytes, what it is, what to do); first match wins.
IMPOSTORS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "Run `git lfs pull` beside it"),
    (b"<!DOCTYPE", "a web page, not weights", "Download the file itself, not the page about it"),
    (b"<!doctype", "a web page, not weights", "Download the file itself, not the page about it"),
    (b"<html", "a web page, not weights", "Download the file itself, not the page about it"),
    (b"GGUF", "a GGUF file", "GGUF is not read; use the safetensors checkpoint that it was converted from"),
    (b"\x89HDF\r\n", "an HDF5 file", "HDF5 is not read; save the model's state_dict as safetensors"),
    (b"\x93NUMPY", "a NumPy array", "Save a dict of named tensors as safetensors instead"),
)


def check_is_no_impostor(path: Path) -> bytes:
    """The first 16 bytes of a file, once it is clear that they may begin a weight file.

    Args:
        path: a file.

    Returns:
        Up to 16 bytes (fewer where the file is shorter).

    Raises:
        WeightsError: the file cannot be read, is empty, or is known to be something else.
    """
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read: {error.strerror or error}. Check its permissions."
        ) from error
    if not start:
        raise WeightsError(f"{path} is empty (0 bytes). The download or copy did not finish: fetch it again.")
    for signature, what, remedy in IMPOSTORS:
        if start.startswith(signature):
            raise WeightsError(f"{path} is {what}. {remedy}.")
    return start[:16]
