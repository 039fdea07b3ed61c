"""The model that WEMoE makes, against its forward pass written out for one sample in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adamerging.adaptation.session import begin
from adamerging.adaptation.settings import resolve
from adamerging.errors import UsageError
from adamerging.recipe import Settings
from adamerging.routing.linear import RoutedLinear
from adamerging.routing.session import RoutedSession, route
from adamerging.run import prepare
from adamerging.stream import Workers
from routing.small import (
    bert_family,
    image_tasks,
    merged_bert,
    reference_bert,
    reference_vit,
    text_tasks,
    vit_family,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as found:
        yield found


def opened(workers, base, experts, tasks, **fields) -> RoutedSession:
    settings = resolve({"preset": "wemoe", **fields})
    session = begin(
        prepare(base, experts, Settings(allow=["unrelated"])), tasks, settings, workers, lambda _: None
    )
    routed = route(session)
    routed.start()
    return routed


def shake(routed: RoutedSession, by: float = 0.3) -> list[dict[str, Tensor]]:
    """Give the routers random values, which are returned."""
    chance = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in routed.routes.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=chance, dtype=parameter.dtype))
    return [{n: t.clone() for n, t in router.state_dict().items()} for router in routed.routes.routers]


def logits_of(routed: RoutedSession, number: int, samples: list[int]) -> Tensor:
    learner = routed.session.learners[number]
    with torch.no_grad():
        return learner.task.forward(learner.module, learner.inputs(samples, torch.device("cpu")))


def test_a_bert_is_what_the_definition_says_for_every_text_of_a_padded_batch(workers) -> None:
    base, experts = bert_family()
    routed = opened(workers, base, experts, text_tasks(experts))
    assert [site.name for site in routed.routes.sites] == ["encoder.layer.0", "encoder.layer.1"]
    assert [w for w, _ in routed.routes.sites[0].maps] == [
        "encoder.layer.0.intermediate.dense.weight",
        "encoder.layer.0.output.dense.weight",
    ]
    routers = shake(routed)
    for number, learner in enumerate(routed.session.learners[:2]):
        found = logits_of(routed, number, list(range(5)))
        for row, logits in enumerate(found):
            text = learner.task.adapt.inputs[row]
            with torch.no_grad():
                wanted = reference_bert(base, experts, learner.task.name, routers, text)
            torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-10)


def test_a_vit_is_what_the_definition_says(workers) -> None:
    base, experts = vit_family()
    routed = opened(workers, base, experts, image_tasks(experts))
    assert len(routed.routes.sites) == 2
    routers = shake(routed)
    for number, learner in enumerate(routed.session.learners):
        found = logits_of(routed, number, list(range(5)))
        for row, logits in enumerate(found):
            image = learner.task.adapt.inputs[row]
            with torch.no_grad():
                wanted = reference_vit(base, experts, learner.task.name, routers, image)
            torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-10)


def constant(routed: RoutedSession, gates: list[float]) -> None:
    with torch.no_grad():
        for router in routed.routes.routers:
            router.second.weight.zero_()
            router.second.bias.copy_(torch.tensor(gates))


def test_with_the_same_gate_for_all_it_is_task_arithmetic(workers) -> None:
    base, experts = bert_family()
    routed = opened(workers, base, experts, text_tasks(experts), initial=0.25)
    constant(routed, [0.25] * 3)
    whole = copy.deepcopy(experts["two"])
    whole.bert.load_state_dict(merged_bert(base, experts, 0.25).state_dict())
    learner = routed.session.learners[1]
    with torch.no_grad():
        wanted = whole(**learner.inputs(range(8), torch.device("cpu"))).logits
    torch.testing.assert_close(logits_of(routed, 1, list(range(8))), wanted, rtol=0, atol=1e-12)
    routed.routes.flow.active = False
    torch.testing.assert_close(logits_of(routed, 1, list(range(8))), wanted, rtol=0, atol=1e-12)


def test_with_one_gate_open_the_mlp_is_the_experts(workers) -> None:
    base, experts = bert_family()
    routed = opened(workers, base, experts, text_tasks(experts))
    constant(routed, [0.0, 1.0, 0.0])
    whole = copy.deepcopy(experts["two"])
    merged, own = merged_bert(base, experts, 0.3).state_dict(), experts["two"].bert.state_dict()
    for name in merged:
        if ".intermediate.dense." in name or (".output.dense." in name and "attention" not in name):
            merged[name] = own[name]
    whole.bert.load_state_dict(merged)
    learner = routed.session.learners[1]
    with torch.no_grad():
        wanted = whole(**learner.inputs(range(8), torch.device("cpu"))).logits
    torch.testing.assert_close(logits_of(routed, 1, list(range(8))), wanted, rtol=0, atol=1e-12)


def test_a_start_is_all_that_is_not_routed(workers) -> None:
    base, experts = bert_family()
    routed = opened(workers, base, experts, text_tasks(experts), start="average", initial=1 / 3)
    constant(routed, [1 / 3] * 3)
    whole = copy.deepcopy(experts["one"])
    whole.bert.load_state_dict(merged_bert(base, experts, 1 / 3).state_dict())
    learner = routed.session.learners[0]
    with torch.no_grad():
        wanted = whole(**learner.inputs(range(4), torch.device("cpu"))).logits
    torch.testing.assert_close(logits_of(routed, 0, list(range(4))), wanted, rtol=0, atol=1e-7)


def test_gates_start_where_the_paper_says(workers) -> None:
    base, experts = bert_family()
    routed = opened(workers, base, experts, text_tasks(experts))
    for router in routed.routes.routers:
        assert (router.first.in_features, router.first.out_features) == (16, 16)
        assert bool((router.second.bias == 0.3).all())
        assert not router.first.bias.any()
        assert 0.007 < float(router.first.weight.std()) < 0.013
    logits_of(routed, 0, [0, 1, 2])
    for gate in routed.routes.gates:
        assert gate.values.shape == (3, 3)
        torch.testing.assert_close(gate.values, torch.full((3, 3), 0.3).double(), rtol=0, atol=0.02)


def test_gradients_reach_the_routers_alone_and_are_right(workers) -> None:
    base, experts = bert_family()
    routed = opened(workers, base, experts, text_tasks(experts))
    shake(routed)
    parameters = routed.routes.parameters()
    for parameter in parameters:
        parameter.requires_grad_(True)
    learner = routed.session.learners[0]
    batch = learner.inputs(range(6), torch.device("cpu"))

    def loss() -> Tensor:
        return learner.task.forward(learner.module, batch).log_softmax(-1)[:, 0].sum()

    loss().backward()
    routed_names = {id(parameter) for parameter in parameters}
    others = [p for p in learner.module.parameters() if id(p) not in routed_names]
    assert others and all(p.grad is None for p in others)
    assert all(t.grad is None for t in routed.session.body.tensors.values())
    found = routed.session.parametrisation.pull_back({}, torch.empty(0))[0]
    assert all(p.grad is None for p in parameters)
    values = routed.session.parametrisation.first()
    chance = torch.Generator().manual_seed(1)
    for _ in range(3):
        way = torch.randn(values.shape, generator=chance, dtype=torch.float64)
        sides = []
        for step in (1e-5, -1e-5):
            routed.session.parametrisation.materialise({}, values + step * way)
            sides.append(float(loss().detach()))
        slope = (sides[0] - sides[1]) / 2e-5
        assert slope == pytest.approx(float(found @ way[0]), rel=1e-5, abs=1e-8)


def test_in_lower_precision_it_is_nearly_the_same_and_learns(workers) -> None:
    base, experts = bert_family()
    base, experts = base.float(), {name: expert.float() for name, expert in experts.items()}
    routed = opened(workers, base, experts, text_tasks(experts))
    shake(routed)
    wanted = logits_of(routed, 0, list(range(6)))
    for parameter in routed.routes.parameters():
        parameter.requires_grad_(True)
    learner = routed.session.learners[0]
    with torch.autocast("cpu", torch.bfloat16):
        inputs = learner.inputs(range(6), torch.device("cpu"))
        found = learner.task.forward(learner.module, inputs)
        found.float().log_softmax(-1)[:, 0].sum().backward()
    torch.testing.assert_close(found.detach().float(), wanted, rtol=0, atol=0.1)
    gradient = routed.session.parametrisation.pull_back({}, torch.empty(0))
    assert bool(gradient.isfinite().all())
    assert bool(gradient.any())


def test_taken_out_the_modules_are_as_before(workers) -> None:
    base, experts = bert_family()
    routed = opened(workers, base, experts, text_tasks(experts))
    module = routed.session.learners[0].module
    assert sum(isinstance(part, RoutedLinear) for part in module.modules()) == 4
    routed.remove()
    assert not any(isinstance(part, RoutedLinear) for part in module.modules())
    assert set(module.state_dict()) == set(experts["one"].state_dict())


def test_patterns_choose_what_is_routed(workers) -> None:
    base, experts = bert_family()
    options = {"mlp": ["*.1.attention.*.query.weight", "*.1.output.dense.weight"], "hidden": 5}
    routed = opened(workers, base, experts, text_tasks(experts), route_options=options)
    (site,) = routed.routes.sites
    assert [w for w, _ in site.maps] == [
        "encoder.layer.1.attention.self.query.weight",
        "encoder.layer.1.output.dense.weight",
    ]
    assert routed.routes.routers[0].first.out_features == 5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"route_options": {"mlp": ["*.nothing.*"]}}, "'*.nothing.*' fits no weight of a linear map"),
        ({"route_options": {"mpl": ["*"]}}, "did you mean 'mlp'?"),
        ({"route_options": {"hidden": 0}}, "hidden"),
        ({"granularity": "row"}, "granularity is for coefficients"),
    ],
)
def test_what_is_refused(workers, fields, said) -> None:
    base, experts = bert_family()
    with pytest.raises(UsageError) as refused:
        opened(workers, base, experts, text_tasks(experts), **fields)
    assert said in str(refused.value)


def test_a_model_without_an_mlp_is_refused(workers) -> None:
    from adaptation.toy import make_experts, make_tasks

    base, experts = make_experts()
    with pytest.raises(UsageError, match="no MLP was found to route"):
        opened(workers, base, experts, make_tasks(experts))
    options = {"mlp": ["blocks.*"]}
    routed = opened(workers, base, experts, make_tasks(experts), route_options=options)
    assert [site.name for site in routed.routes.sites] == ["blocks.0", "blocks.1"]
