"""AdaRank: a gate for each singular component, a coefficient for each row and tensor (arXiv 2503.22178).

A gate has a logit g. It is open where sigmoid(g / 10) > 1/2 and shut elsewhere; backward it counts as
sigmoid(g / 10), straight through the step. So with G = ∂L/∂merged and c_i = u_iᵀ G v_i:

    ∂L/∂λ = Σ_i open_i s_i c_i                 ∂L/∂g_i = λ s_i c_i · σ (1 − σ) / 10,  σ = sigmoid(g_i / 10)

Nothing but the components is read for it, from a mapped file, tensor by tensor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..blocks import Place
from ..errors import UsageError
from ..output.tensors import write_tensors
from ..plan import Entry
from ..stream import Workers
from ..task_vectors import TaskVectors
from .coefficients import Layout, layout, misshapen, read_coefficients, refuse_misfit, table
from .parametrisation import FILE, Records
from .settings import AdaptSettings
from .spectrum import Matrix, Part, Spectrum, build_spectrum, open_at_first
from .store import VectorStore

TEMPERATURE = 10.0
GRANULARITY = "singular"


@dataclass(frozen=True)
class Slot:
    """Where the values of one row of one tensor with gates stand.

    Attributes:
        part: its components.
        coefficient: position of λ.
        gates: positions of the logits.
    """

    part: Part
    coefficient: int
    gates: slice


@dataclass
class Gates:
    """Gates on singular components, and coefficients; all values in one vector, coefficients first.

    Args:
        spectrum: the components.
        plain: the stack of the tensors without gates; one row more, the first, where there is an origin.
        rows: labels of the rows.
        initial: distance of the first logits from 0.
        places: of the tensors, for tables.
        device: where the merged weights live.
        keep: hold the components there.
    """

    spectrum: Spectrum
    plain: VectorStore
    rows: tuple[str, ...]
    initial: float
    places: Mapping[str, Place]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    keep: bool = False
    where: Layout = field(init=False)
    _beside: Layout = field(init=False)
    _slots: list[tuple[Matrix, tuple[Slot, ...]]] = field(init=False)
    _size: int = field(init=False)

    def __post_init__(self) -> None:
        source = self.spectrum.source
        beside = self.plain.entries()
        self._beside = layout("tensor", source.plain_rows, beside, self.places)
        matrices = [self._moved(matrix) if self.keep else matrix for matrix in self.spectrum.matrices]
        names = {matrix.entry.name for matrix in matrices} | {entry.name for entry in beside}
        ordered = [entry for entry in self.plain.vectors.entries() if entry.name in names]
        self.where = layout("tensor", self.rows, ordered, self.places)
        position = len(source.plain_rows) * self._beside.width
        gate = position + sum(len(matrix.parts) for matrix in matrices)
        self._slots = []
        for matrix in matrices:
            slots = []
            for part in matrix.parts:
                slots.append(Slot(part, position, slice(gate, gate + len(part.values))))
                position, gate = position + 1, gate + len(part.values)
            self._slots.append((matrix, tuple(slots)))
        self._coefficients, self._size = position, gate

    def entries(self) -> list[Entry]:
        """The tensors that depend on what is learned."""
        return [*self.plain.entries(), *(matrix.entry for matrix, _ in self._slots)]

    def first(self) -> Tensor:
        """Every coefficient at its method's strength, the strongest components' gates open."""
        source = self.spectrum.source
        values = torch.full((self._size,), source.strength, dtype=torch.float64)
        for slot in self._all_slots():
            logits = values[slot.gates]
            logits.fill_(-self.initial)
            logits[: open_at_first(source, slot.part)] = self.initial
        return values

    def materialise(self, targets: Mapping[str, Tensor], values: Tensor) -> None:
        """Write the merged weights of every changed tensor into ``targets``, by name and in place."""
        values = values.detach()
        self.plain.materialise(targets, self._with_origin(values), self._plain_layout)

        def write(job: tuple[Matrix, tuple[Slot, ...]]) -> None:
            matrix, slots = job
            target = targets[matrix.entry.name].detach().view(-1)[: self._numel(matrix)]
            merged = self._base(matrix)
            for slot in slots:
                chosen = values[slot.gates] > 0
                left, strength, right = self._components(slot.part)
                weight = strength * values[slot.coefficient].to(strength)
                if not bool(chosen.all()):
                    chosen = chosen.to(left.device)
                    left, weight, right = left[chosen], weight[chosen], right[chosen]
                merged.addmm_((left * weight[:, None]).T, right)
            target.copy_(merged.view(-1))

        deque(self._workers.map(write, self._slots), maxlen=0)

    def pull_back(self, gradients: Mapping[str, Tensor], values: Tensor) -> Tensor:
        """``(size,)`` float64 gradient of the values, straight through the gates' steps."""
        values = values.detach().double().cpu()
        total = torch.zeros(self._size, dtype=torch.float64)
        by_row = self.plain.pull_back(gradients, self._plain_layout)
        total[: by_row[self._fixed :].numel()] = by_row[self._fixed :].reshape(-1)

        def contract(job: tuple[Matrix, tuple[Slot, ...]]) -> list[tuple[Slot, Tensor]]:
            matrix, slots = job
            gradient = gradients[matrix.entry.name].reshape(-1)[: self._numel(matrix)]
            found = []
            for slot in slots:
                left, strength, right = self._components(slot.part)
                pulled = left @ gradient.view(left.shape[1], -1).to(left)
                along = (pulled * right).sum(1) * strength
                found.append((slot, along.double().cpu()))
            return found

        jobs = [job for job in self._slots if job[0].entry.name in gradients]
        for found in self._workers.map(contract, jobs):
            for slot, along in found:
                logits = values[slot.gates]
                soft = torch.sigmoid(logits / TEMPERATURE)
                total[slot.coefficient] = along[logits > 0].sum()
                total[slot.gates] = values[slot.coefficient] * along * soft * (1 - soft) / TEMPERATURE
        return total

    def clamped(self, values: Tensor) -> Tensor:
        """The values with coefficients held in [0, 1]; gates stay."""
        return torch.cat([values[: self._coefficients].clamp(0, 1), values[self._coefficients :]])

    def coefficients(self, values: Tensor) -> Tensor:
        """``(rows, tensors)`` λ; 0 where a row does not change a tensor."""
        found = values.new_zeros(len(self.rows), self.where.width)
        owners = [self.rows.index(label) for label in self._beside.rows]
        beside = self._of_plain(values)
        for name, (column, _) in self._beside.spans.items():
            found[owners, self.where.spans[name][0]] = beside[:, column]
        for matrix, slots in self._slots:
            column = self.where.spans[matrix.entry.name][0]
            for slot in slots:
                found[slot.part.row, column] = values[slot.coefficient]
        return found

    def count(self, values: Tensor) -> int:
        """How many coefficients and gates."""
        return values.numel()

    def write(self, folder: Path, values: Tensor) -> None:
        """Write λ by tensor ``(rows,)``, and logits as ``<tensor>/gates/<row>``."""
        scales = self.coefficients(values)
        tensors = {name: scales[:, column].clone() for name, (column, _) in self.where.spans.items()}
        for matrix, slots in self._slots:
            for slot in slots:
                tensors[self._gates_name(matrix, slot)] = values[slot.gates].clone()
        write_tensors(folder / FILE, tensors, {"granularity": GRANULARITY, "rows": "\n".join(self.rows)})

    def load(self, path: str | Path) -> Tensor:
        """What `write` wrote, aligned by the names of rows and tensors. Raises as `Parametrisation.load`."""
        metadata, stored = read_coefficients(path)
        if metadata.get("granularity") != GRANULARITY:
            raise UsageError(
                f"{path} holds coefficients of granularity '{metadata.get('granularity', 'unknown')}'; gates "
                "start from those of another run with granularity: singular"
            )
        rows = metadata.get("rows", "").split("\n")
        problems = [f"no coefficients for '{row}'" for row in self.rows if row not in rows]
        shapes = {name: (len(rows),) for name in self.where.spans}
        for matrix, slots in self._slots:
            shapes |= {self._gates_name(matrix, slot): (len(slot.part.values),) for slot in slots}
        problems += misshapen(stored, shapes)
        refuse_misfit(f"the gates in {path}", problems)
        values = self.first()
        numbers = {row: rows.index(row) for row in self.rows}
        beside = self._of_plain(values)
        for name, (column, _) in self._beside.spans.items():
            beside[:, column] = stored[name].double()[[numbers[row] for row in self._beside.rows]]
        for matrix, slots in self._slots:
            for slot in slots:
                label = self.rows[slot.part.row]
                values[slot.coefficient] = stored[matrix.entry.name].double()[numbers[label]]
                values[slot.gates] = stored[self._gates_name(matrix, slot)].double()
        return values

    def tables(self, values: Tensor) -> Mapping[str, Records]:
        """Coefficients by tensor; components kept, and how many there are, by tensor and row."""
        return {
            "coefficients.csv": table(self.coefficients(values), self.where),
            "components.csv": self._kept_by_tensor(values),
        }

    def record(self, values: Tensor) -> Mapping[str, Any]:
        """How many gates there are, and how many components are kept, by row and block."""
        by_block: dict[str, dict[str, list[int]]] = {}
        for matrix, slots in self._slots:
            block = by_block.setdefault(self.places[matrix.entry.name].block or matrix.entry.name, {})
            for slot in slots:
                count = block.setdefault(self.rows[slot.part.row], [0, 0])
                count[0] += int((values[slot.gates] > 0).sum())
                count[1] += len(slot.part.values)
        return {"gates": self._size - self._coefficients, "kept_components": by_block}

    def _kept_by_tensor(self, values: Tensor) -> Records:
        records: list[dict[str, object]] = []
        for matrix, slots in self._slots:
            name = matrix.entry.name
            record: dict[str, object] = {"block": self.places[name].block or "", "tensor": name}
            own = {slot.part.row: slot for slot in slots}
            for row, label in enumerate(self.rows):
                chosen = int((values[own[row].gates] > 0).sum()) if row in own else 0
                record |= {f"{label} kept": chosen}
                record |= {f"{label} of": len(own[row].part.values) if row in own else 0}
            records.append(record)
        return records

    def _gates_name(self, matrix: Matrix, slot: Slot) -> str:
        return f"{matrix.entry.name}/gates/{self.rows[slot.part.row]}"

    @property
    def _workers(self) -> Workers:
        return self.plain.workers

    @property
    def _fixed(self) -> int:
        """How many rows of the plain stack have no coefficient of their own but count once."""
        return int(self.spectrum.source.centred)

    @property
    def _plain_layout(self) -> Layout:
        rows = ("origin",) * self._fixed + self._beside.rows
        return replace(self._beside, rows=rows)

    def _of_plain(self, values: Tensor) -> Tensor:
        """``(rows, tensors)`` view of the coefficients of tensors without gates."""
        rows, width = len(self._beside.rows), self._beside.width
        return values[: rows * width].view(rows, width)

    def _with_origin(self, values: Tensor) -> Tensor:
        """``(fixed + rows, tensors)`` coefficients of the plain stack."""
        own = self._of_plain(values)
        return torch.cat([own.new_ones(self._fixed, own.shape[1]), own])

    def _all_slots(self) -> Iterator[Slot]:
        for _, slots in self._slots:
            yield from slots

    def _numel(self, matrix: Matrix) -> int:
        return self.plain.vectors.numel(matrix.entry)

    def _base(self, matrix: Matrix) -> Tensor:
        """``(m, n)`` base and origin, a new tensor."""
        vectors = self.plain.vectors
        stored = vectors.base.read(matrix.entry.name).reshape(-1)[: self._numel(matrix)]
        base = stored.to(self.device, vectors.dtype(matrix.entry), copy=True)
        if matrix.origin is not None:
            base += matrix.origin.to(base)
        return base.view(vectors.shape(matrix.entry)[0], -1)

    def _components(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        return part.left.to(self.device), part.values.to(self.device), part.right.to(self.device)

    def _moved(self, matrix: Matrix) -> Matrix:
        parts = []
        for part in matrix.parts:
            left, values, right = self._components(part)
            parts.append(replace(part, left=left, values=values, right=right))
        return replace(matrix, parts=tuple(parts))


def make_gates(
    settings: AdaptSettings,
    vectors: TaskVectors,
    workers: Workers,
    content: Sequence[str],
    device: torch.device,
    say: Callable[[str], None],
) -> Gates:
    """Look at the experts, decompose what they changed (or take it from the cache), and set gates.

    Raises:
        UsageError: see `build_spectrum`; every expert is the base.
    """
    budget = int(settings.budget * 1e9)
    VectorStore(vectors, workers).scan()
    changed = VectorStore(vectors, workers).entries()
    if not changed:
        raise UsageError("every expert is identical to the base: there is nothing to merge")
    spectrum = build_spectrum(settings, vectors, changed, workers, content, say)
    gated = {matrix.entry.name for matrix in spectrum.matrices}
    others = frozenset(entry.name for entry in changed if entry.name not in gated)
    own = spectrum.source.plain is None
    plain = VectorStore(vectors, workers, spectrum.plain, own, device, only=others)
    keep = 0 < spectrum.nbytes <= budget and device.type != "cpu"
    return Gates(spectrum, plain, spectrum.source.rows, settings.gate, vectors.places, device, keep)
