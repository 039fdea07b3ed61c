"""Where samples come from: files, folders, hub ids and objects, each read into columns by name.

A file format is one record of `FORMATS`; the first that matches a path reads it.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, UsageError

Columns = Mapping[str, Sequence[Any]]

INPUT, PAIR, LABEL = "input", "pair", "label"
"""Names of the columns of data that comes without names."""

LONGEST_FIELD = 2**31 - 1
"""Characters of one value in a table; by default Python's reader stops at 131072."""

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(\[[\w.-]+\])?")


class Names(list[str]):
    """Labels that are names of classes, also those that look like numbers."""


@dataclass(frozen=True)
class Format:
    """One kind of file or folder.

    Attributes:
        name: as messages call it.
        matches: whether an existing path is of this kind.
        read: ``(path, split) → columns``; the split is what stood behind a colon, or None.
    """

    name: str
    matches: Callable[[Path], bool]
    read: Callable[[Path, str | None], Columns]


def read_columns(source: Any) -> tuple[Columns, str]:
    """Columns by name, and what messages and records call their source.

    Args:
        source: a path (``file.npz:split`` for one split of several), a hub id (``org/name:split`` or
            ``org/name[config]:split``), a `datasets` object, columns by name, an array or tensor, or an
            iterable of samples: inputs, ``(input, label)`` or ``(input, pair, label)`` tuples, or dicts.

    Raises:
        UsageError: nothing is there, or it cannot be read.
        MissingExtraError: a package of the ``data`` extra is needed.
    """
    if isinstance(source, str | Path):
        return _read_named(str(source)), str(source)
    name = type(source).__name__
    if type(source).__module__.split(".")[0] == "datasets":
        return _of_dataset(source, name), f"datasets {name}"
    if isinstance(source, Mapping):
        return {str(key): value for key, value in source.items()}, "columns"
    if hasattr(source, "shape") and hasattr(source, "dtype"):
        return {INPUT: source}, f"{name} {list(source.shape)}"
    return _of_rows(_rows(source), name), name


def folder_of(source: Any) -> Path | None:
    """The folder that names of files in a source are relative to; None for one that is no file or folder."""
    path, _ = _path_and_split(str(source)) if isinstance(source, str | Path) else (None, None)
    if path is None or not path.exists():
        return None
    return path if path.is_dir() else path.parent


def _path_and_split(name: str) -> tuple[Path, str | None]:
    """What a source names, and the split behind its colon; a path with a colon in its name comes first."""
    path = Path(name).expanduser()
    if path.exists() or ":" not in name:
        return path, None
    before, _, split = name.rpartition(":")
    return Path(before).expanduser(), split


def _read_named(name: str) -> Columns:
    path, split = _path_and_split(name)
    if path.exists():
        return _read_path(path, split)
    plain = name if split is None else name.rpartition(":")[0]
    if _HUB_ID.fullmatch(plain) and path.suffix not in {".jsonl", ".gz", ".csv", ".parquet", ".npz", ".json"}:
        return _of_hub(plain, split)
    raise UsageError(
        f"the data {name!r} does not exist. Give a file ({', '.join(form.name for form in FORMATS)}), "
        "a hub id (org/name:split), or the samples themselves in a list"
    )


def _read_path(path: Path, split: str | None) -> Columns:
    for form in FORMATS:
        if form.matches(path):
            try:
                return form.read(path, split)
            except (OSError, EOFError, zlib.error) as error:  # the last two of a compressed file
                raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
            except UnicodeDecodeError as error:
                raise UsageError(f"{path} is not UTF-8 text: {error.reason}") from None
    raise UsageError(
        f"{path} is of no known format; known by the name's end: {', '.join(form.name for form in FORMATS)}"
    )


def _without_split(path: Path, split: str | None) -> None:
    if split is not None:
        raise UsageError(f"{path}:{split}: only npz files and data sets of several splits have splits")


def _text(path: Path) -> io.TextIOBase:
    """A file's text, without the mark that spreadsheets put before it."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _jsonl(path: Path, split: str | None) -> Columns:
    _without_split(path, split)
    rows = []
    with _text(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise UsageError(f"{path}, line {number}: not valid JSON ({error})") from None
    return _of_rows(rows, str(path))


def _json(path: Path, split: str | None) -> Columns:
    with _text(path) as file:
        try:
            found = json.load(file)
        except ValueError as error:
            raise UsageError(
                f"{path} is not valid JSON ({error}); a file of JSON lines ends in .jsonl"
            ) from None
    if split is not None and isinstance(found, dict):
        if split not in found:
            raise UsageError(f"{path} has no '{split}'; it has {', '.join(found)}")
        found = found[split]
    if isinstance(found, dict):
        return found
    if not isinstance(found, list):
        raise UsageError(f"{path} must hold a list of samples, or columns by name")
    return _of_rows(found, str(path))


def _csv(path: Path, split: str | None) -> Columns:
    _without_split(path, split)
    with _text(path) as file, _long_fields():
        rows = csv.reader(file, delimiter="\t" if ".tsv" in path.name else ",")
        try:
            return _of_table(rows, path)
        except csv.Error as error:
            raise UsageError(f"{path}, line {rows.line_num}: not readable as a table ({error})") from None


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Let `csv`, whose limit holds for the whole process, read values of any length for a while."""
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _of_table(rows: Any, path: Path) -> Columns:
    header: list[str] = next(rows, [])
    if len(set(header)) != len(header):
        raise UsageError(f"{path}: the first line must name the columns, each differently, got {header}")
    columns: dict[str, list[str]] = {name: [] for name in header}
    for row in rows:
        if not row:
            continue
        if len(row) != len(header):
            raise UsageError(
                f"{path}, line {rows.line_num}: {len(row)} values under a header of {len(header)} columns"
            )
        for name, value in zip(header, row, strict=True):
            columns[name].append(value)
    return columns


def _lines(path: Path, split: str | None) -> Columns:
    _without_split(path, split)
    with _text(path) as file:
        return {INPUT: [line.rstrip("\r\n") for line in file if line.strip()]}


def _parquet(path: Path, split: str | None) -> Columns:
    _without_split(path, split)
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "data", f"reading {path.name}") from None
    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise UsageError(f"{path} is not a readable Parquet file: {error}") from None
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _npz(path: Path, split: str | None) -> Columns:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as stored:
            names = list(stored.files)
            wanted = {name: _in_split(name, split) for name in names}
            found = {short: stored[name] for name, short in wanted.items() if short is not None}
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UsageError(f"{path} is not a readable npz file of plain arrays: {error}") from None
    if split is not None and not found:
        raise UsageError(f"{path} has no split '{split}'; its arrays are {', '.join(names)}")
    return found


def _in_split(name: str, split: str | None) -> str | None:
    """The name of an array within a split (``val_x`` → ``x``); None for arrays of other splits."""
    if split is None:
        return name
    if name.startswith(f"{split}_"):
        return name[len(split) + 1 :]
    return name[: -len(split) - 1] if name.endswith(f"_{split}") else None


def _image_folder(path: Path, split: str | None) -> Columns:
    root = path if split is None else path / split
    if not root.is_dir():
        raise UsageError(f"{path} has no folder '{split}'")
    visible = [entry for entry in sorted(root.iterdir()) if not entry.name.startswith(".")]
    classes = [entry for entry in visible if entry.is_dir()]
    flat = _images(root)
    if flat and not classes:
        return {INPUT: flat}
    if flat:
        raise UsageError(
            f"{root} holds both images and folders; give a folder of images, or of one folder a class"
        )
    by_class = {folder.name: _images(folder) for folder in classes}
    inputs = [image for images in by_class.values() for image in images]
    if not inputs and any(list(folder.glob("*/*.*")) for folder in classes):
        splits = ", ".join(folder.name for folder in classes)
        raise UsageError(f"{root} seems to hold splits ({splits}); name one, as {root}:{classes[0].name}")
    labels = [name for name, images in by_class.items() for _ in images]
    return {INPUT: inputs, LABEL: labels if _count_from_zero(by_class) else Names(labels)}


def _count_from_zero(names: Iterable[str]) -> bool:
    """Whether names are the numbers 0, 1, 2, ... without a gap, in whatever order."""
    found = list(names)
    return all(name.isdecimal() for name in found) and sorted(map(int, found)) == list(range(len(found)))


def _images(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]


def _saved_dataset(path: Path, split: str | None) -> Columns:
    return _of_dataset(_datasets(path.name).load_from_disk(str(path)), str(path), split)


def _ends(*suffixes: str) -> Callable[[Path], bool]:
    endings = (*suffixes, *(f"{suffix}.gz" for suffix in suffixes))
    return lambda path: path.is_file() and path.name.lower().endswith(endings)


FORMATS: tuple[Format, ...] = (
    Format(".jsonl", _ends(".jsonl", ".ndjson"), _jsonl),
    Format(".json", _ends(".json"), _json),
    Format(".csv or .tsv", _ends(".csv", ".tsv"), _csv),
    Format(".txt", _ends(".txt"), _lines),
    Format(".parquet", lambda path: path.is_file() and path.suffix.lower() in (".parquet", ".pq"), _parquet),
    Format(".npz", lambda path: path.is_file() and path.suffix.lower() == ".npz", _npz),
    Format(
        "saved data set",
        lambda path: (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file(),
        _saved_dataset,
    ),
    Format("image folder", Path.is_dir, _image_folder),
)


def _datasets(purpose: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "data", f"reading {purpose}") from None
    return datasets


def _of_hub(name: str, split: str | None) -> Columns:
    plain, _, config = name.rstrip("]").partition("[")
    module = _datasets(f"the data set {plain}")
    try:
        found = module.load_dataset(plain, config or None, split=split)
    except Exception as error:  # whatever the hub, the network or a builder raises
        first = str(error).strip().splitlines()
        raise UsageError(
            f"no path {name} exists, and as a data set of the hub it cannot be loaded: "
            f"{type(error).__name__}: {first[0] if first else ''}"
        ) from None
    return _of_dataset(found, name)


def _of_dataset(found: Any, name: str, split: str | None = None) -> Columns:
    if isinstance(found, Mapping):  # a DatasetDict
        if split is None and len(found) > 1:
            raise UsageError(f"{name} has several splits; name one of {', '.join(found)} (as name:split)")
        if split is not None and split not in found:
            raise UsageError(f"{name} has no split '{split}'; it has {', '.join(found)}")
        found = found[split] if split is not None else next(iter(found.values()))
    elif split is not None:
        raise UsageError(f"{name} has no splits, so there is no '{split}'")
    if not hasattr(found, "__len__"):  # streamed
        return _of_rows(list(found), name)
    found = _encoded(found)
    return {column: found[column] for column in found.column_names}


def _encoded(found: Any) -> Any:
    """A data set whose images stay encoded until they are used: checks and hashes need not decode them."""
    for column, feature in (getattr(found, "features", None) or {}).items():
        if type(feature).__name__ == "Image" and getattr(feature, "decode", False) and len(found):
            plain = found.cast_column(column, type(feature)(decode=False))
            first = plain[0][column]
            if isinstance(first, Mapping) and first.get("bytes") is not None:
                found = plain
    return found


def _rows(source: Any) -> list[Any]:
    if not isinstance(source, Iterable) and hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return [source[index] for index in range(len(source))]  # a torch data set
    if not isinstance(source, Iterable):
        raise UsageError(
            f"samples cannot be read from a {type(source).__name__}; give a path, a hub id, or an iterable"
        )
    return list(source)


def _of_rows(rows: Sequence[Any], name: str) -> Columns:
    """Columns of dicts, of ``(input, label)`` or ``(input, pair, label)`` tuples, or of bare inputs."""
    if not rows:
        return {}
    kinds = {_row_kind(row) for row in rows}
    if len(kinds) > 1:
        raise UsageError(f"the samples of {name} are not all alike: {', '.join(sorted(kinds))}")
    kind = kinds.pop()
    if kind == "dict":
        names: dict[str, None] = {}
        for row in rows:
            names |= dict.fromkeys(row)
        # A field that some rows lack is None there; whoever uses the column says which sample.
        return {field: [row.get(field) for row in rows] for field in names}
    if kind == "tuple of 2":
        return {INPUT: [row[0] for row in rows], LABEL: [row[1] for row in rows]}
    if kind == "tuple of 3":
        return {INPUT: [r[0] for r in rows], PAIR: [r[1] for r in rows], LABEL: [r[2] for r in rows]}
    if kind.startswith("tuple"):
        raise UsageError(
            f"samples of {name} are {kind}; give (input, label), (input, pair, label) or dicts with names"
        )
    return {INPUT: list(rows)}


def _row_kind(row: Any) -> str:
    if isinstance(row, Mapping):
        return "dict"
    return f"tuple of {len(row)}" if isinstance(row, tuple) else "input"
