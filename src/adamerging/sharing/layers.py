"""Which tensors of a model get a gate: the weights of its linear, convolution and embedding maps."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from ..errors import UsageError
from ..naming import matching

_MAPS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Layer:
    """One gated tensor, and the small ones that may follow its gate.

    Attributes:
        weight: name of the parameter.
        small: names of the layer's biases, and of the norms' parameters that come after it in the model.
        statistics: names of the BatchNorm modules among these norms.
    """

    weight: str
    small: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The layer's name: the parameter's without ``.weight``."""
        return self.weight.removesuffix(".weight")


def find_layers(
    module: nn.Module,
    *,
    head: Collection[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[Layer]:
    """The layers of a model that can be gated, in the model's order.

    Every linear, convolution and embedding map counts, the first layer (stem) like any other, whatever its
    class is called; the projections of ``nn.MultiheadAttention`` and the ``Conv1D`` of transformers too. The
    head is each task's own and what is frozen stays the base's: neither is gated.

    Args:
        module: any module.
        head: names of the head's parameters.
        include: keep only layers whose name matches one of these patterns (``*`` stands for any text).
        exclude: leave out layers that match one of these.

    Raises:
        UsageError: a pattern that matches no layer, no layer at all, or a weight that several places of the
            model share; all that is wrong in one message.
    """
    places = _places(module)
    maps = {
        name: [form for place in places[id(module.get_parameter(name))] for form in _forms(place)]
        for name in gateable(module, head)
    }
    problems = []
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if all(matching([pattern], forms) is None for forms in maps.values()):
                names = [name.removesuffix(".weight") for name in maps]
                near = get_close_matches(pattern, names, n=1, cutoff=0.3)
                hint = f"; the nearest name is '{near[0]}'" if near else ""
                problems.append(
                    f"gates.{option}: the pattern '{pattern}' matches no layer that can be gated{hint}"
                )
    chosen = [
        name
        for name, forms in maps.items()
        if matching(exclude, forms) is None and (not include or matching(include, forms) is not None)
    ]
    for name in chosen:
        others = [each for each in places[id(module.get_parameter(name))] if each != name]
        if others:
            problems.append(
                f"the weight {name} is shared between places of the model (also {', '.join(others)}), and "
                "one gate cannot serve them all; keep it as it is in the base with gates.exclude: "
                f"[{name.removesuffix('.weight')}], or freeze it"
            )
    if not chosen and not problems:
        problems.append(
            "no layer can be gated: the body has no linear, convolution or embedding map that is "
            "neither frozen nor excluded"
        )
    if problems:
        raise UsageError(
            problems[0] if len(problems) == 1 else "\n".join(["", *(f"  - {p}" for p in problems)])
        )
    return _with_small(module, chosen, set(head))


def gateable(module: nn.Module, head: Collection[str]) -> Iterator[str]:
    """Names of all weights that a gate can be given to: of maps that learn and are no head."""
    for path, part in module.named_modules():
        leaves: tuple[str, ...] = ()
        if isinstance(part, _MAPS) or _is_conv1d(part):
            leaves = ("weight",)
        elif isinstance(part, nn.MultiheadAttention):
            leaves = _ATTENTION
        for leaf in leaves:
            parameter = getattr(part, leaf, None)
            if (
                isinstance(parameter, nn.Parameter)
                and parameter.requires_grad
                and _join(path, leaf) not in head
            ):
                yield _join(path, leaf)


def norms_and_biases(module: nn.Module, head: Collection[str]) -> Iterator[tuple[str, bool]]:
    """Names of the small parameters of the body that learn, each with whether it belongs to a norm."""
    for path, part in module.named_modules():
        for leaf, parameter in part.named_parameters(recurse=False):
            name = _join(path, leaf)
            if name in head or not parameter.requires_grad:
                continue
            if isinstance(part, _NORMS) or _looks_like_norm(part):
                yield name, True
            elif leaf.endswith("bias"):
                yield name, False


def _with_small(module: nn.Module, chosen: Sequence[str], head: set[str]) -> list[Layer]:
    """The layers with their biases and the norms that follow them; norms before the first are the first's."""
    small: dict[str, list[str]] = {name: [] for name in chosen}
    statistics: dict[str, list[str]] = {name: [] for name in chosen}
    owners = {name: name.rpartition(".")[0] for name in chosen}
    learns = dict(norms_and_biases(module, head))
    current = chosen[0]
    for path, part in module.named_modules():
        mine = [name for name in chosen if owners[name] == path]
        current = mine[0] if mine else current
        for leaf, _ in part.named_parameters(recurse=False):
            name = _join(path, leaf)
            if name in learns and (mine or learns[name]):
                small[current].append(name)
                if isinstance(part, nn.modules.batchnorm._NormBase) and path not in statistics[current]:
                    statistics[current].append(path)
    return [Layer(name, tuple(small[name]), tuple(statistics[name])) for name in chosen]


def _places(module: nn.Module) -> dict[int, list[str]]:
    """All names of every parameter, by the parameter's identity."""
    found: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return found


def _forms(name: str) -> list[str]:
    """What a pattern may be written for: the layer's name, or its parameter's."""
    return [name.removesuffix(".weight"), name]


def _is_conv1d(part: nn.Module) -> bool:
    """Whether it is the linear map that transformers calls Conv1D; told by name, so as not to load it."""
    kinds = type(part).__mro__
    return any(kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in kinds)


def _looks_like_norm(part: nn.Module) -> bool:
    """A norm of the model's own (RMSNorm and its kin): nothing but vectors, and called so."""
    own = list(part.parameters(recurse=False))
    return "norm" in type(part).__name__.lower() and bool(own) and all(p.ndim == 1 for p in own)


def _join(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf
