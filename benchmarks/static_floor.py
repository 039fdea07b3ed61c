"""The floor: read the files, take their mean with plain torch, save and sync it, hash every byte.

    python benchmarks/static_floor.py OUT IN IN ...

What a careful script of twenty lines does, and no less than any merge has to do.
"""

from __future__ import annotations

import hashlib
import os
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def sha256(path: str) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 22))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def main(out: str, *inputs: str) -> None:
    files = [safe_open(path, framework="pt") for path in inputs]
    mean = {}
    for name in files[0].keys():  # noqa: SIM118 - not a dictionary
        total = files[0].get_tensor(name).to(torch.float32)
        for file in files[1:]:
            total += file.get_tensor(name)
        mean[name] = total.div_(len(files)).to(torch.bfloat16)
    save_file(mean, out, {"format": "pt"})
    handle = os.open(out, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    for path in (*inputs, out):
        print(sha256(path), path)


if __name__ == "__main__":
    main(*sys.argv[1:])
