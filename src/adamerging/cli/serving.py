"""`adamerging predict` and `adamerging export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from . import show
from .failing import guard

Folder = Annotated[Path, typer.Argument(help="A folder that a merge wrote, or a store.")]


@guard()
def predict(
    folder: Folder,
    task: Annotated[str, typer.Argument(help="Which task's head to use.")],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT]...", help="Texts; for image tasks, image files.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            metavar="DATA",
            help="Inputs from a file: .txt with a text a line, .jsonl, .csv, .parquet, .npz:split, images.",
        ),
    ] = None,
    field: Annotated[
        str | None, typer.Option("--field", metavar="NAME", help="Which column of the file to read.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Inputs a forward pass.")] = 32,
    device: Annotated[str, typer.Option("--device", help="Where to compute, as cuda or cpu.")] = "cpu",
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON document on standard output: all classes' probabilities."
        ),
    ] = False,
) -> None:
    """Predict with a merged model: label, probability and input, tab-separated, one a line."""
    if bool(inputs) == (file is not None):
        raise UsageError("give the inputs either as arguments or with --file")
    from ..serving import load, read_inputs
    from ..tasks.data import Fields

    model = load(folder, device=device)
    items = (
        list(inputs or ()) if file is None else read_inputs(str(file), model.kind(task), Fields(input=field))
    )
    found = model.predict(task, items, batch_size=batch_size)
    if as_json:
        names = model.label_names(task) or [str(index) for index in range(len(found[0].probabilities))]
        show.print_json(
            [
                {
                    "label": prediction.label,
                    "index": prediction.index,
                    "probability": prediction.probability,
                    "probabilities": dict(zip(names, prediction.probabilities, strict=True)),
                }
                for prediction in found
            ]
        )
        return
    for item, prediction in zip(items, found, strict=True):
        shown = " ".join(str(item).split()) if isinstance(item, str | Path) else ""
        print(f"{prediction.label}\t{prediction.probability:.4f}\t{shown}".rstrip("\t"))


@guard()
def export(
    folder: Folder,
    task: Annotated[str, typer.Option("--task", "-t", help="Which task's classifier to write.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must not exist.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder of an earlier export.")
    ] = False,
) -> None:
    """Write one task's whole classifier, with tokenizer, as plain transformers loads it."""
    from ..serving import export as write

    print(write(folder, task, out, overwrite=overwrite))
