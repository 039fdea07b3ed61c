"""A mergekit configuration of the ``models:`` kind, translated into a recipe that gives what mergekit gives.

Only names and numbers are translated; no weights are opened. The readings are those of mergekit 0.1.5:
trimming tensor by tensor with exactly so many values kept, +1 as the sign of zero, gradients over the layers
that are at their first value outside the layers. What is refused, and what is deliberately not the same, is
listed in docs/mergekit.md.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import UsageError

NUMBERED = "*.[0-9]*.*"
"""Matches the names inside layers (``model.layers.3.mlp.up_proj.weight``) and no others."""

TASK_VECTOR = {"weight", "density", "gamma", "epsilon", "lambda", "normalize", "rescale", "int8_mask"}
PARAMETERS: Mapping[str, set[str]] = {
    "linear": {"weight", "normalize"},
    "slerp": {"t"},
    "model_stock": {"filter_wise"},
    "task_arithmetic": {"weight", "lambda", "normalize", "int8_mask"},
    "ties": TASK_VECTOR - {"gamma", "epsilon"},
    "dare_linear": TASK_VECTOR - {"gamma", "epsilon"},
    "dare_ties": TASK_VECTOR - {"gamma", "epsilon"},
    "breadcrumbs": TASK_VECTOR - {"epsilon"},
    "breadcrumbs_ties": TASK_VECTOR - {"epsilon"},
    "della": TASK_VECTOR - {"gamma"},
    "della_linear": TASK_VECTOR - {"gamma"},
}
"""The methods that are translated, each with the parameters that mergekit reads for it."""

_NOT_HERE = (
    "arcee_fusion",
    "karcher",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "ram",
    "ramplus_tl",
    "sce",
)
_ANY_PARAMETER = set().union(*PARAMETERS.values()) | {
    "alpha",
    "epsilon",
    "eps",
    "max_iter",
    "nuslerp_flatten",
    "nuslerp_row_wise",
    "r",
    "scale",
    "select_topk",
    "similarity_threshold",
    "tol",
}
_KNOWN_KEYS = {
    "merge_method",
    "models",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
}
_INSTEAD = {
    "slices": "it builds a model out of ranges of layers; run it with mergekit",
    "modules": "it merges parts of a model by different rules; write one configuration of the models: kind",
    "experts": "it is a mergekit-moe configuration; run it with mergekit-moe",
    "gate_mode": "it is a mergekit-moe configuration; run it with mergekit-moe",
    "chat_template": "the output carries the template of the tokenizer's model; remove this key, and "
    "change the template in the output's files if you want another",
}
_DTYPES = ("float32", "float16", "bfloat16", "float64")

Rules = list[dict[str, Any]]


def is_mergekit(fields: Mapping[str, Any]) -> bool:
    """Whether a YAML file is one of mergekit's (and not a recipe of this program, which has a ``base``)."""
    if {"merge_method", "slices", "gate_mode"} & set(fields):
        return True
    return isinstance(fields.get("experts"), list) and "base" not in fields


def translate(fields: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """The recipe's fields, and notes on what a reader should know about the translation.

    Paths are taken as they stand: relative to the working directory, or ids on the hub, as mergekit does.

    Args:
        fields: the configuration as read from its YAML file.
        where: what messages call it.

    Raises:
        UsageError: what cannot be translated, all of it in one message, each with what to do.
    """
    config = _Config(fields)
    recipe = config.translated() if not config.problems else {}
    if config.problems:
        lines = "\n".join(f"  - {problem}" for problem in config.problems)
        raise UsageError(f"{where} is a mergekit configuration that cannot be merged here:\n{lines}")
    return recipe, config.notes


@dataclass(frozen=True)
class _Model:
    """One item of ``models``: what opens it, what it is called here, and its own parameters."""

    reference: str
    path: str
    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


class _Config:
    """Reads a configuration, collecting problems and notes."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.fields = fields
        self.method = str(fields.get("merge_method"))
        self._check_keys()
        self.base = self._reference(fields.get("base_model"), "base_model")
        self.parameters = self._mapping(fields.get("parameters"), "parameters")
        self.models = self._models()
        if not self.problems:
            self._check_parameters()
            self._check_inputs()

    # --- what is there

    def _check_keys(self) -> None:
        for key, instead in _INSTEAD.items():
            if self.fields.get(key):
                self.problems.append(f"'{key}' is not supported: {instead}")
        if not self.problems and self.method not in PARAMETERS:
            if self.method in _NOT_HERE:
                why = f"merge_method '{self.method}' is not translated"
            else:
                near = difflib.get_close_matches(self.method, PARAMETERS, n=2, cutoff=0.5)
                why = f"unknown merge_method '{self.method}'" + (
                    f", did you mean {' or '.join(near)}?" if near else ""
                )
            self.problems.append(f"{why}; translated are: {', '.join(PARAMETERS)}")
        for key in self.fields:
            if key not in _KNOWN_KEYS | set(_INSTEAD):
                near = difflib.get_close_matches(str(key), _KNOWN_KEYS, n=1)
                hint = (
                    f", did you mean '{near[0]}'?" if near else f"; known: {', '.join(sorted(_KNOWN_KEYS))}"
                )
                self.problems.append(f"unknown key '{key}'{hint}")

    def _mapping(self, value: Any, where: str) -> Mapping[str, Any]:
        if value is None:
            return {}
        if isinstance(value, Mapping):
            return value
        self.problems.append(f"{where} must hold names and values, got {value!r}")
        return {}

    def _reference(self, value: Any, where: str) -> str | None:
        if value is None or (isinstance(value, str) and value.strip()):
            return value
        self.problems.append(
            f"{where} (={value!r}) must be a path or a hub id, as org/name or org/name@revision"
        )
        return None

    def _models(self) -> list[_Model]:
        items = self.fields.get("models")
        if not isinstance(items, list) or not items:
            if not self.problems:
                self.problems.append("'models' must list the models to merge")
            return []
        models: list[_Model] = []
        for number, item in enumerate(items, 1):
            where = f"models[{number}]"
            item = {"model": item} if isinstance(item, str) else self._mapping(item, where)
            reference = self._reference(item.get("model") or "", f"{where}: model")
            unknown = [str(key) for key in item if key not in ("model", "parameters")]
            if unknown:
                self.problems.append(f"{where}: unknown key {', '.join(map(repr, unknown))}")
            if reference is None:
                continue
            if any(model.reference == reference for model in models):
                self.problems.append(f"{where}: {reference} is listed twice")
                continue
            models.append(self._model(reference, item.get("parameters"), models, where))
        return models

    def _model(self, reference: str, parameters: Any, others: Iterable[_Model], where: str) -> _Model:
        model, plus, adapter = reference.partition("+")
        if plus and (model != self.base or not adapter or "+" in adapter):
            self.problems.append(
                f"{where}: {reference} adds an adapter to a model that is not the base_model; merge the "
                "adapter into it first (PEFT's merge_and_unload), or set base_model to that model"
            )
        path = adapter if plus else model
        name = (
            re.sub(r"[^\w.-]", "_", path.rstrip("/").split("@")[0].rsplit("/", 1)[-1]).lstrip(".") or "model"
        )
        taken, plain, number = {"base", "union", *(other.name for other in others)}, name, 1
        while name in taken:
            number += 1
            name = f"{plain}-{number}"
        return _Model(reference, path, name, self._mapping(parameters, f"{where}: parameters"))

    def _check_parameters(self) -> None:
        read = PARAMETERS[self.method]
        places = [("parameters", self.parameters)]
        places += [(f"parameters of {model.reference}", model.parameters) for model in self.models]
        for where, parameters in places:
            for name in parameters:
                if name not in _ANY_PARAMETER:
                    near = difflib.get_close_matches(str(name), read, n=1)
                    hint = f", did you mean '{near[0]}'?" if near else ""
                    self.problems.append(f"{where}: unknown parameter '{name}'{hint}")
                elif name not in read or name == "int8_mask":
                    why = "it changes no result" if name == "int8_mask" else f"{self.method} does not read it"
                    self.notes.append(f"mergekit: '{name}' in {where} is left aside; {why}")
                elif where != "parameters" and name not in ("weight", "density", "gamma", "epsilon"):
                    self.notes.append(
                        f"mergekit: '{name}' in {where} is left aside; it is read for all alike"
                    )

    def _check_inputs(self) -> None:
        if self.method != "linear" and self.base is None:
            self.problems.append(f"{self.method} needs a base_model")
        if self.base is not None and "+" in self.base:
            self.problems.append(
                f"base_model {self.base} has an adapter; merge it into the model first "
                "(PEFT's merge_and_unload)"
            )
        experts = len(self.experts())
        if self.method == "slerp" and experts != 2:
            self.problems.append(f"slerp merges two models, base_model being one of them; here are {experts}")
        if self.method == "model_stock" and experts < 2:
            self.problems.append("model_stock needs at least two models besides base_model")
        if not experts:
            self.problems.append("there is no model besides base_model")

    # --- what it becomes

    def experts(self) -> list[_Model]:
        """The models that become experts; linear and slerp count the base as one of them."""
        if self.method not in ("linear", "slerp"):
            return [model for model in self.models if model.reference != self.base]
        models = list(self.models)
        if self.base is not None and all(model.reference != self.base for model in models):
            models.append(self._model(self.base, None, models, "base_model"))
        if self.method == "slerp":
            models.sort(key=lambda model: model.reference != self.base)
        return models

    def translated(self) -> dict[str, Any]:
        """The recipe's fields; call it once, where no problem was found."""
        experts = self.experts()
        base = self.base if self.base is not None else experts[0].reference
        if "+" in base:
            self.problems.append(f"the first model, {base}, has an adapter; give base_model without one")
        weighted = "weight" in PARAMETERS[self.method]
        recipe: dict[str, Any] = {
            "base": base,
            "experts": {
                model.name: {"path": model.path, "weight": self._each("weight", model) if weighted else 1.0}
                for model in experts
            },
            "method": self._chain(experts),
            "scale": self._shared("lambda", 1.0),
            "heads": [],
            "buffers": "method",
        }
        self._dtype(recipe)
        self._tokenizer(recipe, base, experts)
        return recipe

    def _chain(self, experts: list[_Model]) -> list[dict[str, dict[str, Any]]]:
        """The method, as the chain of methods that is the same."""
        method = self.method
        kind = method.removesuffix("_ties").removesuffix("_linear")
        normalise = self._flag("normalize", method in ("linear", "ties", "della"))
        if method == "linear":
            return [{"weighted": {"normalise": normalise, "of": "weights"}}]
        if method == "slerp":
            if "t" not in self.parameters:
                self.problems.append("slerp needs the parameter 't'")
            return [{"slerp": {"t": self._shared("t", 0.5)}}]
        if method == "model_stock":
            granularity = "row" if self._flag("filter_wise", False) else "tensor"
            return [{"model_stock": {"granularity": granularity, "clamp": False}}]
        if method == "task_arithmetic":
            return [{"weighted": {"normalise": normalise}}]
        density = {model.name: self._each("density", model, 1.0) for model in experts}
        rescale = self._flag("rescale", kind in ("dare", "della"))
        chain = [self._sparsify(kind, density, experts, rescale)]
        if rescale:
            chain.append({"rescale": {}})
        elif kind == "ties":
            chain = []
        if method in ("ties", "dare_ties", "breadcrumbs_ties", "della"):
            kept = density if kind == "ties" and not rescale else 1.0
            reduction = "mean" if normalise else "sum"
            elect = {"density": kept, "scope": "tensor", "reduction": reduction, "zero_sign": "positive"}
            return [*chain, {"ties": elect}]
        return [*chain, {"weighted": {"normalise": normalise}}]

    def _sparsify(
        self, kind: str, density: Mapping[str, Any], experts: list[_Model], rescale: bool
    ) -> dict[str, dict[str, Any]]:
        """The transform that drops values; to trim is to keep the middle with nothing above it."""
        if kind == "dare":
            return {"dare": {"density": density, "rescale": False}}
        if kind == "della":
            epsilons = [self._each("epsilon", model, 0.15) for model in experts]
            if not isinstance(epsilons[0], float) or any(value != epsilons[0] for value in epsilons):
                self.problems.append("'epsilon' must be one number for all models and tensors")
            return {
                "della": {"density": density, "epsilon": epsilons[0], "rescale": False, "consensus": False}
            }
        gamma = {model.name: self._each("gamma", model, 0.01) for model in experts}
        return {"breadcrumbs": {"density": density, "outliers": gamma if kind == "breadcrumbs" else 0.0}}

    def _dtype(self, recipe: dict[str, Any]) -> None:
        named = {key: self.fields[key] for key in ("dtype", "out_dtype") if self.fields.get(key)}
        for key, value in named.items():
            named[key] = str(value).removeprefix("torch.")
            if named[key] not in _DTYPES:
                self.problems.append(f"{key} (={value}) must be one of {', '.join(_DTYPES)}")
        if named:
            recipe["dtype"] = named.get("out_dtype", named.get("dtype"))
        if named.get("dtype") in ("bfloat16", "float16"):
            self.notes.append(
                f"mergekit: dtype {named['dtype']} would round every step of the arithmetic; "
                "here it is in float32 and rounded once"
            )

    def _tokenizer(self, recipe: dict[str, Any], base: str, experts: list[_Model]) -> None:
        source = self.fields.get("tokenizer_source")
        given = self.fields.get("tokenizer")
        if given:
            given = self._mapping(given, "tokenizer")
            if source:
                self.problems.append("tokenizer and tokenizer_source are both given; keep one")
            for key in given:
                if key != "source" and given[key]:
                    self.problems.append(
                        f"'tokenizer: {key}' is not supported: embeddings come from the models that have the "
                        "token; edit the embeddings with transformers before or after the merge"
                    )
            source = given.get("source", "union")
        if not source:
            return
        names = {model.reference: model.name for model in experts} | {base: "base", "base": "base"}
        if source != "union" and source not in names:
            self.problems.append(
                f"the tokenizer's source {source} is neither base, union nor one of the models"
            )
        recipe["tokenizer"] = names.get(str(source), "union")
        recipe["vocabulary"] = "shared"

    # --- numbers

    def _flag(self, name: str, default: bool) -> bool:
        value = self.parameters.get(name, default)
        if value in (True, False):  # 1.0 is as good as true there
            return bool(value)
        self.problems.append(f"'{name}' (={value!r}) must be true or false, the same for all tensors")
        return default

    def _shared(self, name: str, default: float) -> Any:
        return self._settle([("parameters", self.parameters)], name, default)

    def _each(self, name: str, model: _Model, default: float | None = None) -> Any:
        places = [(f"parameters of {model.reference}", model.parameters), ("parameters", self.parameters)]
        return self._settle(places, name, default)

    def _settle(self, places: list[tuple[str, Mapping[str, Any]]], name: str, default: float | None) -> Any:
        """The schedule of one parameter: the most special place that has a value for a tensor counts."""
        rules: Rules = []
        for where, parameters in places:
            if name in parameters:
                rules += self._rules(parameters[name], f"{where}: {name}")
        if default is not None:
            rules.append({"value": default})
        elif not rules:
            self.problems.append(f"{places[0][0]}: '{name}' is missing")
            return 1.0
        last = next((i for i, rule in enumerate(rules) if "match" not in rule), len(rules))
        rules = rules[: last + 1]
        return rules[0]["value"] if "match" not in rules[0] else rules

    def _rules(self, setting: Any, where: str) -> Rules:
        """What a number, a gradient, or a list of filters is as rules by name."""
        if isinstance(setting, Mapping):
            setting = [setting]
        if not isinstance(setting, list):
            return [{"value": self._number(setting, where)}]
        conditions = [item for item in setting if isinstance(item, Mapping)]
        if not conditions:
            numbers = [self._number(item, where) for item in setting]
            if len(numbers) < 2:
                return [{"value": number} for number in numbers]
            return [{"value": [{"match": NUMBERED, "value": numbers}, {"value": numbers[0]}]}]
        if len(conditions) != len(setting):
            self.problems.append(f"{where} mixes numbers and filters")
        rules = []
        for condition in conditions:
            if "value" not in condition or set(condition) - {"value", "filter"}:
                self.problems.append(f"{where}: {dict(condition)} must have 'value' and optionally 'filter'")
                continue
            inner = self._rules(condition["value"], where)
            part = condition.get("filter")
            if inner:
                match = {} if part in (None, "*") else {"match": f"*{_literally(str(part))}*"}
                rules.append({**match, "value": inner[0]["value"]})
        return rules

    def _number(self, value: Any, where: str) -> float:
        """A number; YAML reads 1e-3 as text, and mergekit then reads the text."""
        try:
            if isinstance(value, (int, float, str)) and not isinstance(value, bool):
                return float(value)
        except ValueError:
            pass
        self.problems.append(
            f"{where} (={value!r}) must be a number, a list of numbers, or filters with values"
        )
        return 0.0


def _literally(text: str) -> str:
    """A pattern that matches the text itself."""
    return re.sub(r"([\[*?])", r"[\1]", text)
