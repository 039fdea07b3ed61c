"""Refuse quantised checkpoints by name: their codes and scales are not weights that can be averaged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch

from ..errors import WeightsError
from .source import Spec

REMEDY = (
    "Quantised weights cannot be merged: use the unquantised checkpoint that it was made from, or load it "
    "with transformers, call `model.dequantize()` and save that."
)

# Names in `quantization_config` as a reader knows them; a method that is not here is called by its own name.
METHODS: Mapping[str, str] = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "fp8",
    "fbgemm_fp8": "fp8 (FBGEMM)",
    "compressed-tensors": "compressed-tensors",
    "compressed_tensors": "compressed-tensors",
    "mxfp4": "MXFP4",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "quanto": "Quanto",
    "torchao": "torchao",
}

# Where the tensors themselves tell: any name with this ending → what it is. First match wins.
TENSOR_ENDINGS: tuple[tuple[str, str], ...] = (
    (".quant_state.bitsandbytes__nf4", "bitsandbytes (nf4)"),
    (".quant_state.bitsandbytes__fp4", "bitsandbytes (fp4)"),
    (".weight.absmax", "bitsandbytes (4-bit)"),
    (".SCB", "bitsandbytes (int8)"),
    (".qweight", "packed int4 (GPTQ or AWQ)"),
    (".qzeros", "packed int4 (GPTQ or AWQ)"),
    (".weight_packed", "packed int4 (compressed-tensors)"),
    (".weight_scale_inv", "fp8"),
)

FLOAT8 = frozenset(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)


def check_config(config: Mapping[str, Any], where: object) -> None:
    """Refuse a ``config.json`` that says that the weights are quantised.

    Args:
        config: the parsed file.
        where: what the message calls it.

    Raises:
        WeightsError: it has a ``quantization_config`` or ``compression_config``, which the message names.
    """
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            found = part.get(key)
            if found:
                raise WeightsError(
                    f"{where} is quantised with {_method(found)} ({key} in config.json). {REMEDY}"
                )


def _method(found: Any) -> str:
    if not isinstance(found, Mapping):
        return str(found)
    name = str(found.get("quant_method") or "").lower()
    if not name and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        name = "bitsandbytes"
    return METHODS.get(name, name or "a method that it does not name")


def check_tensors(specs: Mapping[str, Spec], where: object) -> None:
    """Refuse tensors that are codes of a quantised model, told by their names and dtypes.

    Args:
        specs: shapes and dtypes by name.
        where: what the message calls the file.

    Raises:
        WeightsError: any tensor is fp8, or is named as packed 4- or 8-bit formats name theirs.
    """
    fp8 = [name for name, spec in specs.items() if spec.dtype in FLOAT8]
    if fp8:
        refuse(f"fp8 ({str(specs[fp8[0]].dtype).removeprefix('torch.')})", fp8, where)
    for ending, what in TENSOR_ENDINGS:
        packed = [name for name in specs if name.endswith(ending)]
        if packed:
            refuse(what, packed, where)
    blocks = [name for name in specs if name.endswith("_blocks") and f"{name[:-7]}_scales" in specs]
    if blocks:
        refuse("MXFP4", blocks, where)


def refuse(what: str, names: Iterable[str], where: object) -> NoReturn:
    """Raise the error for quantised tensors.

    Args:
        what: the format, by name.
        names: the tensors that show it.
        where: what the message calls the file.

    Raises:
        WeightsError: always.
    """
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    raise WeightsError(f"{where} holds {what} tensors: {', '.join(listed[:3])}{more}. {REMEDY}")
