"""Static merging against the floor and against mergekit: time, memory, accuracy, as ratios of one run.

    python benchmarks/static.py                     everything, once
    python benchmarks/static.py --runs 5            medians of five rounds
    python benchmarks/static.py --only ties,floor   a part of it; --no-peer leaves mergekit out

Every merge is a process of its own, on files in the page cache, and starts when the disk has taken
what the one before it wrote. Rounds are interleaved, so that what else the machine does hits all alike.

Time is from start to end of the process, imports included. Memory is what the process alone holds: the
largest `RssAnon` in `/proc/<pid>/status`, looked at every five milliseconds; pages of mapped files are
not in it, since the system drops them when it needs room. Ours and the floor hash every byte read and
written and sync what they wrote to the disk; mergekit does neither.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import static_accuracy
import static_mergekit
from static_models import make_models, parameters

HERE = Path(__file__).resolve().parent
FLOOR = "floor"

OURS = {
    "task_arithmetic": ("task_arithmetic",),
    "ties": ("ties",),
    "dare_ties": ("dare", "--option", "consensus=true"),
    "breadcrumbs": ("breadcrumbs",),
    "lines": ("lines",),
    "model_stock": ("model_stock",),
}
"""The method and its options; scales and densities are the defaults (0.3; 0.2, 0.5, 0.14)."""

SAME_READING = {
    "ties": ("ties", "--option", "scope=tensor", "--option", "zero_sign=positive"),
    "breadcrumbs": ("breadcrumbs",),
}
"""For the comparison of errors: what mergekit's own reading of the method is in our options."""


@dataclass(frozen=True)
class Measured:
    """One run of one process."""

    wall: float
    cpu: float
    private: int


def measure(command: Sequence[str], log: Path) -> Measured:
    """Run a command to its end; it must succeed."""
    os.sync()
    with open(log, "wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        peak, ended = [0], threading.Event()
        sampler = threading.Thread(target=_watch, args=(process.pid, peak, ended))
        sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        ended.set()
        sampler.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text(errors='replace')[-3000:]}")
    return Measured(wall, usage.ru_utime + usage.ru_stime, peak[0])


def _watch(pid: int, peak: list[int], ended: threading.Event) -> None:
    while not ended.wait(0.005):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                peak[0] = max(peak[0], int(line.split()[1]) * 1024)


class Bench:
    """The jobs, by (tool, method, number of experts), and what was measured."""

    def __init__(self, folder: Path, environment: Path) -> None:
        self.folder, self.environment = folder, environment
        self.base, self.experts = make_models(folder)
        self.out = folder / "out"
        self.found: dict[tuple[str, str, int], list[Measured]] = {}
        self.errors: dict[tuple[str, str], tuple[float, float]] = {}

    def command(self, tool: str, method: str, count: int) -> list[str]:
        experts = self.experts[:count]
        if tool == FLOOR:
            files = [str(path / "model.safetensors") for path in (self.base, *experts)]
            self.out.mkdir()
            return [
                sys.executable,
                str(HERE / "static_floor.py"),
                str(self.out / "model.safetensors"),
                *files,
            ]
        if tool == "mergekit":
            return static_mergekit.command(self.environment, self.folder, method, self.base, experts)
        return self.merge(OURS[method], experts)

    def merge(self, method: Sequence[str], experts: Sequence[Path]) -> list[str]:
        program = str(Path(sys.executable).with_name("adamerging"))
        named = [f"{path.name}={path}" for path in experts]
        return [program, "merge", str(self.base), *named, "--method", *method, "--out", str(self.out)]

    def run(self, tool: str, method: str, count: int) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        found = measure(self.command(tool, method, count), self.folder / "log.txt")
        self.found.setdefault((tool, method, count), []).append(found)
        print(
            f"  {tool:10} {method:16} {count:2} experts  wall {found.wall:7.2f} s  cpu {found.cpu:7.2f} s"
            f"  private {found.private / 1e6:5.0f} MB",
            flush=True,
        )

    def median(self, tool: str, method: str, count: int = 4) -> Measured | None:
        runs = self.found.get((tool, method, count))
        if not runs:
            return None
        return Measured(
            statistics.median(run.wall for run in runs),
            statistics.median(run.cpu for run in runs),
            max(run.private for run in runs),
        )

    def ratio(self, above: tuple[str, str], below: tuple[str, str], what: str) -> str:
        """The median of the ratios within each round in which both ran: a machine may not stay as busy."""
        pairs = zip(self.found.get((*above, 4), []), self.found.get((*below, 4), []), strict=False)
        ratios = [getattr(one, what) / getattr(other, what) for one, other in pairs]
        return f"{statistics.median(ratios):.2f}" if ratios else ""

    def time_table(self) -> str:
        """Four experts: wall and CPU seconds, and their ratios to the floor and to mergekit."""
        lines = [
            "| | wall s | CPU s | private MB | wall ÷ floor | mergekit: wall s | CPU s | private MB "
            "| mergekit ÷ ours: wall | CPU |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for method in (FLOOR, *OURS):
            name = (FLOOR if method == FLOOR else "adamerging", method)
            own, peer = self.median(*name), self.median("mergekit", method)
            if own is None:
                continue
            cells = [f"{own.wall:.1f}", f"{own.cpu:.1f}", f"{own.private / 1e6:.0f}"]
            cells.append(self.ratio(name, (FLOOR, FLOOR), "wall"))
            if peer:
                cells += [f"{peer.wall:.1f}", f"{peer.cpu:.1f}", f"{peer.private / 1e6:.0f}"]
                cells += [self.ratio(("mergekit", method), name, what) for what in ("wall", "cpu")]
            else:
                cells += [""] * 5
            lines.append(f"| {method.replace('_', ' ')} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def memory_table(self) -> str:
        """Private memory with four and with sixteen experts."""
        lines = ["| | 4 experts, MB | 16 experts, MB | ratio |", "|---|--:|--:|--:|"]
        for method in OURS:
            few, many = self.median("adamerging", method, 4), self.median("adamerging", method, 16)
            if few and many:
                cells = (
                    f"{few.private / 1e6:.0f} | {many.private / 1e6:.0f} | {many.private / few.private:.2f}"
                )
                lines.append(f"| {method.replace('_', ' ')} | {cells} |")
        return "\n".join(lines)

    def check(self, tool: str, method: str) -> None:
        """Errors of what was just merged against float64."""
        if method in SAME_READING and (tool, method) not in self.errors:
            self.errors[tool, method] = static_accuracy.errors(method, self.base, self.experts[:4], self.out)

    def accuracy_table(self) -> str:
        """Errors against float64, of ours and of mergekit's result."""
        lines = ["| | mean error | largest | mergekit's mean | largest |", "|---|--:|--:|--:|--:|"]
        for method, options in SAME_READING.items():
            shutil.rmtree(self.out, ignore_errors=True)
            measure(self.merge(options, self.experts[:4]), self.folder / "log.txt")
            self.check("adamerging", method)
            found = [self.errors.get((tool, method)) for tool in ("adamerging", "mergekit")]
            cells = [f"{value:.2e}" for pair in found for value in pair or ()]
            lines.append(f"| {method} | " + " | ".join(cells + [""] * (4 - len(cells))) + " |")
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "adamerging-benchmark")
    parser.add_argument("--runs", type=int, default=3, help="rounds of ours and the floor (median)")
    parser.add_argument("--peer-runs", type=int, default=1, help="rounds of mergekit (median)")
    parser.add_argument("--only", default="", help="these methods alone, separated by commas; floor is one")
    parser.add_argument("--no-peer", action="store_true", help="without mergekit")
    parser.add_argument("--no-accuracy", action="store_true", help="without the errors against float64")
    parser.add_argument("--no-memory", action="store_true", help="without the runs of 16 experts")
    parser.add_argument("--peer-env", type=Path, default=HERE.parent / ".venvs" / "mergekit")
    args = parser.parse_args()
    wanted = [name for name in (FLOOR, *OURS) if not args.only or name in args.only.split(",")]

    if not args.no_peer:
        static_mergekit.install(args.peer_env)
    args.dir.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.dir, args.peer_env)
    head = [
        f"{parameters(bench.base) / 1e6:.0f} M parameters in bf16, 4 experts, {os.cpu_count()} cores",
        f"adamerging {version('adamerging')}, torch {version('torch')}, Python {platform.python_version()}",
    ]
    if not args.no_peer:
        head.append(static_mergekit.versions(args.peer_env))
    print("; ".join(head), flush=True)

    for path in (bench.base, *bench.experts):  # into the page cache
        with open(path / "model.safetensors", "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    for round_ in range(max(args.runs, 0 if args.no_peer else args.peer_runs)):
        for method in wanted:
            if round_ < args.runs:
                bench.run(FLOOR if method == FLOOR else "adamerging", method, 4)
            if not args.no_peer and round_ < args.peer_runs and method in static_mergekit.METHODS:
                bench.run("mergekit", method, 4)
                if not args.no_accuracy:
                    bench.check("mergekit", method)
    tables = [bench.time_table()]
    if not args.no_memory:
        for method in wanted:
            if method != FLOOR:
                bench.run("adamerging", method, 16)
        tables.append(bench.memory_table())
    if not args.no_accuracy:
        tables.append(bench.accuracy_table())
    shutil.rmtree(bench.out, ignore_errors=True)
    print("", "; ".join(head) + ".", *tables, sep="\n\n")


if __name__ == "__main__":
    main()
