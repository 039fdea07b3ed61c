"""Models on the Hugging Face hub, through its own cache and offline mode. Only what is needed is fetched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import WeightsError
from .folder import NoWeightsError, choose
from .sharded import read_index

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[^\s@]+)?")

# Files beside the weights that belong to a model, also in the numbered folders of sentence-transformers.
SMALL_FILES = re.compile(r"(\d_[A-Za-z]+/)?[^/]+\.(json|txt|model|jinja|tiktoken)")

# Exception of huggingface_hub by name, what happened, what to do. First match wins, so subclasses come first.
FAILURES: tuple[tuple[str, str, str], ...] = (
    (
        "GatedRepoError",
        "is gated, and this account has no access",
        "Accept its terms on huggingface.co, then `hf auth login` (or set HF_TOKEN)",
    ),
    (
        "RepositoryNotFoundError",
        "is not on the hub, or is private",
        "Check the spelling (org/name); for a private one `hf auth login` (or set HF_TOKEN)",
    ),
    ("RevisionNotFoundError", "has no such revision", "Check the branch, tag or commit after the @"),
    ("HFValidationError", "is not a valid hub id", "Hub ids are written org/name or org/name@revision"),
)


def split_id(source: str) -> tuple[str, str | None]:
    """``org/name@revision`` in its two parts.

    Args:
        source: a hub id with or without a revision.

    Returns:
        ``(org/name, revision or None)``.
    """
    repo, _, revision = source.partition("@")
    return repo, revision or None


def fetch(repo: str, revision: str | None) -> Path:
    """The local snapshot of a model, fetched where it is not in the cache yet.

    Fetched are the weights in the preferred format, configuration, tokenizer and other small text files.
    With ``HF_HUB_OFFLINE=1``, or without a connection, only the cache is used.

    Args:
        repo: ``org/name``.
        revision: branch, tag or commit; None for the default branch.

    Returns:
        The snapshot folder; its name is the commit.

    Raises:
        WeightsError: not found, gated, not in the cache while offline, or no connection.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _cached(repo, revision, "HF_HUB_OFFLINE is set")
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        names = [sibling.rfilename for sibling in HfApi().model_info(repo, revision=revision).siblings or ()]
        patterns, weights = wanted(names, called(repo, revision))
        if weights.endswith(".index.json"):
            index = Path(hf_hub_download(repo, weights, revision=revision))
            folder = weights.rpartition("/")[0]
            shards = sorted(set(read_index(index).values()))
            patterns = [*patterns, *(f"{folder}/{shard}" if folder else shard for shard in shards)]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except WeightsError:
        raise
    except (
        Exception
    ) as error:  # each release of huggingface_hub lets other classes of its HTTP client through
        kinds = {kind.__name__ for kind in type(error).__mro__}
        for kind, what, remedy in FAILURES:
            if kind in kinds:
                raise WeightsError(f"{called(repo, revision)} {what}. {remedy}.") from error
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return _cached(repo, revision, f"the hub cannot be reached ({first})")


def called(repo: str, revision: str | None) -> str:
    """The id as messages write it.

    Args:
        repo: ``org/name``.
        revision: or None.

    Returns:
        ``org/name`` or ``org/name@revision``.
    """
    return repo if revision is None else f"{repo}@{revision}"


def wanted(names: Sequence[str], where: object) -> tuple[list[str], str]:
    """What to fetch of a repository, from the names of its files.

    Args:
        names: all files, with their paths in the repository.
        where: what messages call it.

    Returns:
        The exact paths to fetch (without the shards of an index), and the path of the weights or index.

    Raises:
        WeightsError: it has no weights, or several candidates.
    """
    small = [name for name in names if SMALL_FILES.fullmatch(name)]
    root = [name for name in names if "/" not in name]
    if "adapter_config.json" in root:
        weights = next((n for n in ("adapter_model.safetensors", "adapter_model.bin") if n in root), "")
        if not weights:
            raise NoWeightsError(
                f"{where} has an adapter_config.json and no adapter_model.safetensors or .bin."
            )
        return [*small, weights], weights
    try:
        weights = choose(root, where)
    except NoWeightsError:
        folder = _transformer_folder(names)
        if folder is None:
            raise
        weights = f"{folder}/{choose(_inside(names, folder), f'{where}/{folder}')}"
    return list(dict.fromkeys([*small, weights])), weights


def _transformer_folder(names: Iterable[str]) -> str | None:
    """The numbered folder in which a sentence-transformers model has its transformer, if not in the root."""
    folders = sorted({name.partition("/")[0] for name in names if re.match(r"0_[A-Za-z]+/", name)})
    return folders[0] if folders else None


def _inside(names: Iterable[str], folder: str) -> list[str]:
    inside = [name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")]
    return [name for name in inside if "/" not in name]


def _cached(repo: str, revision: str | None, why: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except Exception as error:
        raise WeightsError(
            f"{called(repo, revision)} is not in the hub's cache, and {why}. "
            f"Run `hf download {repo}` once with a connection, "
            "point HF_HOME or HF_HUB_CACHE at a cache that has it, or give a local path."
        ) from error
