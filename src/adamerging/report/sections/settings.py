"""How to make it again."""

from __future__ import annotations

from typing import Any

import yaml

from ..document import Cell, Column, Section, Table
from ..view import View


def settings(view: View) -> Section:
    """Command, settings, seeds, versions, data and fingerprints."""
    run = view.comparison
    text = []
    command = run.settings.get("command")
    if isinstance(command, str):
        text.append(("Command", command))
    rest = {key: value for key, value in run.settings.items() if key != "command"}
    if rest:
        text.append(("Settings", _yaml(rest)))
    whole = [row for row in run.rows if row.group is None]  # a group's are the same
    own = {_name(row.label, row.seed, None): row.settings for row in whole if row.settings}
    if own:
        text.append(("Settings of each model", _yaml(own)))
    sources: list[list[Cell]] = [["base", run.base]]
    sources.extend([f"expert {name}", path] for name, path in run.experts.items())
    tables = [Table("What was merged", [Column("weights"), Column("from")], sources)]
    if run.tasks:
        tables.append(
            Table(
                "Data",
                [
                    Column("task"),
                    Column("kind"),
                    Column("classes", "count"),
                    Column("adapts to"),
                    Column("samples", "count"),
                    Column("scored on"),
                    Column("samples", "count"),
                ],
                [
                    [t.name, t.kind, t.classes, t.adapt, t.adapt_samples, t.evaluate, t.evaluate_samples]
                    for t in run.tasks
                ],
            )  # fmt: skip
        )
    if run.versions:
        tables.append(
            Table(
                "Versions",
                [Column("package"), Column("version")],
                [list(pair) for pair in run.versions.items()],
            )
        )
    prints: list[list[Cell]] = [
        [_name(row.label, row.seed, row.group), row.fingerprint] for row in run.rows if row.fingerprint
    ]
    if prints:
        tables.append(
            Table(
                "Fingerprints: sha256 over each model’s weights", [Column("model"), Column("sha256")], prints
            )
        )
    return Section("again", "To make it again", text=text, tables=tables)


def _name(label: str, seed: int | None, group: str | None) -> str:
    return label + (f", seed {seed}" if seed is not None else "") + (f" ({group})" if group else "")


def _yaml(value: Any) -> str:
    return str(
        yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)
    ).rstrip()
