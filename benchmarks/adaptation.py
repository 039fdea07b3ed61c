"""A step of adaptation beside a plain training step of the same model, and beside FusionBench's loop.

    python benchmarks/adaptation.py                               MiniLM and ViT-B/32 sizes, K = 2, 8, 32
    python benchmarks/adaptation.py --model vit_b32 --experts 8   one of them
    python benchmarks/adaptation.py --peer                        FusionBench too, in its own environment
    python benchmarks/adaptation.py --device cuda --precision bfloat16 --model vit_l14 --budget 60

Every cell is a process of its own. Within it both kinds of step run in turn on the same batches, dtype,
threads and padding: a plain step is forward and backward of every task's batch and one AdamW step of the
whole body; a step of adaptation is the same forwards and backwards, the merge before them and the
contraction after. Models and experts have random weights; time does not depend on them. Memory is the
largest `RssAnon` after the first step, in processes that do only the one kind of step and, whatever the
number of experts, see as many batches: the more often one looks, the larger a peak one finds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEER_VERSION = "0.2.33"


def model_config(kind: str):
    """The architecture by its name: (class, config)."""
    from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

    if kind == "minilm":
        return BertForSequenceClassification, BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=4
        )
    width, layers, heads, patch = {"vit_b32": (768, 12, 12, 32), "vit_l14": (1024, 24, 16, 14)}[kind]
    return ViTForImageClassification, ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
        patch_size=patch, image_size=224, num_labels=10,
    )  # fmt: skip


def make_models(kind: str, count: int, folder: Path) -> tuple[Path, list[Path]]:
    """Base and experts as Hugging Face folders, made once."""
    import torch

    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    make, config = model_config(kind)
    paths = [folder / kind / name for name in ("base", *(f"expert{n:02d}" for n in range(count)))]
    if not all((path / "config.json").exists() for path in paths):
        torch.manual_seed(0)
        model = make(config).eval()
        start = {name: value.clone() for name, value in model.state_dict().items()}
        for number, path in enumerate(paths):
            if (path / "config.json").exists():
                continue
            torch.manual_seed(number)
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    value.copy_(start[name])
                    if number and value.is_floating_point():
                        value.add_(0.01 * torch.randn_like(value))
            model.save_pretrained(path)
    return paths[0], paths[1:]


def make_task(kind: str, name: str, batch: int):
    """A task on random inputs of the usual size: 32 tokens, or 224 × 224 pixels."""
    import torch
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    from adamerging.tasks.huggingface import classifier
    from adamerging.tasks.task import Samples, Task

    generator = torch.Generator().manual_seed(len(name))
    if kind == "minilm":
        inputs = list(torch.randint(1000, 20000, (2 * batch, 32), generator=generator))
        auto, key = AutoModelForSequenceClassification, "input_ids"
    else:
        inputs = list(torch.randn(2 * batch, 3, 224, 224, generator=generator))
        auto, key = AutoModelForImageClassification, "pixel_values"
    return Task(
        name,
        skeleton=lambda expert, base: classifier(auto, expert, base),
        forward=lambda module, batch: module(**batch).logits,
        collate=lambda rows: {key: torch.stack(list(rows))},
        adapt=Samples(inputs, None, "random", f"random {name}"),
    )


def measure(args: argparse.Namespace) -> None:
    """The inner process: run steps, print one JSON line."""
    import torch

    from adamerging.adaptation.loop import Loop, autocast
    from adamerging.adaptation.session import open_session
    from adamerging.adaptation.state import State
    from adamerging.recipe import Settings
    from adamerging.stream import Workers

    base, experts = make_models(args.model, args.experts, Path(args.dir))
    names = [path.name for path in experts]
    tasks = [make_task(args.model, name, args.batch) for name in names]
    settings = {
        "preset": "paper", "steps": 10_000, "device": args.device, "precision": args.precision,
        "batch_size": args.batch, "budget": args.budget, "held_out_limit": 1,
    }  # fmt: skip
    with Workers() as workers:
        session = open_session(
            str(base),
            dict(zip(names, map(str, experts), strict=True)),
            tasks,
            settings,
            Settings(),
            workers,
            print_error,
        )
        body, learned = session.body, session.parametrisation
        state = State(0, learned.first().float())
        loop = Loop(session.settings, session.objective, body, learned, session.learners, state)
        values = state.values.clone().requires_grad_(True)
        adam = torch.optim.Adam([values], lr=1e-3)
        trained = [body.tensors[entry.name] for entry in learned.entries()]
        body.train_only({entry.name for entry in learned.entries()})

        def adapt_step() -> None:
            loop._merge(values, state)
            loop._step(values, adam, state)
            state.step += 1

        plain = torch.optim.AdamW(trained, lr=1e-6) if args.what != "adapt" else None

        def plain_step() -> None:
            assert plain is not None
            plain.zero_grad()
            with autocast(session.settings, body):
                for learner in session.learners:
                    samples = learner.batches.at(state.step)
                    logits = learner.task.forward(learner.module, learner.inputs(samples, body.device))
                    session.objective.loss(logits.float(), None).backward()
            plain.step()

        def timed(step) -> float:
            if args.device != "cpu":
                torch.cuda.synchronize()
            started = time.perf_counter()
            step()
            if args.device != "cpu":
                torch.cuda.synchronize()
            return time.perf_counter() - started

        kinds = {"adapt": [adapt_step], "plain": [plain_step], "both": [adapt_step, plain_step]}[args.what]
        for step in kinds:
            step()
        peak = Peak()
        times = [[timed(step) for step in kinds] for _ in range(args.runs)]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    ratios = [row[0] / row[1] for row in times] if len(kinds) == 2 else []
    memory = torch.cuda.max_memory_allocated() / 1e6 if args.device != "cpu" else peak.stop()
    print(
        json.dumps(
            {"seconds": medians, "ratio": statistics.median(ratios) if ratios else None, "memory": memory}
        )
    )


class Peak:
    """The largest private memory of this process from now on, in MB."""

    def __init__(self) -> None:
        self.largest, self._on = 0.0, True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while self._on:
            text = Path("/proc/self/status").read_text()
            anonymous = next(line for line in text.splitlines() if line.startswith("RssAnon"))
            self.largest = max(self.largest, int(anonymous.split()[1]) / 1e3)
            time.sleep(0.01)

    def stop(self) -> float:
        self._on = False
        self._thread.join()
        return self.largest


def print_error(text: str) -> None:
    """Keep standard output for the result."""
    print(text, file=sys.stderr)


def inner(args: argparse.Namespace, python: Path | str, script: Path, **changes: object) -> dict:
    """Run a measuring process; its JSON result."""
    fields = {**vars(args), **changes, "inner": True}
    names = ("model", "experts", "batch", "device", "precision", "budget", "runs", "what", "dir")
    command = [str(python), str(script), "--inner"]
    for name in names:
        value = fields[name]
        command += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peer_python() -> Path:
    """FusionBench in an environment of its own, made once."""
    folder = HERE.parent / ".venvs" / "fusionbench"
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        venv.create(folder, with_pip=True, clear=True)
        packages = ["torch==2.13.0"], [f"fusion-bench=={PEER_VERSION}", "transformers<5"]
        for group in packages:
            subprocess.run([python, "-m", "pip", "install", "-qq", *group], check=True)
        (folder / "installed").touch()
    return python


def table(args: argparse.Namespace) -> None:
    """All cells, as Markdown."""
    head = "| model | K | adaptation, s | plain training, s | ratio | memory, MB | plain memory, MB |"
    if args.peer:
        head += " FusionBench, s | FusionBench, MB | its time / ours | its memory / ours |"
    print(head + "\n" + "|---" * (head.count("|") - 1) + "|", flush=True)
    for kind in args.model:
        for count in args.experts:
            one = {"model": kind, "experts": count}
            both = inner(args, sys.executable, Path(__file__), **one, what="both")
            one["runs"] = max(2, args.batches // count)
            ours = inner(args, sys.executable, Path(__file__), **one, what="adapt")
            plain = inner(args, sys.executable, Path(__file__), **one, what="plain")
            times = [f"{value:.2f}" for value in both["seconds"]]
            memory = [f"{cell['memory']:.0f}" for cell in (ours, plain)]
            row = [kind, count, *times, f"**{both['ratio']:.2f}**", *memory]
            if args.peer and count <= 16:
                peer = inner(
                    args, peer_python(), HERE / "adaptation_peer.py", **{**one, "runs": 2}, what="adapt"
                )
                row += [f"{peer['seconds'][0]:.2f}", f"{peer['memory']:.0f}"]
                row += [f"**{peer['seconds'][0] / both['seconds'][0]:.2f}**"]
                row += [f"**{peer['memory'] / ours['memory']:.2f}**"]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


def arguments() -> argparse.Namespace:
    """The command line, shared by the inner processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["minilm", "vit_b32"])
    parser.add_argument("--experts", nargs="+", type=int, default=[2, 8, 32])
    parser.add_argument("--batch", type=int, default=16, help="samples of each task")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--budget", type=float, default=0.0, help="GB for task vectors on the device")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batches", type=int, default=64, help="that a measurement of memory sees, at least")
    parser.add_argument("--peer", action="store_true", help="FusionBench beside it")
    parser.add_argument(
        "--dir", default="", help="where models are made and kept; a temporary folder by default"
    )
    parser.add_argument("--what", default="both", help=argparse.SUPPRESS)
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inner:
        args.model, args.experts = args.model[0], args.experts[0]
    return args


if __name__ == "__main__":
    options = arguments()
    if options.inner:
        measure(options)
    else:
        made = tempfile.mkdtemp() if not options.dir else None
        options.dir = options.dir or made
        try:
            table(options)
        finally:
            if made:
                shutil.rmtree(made, ignore_errors=True)
