from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adamerging.errors import PlanError, UsageError
from adamerging.plan import Plan, make_plan
from adamerging.weights.source import Spec, Weights

F32, BF16, I64 = torch.float32, torch.bfloat16, torch.int64


def unread(name):
    raise AssertionError(f"the plan read {name}")


def weights(label, tensors, *, aliases=None, low_rank=(), config=None, files=()):
    """Weights of the given shapes (or Specs) that fail the test when one is read."""
    specs = {n: s if isinstance(s, Spec) else Spec(tuple(s), F32) for n, s in tensors.items()}
    return Weights(
        label,
        specs,
        unread,
        low_rank={name: lambda: pytest.fail("factors read") for name in low_rank},
        aliases=aliases or {},
        config=config,
        files=files,
    )


def of_module(label, module, *, headless=False):
    """Weights of a module, tied tensors seen as one, with its config."""
    specs, aliases, seen = {}, {}, {}
    for name, tensor in module.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            specs[name] = Spec(tuple(tensor.shape), tensor.dtype)
    config = None
    if hasattr(module, "config"):
        config = module.config.to_dict() | {"architectures": [type(module).__name__]}
    return weights(label, specs, aliases=aliases, config=config)


def layers(prefix="", n=3, width=4):
    return {f"{prefix}encoder.{i}.{leaf}": (width, width) for i in range(n) for leaf in ("q", "k")}


def treated(plan: Plan, treatment):
    return [entry.name for entry in plan.with_treatment(treatment)]


def refusal(*args, **kwargs) -> str:
    with pytest.raises(PlanError) as caught:
        make_plan(*args, **kwargs)
    return str(caught.value)


# --- prefixes


@pytest.mark.parametrize("prefix", ["", "bert.", "model.bert."])
def test_a_headless_base_aligns_with_prefixed_experts(prefix):
    base = weights("base", layers())
    expert = weights("a", layers(prefix) | {"classifier.weight": (2, 4)})
    plan = make_plan(base, {"a": expert})
    assert treated(plan, "merged") == list(base.specs)
    assert plan.entries["encoder.0.q"].sources == {"a": f"{prefix}encoder.0.q"}
    assert list(plan.heads["a"]) == ["classifier.weight"]
    assert plan.prefixes["a"].expert == prefix


def test_each_expert_has_a_prefix_of_its_own():
    base = weights("base", layers())
    experts = {"a": weights("a", layers("bert.")), "b": weights("b", layers("model.bert.")), "c": base}
    sources = make_plan(base, experts).entries["encoder.2.k"].sources
    assert sources == {"a": "bert.encoder.2.k", "b": "model.bert.encoder.2.k", "c": "encoder.2.k"}


def test_a_headless_expert_aligns_with_a_prefixed_base():
    base = weights("base", layers("bert.") | {"cls.predictions.bias": (9,)})
    plan = make_plan(base, {"a": weights("a", layers())})
    assert plan.entries["bert.encoder.1.k"].sources == {"a": "encoder.1.k"}
    assert plan.entries["cls.predictions.bias"].reason == "only in the base"
    assert plan.prefixes["a"].base == "bert."


def test_two_towers_that_fit_equally_are_refused():
    expert = weights("a", layers("left.") | layers("right."))
    text = refusal(weights("base", layers()), {"a": expert})
    assert "'left.'" in text and "'right.'" in text and "several prefixes" in text


def test_shapes_decide_between_towers():
    expert = weights("a", layers("left.", width=8) | layers("right."))
    plan = make_plan(weights("base", layers()), {"a": expert})
    assert plan.prefixes["a"].expert == "right."


# --- heads


def test_default_heads_are_anchored_at_the_first_component():
    shared = {"layer1.se.fc.weight": (4, 4), "fc1.weight": (4, 4), "fc.weight": (3, 4)}
    plan = make_plan(weights("base", shared), {"a": weights("a", shared), "b": weights("b", shared)})
    assert treated(plan, "merged") == ["layer1.se.fc.weight", "fc1.weight"]
    assert plan.entries["fc.weight"].reason == "head of the base"
    assert plan.entries["fc.weight"].sources == {}
    assert list(plan.heads["b"]) == ["fc.weight"]


def test_a_wrapper_before_every_name_hides_no_head():
    tensors = layers("module.") | {"module.fc.weight": (2, 4)}
    plan = make_plan(weights("base", tensors), {"a": weights("a", tensors)})
    assert list(plan.heads["a"]) == ["module.fc.weight"]


def test_user_patterns_replace_the_defaults():
    tensors = layers() | {"fc.weight": (2, 4), "top.weight": (2, 4)}
    base, experts = weights("base", tensors), {"a": weights("a", tensors)}
    assert list(make_plan(base, experts, heads=["top.*"]).heads["a"]) == ["top.weight"]
    assert make_plan(base, experts, heads=[]).heads == {"a": {}}
    assert treated(make_plan(base, experts, heads=[]), "merged") == list(tensors)


def test_user_patterns_match_with_and_without_prefix():
    expert = weights("a", layers("bert.") | {"bert.top.w": (2,)})
    for pattern in ("bert.top.*", "top.*"):
        assert list(make_plan(weights("base", layers()), {"a": expert}, heads=[pattern]).heads["a"]) == [
            "bert.top.w"
        ]


def test_what_is_a_head_to_one_expert_is_one_to_all():
    tensors = layers("bert.") | {"out.weight": (2, 4)}
    task = {"architectures": ["BertForSequenceClassification"], "model_type": "bert"}
    experts = {
        "a": weights("a", tensors, config=task),
        "b": weights("b", tensors, config={"model_type": "bert"}),
    }
    plan = make_plan(weights("base", tensors), experts)
    assert plan.entries["out.weight"].treatment == "base"
    assert list(plan.heads["a"]) == list(plan.heads["b"]) == ["out.weight"]


def test_an_unknown_tensor_of_an_expert_is_refused_with_remedies():
    text = refusal(weights("base", layers()), {"a": weights("exp/a", layers() | {"adapter.w": (2, 2)})})
    assert "adapter.w: [2, 2] float32" in text and "exp/a" in text
    assert "heads: ['adapter.*']" in text and "exclude: ['adapter.*']" in text
    plan = make_plan(
        weights("base", layers()),
        {"a": weights("a", layers() | {"adapter.w": (2, 2)})},
        exclude=["adapter.*"],
    )
    assert plan.ignored == {"a": {"adapter.w": "excluded by 'adapter.*'"}}


def test_heads_do_not_come_from_shapes():
    base = layers() | {"out.weight": (10, 4)}
    text = refusal(weights("base", base), {"a": weights("a", layers() | {"out.weight": (2, 4)})})
    assert "out.weight: [2, 4] float32, base [10, 4] float32" in text and "heads: ['out.*']" in text


# --- what stays the base's


def test_reasons_of_the_base_treatment():
    tensors = layers() | {"ids": Spec((1, 8), I64), "mask": Spec((8,), torch.bool), "bn.running_mean": (4,)}
    base = weights("base", tensors | {"pooler.weight": (4, 4)})
    experts = {
        "a": weights("a", tensors),
        "b": weights("b", {n: s for n, s in tensors.items() if n != "ids"}),
    }
    plan = make_plan(base, experts, exclude=["encoder.0.*"], buffers="base")
    reasons = {name: entry.reason for name, entry in plan.entries.items() if entry.treatment == "base"}
    assert reasons == {
        "encoder.0.q": "excluded by 'encoder.0.*'",
        "encoder.0.k": "excluded by 'encoder.0.*'",
        "ids": "integer",
        "mask": "boolean",
        "bn.running_mean": "BatchNorm statistics, the base's as asked",
        "pooler.weight": "only in the base",
    }


def test_include_leaves_the_rest():
    base = weights("base", layers())
    plan = make_plan(base, {"a": base}, include=["*.q"], exclude=["encoder.1.*"])
    assert treated(plan, "merged") == ["encoder.0.q", "encoder.2.q"]
    assert plan.entries["encoder.0.k"].reason == "not matched by include"


def test_exclusion_lifts_a_mismatch():
    base = weights("base", layers() | {"odd": (3,)})
    expert = weights("a", layers() | {"odd": (5,)})
    assert "odd: [5]" in refusal(base, {"a": expert})
    assert make_plan(base, {"a": expert}, exclude=["odd"]).entries["odd"].treatment == "base"


@pytest.mark.parametrize(
    ("buffers", "treatment"), [("average", "averaged"), ("base", "base"), ("method", "merged")]
)
def test_batch_norm_statistics(buffers, treatment):
    tensors = layers() | {"bn.running_var": (4,), "bn.num_batches_tracked": Spec((), I64)}
    plan = make_plan(weights("base", tensors), {"a": weights("a", tensors)}, buffers=buffers)
    assert plan.entries["bn.running_var"].treatment == treatment
    assert plan.entries["bn.num_batches_tracked"].reason == "integer"


def test_a_tensor_that_only_some_experts_have_is_refused():
    base = weights("base", layers() | {"pooler.weight": (4, 4)})
    experts = {"a": weights("a", base.specs), "b": weights("exp/b", layers())}
    text = refusal(base, experts)
    assert "expert 'b' (exp/b)" in text and "pooler.weight" in text and "exclude: ['pooler.*']" in text
    assert make_plan(base, experts, exclude=["pooler.*"]).entries["pooler.weight"].treatment == "base"
    assert list(make_plan(base, experts, heads=["pooler.*"]).heads["a"]) == ["pooler.weight"]


def test_an_expert_with_fewer_blocks_is_refused():
    text = refusal(weights("base", layers(n=6)), {"a": weights("a", layers(n=4))})
    assert "fewer blocks" in text and "encoder.5.k" in text


def test_buffers_that_models_compute_are_no_mismatch():
    extra = {"rotary_emb.inv_freq": (2,), "embeddings.position_ids": Spec((1, 8), I64)}
    plan = make_plan(
        weights("base", layers()), {"a": weights("a", layers() | extra), "b": weights("b", layers())}
    )
    assert set(plan.ignored["a"]) == set(extra)
    plan = make_plan(
        weights("base", layers() | extra), {"a": weights("a", layers() | extra), "b": weights("b", layers())}
    )
    assert plan.entries["rotary_emb.inv_freq"].treatment == "base"


# --- numbers


def test_float_widths_may_differ():
    base = weights("base", {n: Spec(s, BF16) for n, s in layers().items()})
    plan = make_plan(base, {"a": weights("a", layers())})
    assert treated(plan, "merged") == list(base.specs)
    assert any("float32 (base bfloat16)" in note for note in plan.notes)


@pytest.mark.parametrize(("ours", "theirs"), [(F32, I64), (I64, F32)])
def test_float_against_integer_is_refused(ours, theirs):
    text = refusal(
        weights("base", layers() | {"x": Spec((2,), ours)}),
        {"a": weights("a", layers() | {"x": Spec((2,), theirs)})},
    )
    assert re.search(r"x: \[2\] \w+, base \[2\] \w+", text) and "kind of number" in text


def test_complex_is_refused_by_name():
    tensors = layers() | {"freqs": Spec((2,), torch.complex64)}
    text = refusal(weights("base", tensors), {"a": weights("a", tensors)})
    assert "complex" in text and "freqs" in text
    make_plan(weights("base", tensors), {"a": weights("a", tensors)}, exclude=["freqs"])


# --- LoRA


def lora(targets, **more):
    return weights("lora", targets, low_rank=[n for n in targets if n not in more.get("full", ())])


def test_an_adapter_changes_only_its_targets():
    base = weights("base", layers())
    plan = make_plan(base, {"a": lora({"bert.encoder.0.q": (4, 4)}), "b": base})
    assert plan.entries["encoder.0.q"].sources == {"a": "bert.encoder.0.q", "b": "encoder.0.q"}
    assert plan.entries["encoder.0.k"].sources == {"b": "encoder.0.k"}
    alone = make_plan(base, {"a": lora({"encoder.0.q": (4, 4)})})
    assert alone.entries["encoder.0.k"].reason == "no expert changes it"


@pytest.mark.parametrize(("shape", "good"), [((8, 36), True), ((8, 4, 3, 3), True), ((36, 8), False)])
def test_an_adapter_of_a_convolution(shape, good):
    base = weights("base", {"conv.weight": (8, 4, 3, 3)})
    if good:
        assert make_plan(base, {"a": lora({"conv.weight": shape})}).entries["conv.weight"].sources
    else:
        assert "conv.weight" in refusal(base, {"a": lora({"conv.weight": shape})})


def test_an_adapter_of_another_base_is_refused():
    text = refusal(weights("base", layers()), {"a": lora({"encoder.0.q": (4, 4), "decoder.0.q": (4, 4)})})
    assert "decoder.0.q" in text and "adapts 1 tensor that the base lacks" in text


def test_full_tensors_of_an_adapter_follow_the_ordinary_rules():
    targets = {"encoder.0.q": (4, 4), "encoder.0.k": (4, 4), "classifier.weight": (2, 4)}
    adapter = lora(targets, full=("encoder.0.k", "classifier.weight"))
    plan = make_plan(weights("base", layers()), {"a": adapter})
    assert list(plan.heads["a"]) == ["classifier.weight"]
    assert plan.entries["encoder.0.k"].sources == {"a": "encoder.0.k"}


# --- tied weights

BODY = {"model.embed_tokens.weight": (10, 4)} | layers("model.")
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
LM = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def test_tied_names_are_one_entry():
    other = {n: s for n, s in BODY.items() if "embed" not in n} | {"lm_head.weight": (10, 4)}
    expert = weights("a", other, aliases={"model.embed_tokens.weight": "lm_head.weight"})
    plan = make_plan(weights("base", BODY, aliases=TIED), {"a": expert, "b": weights("b", BODY)})
    assert plan.aliases == TIED
    assert plan.entries["model.embed_tokens.weight"].sources == {
        "a": "lm_head.weight",
        "b": "model.embed_tokens.weight",
    }
    assert plan.tied_checks == {}


@pytest.mark.parametrize("aliases", [{}, TIED])
def test_a_stored_copy_of_a_tied_tensor_is_checked_later(aliases):
    tied = LM | {"tie_word_embeddings": True}
    expert = weights("a", BODY | {"lm_head.weight": (10, 4)}, config=tied)
    plan = make_plan(weights("base", BODY, aliases=aliases, config=tied), {"a": expert})
    assert plan.tied_checks == {"a": (("model.embed_tokens.weight", "lm_head.weight"),)}
    assert plan.heads == {"a": {}}


def test_a_base_that_stores_its_tied_tensor_twice_has_one_entry():
    tied = LM | {"tie_word_embeddings": True}
    base = weights("base", BODY | {"lm_head.weight": (10, 4)}, config=tied)
    plan = make_plan(base, {"a": weights("a", BODY, config=tied)})
    assert plan.aliases == TIED and "lm_head.weight" not in plan.entries
    assert plan.base_tied_checks == (("model.embed_tokens.weight", "lm_head.weight"),)


@pytest.mark.parametrize("aliases", [{}, TIED])
def test_an_untied_expert_of_a_tied_base_is_refused(aliases):
    base = weights("base", BODY, aliases=aliases, config=LM | {"tie_word_embeddings": True})
    untied = LM | {"tie_word_embeddings": False}
    text = refusal(base, {"a": weights("a", BODY | {"lm_head.weight": (10, 4)}, config=untied)})
    assert "tied in the base but not in the expert" in text and "lm_head.weight" in text


def test_copies_apart_in_memory_are_untied(tmp_path):
    base = weights("base", BODY, aliases=TIED)
    both = BODY | {"lm_head.weight": (10, 4)}
    assert "untied" in refusal(base, {"a": weights("a", both)})
    stored = weights("a", both, files=(tmp_path / "model.safetensors",))
    assert make_plan(base, {"a": stored}).tied_checks["a"]


def test_a_language_models_own_head_is_merged():
    tensors = BODY | {"lm_head.weight": (10, 4)}
    untied = LM | {"tie_word_embeddings": False}
    plan = make_plan(weights("base", tensors, config=untied), {"a": weights("a", tensors, config=untied)})
    assert treated(plan, "merged") == list(tensors)


def test_an_adapter_that_changes_a_tied_tensor_is_noted():
    base = weights("base", BODY, aliases=TIED)
    plan = make_plan(base, {"a": lora({"lm_head.weight": (10, 4)})})
    assert plan.entries["model.embed_tokens.weight"].sources == {"a": "lm_head.weight"}
    assert any("tied in the base" in note for note in plan.notes)
    full = lora({"lm_head.weight": (10, 4), "model.encoder.0.q": (4, 4)}, full=("lm_head.weight",))
    assert "tied in the base but not" in refusal(base, {"a": full})


# --- vocabulary


def grown(rows):
    return weights(f"{rows}", BODY | {"model.embed_tokens.weight": (rows, 4), "lm_head.weight": (rows, 4)})


def test_a_grown_vocabulary_is_refused_with_the_remedy():
    text = refusal(grown(10), {"a": grown(12)})
    assert "vocabulary: shared" in text and "model.embed_tokens.weight: [12, 4] float32, base [10, 4]" in text


def test_the_shared_rows_of_a_vocabulary_are_merged():
    plan = make_plan(grown(10), {"a": grown(12), "b": grown(9), "c": grown(10)}, vocabulary="shared")
    entry = plan.entries["lm_head.weight"]
    assert (entry.shared_rows, entry.treatment, set(entry.sources)) == (9, "merged", {"a", "b", "c"})
    assert plan.extra_rows["a"]["lm_head.weight"] == (9, 12)
    assert plan.extra_rows["c"]["lm_head.weight"] == (9, 10)
    assert "b" not in plan.extra_rows
    assert plan.entries["model.encoder.0.q"].shared_rows is None


def test_a_vocabulary_is_known_by_its_configured_size():
    base = weights("base", layers() | {"tok.weight": (10, 4)}, config={"vocab_size": 10})
    expert = weights("a", layers() | {"tok.weight": (12, 4)}, config={"vocab_size": 12})
    assert make_plan(base, {"a": expert}, vocabulary="shared").entries["tok.weight"].shared_rows == 10
    positions = weights("a", layers() | {"tok.weight": (12, 4)}, config={"vocab_size": 10})
    assert "another shape" in refusal(base, {"a": positions}, vocabulary="shared")


# --- errors


def test_every_mismatch_is_in_one_readable_error():
    base = weights("base/", layers(n=150))
    wrong = {name: (8, 8) for name in base.specs}
    text = refusal(
        base,
        {
            "good": base,
            "wrong": weights("exp/wrong", wrong, config={"model_type": "gpt2"}),
            "more": weights("exp/more", layers(n=150) | {"x.y": (1,)}),
        },
    )
    assert len(text.splitlines()) < 25
    assert "looks like another architecture" in text and "300 tensors of another shape" in text
    assert "... and 295 more" in text and "exp/wrong" in text and "exp/more" in text and "x.y" in text


def test_the_model_type_is_named():
    base = weights("base", layers(), config={"model_type": "bert"})
    expert = weights("a", {"h.0.w": (3,), "h.1.w": (3,)}, config={"model_type": "gpt2"})
    text = refusal(base, {"a": expert})
    assert "looks like another architecture" in text and "'gpt2' and not 'bert'" in text


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"exclude": ["encodr.*"]}, "exclude: the pattern 'encodr.*' matches no tensor; the nearest"),
        ({"include": ["zzz"]}, "include: the pattern 'zzz' matches no tensor"),
        ({"heads": ["top.*"]}, "heads: the pattern 'top.*'"),
        ({"buffers": "mean"}, "buffers must be one of average, base, method, task, got 'mean'"),
        ({"vocabulary": "grow"}, "vocabulary must be one of refuse, shared"),
    ],
)
def test_options_that_cannot_be_right(kwargs, words):
    base = weights("base", layers())
    with pytest.raises(UsageError, match=re.escape(words)):
        make_plan(base, {"a": base}, **kwargs)


def test_no_experts():
    with pytest.raises(UsageError, match="no experts"):
        make_plan(weights("base", layers()), {})


# --- data for others


def test_summary_and_rows():
    base = weights("base", layers() | {"pooler.w": (4,)})
    plan = make_plan(base, {"a": weights("a", layers() | {"classifier.w": (2,)})})
    summary = plan.summary()
    assert summary["treatments"]["merged"] == {"tensors": 6, "parameters": 96}
    assert summary["heads"] == {"a": {"tensors": 1, "parameters": 2}}
    assert [row["treatment"] for row in plan.rows()] == ["merged"] * 6 + ["base", "head"]


# --- real models


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def test_bert_classifiers_over_a_headless_base(transformers):
    def config(labels):
        return transformers.BertConfig(
            vocab_size=11,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=8,
            num_labels=labels,
        )

    base = of_module("base", transformers.BertModel(config(2)))
    experts = {
        f"t{n}": of_module(f"t{n}", transformers.BertForSequenceClassification(config(n))) for n in (2, 3)
    }
    plan = make_plan(base, experts)
    assert treated(plan, "merged") == [n for n, s in base.specs.items() if s.dtype == F32]
    assert set(plan.heads["t3"]) == {"classifier.weight", "classifier.bias"}

    pretrained = of_module("base", transformers.BertForPreTraining(config(2)))
    plan = make_plan(pretrained, experts)
    assert plan.entries["bert.pooler.dense.weight"].treatment == "merged"
    assert plan.entries["cls.predictions.bias"].reason == "only in the base"
    assert set(plan.heads["t2"]) == {"classifier.weight", "classifier.bias"}

    masked = of_module("base", transformers.BertForMaskedLM(config(2)))
    plan = make_plan(masked, {"a": of_module("a", transformers.BertForMaskedLM(config(2)))})
    assert not treated(plan, "base") and plan.heads == {"a": {}}
    assert plan.aliases["cls.predictions.decoder.weight"] == "bert.embeddings.word_embeddings.weight"


@pytest.mark.filterwarnings("ignore")
def test_gpt2_is_tied(transformers):
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = of_module("m", transformers.GPT2LMHeadModel(config))
    headless = of_module("base", transformers.GPT2Model(config))
    assert make_plan(model, {"a": model}).aliases == {"lm_head.weight": "transformer.wte.weight"}
    plan = make_plan(headless, {"a": model})
    assert plan.entries["wte.weight"].sources == {"a": "transformer.wte.weight"} and plan.heads == {"a": {}}
    # A file that stores the copy, and a config.json that does not say: the model type's default does.
    silent = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    stored = weights("m", dict(model.specs) | {"lm_head.weight": (11, 8)}, config=silent)
    plan = make_plan(headless, {"a": stored})
    assert plan.tied_checks == {"a": (("transformer.wte.weight", "lm_head.weight"),)}


def test_a_vit_keeps_its_head_though_base_has_one_of_the_same_shape(transformers):
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
    )
    model = of_module("m", transformers.ViTForImageClassification(config))
    plan = make_plan(model, {"a": model, "b": model})
    assert treated(plan, "base") == ["classifier.weight", "classifier.bias"]
    assert plan.entries["classifier.bias"].reason == "head of the base"
    assert set(plan.heads["b"]) == {"classifier.weight", "classifier.bias"}


def test_efficientnet_lite():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    build = package.EfficientNet.from_name
    base = of_module("base", build("efficientnet-lite0"))
    expert = of_module("a", build("efficientnet-lite0", num_classes=10))
    plan = make_plan(base, {"a": expert})
    assert list(plan.heads["a"]) == ["_fc.weight", "_fc.bias"]
    assert len(treated(plan, "averaged")) == 2 * sum("num_batches" in name for name in base.specs)
    assert plan.entries["_bn0.num_batches_tracked"].reason == "integer"


# --- properties

NAMES = [
    "encoder.0.q",
    "encoder.1.q",
    "bn.running_mean",
    "ids",
    "pooler.w",
    "fc.weight",
    "embed_tokens.weight",
]


@st.composite
def models(draw):
    """A base and experts that share most of it, under any prefix, some of them adapters."""

    def spec(name):
        return Spec((4,), I64) if name == "ids" else Spec((6, 4), F32)

    base = {name: spec(name) for name in NAMES}
    experts = {}
    for key in draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True)):
        prefix = draw(st.sampled_from(["", "bert.", "model.bert."]))
        names = draw(st.permutations(NAMES))[draw(st.integers(0, 2)) :]
        low_rank = [prefix + n for n in names if n != "ids"] if draw(st.booleans()) else []
        tensors = {prefix + name: spec(name) for name in names if not low_rank or name != "ids"}
        if draw(st.booleans()):
            tensors["classifier.weight"] = Spec((2, 4), F32)
        experts[key] = weights(key, tensors, low_rank=low_rank)
    aliases = {"lm_head.weight": "embed_tokens.weight"} if draw(st.booleans()) else {}
    return weights("base", base, aliases=aliases), experts


def outcome(base, experts):
    try:
        return make_plan(base, experts)
    except PlanError as error:
        return str(error)


@settings(max_examples=80, deadline=None)
@given(models(), st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_of_experts(drawn, random):
    base, experts = drawn
    shuffled = list(experts.items())
    random.shuffle(shuffled)
    assert outcome(base, experts) == outcome(base, dict(shuffled))


@settings(max_examples=80, deadline=None)
@given(models())
def test_every_base_tensor_appears_once_and_every_source_exists(drawn):
    base, experts = drawn
    plan = outcome(base, experts)
    if isinstance(plan, str):
        return
    assert sorted([*plan.entries, *plan.aliases]) == sorted([*base.specs, *base.aliases])
    assert list(plan.entries) == [name for name in base.specs if name in plan.entries]
    for entry in plan.entries.values():
        assert (entry.treatment == "base") == (not entry.sources)
        assert all(source in experts[key].specs for key, source in entry.sources.items())
    for key, expert in experts.items():
        used = [entry.sources[key] for entry in plan.entries.values() if key in entry.sources]
        assert not set(used) & set(plan.heads[key])
        assert len(used) == len(set(used)) and set(plan.heads[key]) <= set(expert.specs)
