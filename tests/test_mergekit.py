"""A mergekit configuration runs as it is and gives what mergekit gives.

Three witnesses for each configuration: our merge, the definition in float64 written here from the
mathematics, and what mergekit 0.1.5 gave (`data/make_mergekit_golden.py`). Where values are kept by rank and
the weights are bfloat16, mergekit ranks rounded differences, many of them equal, so a few per cent of the
values may differ from the definition; ours may not.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from adamerging.errors import UsageError
from adamerging.mergekit import PARAMETERS, is_mergekit, translate
from adamerging.recipe import load_recipe
from adamerging.run import execute, prepare_recipe

DATA = Path(__file__).parent / "data"
_spec = importlib.util.spec_from_file_location("make_mergekit_golden", DATA / "make_mergekit_golden.py")
assert _spec is not None and _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)
RESULTS = json.loads((DATA / "mergekit_golden.json").read_text())["results"]


@pytest.fixture(scope="session", params=list(golden.DTYPES))
def folder(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp(request.param, numbered=False)
    for model in (*golden.MODELS, "far"):
        golden.write_model(root / model, model, request.param)
    return root


@pytest.fixture
def dtype(folder: Path) -> str:
    return folder.name


def merged(folder: Path, config: dict, monkeypatch, **overrides: Any) -> dict[str, Tensor]:
    monkeypatch.chdir(folder)  # the paths are relative to the working directory
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return dict(execute(prepare_recipe(load_recipe(path, {"allow": ["unrelated"], **overrides}))).body)


# --- the definition


def setting(value: Any, tensor: str) -> Any:
    """What a parameter comes to for one tensor; None where nothing applies."""
    layer = int(tensor.split(".")[2]) if ".layers." in tensor else 0
    depth = layer / (golden.LLAMA["num_hidden_layers"] - 1)
    if not isinstance(value, list):
        return value
    if isinstance(value[0], dict):
        for item in value:
            if item.get("filter", "*") == "*" or item["filter"] in tensor:
                return setting(item["value"], tensor)
        return None
    position = depth * (len(value) - 1)
    left = math.floor(position)
    right = min(left + 1, len(value) - 1)
    return value[left] + (position - left) * (value[right] - value[left])


def top(values: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest magnitudes; of equal ones the first."""
    order = values.abs().reshape(-1).argsort(descending=True, stable=True)[:count]
    return torch.zeros(values.numel(), dtype=torch.bool).index_fill_(0, order, True).reshape(values.shape)


def definition(config: dict, dtype: str, tie: float = 1.0) -> dict[str, Tensor]:
    """The merge in float64, with this sign elected where the experts cancel up to rounding."""
    states = {m: golden.state(m, golden.DTYPES[dtype]) for m in (*golden.MODELS, "far")}
    items = {item["model"]: item.get("parameters", {}) for item in config["models"]}
    base, shared = config.get("base_model"), config.get("parameters", {})
    if base is not None and config["merge_method"] in ("linear", "slerp"):
        items.setdefault(base, {})
    result = {}
    for tensor in golden.shapes():
        weights = {m: states[m][tensor].double() for m in states}

        def own(name: str, model: str, default: Any = None, tensor: str = tensor) -> Any:
            for place in (items[model], shared):
                if name in place and setting(place[name], tensor) is not None:
                    return setting(place[name], tensor)
            return default

        def common(name: str, default: Any, tensor: str = tensor) -> Any:
            return setting(shared[name], tensor) if name in shared else default

        result[tensor] = merge_one(config["merge_method"], weights, list(items), base, own, common, tie)
    return result


def merge_one(
    method: str, weights: dict[str, Tensor], models: list[str], base: str | None, own, common, tie: float
):
    if method == "linear":
        total = sum(own("weight", m) * weights[m] for m in models)
        return total / sum(own("weight", m) for m in models) if common("normalize", True) else total
    start = weights[base]
    others = [m for m in models if m != base]
    if method == "slerp":
        end, t = weights[others[0]], common("t", None)
        cosine = float((start * end).sum() / (start.norm() * end.norm()))
        if abs(cosine) > 0.9995:
            return (1 - t) * start + t * end
        angle = math.acos(cosine)
        return (math.sin((1 - t) * angle) * start + math.sin(t * angle) * end) / math.sin(angle)
    deltas = torch.stack([weights[m] - start for m in others])
    if method == "model_stock":
        rows = len(start) if common("filter_wise", False) and start.ndim > 1 else 1
        unit = deltas.reshape(len(others), rows, -1)
        unit = unit / unit.norm(dim=2, keepdim=True)
        k = len(others)
        pairs = [(unit[i] * unit[j]).sum(1) for i in range(k) for j in range(i + 1, k)]
        cosine = sum(pairs) / len(pairs)
        ratio = k * cosine / (1 + (k - 1) * cosine)
        return start + (ratio[:, None] * deltas.mean(0).reshape(rows, -1)).reshape(start.shape)
    for row, model in enumerate(others):
        deltas[row] = sparsified(method, deltas[row], own, model, common("rescale", False))
    scales = torch.tensor([own("weight", m) for m in others], dtype=torch.float64)
    weighted = deltas * scales.reshape(-1, *[1] * start.ndim)
    normalise = common("normalize", method in ("ties", "della"))
    if method in ("task_arithmetic", "dare_linear", "breadcrumbs"):
        total = weighted.sum(0) / (scales.sum() if normalise else 1)
    else:
        total = weighted.sum(0)
        sign = torch.where(total >= 0, 1.0, -1.0).double()
        sign[total.abs() < 1e-6 * weighted.abs().sum(0)] = tie
        agrees = weighted.sign() == sign
        total = (weighted * agrees).sum(0)
        if normalise:
            present = (scales.reshape(-1, *[1] * start.ndim) * agrees).sum(0)
            total = total / torch.where(present == 0, 1, present)
    return start + common("lambda", 1.0) * total


def sparsified(method: str, delta: Tensor, own, model: str, rescale: bool) -> Tensor:
    count, density = delta.numel(), own("density", model, 1.0)
    kept = delta
    if method == "ties" and density < 1:
        kept = delta * top(delta, max(1, int(density * count)))
    elif method.startswith("breadcrumbs") and density < 1:
        stays = int(density * count)
        dropped = min(int(own("gamma", model, 0.01) * count), count - stays)
        kept = delta * (top(delta, dropped + stays) & ~top(delta, dropped))
    if rescale and kept.abs().sum() > 0:
        kept = kept * (delta.abs().sum() / kept.abs().sum())
    return kept


# --- parity


def roundings(ours: Tensor, theirs: Tensor, dtype: str) -> Tensor:
    """How many times the dtype's relative precision two tensors differ; absolute below 0.05."""
    size = theirs.double().abs().clamp_min(0.05) * torch.finfo(golden.DTYPES[dtype]).eps
    return (ours.double() - theirs.double()).abs() / size


@pytest.mark.parametrize("name", golden.CONFIGURATIONS)
def test_the_merge_is_the_definition(name: str, folder: Path, dtype: str, monkeypatch) -> None:
    config = golden.configuration(name)
    ours, wanted = merged(folder, config, monkeypatch), definition(config, dtype)
    # Which sign an exact tie gets in float32 is a matter of the processor.
    other = definition(config, dtype, -1.0)
    assert set(ours) == set(wanted)
    # One rounding to the dtype is half an eps; float32 adds that of its own arithmetic.
    allowed = 0.51 if dtype == "bfloat16" else 8
    for tensor in wanted:
        assert str(ours[tensor].dtype) == f"torch.{dtype}"
        off = [roundings(ours[tensor], each[tensor], dtype) for each in (wanted, other)]
        assert torch.minimum(*off).max() <= allowed, tensor


@pytest.mark.parametrize("name", golden.CONFIGURATIONS)
def test_the_merge_is_mergekits(name: str, folder: Path, dtype: str, monkeypatch) -> None:
    config = golden.configuration(name)
    ours, wanted = merged(folder, config, monkeypatch), definition(config, dtype)
    distances, ours_off, theirs_off = [], 0.0, 0.0
    for tensor in golden.KEPT:
        data = base64.b64decode(RESULTS[name][dtype][tensor])
        theirs = torch.frombuffer(bytearray(data), dtype=golden.DTYPES[dtype]).reshape(ours[tensor].shape)
        distances.append(roundings(ours[tensor], theirs, dtype).reshape(-1))
        ours_off += float((ours[tensor].double() - wanted[tensor]).abs().sum())
        theirs_off += float((theirs.double() - wanted[tensor]).abs().sum())
    distance = torch.cat(distances)
    if dtype == "float32":
        assert distance.max() <= 8
    else:  # its arithmetic is in bfloat16: each step rounds, ranks and signs are those of rounded numbers
        assert (distance > 2).double().mean() <= 0.04
        assert ours_off <= theirs_off * (1 + 1e-9)


def test_a_linear_merge_does_not_depend_on_which_model_is_first(
    folder: Path, dtype: str, monkeypatch
) -> None:
    for name in ("linear", "linear_sum"):
        config = golden.configuration(name)
        first = merged(folder, config, monkeypatch)
        config["models"].reverse()
        for tensor, values in merged(folder, config, monkeypatch).items():
            assert roundings(values, first[tensor], dtype).max() <= (1 if dtype == "bfloat16" else 4)


@pytest.mark.parametrize("method", golden.RANDOM)
def test_what_is_random_keeps_the_statistics(method: str, folder: Path, dtype: str, monkeypatch) -> None:
    """A share of `density` stays, and each tensor keeps the L1 norm of its task vector, as in mergekit."""
    config = {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": "a"}],
        "parameters": {"density": 0.4, "weight": 0.5, "normalize": False}
        | ({"epsilon": 0.2} if "della" in method else {}),
        "dtype": "float64",
    }
    ours = merged(folder, config, monkeypatch)
    base = golden.state("base", golden.DTYPES[dtype])
    expert = golden.state("a", golden.DTYPES[dtype])
    kept = total = 0
    for name, values in ours.items():
        delta, change = expert[name].double() - base[name].double(), values - base[name].double()
        kept, total = kept + int((change != 0).sum()), total + int((delta != 0).sum())
        if change.any():
            assert float(change.abs().sum() / delta.abs().sum()) == pytest.approx(0.5, rel=1e-4)
            ratio = (change / delta)[change != 0]
            assert float(ratio.max() / ratio.min()) == pytest.approx(1, rel=1e-2)
    assert abs(kept / total - 0.4) < 4 * math.sqrt(0.4 * 0.6 / total)


# --- translation

TWO = [{"model": "org/a"}, {"model": "org/b"}]


def ties(**changes: Any) -> dict[str, Any]:
    parameters = {"weight": 1.0, "density": 0.5}
    return {
        "merge_method": "ties",
        "base_model": "org/base",
        "models": TWO,
        "parameters": parameters,
    } | changes


def test_what_makes_a_file_one_of_mergekits() -> None:
    assert is_mergekit(ties()) and is_mergekit({"slices": []}) and is_mergekit({"experts": [{}]})
    assert not is_mergekit({"base": "base", "experts": {"a": "a"}, "method": "ties"})


def test_a_list_of_experts_beside_a_base_is_a_recipe_gone_wrong(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("base: base\nexperts: [a, b]\nmethod: ties\n")
    with pytest.raises(UsageError, match=r"experts.*NAME: PATH") as caught:
        load_recipe(path)
    assert "mergekit" not in str(caught.value)


def test_names_dtype_scale_and_paths() -> None:
    models = [
        {"model": "one/ckpt"},
        {"model": "two/ckpt"},
        {"model": "org/m@v1.0"},
        {"model": "org/base+lora"},
    ]
    recipe, _ = translate(ties(models=models, dtype="bfloat16", out_dtype="torch.float16"), "x.yaml")
    paths = {name: expert["path"] for name, expert in recipe["experts"].items()}
    assert paths == {"ckpt": "one/ckpt", "ckpt-2": "two/ckpt", "m": "org/m@v1.0", "lora": "lora"}
    assert (recipe["base"], recipe["dtype"], recipe["scale"]) == ("org/base", "float16", 1.0)
    assert recipe["heads"] == []


def test_numbers_written_as_text_and_filters_with_wildcards_in_them() -> None:
    filtered = [{"filter": "a[0]*", "value": "1e-1"}, {"value": [1, 2]}]
    recipe, _ = translate(ties(parameters={"weight": "1e-3", "density": filtered}), "x.yaml")
    assert recipe["experts"]["a"]["weight"] == 0.001
    rules = recipe["method"][0]["ties"]["density"]["a"]
    assert rules[0] == {"match": "*a[[]0][*]*", "value": 0.1}
    assert rules[1]["value"] == [{"match": "*.[0-9]*.*", "value": [1.0, 2.0]}, {"value": 1.0}]


def test_notes_say_what_was_left_aside() -> None:
    parameters = {"weight": 1, "int8_mask": True, "gamma": 0.1}
    _, notes = translate(ties(parameters=parameters, dtype="bfloat16"), "x.yaml")
    assert [any(word in note for note in notes) for word in ("int8_mask", "gamma", "rounded once")] == [
        True
    ] * 3


def test_notes_and_recipe_reach_the_record(folder: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(folder)
    path = tmp_path / "elsewhere.yaml"
    config = golden.configuration("ties")
    path.write_text(yaml.safe_dump(config))
    recipe = load_recipe(path, {"out": str(tmp_path / "merged")})
    result = execute(prepare_recipe(recipe), out=recipe.out)
    assert any("int8_mask" in note for note in result.record["plan"]["notes"])
    assert (tmp_path / "merged" / "run.json").exists()


@pytest.mark.parametrize(
    ("source", "tokenizer"),
    [("base", "base"), ("union", "union"), ("org/base", "base"), ("org/b", "b")],
)
def test_tokenizer(source: str, tokenizer: str) -> None:
    for given in ({"tokenizer_source": source}, {"tokenizer": {"source": source}}):
        recipe, _ = translate(ties(**given), "x.yaml")
        assert (recipe["tokenizer"], recipe["vocabulary"]) == (tokenizer, "shared")
    assert "tokenizer" not in translate(ties(), "x.yaml")[0]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"merge_method": "passthrough", "slices": [{"sources": []}]}, "'slices'.*layers.*mergekit"),
    ({"experts": [{"source_model": "a"}], "gate_mode": "hidden"}, "mergekit-moe"),
    (ties(modules={"text": {}}), "'modules'.*models: kind"),
    (ties(merge_method="tiess"), "did you mean ties"),
    (ties(merge_method="sce"), "'sce' is not translated.*translated are: linear"),
    (ties(tokenizer={"tokens": {"<x>": {}}}), "tokenizer: tokens.*transformers"),
    (ties(tokenizer={"pad_to_multiple_of": 64}), "pad_to_multiple_of"),
    (ties(tokenizer_source="org/other"), "org/other is neither"),
    (ties(chat_template="chatml"), "chat_template.*template"),
    (ties(base_model=None), "ties needs a base_model"),
    (ties(parameters={"density": 0.5}), "parameters of org/a: 'weight' is missing"),
    (ties(parameters={"weight": 1, "densty": 0.5}), "'densty', did you mean 'density'"),
    (ties(parameters={"weight": "much"}), "weight.*must be a number"),
    (ties(parameters={"weight": [1, {"value": 2}]}), "mixes numbers and filters"),
    (ties(parameters={"weight": 1, "normalize": [True, False]}), "normalize.*true or false"),
    (ties(paramaters={}), "unknown key 'paramaters', did you mean 'parameters'"),
    (ties(dtype="int8"), "dtype"),
    (ties(models=[{"model": "org/a"}, {"model": "org/a"}]), "listed twice"),
    (ties(models=[{"model": "org/other+lora"}]), "adapter.*base_model"),
    (ties(models=[]), "'models' must list"),
    (ties(models=["org/base"]), "no model besides"),
    (ties(merge_method="slerp", parameters={"t": 0.5}), "slerp merges two models.*3"),
    (ties(merge_method="slerp", models=[{"model": "org/a"}], parameters={}), "needs the parameter 't'"),
    (ties(merge_method="model_stock", models=[{"model": "org/a"}]), "at least two"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused_by_name(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UsageError, match=message) as caught:
        load_recipe(path)
    assert "config.yaml is a mergekit configuration" in str(caught.value)


def test_every_translated_method_is_tried() -> None:
    tried = {golden.configuration(name)["merge_method"] for name in golden.CONFIGURATIONS} | set(
        golden.RANDOM
    )
    assert tried == set(PARAMETERS)
