"""Static methods beside FusionBench's of the same name: time, memory, and how far the results differ.

    python benchmarks/methods_peer.py                      all methods both have
    python benchmarks/methods_peer.py --only ties,tsv_m    some of them
    python benchmarks/methods_peer.py --limit 1800         no run takes longer than half an hour
    python benchmarks/methods_peer.py --dir models         keeps models and results; goes on where it stopped
    python benchmarks/methods_peer.py --only wudi,wudi_adam --layers 2 --descent 30      a short look at WUDI

Experts are of the shape of CLIP's ViT-B/32 image encoder, in float32, with random task vectors: of every
matrix a low rank and some noise, as fine-tuning leaves it. Every run is a process of its own. Timed is the
way from the files to the merged model in memory, imports aside, in both; the sha256 of what was merged, which
a merge to a folder records beside it, is left out, since FusionBench has none. Files are in the page cache,
and decompositions are not kept from one run to the next. Both use as many threads as torch does by itself.

Options are those under which both read a method alike; where FusionBench has matrices alone (two
dimensions), the patch embedding is a vector here too. `same` is the distance of the two merged models,
relative to what the merge changed; where chance decides (dare) there is none. FusionBench's TIES keeps one
value more of each task than asked for, and so differs in a few single values.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adaptation import PEER_VERSION, Peak, peer_python

DESCENT = "DESCENT"
"""In a row's options: the steps of `--descent`."""
CONVOLUTION = ["*text_projection*", "*patch_embedding*"]


@dataclass(frozen=True)
class Pair:
    """One method in both.

    Attributes:
        method, options, scale: ours.
        theirs: path of the class within `fusion_bench.method`.
        arguments: theirs.
        same: whether both are the same function of the weights.
        bound: what both spend their time on, where it is the same.
    """

    method: str
    theirs: str
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    scale: float | None = None
    same: bool = True
    bound: str = ""


PAIRS = {
    "average": Pair("average", "SimpleAverageAlgorithm", {}, bound="reading"),
    "task_arithmetic": Pair(
        "task_arithmetic", "TaskArithmeticAlgorithm", {"scaling_factor": 0.3}, scale=0.3, bound="reading"
    ),
    "ties": Pair(
        "ties",
        "TiesMergingAlgorithm",
        {"scaling_factor": 0.3, "threshold": 20, "remove_keys": [], "merge_func": "sum"},
        {"reduction": "sum", "zero_sign": "majority"},
        scale=0.3,
    ),
    "dare": Pair(
        "dare",
        "DareTaskArithmetic",
        {"scaling_factor": 0.3, "sparsity_ratio": 0.5, "only_on_linear_weights": False},
        {"density": 0.5},
        scale=0.3,
        same=False,
    ),
    "iso_c": Pair(
        "iso_c",
        "ISO_C_Merge",
        {"scaling_factor": 1.0},
        {"as_vectors": CONVOLUTION},
        bound="one singular value decomposition a matrix",
    ),
    "tsv_m": Pair("tsv_m", "TaskSingularVectorMerging", {}, {"as_vectors": CONVOLUTION}),
    "iso_cts": Pair(
        "iso_cts",
        "ISO_CTS_Merge",
        {"scaling_factor": 1.0, "common_space_fraction": 0.8},
        {"as_vectors": CONVOLUTION},
    ),
    "wudi_adam": Pair(
        "wudi",
        "WUDIMerging",
        {"iter_num": DESCENT},
        {"matrices": "all", "solver": "adam", "steps": DESCENT, "as_vectors": CONVOLUTION},
        bound="the same steps of Adam",
    ),
    "wudi": Pair(
        "wudi",
        "WUDIMerging",
        {"iter_num": DESCENT},
        {"matrices": "all", "as_vectors": CONVOLUTION},
        same=False,
    ),
}
"""By row; `wudi` is our closed form beside their descent, `wudi_adam` the same descent in both."""

PEER_OF = {"wudi": "wudi_adam"}
"""Rows that share a run of the peer's."""


def make_models(folder: Path, count: int, layers: int) -> None:
    """Base and experts, as Hugging Face folders; made once."""
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModel

    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    paths = [folder / name for name in names(count)]
    if all((path / "model.safetensors").exists() for path in paths):
        return
    torch.manual_seed(0)
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=layers,
            num_attention_heads=12,
            patch_size=32,
        )
    )
    # As the model of the hub has it, whatever this version of transformers calls its parts.
    start = {
        f"vision_model.{name.removeprefix('vision_model.')}": value
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }
    for number, path in enumerate(paths):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            name: value + 1e-3 * change(value.shape, generator) if number else value
            for name, value in start.items()
        }
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        model.config.architectures = ["CLIPVisionModel"]
        model.config.save_pretrained(path)


def change(shape: Any, generator: Any, rank: int = 16) -> Any:
    """Of a matrix a low rank with a falling spectrum and some noise, each value about 1 in size."""
    import torch

    noise = torch.randn(shape, generator=generator)
    if len(shape) < 2:
        return noise
    rows, columns = shape[0], noise[0].numel()
    left = torch.randn(rows, rank, generator=generator) / torch.arange(1, rank + 1).sqrt()
    return (left @ torch.randn(rank, columns, generator=generator)).reshape(shape) / 2 + 0.3 * noise


def models_folder(args: argparse.Namespace) -> Path:
    """Where the models of this size lie."""
    return Path(args.dir) / f"layers_{args.layers}"


def results_folder(args: argparse.Namespace) -> Path:
    """Where what was found of them lies; another number of steps is another experiment."""
    return models_folder(args) / f"results_{args.experts}_descent_{args.descent}"


def names(count: int) -> list[str]:
    """Folders of base and experts."""
    return ["base", *(f"expert{n:02d}" for n in range(count))]


def with_steps(options: dict[str, Any], steps: int) -> dict[str, Any]:
    """A row's options with the number of steps asked for."""
    return {name: steps if value == DESCENT else value for name, value in options.items()}


def run_ours(pair: Pair, folder: Path, count: int, out: Path) -> dict[str, float]:
    """Merge with this package."""
    import torch
    from safetensors.torch import save_file

    from adamerging.run import merge

    settings = {"method": pair.method, "options": pair.options, "scale": pair.scale}
    base, *experts = names(count)
    peak = Peak()
    started = time.perf_counter()
    result = merge(str(folder / base), {name: str(folder / name) for name in experts}, **settings)
    seconds = time.perf_counter() - started
    found = {"seconds": seconds, "memory": peak.stop(), "threads": torch.get_num_threads()}
    save_file({name: value.contiguous() for name, value in result.body.items()}, out)
    return found


def run_theirs(pair: Pair, folder: Path, count: int, out: Path) -> dict[str, float]:
    """Merge with FusionBench; in its environment."""
    import fusion_bench.method as methods
    import torch
    from fusion_bench.modelpool import CLIPVisionModelPool
    from safetensors.torch import save_file

    base, *experts = names(count)
    models = {"_pretrained_": str(folder / base), **{name: str(folder / name) for name in experts}}
    algorithm = getattr(methods, pair.theirs)(**pair.arguments)
    pool = CLIPVisionModelPool(models)
    peak = Peak()
    started = time.perf_counter()
    merged = algorithm.run(pool)
    seconds = time.perf_counter() - started
    found = {"seconds": seconds, "memory": peak.stop(), "threads": torch.get_num_threads()}
    save_file({name: value.detach().contiguous() for name, value in merged.state_dict().items()}, out)
    return found


def distance(base: Path, ours: Path, theirs: Path) -> tuple[float, float]:
    """‖ours − theirs‖ / ‖theirs − base‖, and the same of the largest single value."""
    from safetensors import safe_open

    apart = moved = largest = step = 0.0
    with safe_open(base, "pt") as zero, safe_open(ours, "pt") as one, safe_open(theirs, "pt") as other:
        for name in zero.keys():  # noqa: SIM118 - not a mapping
            difference = one.get_tensor(name).double() - other.get_tensor(name).double()
            change_ = other.get_tensor(name).double() - zero.get_tensor(name).double()
            apart += float(difference.square().sum())
            moved += float(change_.square().sum())
            largest = max(largest, float(difference.abs().max()))
            step = max(step, float(change_.abs().max()))
    return (apart / moved) ** 0.5, largest / step


class Bench:
    """Runs, and what was found; every finished run is kept as a file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, models_folder(args)
        self.results = results_folder(args)
        self.results.mkdir(parents=True, exist_ok=True)

    def run(self, row: str, side: str, python: str | Path) -> dict[str, Any]:
        """The medians of this side's runs; from an earlier start of this script where it has them."""
        kept = self.results / f"{row}.{side}.json"
        runs = json.loads(kept.read_text()) if kept.exists() else []
        while len(runs) < self.args.runs and not any("failed" in run for run in runs):
            runs.append(self._once(row, side, python))
            kept.write_text(json.dumps(runs))
            print(f"  {row:16} {side:6} {runs[-1]}", file=sys.stderr, flush=True)
        failed = [run for run in runs if "failed" in run]
        keys = ("seconds", "memory", "threads")
        return failed[0] if failed else {key: statistics.median(run[key] for run in runs) for key in keys}

    def _once(self, row: str, side: str, python: str | Path) -> dict[str, Any]:
        command = [str(python), __file__, "--inner", side, "--only", row, "--dir", str(self.args.dir)]
        command += ["--experts", str(self.args.experts), "--layers", str(self.args.layers)]
        command += ["--descent", str(self.args.descent)]
        environment = {
            **os.environ, "HF_HUB_OFFLINE": "1", "ADAMERGING_DECOMPOSITIONS_GB": "0",
            "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=self.args.limit
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"> {self.args.limit:.0f}"}
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr)
            return {"failed": "failed"}
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def weights(self, row: str, side: str) -> Path:
        """Where a run leaves what it merged."""
        return self.results / f"{row}.{side}.safetensors"

    def line(self, row: str, peer: Path) -> str:
        """One row of the table."""
        ours = self.run(row, "ours", sys.executable)
        shared = PEER_OF.get(row, row)
        theirs = self.run(shared, "theirs", peer)
        cells = []
        for what, form in (("seconds", ".1f"), ("memory", ".0f")):
            pair = [found.get(what) for found in (ours, theirs)]
            cells += [
                found.get("failed", "") if value is None else f"{value:{form}}"
                for value, found in zip(pair, (ours, theirs), strict=True)
            ]
            ratio = None if None in pair else pair[1] / pair[0]
            cells.append("" if ratio is None else f"**{ratio:.1f}**")
        cells = [row, *cells, *self.difference(row, shared), PAIRS[row].bound]
        return "| " + " | ".join(cells) + " |"

    def difference(self, row: str, shared: str) -> list[str]:
        """Both distances, kept too, since the weights are removed once they have been compared."""
        if not PAIRS[row].same:
            return ["", ""]
        kept = self.results / f"{row}.difference.json"
        files = self.weights(row, "ours"), self.weights(shared, "theirs")
        if not kept.exists() and all(path.exists() for path in files):
            kept.write_text(json.dumps(distance(self.folder / "base" / "model.safetensors", *files)))
            for path in files:
                path.unlink()
        return [f"{value:.1e}" for value in json.loads(kept.read_text())] if kept.exists() else ["", ""]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help=f"rows, separated by commas: {', '.join(PAIRS)}")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12, help="fewer for a trial")
    parser.add_argument("--descent", type=int, default=300, help="steps of WUDI's descent, 300 as published")
    parser.add_argument("--runs", type=int, default=1, help="of each, for medians")
    parser.add_argument("--limit", type=float, default=7200, help="seconds that one run may take")
    parser.add_argument("--dir", default=str(Path(tempfile.gettempdir()) / "adamerging-methods"))
    parser.add_argument(
        "--peer-env", type=Path, help="an environment that has FusionBench; made if not given"
    )
    parser.add_argument("--inner", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows = [row for row in PAIRS if not args.only or row in args.only.split(",")]
    unknown = set(filter(None, args.only.split(","))) - set(PAIRS)
    if unknown:
        parser.error(f"no such rows: {', '.join(sorted(unknown))}")

    if args.inner:
        folder, pair = models_folder(args), PAIRS[rows[0]]
        out = results_folder(args) / f"{rows[0]}.{args.inner}.safetensors"
        run = run_ours if args.inner == "ours" else run_theirs
        steps = args.descent
        pair = replace(
            pair, options=with_steps(pair.options, steps), arguments=with_steps(pair.arguments, steps)
        )
        print(json.dumps(run(pair, folder, args.experts, out)))
        return
    peer = args.peer_env / "bin" / "python" if args.peer_env else peer_python()
    make_models(models_folder(args), args.experts, args.layers)
    bench = Bench(args)
    head = (
        f"FusionBench {PEER_VERSION}; {args.experts} experts of {args.layers} layers, {os.cpu_count()} cores"
    )
    print(head + "\n")
    head = "| | s | FusionBench, s | its time / ours | MB | FusionBench, MB | its memory / ours "
    head += "| same | largest | both bound by |"
    print(head + "\n" + "|---" * (head.count("|") - 1) + "|", flush=True)
    for row in rows:
        print(bench.line(row, peer), flush=True)


if __name__ == "__main__":
    main()
