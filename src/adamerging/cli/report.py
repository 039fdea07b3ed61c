"""`adamerging report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import flags, show
from .failing import guard


@guard()
def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN_FOLDER", help="The folder that compare wrote, finished or not.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The page to write; report.html in the run's folder when not given."
        ),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", metavar="DIR", help="Write the figures as SVG and PNG, too.")
    ] = None,
    as_json: flags.AsJson = False,
) -> None:
    """Make a comparison's report from its records alone: one HTML file that opens offline.

    Example: adamerging report runs/text8 --figures figures/
    """
    from ..report.load import shown
    from ..report.write import write_report

    written = write_report(run, out, figures=figures)
    said = written.page.verdict
    comparison = written.run.comparison
    for problem in written.run.problems:
        show.warn(problem)
    if as_json:
        show.print_json(
            {
                "out": shown(written.out),
                "figures": [shown(path) for path in written.figures],
                "complete": comparison.complete,
                "planned": comparison.planned,
                "rows": len(written.run.rows),
                "problems": list(written.run.problems),
                "verdict": said.headline,
                "cautions": [f"{about}: {sentence}" for about, sentence in said.cautions],
            }
        )
        return
    if not comparison.complete:
        show.note(
            f"this run is not finished: {len(written.run.rows)} of {comparison.planned} "
            "rows are there, and shown"
        )
    console = show.console()
    console.print(said.headline, soft_wrap=True)
    beside = f", and {len(written.figures)} files of figures" if written.figures else ""
    console.print(f"Wrote {shown(written.out)}{beside}.", soft_wrap=True)
