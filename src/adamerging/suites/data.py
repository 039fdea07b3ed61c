"""The data of a suite: there and whole, or fetched, or an error that says what to do.

Each data set is a folder with a ``meta.json``, which names its files with their sha256 and, where they can be
fetched, their ``url``; and the repository and commit that the data were made from.
"""

from __future__ import annotations

import http.client
import json
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import OutputError, UsageError
from ..weights.fingerprint import sha256_file

SECONDS = 30
"""Longest wait for a server's answer."""


def ensure(root: Path, folders: Iterable[str], say: Callable[[str], None] = lambda _: None) -> None:
    """See that every file of some data sets is there and is the right one; fetch what is missing.

    Args:
        root: folder of the data sets.
        folders: of the sets, relative to it.
        say: called with a line for every file that is fetched.

    Raises:
        UsageError: data that are missing and cannot be fetched, or are other data; all in one message.
        OutputError: what was fetched cannot be written.
    """
    problems = [problem for folder in folders for problem in _problems(root / folder, say)]
    if problems:
        raise UsageError(
            f"the data in {root} are not those of the suite:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + "\nGive their folder with --data: one folder a data set, each with meta.json and the files "
            "that it names"
        )


def _problems(folder: Path, say: Callable[[str], None]) -> Iterator[str]:
    meta = folder / "meta.json"
    try:
        described = json.loads(meta.read_text(encoding="utf-8"))
        files = {str(name): dict(about) for name, about in described["files"].items()}
    except OSError:
        yield f"{meta} is missing: it says where the data come from"
        return
    except (ValueError, TypeError, KeyError, AttributeError):
        yield f"{meta} does not name the data set's files"
        return
    for name, about in files.items():
        path = folder / name
        if Path(name).name != name:
            yield f"{meta} names a file outside its folder: {name}"
            continue
        problem = None if path.is_file() else _fetch(path, about, described, say)
        if problem is None and about.get("sha256") not in (None, sha256_file(path)):
            problem = f"{path} is another file: its sha256 is not that of meta.json; remove it"
        if problem is not None:
            yield problem


def _fetch(
    path: Path, about: Mapping[str, Any], described: Mapping[str, Any], say: Callable[[str], None]
) -> str | None:
    """Fetch a file beside and rename it once its sha256 is right; what went wrong, if anything."""
    url = about.get("url")
    source = f"{described.get('source_repo', 'an unknown source')} at {described.get('source_commit', '?')}"
    if not isinstance(url, str) or not url.startswith("https://"):
        return (
            f"{path} is missing and meta.json gives no https url to fetch it from; it was made from {source} "
            f"({described.get('source_files', '?')}): {described.get('preprocessing', '').strip()}"
        )
    say(f"fetching {url}")
    partial = path.with_name(f".{path.name}.partial")
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:  # noqa: S310 - https alone
            content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        return f"{path} is missing and {url} cannot be fetched ({error}); fetch it elsewhere and put it there"
    try:
        partial.write_bytes(content)
        if about.get("sha256") not in (None, sha256_file(partial)):
            partial.unlink()
            return f"{path} is missing, and what {url} gives has another sha256 than meta.json says"
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None
    return None
