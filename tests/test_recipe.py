"""The recipe: what it takes, what it refuses, and how flags change it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adamerging import UsageError, load_recipe
from adamerging.finetuning import load_finetune_recipe
from adamerging.recipe import Recipe, Settings, make_recipe, override
from adamerging.validation import make

LEAST = {"base": "b", "experts": {"a": "x"}}


def load(tmp_path: Path, text: str, overrides: dict[str, Any] | None = None) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    return load_recipe(tmp_path / "recipe.yaml", overrides)


def test_the_least_recipe(tmp_path: Path) -> None:
    recipe = load(tmp_path, "base: org/base\nexperts: {a: org/a@v1}\n")
    assert recipe.base == "org/base"
    assert recipe.experts["a"].path == "org/a@v1"
    assert recipe.chain() == [("task_arithmetic", {})]
    assert recipe.weights_by_expert() == 1.0
    assert recipe.out is None


def test_every_field_is_described() -> None:
    assert all(field.description for field in Recipe.model_fields.values())


def test_the_docs_describe_every_key() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert [key for key in Recipe.model_fields if f"| `{key}` |" not in page] == []


@pytest.mark.parametrize(
    ("method", "options", "chain"),
    [
        ("ties", {}, [("ties", {})]),
        ("ties", {"density": 0.3}, [("ties", {"density": 0.3})]),
        (["dare", "ties"], {"density": 0.3}, [("dare", {}), ("ties", {"density": 0.3})]),
        ([{"dare": {"density": 0.1}}, {"ties": None}], {}, [("dare", {"density": 0.1}), ("ties", {})]),
        (
            [{"ties": {"density": 0.1, "scope": "tensor"}}],
            {"density": 0.2},
            [("ties", {"density": 0.2, "scope": "tensor"})],
        ),
    ],
)
def test_a_chain_of_methods(method: Any, options: dict[str, Any], chain: list[Any]) -> None:
    assert make(Settings, {"method": method, "options": options}, "here").chain() == chain


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("experts: {a: x}", "'base' is missing"),
        ("base: b", "'experts' is missing"),
        ("base: b\nexperts: x", "experts (='x')"),
        ("base: b\nexperts: {a: 3}", "experts.a"),
        (
            "base: b\nexperts: {a: {path: x, wieght: 1}}",
            "unknown key 'experts.a.wieght', did you mean 'weight'?",
        ),
        ("base: b\nexperts: {a: {weight: 1}}", "'experts.a.path' is missing"),
        ("base: 3\nexperts: {a: x}", "base (=3)"),
        ("basse: b\nexperts: {a: x}", "unknown key 'basse', did you mean 'base'?"),
        ("base: b\nexperts: {a: x}\nzzz: 1", "unknown key 'zzz'; known: method, options"),
        ("base: b\nexperts: {a: x}\nmethod: []", "the list of methods is empty"),
        ("base: b\nexperts: {a: x}\nmethod: [{ties: {}, dare: {}}]", "names one method, got: ties, dare"),
        ("base: b\nexperts: {a: x}\nmethod: 3", "method"),
        ("base: b\nexperts: {a: x}\noptions: [1]", "options (=[1])"),
        ("base: b\nexperts: {a: x}\nthreads: 0", "threads (=0)"),
        ("base: b\nexperts: {a: x}\nthreads: '2'", "threads (='2')"),
        ("base: b\nexperts: {a: x}\noverwrite: yes please", "overwrite (='yes please')"),
        ("base: b\nexperts: {a: x}\ninclude: encoder.*", "include (='encoder.*')"),
        ("base: b\nexperts: {a: x}\nheads: 1", "heads (=1)"),
        ("base: b\nexperts: {a: x}\nbuffers: mean", "buffers (='mean')"),
        ("base: b\nexperts: {a: x}\nvocabulary: any", "vocabulary (='any')"),
        ("base: b\nexperts: {a: x}\ndtype: float8", "dtype (='float8')"),
        ("base: b\nexperts: {a: x}\nallow: [everything]", "allow.0 (='everything')"),
        ("base: b\nbase: c\nexperts: {a: x}", "the key 'base' is given twice"),
        ("base: b\nexperts: {a: x, a: y}", "the key 'a' is given twice"),
        ("- a\n- b", "must hold keys and values"),
        ("", "must hold keys and values"),
        ("base: [", "is not a readable YAML file"),
        ("base: !!python/object/apply:os.system ['true']", "is not a readable YAML file"),
        ("base: {a: x}: y", "is not a readable YAML file"),
        ("? [a, b]\n: 1", "is not a readable YAML file"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        load(tmp_path, text)
    assert said in str(refused.value)
    assert "recipe.yaml" in str(refused.value)


def test_all_that_is_wrong_is_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        load(tmp_path, "bsae: b\nthreads: 0\nbuffers: mean\n")
    message = str(refused.value)
    assert all(word in message for word in ("bsae", "'base' is missing", "threads (=0)", "buffers (='mean')"))


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the recipe"):
        load_recipe(tmp_path / "nothing.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not a readable YAML"):
        load_recipe(tmp_path / "b.yaml")


def test_paths_are_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "experts" / "a").mkdir(parents=True)
    text = "base: base\nexperts: {a: experts/a, b: org/b, c: ./gone, d: {path: /abs/d}}\nout: out/\n"
    recipe = load(tmp_path, text)
    assert recipe.base == str(tmp_path / "base")
    assert recipe.out == str(tmp_path / "out")
    paths = {name: expert.path for name, expert in recipe.experts.items()}
    assert paths == {
        "a": str(tmp_path / "experts" / "a"),
        "b": "org/b",
        "c": str(tmp_path / "gone"),
        "d": "/abs/d",
    }


def test_lists_of_data_are_beside_the_recipe(tmp_path: Path) -> None:
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text("")
    text = "base: org/b\nexperts: {a: org/a}\ntasks: {a: {adapt: [one.jsonl, two.jsonl, gone.jsonl]}}\n"
    found = load(tmp_path, text).tasks["a"].adapt
    assert found == [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl"), "gone.jsonl"]


def test_a_new_folder_with_a_slash_is_beside_the_recipe_too(tmp_path: Path) -> None:
    assert load(tmp_path, "base: org/b\nexperts: {a: org/a}\nout: runs/one\n").out == str(
        tmp_path / "runs/one"
    )


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "a.npz").write_bytes(b"")
    text = "base: ~/base\nout: ~/merged\nexperts: {a: ~/a, b: ~/store#b}\n"
    recipe = load(tmp_path, text + "tasks: {a: {adapt: '~/a.npz:val', evaluate: ~/a.npz}}\n")
    home = str(tmp_path / "home")
    assert (recipe.base, recipe.out) == (f"{home}/base", f"{home}/merged")
    assert [expert.path for expert in recipe.experts.values()] == [f"{home}/a", f"{home}/store#b"]
    assert (recipe.tasks["a"].adapt, recipe.tasks["a"].evaluate) == (f"{home}/a.npz:val", f"{home}/a.npz")
    (tmp_path / "train.yaml").write_text("base: ~/base\nout: ~/experts\ntasks: {a: {train: x, val: y}}\n")
    training = load_finetune_recipe(tmp_path / "train.yaml")
    assert (training.base, training.out) == (f"{home}/base", f"{home}/experts")


def test_weights_with_the_experts() -> None:
    recipe = make_recipe({"base": "b", "experts": {"a": {"path": "x", "weight": 0.5}, "c": "y"}})
    assert recipe.weights_by_expert() == {"a": 0.5, "c": 1.0}
    both = make_recipe({"base": "b", "experts": {"a": {"path": "x", "weight": 0.5}}})
    with pytest.raises(UsageError, match="in one place"):
        both.model_copy(update={"weights": 2.0}).weights_by_expert()


# --- changes by flags


def test_a_change_replaces() -> None:
    assert override({"base": "a", "scale": 1}, {"scale": 2}) == {"base": "a", "scale": 2}


def test_options_add_to_those_of_the_same_method() -> None:
    fields = {"method": "ties", "options": {"density": 0.5, "scope": "tensor"}}
    assert override(fields, {"options": {"density": 0.1}})["options"] == {"density": 0.1, "scope": "tensor"}


def test_another_method_drops_the_options_of_the_old_one() -> None:
    fields = {"method": "ties", "options": {"density": 0.5}}
    assert override(fields, {"method": "average"})["options"] == {}
    assert override(fields, {"method": "dare", "options": {"seed": 1}})["options"] == {"seed": 1}


@pytest.mark.parametrize(
    ("fields", "changes", "weights"),
    [
        ({}, {"a": 2}, {"a": 2, "c": 1.0}),
        ({"weights": 0.5}, {"a": 2}, {"a": 2, "c": 0.5}),
        ({"weights": {"a": 3, "c": 4}}, {"a": 2}, {"a": 2, "c": 4}),
        (
            {"experts": {"a": {"path": "x", "weight": 3}, "c": {"path": "y", "weight": 4}}},
            {"a": 2},
            {"a": 2, "c": 4},
        ),
        ({"experts": {"a": {"path": "x", "weight": 3}, "c": "y"}}, 0.3, 0.3),
        ({}, {"z": 2}, {"a": 1.0, "c": 1.0, "z": 2}),
    ],
)
def test_weights_by_expert_leave_the_others(fields: Any, changes: Any, weights: Any) -> None:
    full = {"base": "b", "experts": {"a": "x", "c": "y"}, **fields}
    recipe = make_recipe(override(full, {"weights": changes}))
    assert recipe.weights_by_expert() == weights


@pytest.mark.parametrize("experts", ["nothing", 3, ["a"], {"a": 3}])
def test_changes_to_a_broken_recipe_leave_the_refusal_to_the_check(experts: Any) -> None:
    with pytest.raises(UsageError, match="experts"):
        make_recipe(override({"base": "b", "experts": experts}, {"weights": {"a": 2}, "options": {"x": 1}}))
