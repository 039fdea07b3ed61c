"""Sharing: one base, many tasks, each with the few layers it needs (TAPS). Loaded when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import names_from

if TYPE_CHECKING:
    from .layers import Layer, find_layers
    from .run import FrontierPoint, ShareResult, Trial, share
    from .settings import ShareRecipe, SweepSettings, TapsSettings, load_share_recipe
    from .shared_task import SharedTask
    from .store import add_task, remove_task, write_store
    from .switching import Switch
    from .taps import Gate, Gates, gate_layers

_HOME = {
    "FrontierPoint": "run",
    "Gate": "taps",
    "TapsSettings": "settings",
    "Gates": "taps",
    "Layer": "layers",
    "ShareRecipe": "settings",
    "ShareResult": "run",
    "SharedTask": "shared_task",
    "Switch": "switching",
    "add_task": "store",
    "remove_task": "store",
    "write_store": "store",
    "SweepSettings": "settings",
    "Trial": "run",
    "find_layers": "layers",
    "gate_layers": "taps",
    "load_share_recipe": "settings",
    "share": "run",
}

__all__ = [
    "FrontierPoint",
    "Gate",
    "TapsSettings",
    "Gates",
    "Layer",
    "ShareRecipe",
    "ShareResult",
    "SharedTask",
    "SweepSettings",
    "Switch",
    "Trial",
    "add_task",
    "find_layers",
    "gate_layers",
    "load_share_recipe",
    "remove_task",
    "share",
    "write_store",
]


__getattr__ = names_from(__name__, _HOME)
