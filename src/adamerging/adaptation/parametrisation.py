"""What is learned, as the loop sees it: numbers that give merged weights, and the gradient's way back.

`Coefficients` are λ[row of the stack, group], see `coefficients`. `gates.Gates` has a coefficient for each
row and tensor and a gate for each singular component, `routing.store.Routers` are routers. The loop, its
state, checks and records know none of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..plan import Entry
from .coefficients import Layout, load_coefficients, save_coefficients, table
from .mask import Mask
from .store import VectorStore

FILE = "coefficients.safetensors"
Records = Sequence[Mapping[str, object]]


class Learned(Protocol):
    """Learned numbers, all in one tensor, and the model that they stand for.

    Attributes:
        where: layout of the coefficients among them.
    """

    @property
    def where(self) -> Layout:
        """Layout of the coefficients."""
        ...

    def entries(self) -> Sequence[Entry]:
        """The tensors that depend on what is learned."""
        ...

    def first(self) -> Tensor:
        """The values that learning starts from, float64."""
        ...

    def materialise(self, targets: Mapping[str, Tensor], values: Tensor) -> None:
        """Write the merged weights into ``targets``, by name and in place."""
        ...

    def pull_back(self, gradients: Mapping[str, Tensor], values: Tensor) -> Tensor:
        """Gradient of the values, float64 and of their shape, from that of the merged weights by name."""
        ...

    def clamped(self, values: Tensor) -> Tensor:
        """The values with their coefficients held in [0, 1]; differentiable."""
        ...

    def coefficients(self, values: Tensor) -> Tensor:
        """``(rows, width)`` the coefficients among the values, laid out as `where` says."""
        ...

    def count(self, values: Tensor) -> int:
        """How many numbers are learned."""
        ...

    def record(self, values: Tensor) -> Mapping[str, Any]:
        """What else ``run.json`` says about the values."""
        ...


@runtime_checkable
class Parametrisation(Learned, Protocol):
    """Learned numbers that have a file of their own, and can be the start of another run."""

    def write(self, folder: Path, values: Tensor) -> None:
        """Write what was learned into a folder as safetensors, by name: `FILE`, and perhaps others."""
        ...

    def load(self, path: str | Path) -> Tensor:
        """The values that `write` wrote into `FILE`, of this or another run, aligned by name.

        Raises:
            WeightsError: the file cannot be read.
            UsageError: it does not fit; all differences in one message.
        """
        ...

    def tables(self, values: Tensor) -> Mapping[str, Records]:
        """Readable tables of the values, by file name."""
        ...


@dataclass
class Coefficients:
    """A coefficient for each row of the stack and group of values.

    Args:
        store: base and stack.
        where: which values a coefficient covers.
        initial: first coefficient of each row.
        mask: that the stack is multiplied with, once it is learned.
    """

    store: VectorStore
    where: Layout
    initial: Sequence[float]
    mask: Mask | None = None

    def entries(self) -> Sequence[Entry]:
        """See `Parametrisation`, as for all that follows."""
        return self.store.entries()

    def first(self) -> Tensor:  # noqa: D102
        return self.where.full(self.initial, torch.float64)

    def materialise(self, targets: Mapping[str, Tensor], values: Tensor) -> None:  # noqa: D102
        self.store.materialise(targets, values, self.where)

    def pull_back(self, gradients: Mapping[str, Tensor], values: Tensor) -> Tensor:  # noqa: D102
        return self.store.pull_back(gradients, self.where)

    def clamped(self, values: Tensor) -> Tensor:  # noqa: D102
        return values.clamp(0, 1)

    def coefficients(self, values: Tensor) -> Tensor:  # noqa: D102
        return values

    def count(self, values: Tensor) -> int:  # noqa: D102
        return values.numel() + (self.mask.count if self.mask is not None else 0)

    def write(self, folder: Path, values: Tensor) -> None:  # noqa: D102
        save_coefficients(folder / FILE, values, self.where)
        if self.mask is not None:
            self.mask.write(folder)

    def load(self, path: str | Path) -> Tensor:  # noqa: D102
        return load_coefficients(path, self.where)

    def tables(self, values: Tensor) -> Mapping[str, Records]:  # noqa: D102
        tables: dict[str, Records] = {"coefficients.csv": table(values, self.where)}
        return tables if self.mask is None else tables | {"mask.csv": self.mask.table()}

    def record(self, values: Tensor) -> Mapping[str, Any]:  # noqa: D102
        return {} if self.mask is None else {"mask": self.mask.record()}
