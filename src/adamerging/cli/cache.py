"""`adamerging cache`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import flags, show
from .failing import guard


@guard()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove everything in it.")] = False,
    as_json: flags.AsJson = False,
) -> None:
    """Show or clear the disk cache: transformed task vectors, decompositions, experts' predictions,
    scores.

    What is removed is computed again when it is needed.
    """
    from ..adaptation.cache import cache_files, cache_folder, clear_cache

    files = cache_files()
    nbytes = sum(size for _, size in files)
    freed = clear_cache() if clear else 0
    if as_json:
        show.print_json(
            {
                "folder": str(cache_folder()),
                "files": 0 if clear else len(files),
                "bytes": 0 if clear else nbytes,
                "freed": freed,
            }
        )
        return
    console = show.console()
    if clear:
        console.print(f"Removed {show.size(freed)} from {cache_folder()}.", soft_wrap=True)
        return
    console.print(f"{show.size(nbytes)} in {len(files)} files in {cache_folder()}.", soft_wrap=True)
    if files:
        console.print("adamerging cache --clear removes them.")
