"""Twin-Merging, against its definition in float64, and through files and the command line."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adamerging as am
from adamerging.adaptation.session import begin
from adamerging.adaptation.settings import resolve
from adamerging.recipe import Settings
from adamerging.routing.session import RoutedSession, route
from adamerging.routing.twin import compress
from adamerging.run import prepare
from adamerging.stream import Workers
from compared import CLASSES, save_family, save_recipe
from routing.small import bert_family, body_of, merged_bert, text_tasks

QUICK = {"preset": "twin", "steps": 60, "batch_size": 8, "lr": 0.01, "route_options": {"rank": 0.5}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as found:
        yield found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("family"))


def opened(workers, base, experts, **options) -> RoutedSession:
    settings = resolve({"preset": "twin", "precision": "float32", "route_options": options})
    prepared = prepare(base, experts, Settings(allow=["unrelated"]))
    session = begin(prepared, text_tasks(experts), settings, workers, lambda _: None, ask=False)
    return route(session)


def routed_map(name: str) -> bool:
    return name.startswith("encoder.layer.") and "LayerNorm" not in name


def cut(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def reference(base, experts, task, router, ids, fraction):
    """Logits and weights of one text: θ* + Σ_t w_t SVD(θ_t − θ*) in every linear map of the blocks."""
    shared = merged_bert(base, experts, 0.3)
    hidden = shared(input_ids=ids[None]).last_hidden_state[0]
    mean = sum(hidden) / len(hidden)
    mean = (mean - mean.mean()) / (mean.var(unbiased=False) + 1e-5).sqrt()
    inner = (router["first.weight"] @ mean + router["first.bias"]).clamp_min(0)
    scores = router["second.weight"] @ inner + router["second.bias"]
    weights = scores.exp() / scores.exp().sum()
    mixed = copy.deepcopy(shared)
    own = body_of(mixed)
    for name, tensor in own.items():
        if not routed_map(name):
            continue
        for weight, expert in zip(weights, experts.values(), strict=True):
            change = body_of(expert)[name] - body_of(shared)[name]
            if change.ndim == 2:
                change = cut(change, max(1, round(fraction * min(change.shape))))
            tensor = tensor + weight * change
        own[name] = tensor
    mixed.load_state_dict(own)
    output = mixed(input_ids=ids[None])
    return experts[task].classifier(output.pooler_output)[0], weights


@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_a_bert_is_what_the_definition_says_for_every_text_of_a_padded_batch(workers, fraction) -> None:
    base, experts = bert_family()
    routed = opened(workers, base, experts, rank=fraction)
    chance = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in routed.routes.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=chance, dtype=parameter.dtype))
    router = routed.routes.router.state_dict()
    assert sum(len(site.maps) for site in routed.routes.sites) == 2 * 6
    for learner in routed.session.learners[1:2]:
        with torch.no_grad():
            found = learner.task.forward(learner.module, learner.inputs(range(4), torch.device("cpu")))
            for row, logits in enumerate(found):
                text = learner.task.adapt.inputs[row]
                wanted, weights = reference(base, experts, learner.task.name, router, text, fraction)
                torch.testing.assert_close(routed.routes.gates[0].values[row], weights, rtol=0, atol=1e-10)
                torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-7)


def test_compression_keeps_the_leading_directions() -> None:
    matrices = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices[2] = 0
    left, right = compress(matrices, 0.5)
    assert (left.shape, right.shape) == ((3, 6, 3), (3, 3, 9))
    for number, matrix in enumerate(matrices):
        torch.testing.assert_close(left[number] @ right[number], cut(matrix, 3), rtol=0, atol=1e-8)


@pytest.fixture(scope="module")
def folder(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by a run on tasks whose texts can be told apart by their words."""
    root = tmp_path_factory.mktemp("twin")
    tasks = []
    for number, name in enumerate(CLASSES):
        words = [f"word{10 * number + n}" for n in range(10)]
        texts = [" ".join(words[(i + j) % 10] for j in range(3 + i % 4)) for i in range(30)]
        tasks.append(am.text_task(name, adapt=texts))
    experts = {name: models / name for name in CLASSES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAMERGING_CACHE", str(root / "cache"))
        result = am.adapt(models / "base", experts, tasks, out=root / "merged", **{**QUICK, "steps": 150})
    torch.save(
        {
            learner.task.name: learner.task.forward(learner.module, learner.task.collate(TEXTS)).detach()
            for learner in result.learners
        },
        root / "logits.pt",
    )
    return root / "merged"


TEXTS = ["word1 word2 word3 word4", "word12 word13 word14 word15", "word22 word23 word24"]


def test_the_router_finds_whose_task_an_input_is_of(folder: Path) -> None:
    record = json.loads((folder / "run.json").read_text())
    assert record["method"] == "Twin-Merging"
    assert record["routing"]["domains"] > 0.8
    found = am.load(folder).route(TEXTS)
    assert [max(weights, key=weights.__getitem__) for weights in found] == list(CLASSES)
    assert all(sum(weights.values()) == pytest.approx(1, abs=1e-5) for weights in found)


def test_the_folder_opens_with_the_same_bits(folder: Path) -> None:
    wanted = torch.load(folder.parent / "logits.pt", weights_only=True)
    model = am.load(folder)
    for name in CLASSES:
        ready = model._get(name)
        with torch.no_grad():
            assert torch.equal(ready.module(**ready.task.collate(TEXTS)).logits, wanted[name])
        assert len(model.predict(name, TEXTS)) == 3
    copied = copy.deepcopy(am.load_module(folder, "topics"))
    with torch.no_grad():
        assert torch.equal(copied(**ready.task.collate(TEXTS)).logits, wanted["topics"])


def test_the_record_counts_what_is_stored(folder: Path) -> None:
    routing = json.loads((folder / "run.json").read_text())["routing"]
    files = [load_file(path) for path in (folder / "routing").rglob("*.safetensors")]
    assert len(files) == 4  # three experts and the router
    body = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    size = sum(tensor.numel() for tensors in files for tensor in tensors.values())
    assert routing["parameters"]["routed"] == size
    assert routing["parameters"]["times"] == round((body + size) / body, 3)


def test_the_command_line_learns_compares_and_serves(cli, models: Path, tmp_path: Path) -> None:
    path = save_recipe(tmp_path, models, adapt=QUICK, compare={"methods": [{"twin": {"adapt": QUICK}}]})
    dry = cli("merge", path, "--dry-run")
    assert dry.code == 0, dry.err
    assert "Would learn routers (twin)" in dry.out
    ended = cli("merge", path, "--out", tmp_path / "m")
    assert ended.code == 0, ended.err
    for word in ("the routers of 12 linear maps", "by whose task an input is of", "Accuracy"):
        assert word in ended.out
    compared = cli("compare", path, "--out", tmp_path / "c", "--no-report", "--json")
    assert compared.code == 0, compared.err
    (row,) = [row for row in json.loads(compared.out)["rows"] if row["label"] == "twin"]
    assert row["failed"] is None
    assert any(text.startswith("routes by input: 12 linear maps") for text in row["warnings"])
    data = {name: models / f"{name}_test.jsonl" for name in CLASSES}
    for mine, other in zip(row["scores"], am.evaluate(tmp_path / "m", data).scores, strict=True):
        assert mine["nll"] == pytest.approx(other.nll, abs=1e-5)
    refused = cli("export", tmp_path / "m", "--task", "topics", "--out", tmp_path / "whole")
    assert (refused.code, "routes by input" in refused.err) == (2, True)


def test_an_objective_has_no_say(cli, models: Path, tmp_path: Path) -> None:
    path = save_recipe(tmp_path, models, adapt={**QUICK, "objective": "entropy"}, compare=None)
    ended = cli("merge", path, "--out", tmp_path / "m")
    assert (ended.code, "objective has no say with route: twin" in ended.err) == (2, True), ended.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0.0}, "rank"),
        ({"rank": 2.0}, "rank"),
        ({"mlp": ["*"]}, "mlp"),
        ({"maps": ["*.nowhere.*"]}, "'*.nowhere.*' fits no weight of a linear map"),
    ],
)
def test_what_is_refused(cli, models: Path, tmp_path: Path, options, said: str) -> None:
    adapt = {**QUICK, "route_options": options}
    ended = cli("merge", save_recipe(tmp_path, models, adapt=adapt, compare=None), "--out", tmp_path / "m")
    assert (ended.code, said in ended.err, "Traceback" in ended.err) == (2, True, False), ended.err


def test_a_model_that_does_not_route_says_so(models: Path, tmp_path: Path) -> None:
    am.merge(models / "base", {name: models / name for name in CLASSES}, out=tmp_path / "m")
    with pytest.raises(am.UsageError, match="it does not route"):
        am.load(tmp_path / "m").route(["word1"])
