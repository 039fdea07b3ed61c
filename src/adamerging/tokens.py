"""Which token a tokenizer gives which number, and the union of several tokenizers.

A tokenizer is read from its ``tokenizer.json`` where there is one, else by transformers from its other files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .output.companions import is_tokenizer

if TYPE_CHECKING:
    from tokenizers import AddedToken

FAST = "tokenizer.json"
CONFIG = "tokenizer_config.json"
ADDED = "added_tokens.json"
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Tokens:
    """The tokens of one tokenizer.

    Attributes:
        folder: where its files are.
        ids: number by token.
        added: numbers of the tokens that were added to its model, which it finds in a text by themselves.
    """

    folder: Path
    ids: Mapping[str, int]
    added: frozenset[int]
    by_id: Mapping[int, str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_id", {number: token for token, number in self.ids.items()})

    @property
    def size(self) -> int:
        """How many rows of an embedding these tokens need."""
        return max(self.ids.values(), default=-1) + 1


def read_tokens(folder: Path | None) -> Tokens | None:
    """The tokens of a model folder's tokenizer; None where it has none.

    Raises:
        UsageError: there are files of a tokenizer, and they cannot be read.
    """
    if folder is None or not any(is_tokenizer(path.name) for path in folder.iterdir()):
        return None
    try:
        if (folder / FAST).is_file():
            from tokenizers import Tokenizer

            fast = Tokenizer.from_file(str(folder / FAST))
            return Tokens(folder, fast.get_vocab(), frozenset(fast.get_added_tokens_decoder()))
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        return Tokens(folder, slow.get_vocab(), frozenset(slow.added_tokens_decoder))
    except Exception as error:  # of the tokenizers library, which has no class of its own
        raise UsageError(f"the tokenizer in {folder} cannot be read: {error}") from error


@dataclass(frozen=True)
class Union:
    """The base's tokenizer with the added tokens of the experts.

    Attributes:
        new: number in the union by new token, in ascending order.
        files: the tokenizer files that differ from the base's, by name.
        notes: what a reader should know.
    """

    new: Mapping[str, int]
    files: Mapping[str, str]
    notes: tuple[str, ...]


def unite(base: Tokens, experts: Mapping[str, Tokens]) -> Union:
    """Append to the base's tokenizer what the experts added and it lacks; experts and their tokens in order.

    Raises:
        UsageError: the base has no ``tokenizer.json``, its numbers have gaps, or an expert's tokenizer has
            new tokens within its model (it was trained anew).
    """
    from tokenizers import Tokenizer

    if not (base.folder / FAST).is_file():
        raise UsageError(
            f"tokenizer: union needs {FAST} in {base.folder}; write it with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    fast = Tokenizer.from_file(str(base.folder / FAST))
    added: dict[str, AddedToken] = {}
    for task, tokens in experts.items():
        for token, how in _added(base, task, tokens).items():
            added.setdefault(token, how)
    fast.add_tokens(list(added.values()))
    new = {token: number for token in added if (number := fast.token_to_id(token)) is not None}
    if list(new.values()) != list(range(base.size, base.size + len(added))):
        raise UsageError(
            f"the numbers of the tokens in {base.folder} have gaps, so a union would renumber them; "
            "name the expert whose tokenizer to take, or tokenizer: base"
        )
    files = {FAST: fast.to_str(pretty=True)} if new else {}
    config = _json(base.folder / CONFIG)
    notes = []
    if new:
        notes.append(f"tokenizer: the base's with {len(new)} tokens of the experts: {_some(list(new))}")
        if isinstance(config.get("added_tokens_decoder"), dict):
            decoder = fast.get_added_tokens_decoder()
            config["added_tokens_decoder"] |= {
                str(n): _plain(t) for n, t in decoder.items() if n >= base.size
            }
            files[CONFIG] = _text(config)
        if (base.folder / ADDED).is_file():
            files[ADDED] = _text(_json(base.folder / ADDED) | new)
    templates = ((task, _template(tokens.folder)) for task, tokens in experts.items())
    first = next(((task, template) for task, template in templates if template is not None), None)
    if first is not None and _template(base.folder) is None:
        files[TEMPLATE] = first[1]
        notes.append(f"tokenizer: the base has no chat template; this is that of expert '{first[0]}'")
    return Union(new, files, tuple(notes))


def _added(base: Tokens, task: str, tokens: Tokens) -> dict[str, AddedToken]:
    """What an expert added and the base lacks, in the order of its numbers."""
    from tokenizers import AddedToken, Tokenizer

    lacking = sorted(number for token, number in tokens.ids.items() if token not in base.ids)
    trained = [tokens.by_id[number] for number in lacking if number not in tokens.added]
    if trained:
        raise UsageError(
            f"tokenizer: union adds what experts added, and the tokenizer of expert '{task}' has "
            f"{len(trained)} tokens in its model that the base's lacks ({_some(trained)}): it was "
            f"trained anew. Take it as a whole (tokenizer: {task}), or keep the base's (tokenizer: base)"
        )
    known: Mapping[int, AddedToken] = {}
    if (tokens.folder / FAST).is_file():
        known = Tokenizer.from_file(str(tokens.folder / FAST)).get_added_tokens_decoder()
    return {tokens.by_id[n]: known.get(n) or AddedToken(tokens.by_id[n]) for n in lacking}


def _template(folder: Path) -> str | None:
    """A model's chat template, the default one where it has several."""
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    for name in ("chat_template.json", CONFIG):
        found = _json(folder / name).get("chat_template")
        if isinstance(found, list):
            found = next((item.get("template") for item in found if item.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _text(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def _plain(token: Any) -> dict[str, Any]:
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {key: getattr(token, key) for key in keys}


def _some(tokens: list[str], most: int = 5) -> str:
    shown = ", ".join(map(repr, tokens[:most]))
    return shown if len(tokens) <= most else f"{shown} and {len(tokens) - most} more"
