"""The two passes: every kind of stack against plain arithmetic."""

import copy

import pytest
import torch

from adamerging import UsageError
from adamerging.adaptation.adapt import adapt
from adamerging.adaptation.body import Body
from adamerging.adaptation.coefficients import layout
from adamerging.adaptation.scoring import average_into
from adamerging.adaptation.session import open_session
from adamerging.adaptation.store import VectorStore
from adamerging.plan import make_plan
from adamerging.recipe import Settings
from adamerging.run import merge, prepare
from adamerging.stream import Pipeline, Workers
from adamerging.task_vectors import TaskVectors
from adamerging.weights import Weights, open_weights
from adamerging.weights.source import Factors
from adaptation.toy import make_experts, make_tasks


def make_low_rank(base, seed):
    """Weights that change the matrices of a base by factors."""
    torch.manual_seed(seed)
    factors = {}
    for name, spec in base.specs.items():
        if len(spec.shape) >= 2:
            rows, columns = spec.shape[0], spec.numel // spec.shape[0]
            left, right = torch.randn(rows, 2).double(), torch.randn(2, columns).double()
            factors[name] = Factors(left, right, 0.25)
    specs = {name: base.specs[name] for name in factors}
    readers = {name: (lambda f=found: f) for name, found in factors.items()}
    return Weights(f"adapter{seed}", specs, lambda name: pytest.fail(name), low_rank=readers)


def test_vectors_are_opened_before_the_first_piece_is_read(monkeypatch):
    # Views opened between pieces stay where a freed piece was: with many experts the heap grew by that.
    base = open_weights({"a": torch.zeros(4, 4), "b": torch.zeros(4)})
    experts = {name: open_weights({"a": torch.ones(4, 4), "b": torch.ones(4)}) for name in "xy"}
    calls = []

    def note(name):
        original = getattr(TaskVectors, name)

        def noted(self, *given):
            calls.append(name)
            return original(self, *given)

        monkeypatch.setattr(TaskVectors, name, noted)

    note("open")
    note("read")
    with Workers(2) as workers:
        store = VectorStore(TaskVectors(make_plan(base, experts), base, experts, chunk_values=8), workers)
        store.scan()
    assert calls == ["open"] * 2 + ["read"] * 5
    assert [entry.name for entry in store.entries()] == ["a", "b"]


@pytest.mark.parametrize("granularity", ["task", "tensor", "row"])
def test_factors_contract_as_dense_vectors_do(granularity):
    torch.manual_seed(0)
    state = {
        "a": torch.randn(6, 4).double(),
        "b.0.w": torch.randn(3, 2, 5).double(),
        "c": torch.randn(7).double(),
    }
    base = open_weights(state)
    adapters = {name: make_low_rank(base, seed) for seed, name in enumerate("xyz")}
    dense = {
        name: open_weights(
            {
                key: value + ((f := w.factors(key)).scale * f.left @ f.right).reshape(value.shape)
                if key in w.low_rank
                else value
                for key, value in state.items()
            }
        )
        for name, w in adapters.items()
    }
    gradients = {name: torch.randn_like(value) for name, value in state.items()}
    found, merged = [], []
    with Workers(1) as workers:
        for experts in (adapters, dense):
            vectors = TaskVectors(make_plan(base, experts), base, experts, chunk_values=24)
            store = VectorStore(vectors, workers)
            store.scan()
            assert [entry.name for entry in store.entries()] == ["a", "b.0.w"]
            where = layout(granularity, vectors.tasks, store.entries(), vectors.places)
            torch.manual_seed(1)
            values = torch.randn(3, where.width).double()
            target = {name: torch.empty_like(value) for name, value in state.items()}
            store.materialise(target, values, where)
            merged.append(target)
            if experts is adapters:
                assert all(store._factored(entry) for entry in store.entries())
            found.append(store.pull_back(gradients, where))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)
    for name in ("a", "b.0.w"):
        torch.testing.assert_close(merged[0][name], merged[1][name], rtol=0, atol=1e-9)


def opened(base, experts, workers, settings=None, **fields):
    settings = {"preset": "paper", "steps": 1, **(settings or {}), **fields}
    return open_session(base, experts, make_tasks(experts), settings, Settings(), workers, lambda _: None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))


def test_a_start_joins_the_experts_and_is_the_merge_itself():
    base, experts = make_experts()
    with Workers(1) as workers:
        session = opened(base, experts, workers, start="tsv_m", initial=0.0, clamp="none", granularity="row")
        assert session.labels == ("combined", *experts)
        assert session.where.rows == session.labels
        values = session.parametrisation.first()
        session.parametrisation.materialise(session.body.tensors, values)
    wanted = merge(base, experts, method="tsv_m").body
    for name, tensor in session.body.tensors.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-12, msg=name)


def test_a_start_with_options_and_a_chain():
    base, experts = make_experts()
    start = [{"dare": {"density": 0.5, "seed": 3}}, {"ties": {"density": 0.6}}]
    with Workers(1) as workers:
        session = opened(base, experts, workers, start=start, initial=0.0)
        values = session.parametrisation.first()
        session.parametrisation.materialise(session.body.tensors, values)
    wanted = merge(base, experts, method=start).body
    for name, tensor in session.body.tensors.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-12, msg=name)


def ties_vectors(base, experts, density=0.2):
    """Trim over the whole vector of a task, elect signs, keep what agrees: float64, from the paper."""
    names = [n for n, p in base.named_parameters() if not n.startswith("head")]
    own = dict(base.named_parameters())
    flat = torch.stack(
        [
            torch.cat([(dict(e.named_parameters())[n] - own[n]).detach().reshape(-1) for n in names])
            for e in experts.values()
        ]
    )
    for row in flat:
        keep = int(density * len(row))
        row[row.abs() < row.abs().sort(descending=True).values[keep - 1]] = 0
    elected = flat.sum(0).sign()
    majority = elected.sum().sign()
    elected[elected == 0] = majority
    flat = torch.where(flat.sign() == elected, flat, torch.zeros_like(flat))
    parts = flat.split([own[n].numel() for n in names], 1)
    return {name: part for name, part in zip(names, parts, strict=True)}


def test_plus_plus_learns_on_the_trimmed_and_elected_vectors():
    base, experts = make_experts()
    with Workers(1) as workers:
        session = opened(base, experts, workers, {"preset": "paper++"})
        wanted = ties_vectors(base, experts)
        assert session.labels == tuple(experts)
        for entry in session.parametrisation.entries():
            _, stack = session.parametrisation.store.read(entry, 0, entry.spec.numel)
            torch.testing.assert_close(stack, wanted[entry.name], rtol=0, atol=1e-12, msg=entry.name)


def test_vectors_that_are_one_vector_are_refused():
    base, experts = make_experts()
    with Workers(1) as workers, pytest.raises(UsageError, match="use it as 'start'"):
        opened(base, experts, workers, vectors="iso_c")


METHODS = [
    "tsv_m",
    "iso_c",
    "iso_cts",
    "cart",
    "pcb",
    "ace",
    "wudi",
    [{"wudi": {"solver": "adam", "steps": 3}}],
]


@pytest.mark.parametrize("start", METHODS, ids=str)
def test_every_data_free_merge_can_be_started_from(start):
    base, experts = make_experts()
    with Workers(1) as workers:
        session = opened(base, experts, workers, start=start, initial=0.0, clamp="none")
        values = session.parametrisation.first()
        session.parametrisation.materialise(session.body.tensors, values)
    wanted = merge(base, experts, method=start).body
    for name, tensor in session.body.tensors.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("method", ["tsv_m", "cart", "pcb", "wudi"])
def test_coefficients_of_one_on_what_a_method_makes_of_each_expert_are_its_merge(method):
    base, experts = make_experts()
    with Workers(1) as workers:
        session = opened(base, experts, workers, vectors=method, initial=1.0, clamp="none")
        assert session.labels == tuple(experts)
        values = session.parametrisation.first()
        session.parametrisation.materialise(session.body.tensors, values)
    wanted = merge(base, experts, method=method).body
    for name, tensor in session.body.tensors.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("settings", [{}, {"start": "task_arithmetic"}, {"vectors": "ties"}])
def test_kept_in_memory_is_streamed(settings):
    base, experts = make_experts()
    results = [
        adapt(
            base,
            experts,
            make_tasks(experts),
            preset="paper",
            steps=4,
            budget=budget,
            granularity="row",
            **settings,
        )
        for budget in (0.0, 1.0)
    ]
    assert torch.equal(results[0].values, results[1].values)
    for name, tensor in results[0].body.tensors.items():
        assert torch.equal(tensor, results[1].body.tensors[name])


@pytest.mark.parametrize("settings", [{"start": "tsv_m"}, {"vectors": "ties"}])
def test_a_transform_is_taken_from_the_cache(settings, monkeypatch):
    base, experts = make_experts()
    with Workers(1) as workers:
        first = opened(base, experts, workers, settings)
        monkeypatch.setattr(Pipeline, "chunks", lambda *_: pytest.fail("computed twice"))
        second = opened(base, experts, workers, settings)
        assert first.where == second.where
        for name, rows in first.parametrisation.store.cached.items():
            assert torch.equal(rows, second.parametrisation.store.cached[name])


def test_the_working_body_is_neither_the_last_expert_nor_the_base_statistics():
    base, experts = make_experts()
    with torch.no_grad():
        for number, expert in enumerate(experts.values(), 1):
            expert.norm.running_mean.fill_(number)
    with Workers(1) as workers:
        settings = Settings(exclude=["up.*"])
        session = open_session(
            base, experts, make_tasks(experts), {"preset": "paper", "batchnorm": "keep"}, settings, workers,
            lambda _: None,
        )  # fmt: skip
    assert torch.equal(session.body.tensors["up.weight"], base.up.weight)
    assert session.body.tensors["norm.running_mean"].tolist() == [2.0] * 4


def test_tied_weights_stay_tied():
    base, experts = make_experts(tied=True)
    result = adapt(base, experts, make_tasks(experts), preset="paper", steps=3)
    module = result.learners[0].module
    assert module.up.weight is module.down.weight
    assert "down.weight" not in result.body.tensors
    assert {name for name, _, _ in result.layout.groups} >= {"up.weight", "stem.weight"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bases_of_other_dtypes(dtype, tmp_path):
    base, experts = make_experts(dtype=dtype, batchnorm=False)
    tasks = make_tasks({n: copy.deepcopy(e).float() for n, e in experts.items()}, dtype=torch.float32)
    if dtype == torch.float64:
        tasks = make_tasks(experts)
    result = adapt(base, experts, tasks, preset="paper", steps=4, lr=0.05, out=tmp_path / "m")
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(tensor.dtype == inner for tensor in result.body.tensors.values())
    assert result.values.dtype == inner
    written = open_weights(tmp_path / "m")
    for name, tensor in result.body.tensors.items():
        assert torch.equal(written.read(name), tensor.detach().to(dtype)), name


def test_experts_may_be_one_and_the_base_an_expert():
    base, experts = make_experts()
    same = {"task0": experts["task0"], "task1": copy.deepcopy(base)}
    tasks = make_tasks(same)
    result = adapt(base, same, tasks, preset="paper", steps=3)
    assert not any("all coefficients" in text for text in result.warnings)
    one = {"task0": experts["task0"]}
    for preset in ("paper", "recommended"):
        alone = adapt(base, one, tasks[:1], preset=preset, steps=3)
        assert alone.layout.rows[-1] == "task0"


def test_the_average_is_right_before_anything_was_scanned():
    base, experts = make_experts(3, batchnorm=False)
    prepared = prepare(base, experts, Settings(heads=["head.*"]))
    body = Body(prepared.vectors, torch.device("cpu"))
    store = VectorStore(prepared.vectors, Workers(1))
    everything = [entry.name for entry in store.entries()]
    with Workers(1) as workers:
        average_into(body, prepared.vectors, workers)
    for name in everything:
        stored = torch.stack([expert.get_parameter(name).detach() for expert in experts.values()])
        assert torch.allclose(body.tensors[name].detach(), stored.mean(0), atol=1e-6)


def test_what_was_seen_is_known_of_some_of_the_experts_too():
    base, experts = make_experts(2, batchnorm=False)
    name = next(name for name, _ in base.named_parameters() if not name.startswith("head"))
    changed = copy.deepcopy(base)
    with torch.no_grad():
        changed.get_parameter(name).add_(1.0)
    prepared = prepare(
        base, {"same": copy.deepcopy(base), "one": changed, **experts}, Settings(heads=["head.*"])
    )
    vectors = prepared.vectors
    with Workers(1) as workers:
        before = len(VectorStore(vectors.like(["same", "one"]), workers).entries())
        VectorStore(vectors, workers).scan()
        after = VectorStore(vectors.like(["same", "one"]), workers).entries()
    assert before > 1 and [entry.name for entry in after] == [name]
    assert vectors.like(weights=0.5).weights == 0.5 and vectors.like().tasks == vectors.tasks


def test_a_base_that_is_stored_channels_last_can_be_written_piece_by_piece():
    torch.manual_seed(0)
    base = {"conv.weight": torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)}
    experts = {name: {"conv.weight": base["conv.weight"] + torch.randn(6, 4, 3, 3)} for name in "ab"}
    prepared = prepare(base, experts, Settings())
    assert not prepared.vectors.base.read("conv.weight").is_contiguous()
    body = Body(prepared.vectors, torch.device("cpu"))
    with Workers(1) as workers:
        average_into(body, prepared.vectors, workers)
    mean = (experts["a"]["conv.weight"] + experts["b"]["conv.weight"]) / 2
    assert torch.allclose(body.tensors["conv.weight"], mean, atol=1e-6)
    body.load_expert(prepared.vectors, "b")
    assert torch.equal(body.tensors["conv.weight"], experts["b"]["conv.weight"])
