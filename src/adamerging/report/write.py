"""A run's report as files: the page, and its figures beside it where they are wanted."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError
from .drawing import png
from .load import Run, load_run, shown
from .page import Page, make_page


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        out: the page.
        figures: files of the figures, an SVG and a PNG each.
        run: the records that it shows.
        page: what was made of them.
    """

    out: Path
    figures: tuple[Path, ...]
    run: Run
    page: Page


def write_report(
    folder: str | Path, out: str | Path | None = None, *, figures: str | Path | None = None
) -> Written:
    """Make the report of a run from its records alone.

    Args:
        folder: of the run, as `compare` writes it, finished or not.
        out: the page to write, replaced if it is there; ``report.html`` in the run's folder when None.
        figures: folder for the figures as ``NAME.svg`` and ``NAME.png``; none are written when None.

    Raises:
        UsageError: the folder holds no run that can be read, see `load_run`.
        MissingExtraError: matplotlib is not installed.
        OutputError: a file cannot be written. Each file is written whole or not at all.
    """
    run = load_run(folder)
    folder = Path(folder)
    target = Path(out) if out is not None else (folder if folder.is_dir() else folder.parent) / "report.html"
    if target.is_dir():
        raise OutputError(f"{shown(target)} is a folder; give --out the name of a file, such as report.html")
    page = make_page(run)
    files = {}
    if figures is not None:
        for drawn in page.charts:
            files[Path(figures) / f"{drawn.chart.name}.svg"] = drawn.svg.encode("utf-8")
            files[Path(figures) / f"{drawn.chart.name}.png"] = png(drawn.figure)
    for path, content in files.items():
        _write(path, content)
    _write(target, page.html.encode("utf-8"))
    return Written(target, tuple(files), run, page)


def _write(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".report-")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {shown(path)}: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
