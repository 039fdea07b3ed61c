"""The model card: what was merged and how, with the metadata the hub expects of a merge."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")


def model_card(record: Mapping[str, Any]) -> str:
    """A README.md for the merged model, from the run's record alone."""
    sources = [record["base"], *record["experts"].values()]
    ids = [source["hub_id"] for source in sources if source.get("hub_id")]
    fields: dict[str, Any] = {"library_name": "transformers"} if record["config"] else {}
    if ids:
        fields |= {"base_model": ids, "base_model_relation": "merge"}
    fields["tags"] = ["merge", "adamerging"]
    front = yaml.safe_dump(fields, sort_keys=False)
    experts = "\n".join(
        f"| {_cell(task)} | {_cell(_name(source))} | {record['plan']['heads'][task]['tensors']} |"
        for task, source in record["experts"].items()
    )
    counts = "\n".join(
        f"| {treatment} | {count['tensors']} | {count['parameters']:,} |"
        for treatment, count in record["plan"]["treatments"].items()
    )
    named = {"base": _name(record["base"]), "experts": {t: _name(s) for t, s in record["experts"].items()}}
    recipe = yaml.safe_dump({**record["recipe"], **named}, sort_keys=False, allow_unicode=True)
    note = _data_note(record)
    many = f"{len(record['experts'])} expert{'s' if len(record['experts']) > 1 else ''}"
    return f"""---
{front}---

# Merged model

{many} merged into one model with the method `{record["method"]}`
by [adamerging](https://pypi.org/project/adamerging/) {record["versions"]["adamerging"]}.

Base: `{_name(record["base"])}`

| expert | from | tensors kept as its head |
|---|---|---|
{experts}

| treatment | tensors | parameters |
|---|---|---|
{counts}

Recipe:

```yaml
{recipe}```

{note}`run.json` beside this file holds versions, seeds and the sha256 of every input and output.
"""


def _data_note(record: Mapping[str, Any]) -> str:
    """What a reader of scores must know about the data."""
    notes = []
    if record.get("masks"):
        notes.append(
            "Each task has **weights of its own**, made from one vector and its mask in `masks/` "
            "when the folder is opened with the task's name. The body by itself is no multi-task model."
        )
    if record.get("recipe", {}).get("buffers") == "task":
        notes.append(
            "Each task has **BatchNorm statistics of its own**, with its head in `heads/`; those of the body "
            "serve whoever opens it without a task."
        )
    if record.get("routing"):
        notes.append(
            "It **routes by input**: the linear maps listed under `routing` in `run.json` have other weights "
            "for every input. `adamerging.load` and `adamerging.load_module` open it so; the body by itself "
            "is the merge it started from."
        )
    parts = record.get("parts", {}).get("kind")
    if parts == "heads":
        notes.append(
            "The heads in `heads/` were **learned along with the coefficients**: they belong to this merge "
            "and are not the experts'."
        )
    if parts == "surgery":
        notes.append(
            "Each task has **a small module of its own** before its head (representation surgery), in "
            "`parts/`. It acts when the folder is opened with the task's name; the body by itself is the "
            "merge without."
        )
    if record.get("labelled"):
        notes.append("The coefficients were learned from **labelled** data.")
    if record.get("transductive"):
        notes.append("**Transductive**: it may be scored on the inputs it was adapted to.")
    return "".join(f"{note}\n\n" for note in notes)


def hub_id(label: str) -> str | None:
    """The hub id in a label, without its revision; None for local paths."""
    return label.split("@")[0] if _HUB_ID.match(label) and not label.startswith(".") else None


def _name(source: Mapping[str, Any]) -> str:
    """The hub id, or a local folder's own name: a card is published, the author's paths are not."""
    return source["hub_id"] or PurePath(source["label"]).name


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
