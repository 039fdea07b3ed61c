"""Learn a mask by two-level descent (Concrete Subspace Learning, arXiv 2312.06173).

Every step samples a mask from a relaxed Bernoulli distribution, shared by all tasks, and rescales it by its
mean. Below, the coefficients take one step of their optimiser, from where they start, on one batch of every
task. Above, the logits take a step of Adam on another batch, at the coefficients that this gave; that those
depend on the mask too is left out, as in the authors' code (first order). Then the mask is held fixed.

Held in memory beside the model and its gradients: logits, two moments of Adam, the mask in use and its
gradient, five times the weights that are merged.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .loop import InterruptedRun, NonFiniteLossError, make_optimizer, run_batches
from .mask import Mask, gradient_of_logits, load_logits, relaxed_bernoulli, rescaled
from .parametrisation import Coefficients
from .settings import MaskSettings
from .state import read_progress, write_progress

if TYPE_CHECKING:
    from .session import Session

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class MaskState:
    """What changes while a mask is learned.

    Attributes:
        logits: by tensor name ``(numel,)``.
        moments: of Adam, by name of a moment and tensor; empty at first.
        step: steps done.
        history: loss of every task, a record a step.
    """

    logits: dict[str, Tensor]
    moments: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def learn_mask(
    session: Session, initial: Tensor, path: Path | None, callback: Callable[[Mapping[str, Any]], None]
) -> Mask:
    """Learn the mask that the settings ask for, going on from a saved state where there is one.

    Args:
        session: a run whose coefficients are not learned yet.
        initial: ``(S, width)`` coefficients that every step starts from.
        path: where the state is saved; None for nowhere.
        callback: told of every step.

    Raises:
        UsageError: a saved state of another run, logits that do not fit.
        NonFiniteLossError: names the task and step.
        InterruptedRun: Ctrl-C; the state is saved.
    """
    settings, parametrisation = session.settings, session.parametrisation
    assert settings.mask is not None and isinstance(parametrisation, Coefficients)
    sizes = {e.name: parametrisation.store.vectors.numel(e) for e in parametrisation.entries()}
    state = load_mask(path, session.fingerprint, list(sizes)) if path is not None else None
    if state is None:
        state = MaskState(_first(sizes, settings.mask, session))
    learner = _Upper(session, parametrisation, settings.mask, initial, state)
    session.body.train_only(set(sizes))
    try:
        while state.step < settings.mask.steps:
            if path is not None and state.step % settings.save_every == 0:
                save_mask(path, learner.current(), session.fingerprint)
            started = time.perf_counter()
            losses = learner.step()
            record = {"mask_step": state.step, "loss": losses, "seconds": time.perf_counter() - started}
            state.history.append(record)
            callback({**record, "step": state.step, "steps": settings.mask.steps, "objective": "mask"})
            state.step += 1
        if path is not None:
            save_mask(path, learner.current(), session.fingerprint)
    except KeyboardInterrupt:
        kept = "; the same command goes on from the last save" if path is not None else ""
        raise InterruptedRun(
            f"stopped after {state.step} of {settings.mask.steps} steps of the mask{kept}"
        ) from None
    finally:
        session.body.train_only(set())
        session.body.clear_gradients()
        parametrisation.store.mask = {}
    return Mask(state.logits, settings.mask.kind, state.step, state.history)


def _first(sizes: Mapping[str, int], settings: MaskSettings, session: Session) -> dict[str, Tensor]:
    dtypes = {name: session.body.tensors[name].dtype for name in sizes}
    if settings.logits is not None:
        return {name: v.to(dtypes[name]) for name, v in load_logits(settings.logits, sizes).items()}
    return {name: torch.full((size,), settings.initial, dtype=dtypes[name]) for name, size in sizes.items()}


class _Upper:
    """The upper level: logits and their optimiser."""

    def __init__(
        self,
        session: Session,
        parametrisation: Coefficients,
        settings: MaskSettings,
        initial: Tensor,
        state: MaskState,
    ) -> None:
        self.session, self.parametrisation, self.settings = session, parametrisation, settings
        self.initial, self.state = initial, state
        self.optimizer = torch.optim.Adam(list(state.logits.values()), lr=settings.lr)
        for name, logits in state.logits.items():
            found = {key: state.moments.get(f"{key}/{name}") for key in _MOMENTS}
            if all(value is not None for value in found.values()):
                self.optimizer.state[logits] = {"step": torch.tensor(float(state.step)), **found}

    def current(self) -> MaskState:
        """The state, with the optimiser's moments as they are now."""
        self.state.moments = {
            f"{key}/{name}": self.optimizer.state[logits][key]
            for name, logits in self.state.logits.items()
            for key in _MOMENTS
            if logits in self.optimizer.state
        }
        return self.state

    def step(self) -> dict[str, float]:
        """One step on both levels; the losses of the upper one."""
        session, parametrisation, state = self.session, self.parametrisation, self.state
        names = list(state.logits)
        masks, means, weights = {}, {}, {}
        for name, sampled in zip(names, session.workers.map(self._sample, names), strict=True):
            masks[name], weights[name], means[name] = sampled
        parametrisation.store.mask = weights
        values = self.initial.clone().requires_grad_(True)
        optimizer = make_optimizer(session.settings, values)
        self._losses(values, 2 * state.step)
        values.grad = parametrisation.pull_back(session.body.gradients(), values).to(values)
        optimizer.step()
        losses = self._losses(values, 2 * state.step + 1)
        found = parametrisation.store.pull_back_to_mask(
            session.body.gradients(), values, parametrisation.where
        )
        session.body.clear_gradients()

        def pull(name: str) -> Tensor | None:
            if name not in found:  # a tensor that the outputs do not depend on
                return None
            gradient = found.pop(name).to(masks[name])
            return gradient_of_logits(gradient, masks.pop(name), means[name], self.settings.temperature)

        for name, gradient in zip(names, session.workers.map(pull, names), strict=True):
            state.logits[name].grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    def _sample(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """A mask, the same rescaled, and its mean."""
        seed = seed_of(self.session.settings.seed, name, self.state.step)
        mask = relaxed_bernoulli(self.state.logits[name], self.settings.temperature, seed)
        return mask, *rescaled(mask)

    def _losses(self, values: Tensor, number: int) -> dict[str, float]:
        session = self.session
        self.parametrisation.materialise(session.body.tensors, values)
        try:
            return run_batches(session.settings, session.objective, session.body, session.learners, number)
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"while the mask was learned: {error}") from None


def seed_of(seed: int, name: str, step: int) -> int:
    """The seed of one tensor's mask in one step."""
    digest = hashlib.blake2b(f"mask {seed} {step} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def save_mask(path: Path, state: MaskState, fingerprint: str) -> None:
    """Write the state beside and rename."""
    tensors = {f"logits/{name}": value for name, value in state.logits.items()} | state.moments
    write_progress(path, tensors, state.step, state.history, fingerprint)


def load_mask(path: Path, fingerprint: str, names: Sequence[str]) -> MaskState | None:
    """The saved state of the same run; None where there is none. Raises as `read_progress`."""
    found = read_progress(path, fingerprint)
    if found is None:
        return None
    tensors, step, history = found
    return MaskState({name: tensors.pop(f"logits/{name}") for name in names}, tensors, step, history)
