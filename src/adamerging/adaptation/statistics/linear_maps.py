"""The inputs of every linear map that a forward pass uses, whoever calls it.

Hooks on modules miss maps that are called as functions, as both of `torch.nn.MultiheadAttention`. So this
looks at the functions themselves, and knows the weights by their memory: `linear`, matrix products with a
weight (`Conv1D` of transformers, projections kept as plain parameters), convolutions, and fused attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as everyone writes it
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .patches import patches


@dataclass(frozen=True)
class Use:
    """One linear map, used once.

    Attributes:
        name: of the weight.
        inputs: ``(..., d)``; the same object where one input goes through several maps.
        parts: into how many equal parts the rows of the weight are divided.
        part: which of them this is; None for all of them at once, ``inputs`` then being ``(P, n, d)``.
        turned: the weight is stored (in, out).
        keep: which inputs are no padding, in the shape of the inputs without the last dimension; None where
            the batch tells.
        sequence: inputs are tokens of samples, to which the batch's own mask of padding may apply.
    """

    name: str
    inputs: Tensor
    parts: int = 1
    part: int | None = 0
    turned: bool = False
    keep: Tensor | None = None
    sequence: bool = True


class LinearMaps(TorchFunctionMode):
    """Tells of each use of a linear map, while it is entered.

    Args:
        tensors: the weights by name; views of them are known too.
        use: told of each use, just before the map is applied.
        look_up: told the name of each weight that rows are looked up in.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        use: Callable[[Use], None],
        look_up: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__()
        self._use, self._look_up = use, look_up
        self._names = {
            tensor.untyped_storage().data_ptr(): (name, tensor)
            for name, tensor in tensors.items()
            if tensor.numel() and tensor.is_floating_point()
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See a call, and let it happen."""
        kwargs = kwargs or {}
        seen = _SEEN.get(getattr(func, "__name__", ""))
        if seen is None:
            return func(*args, **kwargs)
        return seen(self, func, args, kwargs)

    def _named(self, tensor: Any) -> tuple[str, Tensor] | None:
        """The weight that a tensor is, or is a view of."""
        if not isinstance(tensor, Tensor) or tensor.ndim < 2 or not tensor.numel():
            return None
        try:
            return self._names.get(tensor.untyped_storage().data_ptr())
        except (RuntimeError, NotImplementedError):  # a tensor without memory of its own
            return None

    def _linear(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        self._matrix(given["input"], given["weight"])
        return func(*args, **kwargs)

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        left, right = self._factors(func, args, kwargs)
        if isinstance(left, Tensor) and isinstance(right, Tensor) and min(left.ndim, right.ndim) > 0:
            if right.ndim == 2 and self._named(right) is not None:
                self._matrix(left, right.T)
            elif left.ndim == 2 and self._named(left) is not None and right.ndim > 1:
                self._matrix(right.transpose(-1, -2), left, sequence=False)
        return func(*args, **kwargs)

    def _factors(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if func.__name__ == "addmm":
            given = dict(zip(("input", "mat1", "mat2"), args, strict=False)) | kwargs
            return given.get("mat1"), given.get("mat2")
        given = dict(zip(("input", "other"), args, strict=False)) | kwargs
        pair = given.get("input"), given.get("other", given.get("mat2"))
        return pair[::-1] if func.__name__ == "__rmatmul__" else pair

    def _matrix(
        self, inputs: Tensor, weight: Tensor, keep: Tensor | None = None, *, sequence: bool = True
    ) -> None:
        """Inputs ``(..., d)`` through a weight ``(out, d)``, which may be a view of a stored one."""
        found = self._named(weight)
        if found is None or weight.ndim != 2:
            return
        name, stored = found
        if stored.ndim != 2:
            if stored.numel() == weight.numel() and weight.is_contiguous():  # a convolution's, flattened
                self._use(Use(name, inputs, keep=keep, sequence=sequence))
            return
        columns = stored.shape[1]
        offset, size = weight.storage_offset(), tuple(weight.shape)
        if weight.stride() == (columns, 1) and size[1] == columns and offset % columns == 0:
            for parts, part in _parts(stored.shape[0], offset // columns, size[0]):
                self._use(Use(name, inputs, parts, part, keep=keep, sequence=sequence))
        elif weight.stride() == (1, columns) and size == (columns, stored.shape[0]):
            self._use(Use(name, inputs, turned=True, keep=keep, sequence=sequence))

    def _convolution(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, args, strict=False)) | kwargs
        found = self._named(given["weight"])
        if found is not None and found[1].shape == given["weight"].shape:
            settings = {name: given[name] for name in names[3:] if name in given}
            for piece in patches(given["input"], given["weight"], **settings):
                self._use(Use(found[0], piece, len(piece), None, sequence=False))
        return func(*args, **kwargs)

    def _embedding(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
        for tensor in (given.get("weight"), given.get("input")):  # embedding_bag has them the other way round
            found = self._named(tensor)
            if found is not None:
                self._look_up(found[0])
        return func(*args, **kwargs)

    def _attention(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Fused attention, whose inner projections no mode sees.

        What goes into the last projection is what comes out with that replaced by the identity.
        """
        given = dict(zip(_ATTENTION, args, strict=False)) | kwargs
        query, key, value = (given[name] for name in ("query", "key", "value"))
        padding = given.get("key_padding_mask")
        keep = None if padding is None else _kept(padding)
        own = keep if query is key else None  # nothing tells which tokens of another query are padding
        if given.get("use_separate_proj_weight"):
            inputs = ((query, "q", own), (key, "k", keep), (value, "v", keep))
            for tensor, letter, mask in inputs:
                if given.get(f"static_{letter}") is None:
                    self._matrix(tensor, given[f"{letter}_proj_weight"], mask, sequence=False)
        elif query is key is value and given.get("static_k") is None is given.get("static_v"):
            self._matrix(query, given["in_proj_weight"], own, sequence=False)
        else:
            weights = given["in_proj_weight"].chunk(3)
            masks = (own, keep, keep)
            for tensor, letter, weight, mask in zip((query, key, value), "qkv", weights, masks, strict=True):
                if given.get(f"static_{letter}") is None:
                    self._matrix(tensor, weight, mask, sequence=False)
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        heads, *rest = func(**given | {"out_proj_weight": identity, "out_proj_bias": None})
        self._matrix(heads, weight, own, sequence=False)
        return (F.linear(heads, weight, bias), *rest)


def _parts(rows: int, first: int, count: int) -> list[tuple[int, int]]:
    """Which of how many equal parts of all rows these are; none where they are no whole parts."""
    if count == rows:
        return [(1, 0)]
    if rows % 3 == 0 and first % (rows // 3) == 0 and count % (rows // 3) == 0:  # query, key, value in one
        start = first // (rows // 3)
        return [(3, part) for part in range(start, start + count // (rows // 3))]
    if rows % count == 0 and first % count == 0:
        return [(rows // count, first // count)]
    return []


def _kept(padding: Tensor) -> Tensor:
    """``(tokens, samples)`` true where a token is none of padding, as inputs of attention lie."""
    kept = ~padding if padding.dtype == torch.bool else padding == 0
    return kept.T if kept.ndim == 2 else kept


_ATTENTION = (
    "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k",
    "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training",
    "key_padding_mask", "need_weights", "attn_mask", "use_separate_proj_weight", "q_proj_weight",
    "k_proj_weight", "v_proj_weight", "static_k", "static_v", "average_attn_weights", "is_causal",
)  # fmt: skip

_SEEN: Mapping[str, Callable[..., Any]] = {
    "linear": LinearMaps._linear,
    **dict.fromkeys(("matmul", "__matmul__", "__rmatmul__", "mm", "addmm"), LinearMaps._product),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), LinearMaps._convolution),
    **dict.fromkeys(("embedding", "embedding_bag"), LinearMaps._embedding),
    "multi_head_attention_forward": LinearMaps._attention,
}
