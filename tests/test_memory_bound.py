"""Private memory does not grow with the number of experts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

MERGE = """
import sys, threading, time
import adamerging as am

base, out, method, *experts = sys.argv[1:]
peak = 0

def private():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:"))

def watch():
    global peak
    while True:
        peak = max(peak, private())
        time.sleep(0.002)

am.merge(base, {f"e{i}": path for i, path in enumerate(experts[:1])}, out=out + "-first")  # imports, pools
start = private()
threading.Thread(target=watch, daemon=True).start()
am.merge(base, {f"e{i}": path for i, path in enumerate(experts)}, method=method, out=out, threads=2)
print(start, peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("method", ["breadcrumbs"])
def test_more_experts_take_no_more_private_memory(tmp_path: Path, method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"blocks.{i}.weight": torch.randn(2048, 3584, generator=generator) * 0.02 for i in range(2)}
    paths = [tmp_path / f"{i}.safetensors" for i in range(9)]
    save_file({name: tensor.bfloat16() for name, tensor in base.items()}, paths[0])
    for path in paths[1:]:
        moved = {name: t + 0.002 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
        save_file({name: tensor.bfloat16() for name, tensor in moved.items()}, path)

    peaks = {}
    for count in (2, 8):
        arguments = [str(paths[0]), str(tmp_path / f"out{count}"), method, *map(str, paths[1 : count + 1])]
        run = subprocess.run(
            [sys.executable, "-c", MERGE, *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "2"},
            check=False,
        )
        assert run.returncode == 0, run.stderr
        start, peak = map(int, run.stdout.split())
        peaks[count] = peak
        # 30 MB a model in bf16: eight experts would be 240 MB, in float32 480 MB.
        assert peak - start < 150_000, peaks
    assert peaks[8] < 1.25 * peaks[2], peaks
