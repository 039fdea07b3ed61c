"""Tokenizers and vocabularies that differ: real tokenizers and small Llamas, through the whole of `merge`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import adamerging as am

WORDS = ["<unk>", "<s>", "</s>", *"abcdefghij"]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tokenizer(added: Sequence[str | AddedToken] = (), words: Sequence[str] = WORDS) -> Tokenizer:
    fast = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast.add_tokens(list(added))
    return fast


def model(
    folder: Path,
    fast: Tokenizer | None,
    rows: int,
    seed: int,
    near: Path | None = None,
    template: str | None = None,
    tied: bool = False,
    **config,
) -> Path:
    """A Llama folder; an expert's weights are near another's in the rows and tensors that both have."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=rows, tie_word_embeddings=tied, **sizes, **config))
    llama.save_pretrained(folder)
    if near is not None:
        own, theirs = load_file(folder / "model.safetensors"), load_file(near / "model.safetensors")
        for name, values in theirs.items():
            n = min(len(values), len(own[name]))
            own[name][:n] = values[:n] + 0.02 * own[name][:n]
        save_file(own, folder / "model.safetensors", {"format": "pt"})
    if fast is not None:
        fast.save(str(folder / "tokenizer.json"))
        fields: dict = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "eos_token": "</s>",
        }
        if template is not None:
            fields["chat_template"] = template
        decoder = fast.get_added_tokens_decoder()
        fields["added_tokens_decoder"] = {str(n): {"content": t.content} for n, t in decoder.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


IM = [AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = model(root / "base", tokenizer(), 13, 0)
    model(root / "same", tokenizer(), 13, 1, base)
    model(root / "chat", tokenizer(IM), 15, 2, base, "{{ chat }}", eos_token_id=14)
    model(root / "tools", tokenizer([IM[1], "<tool>"]), 15, 3, base, "{{ tools }}")
    model(root / "bare", None, 13, 4, base)
    return root


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def merge(root: Path, out: Path, experts: Sequence[str] = ("same", "chat", "tools"), base="base", **settings):
    settings = {"method": "average", **settings}
    am.merge(root / base, {name: root / name for name in experts}, out=out, **settings)
    config = json.loads((out / "config.json").read_text())
    merged = weights(out)
    assert config["vocab_size"] == len(merged[EMBED])
    AutoModelForCausalLM.from_pretrained(out)
    return merged, config, AutoTokenizer.from_pretrained(out)


def mean(root: Path, name: str, rows: dict[str, int]) -> Tensor:
    return torch.stack([weights(root / who)[name][row] for who, row in rows.items()]).mean(0)


def test_refused_unless_asked(root: Path, tmp_path: Path) -> None:
    with pytest.raises(am.PlanError, match="vocabulary"):
        merge(root, tmp_path / "out")


def test_the_bases_tokenizer_keeps_other_rows_for_their_task(root: Path, tmp_path: Path) -> None:
    merged, _, tokens = merge(root, tmp_path / "out", vocabulary="shared")
    for name in (EMBED, HEAD):
        everyone = torch.stack([weights(root / who)[name][:13] for who in ("same", "chat", "tools")])
        torch.testing.assert_close(merged[name], everyone.mean(0))
    assert len(tokens) == 13
    with safe_open(tmp_path / "out" / "heads" / "chat" / "head.safetensors", "pt") as head:
        assert set(head.keys()) == {f"{EMBED}.extra_rows", f"{HEAD}.extra_rows"}
        assert torch.equal(head.get_tensor(f"{EMBED}.extra_rows"), weights(root / "chat")[EMBED][13:])
        metadata = head.metadata()
    assert metadata[f"{EMBED}.extra_rows"] == "13:15"
    assert json.loads(metadata["extra_tokens"]) == {"13": "<|im_start|>", "14": "<|im_end|>"}
    assert not (tmp_path / "out" / "heads" / "same" / "head.safetensors").exists()


def test_an_experts_tokenizer_brings_its_rows(root: Path, tmp_path: Path) -> None:
    merged, config, tokens = merge(root, tmp_path / "out", tokenizer="chat")
    for name in (EMBED, HEAD):
        everyone = torch.stack([weights(root / who)[name][:13] for who in ("same", "chat", "tools")])
        torch.testing.assert_close(merged[name][:13], everyone.mean(0))
        assert torch.equal(merged[name][13:], weights(root / "chat")[name][13:])
    assert tokens.encode("a <|im_end|>") == [3, 14]
    assert tokens.chat_template == "{{ chat }}"
    assert config["eos_token_id"] == 14
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        root / "chat" / "tokenizer.json"
    ).read_bytes()
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert any("'tools': rows of its own tokens" in note for note in record["plan"]["notes"])


def test_union(root: Path, tmp_path: Path) -> None:
    merged, _, tokens = merge(root, tmp_path / "out", tokenizer="union")
    vocabulary = tokens.get_vocab()
    assert {token: vocabulary[token] for token in ("<|im_start|>", "<|im_end|>", "<tool>")} == {
        "<|im_start|>": 13,
        "<|im_end|>": 14,
        "<tool>": 15,
    }
    for name in (EMBED, HEAD):
        assert len(merged[name]) == 16
        torch.testing.assert_close(merged[name][13], weights(root / "chat")[name][13])
        torch.testing.assert_close(merged[name][14], mean(root, name, {"chat": 14, "tools": 13}))
        torch.testing.assert_close(merged[name][15], weights(root / "tools")[name][14])
    assert tokens.encode("<tool> b") == [15, 4]
    assert tokens.chat_template == "{{ chat }}"
    decoder = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert decoder["13"]["special"] is True and decoder["15"]["special"] is False
    assert not list((tmp_path / "out" / "heads").glob("*/head.safetensors"))


def test_the_order_of_the_experts_orders_the_union(root: Path, tmp_path: Path) -> None:
    _, _, tokens = merge(root, tmp_path / "out", ("tools", "chat"), tokenizer="union")
    vocabulary = tokens.get_vocab()
    assert [vocabulary[token] for token in ("<|im_end|>", "<tool>", "<|im_start|>")] == [13, 14, 15]
    assert tokens.chat_template == "{{ tools }}"


def test_tied_embeddings_and_in_memory(tmp_path: Path) -> None:
    base = model(tmp_path / "base", tokenizer(), 13, 0, tied=True)
    model(tmp_path / "chat", tokenizer(IM), 15, 1, base, tied=True)
    model(tmp_path / "same", tokenizer(), 13, 2, base, tied=True)
    result = am.merge(base, {n: tmp_path / n for n in ("chat", "same")}, method="average", tokenizer="union")
    assert torch.equal(result.body[EMBED][13:], weights(tmp_path / "chat")[EMBED][13:])
    merged, _, _ = merge(tmp_path, tmp_path / "out", ("chat", "same"), tokenizer="union")
    assert torch.equal(merged[EMBED], result.body[EMBED]) and HEAD not in merged


@pytest.mark.parametrize("choice", ["base", "union", "small", "padded"])
def test_rows_that_only_pad(choice: str, root: Path, tmp_path: Path) -> None:
    """A base padded to 64 rows; one expert puts its tokens on that padding, one cuts it off."""
    base = model(tmp_path / "wide", tokenizer(), 64, 0)
    model(tmp_path / "padded", tokenizer(IM), 64, 1, base)
    model(tmp_path / "small", tokenizer(["<tool>"]), 14, 2, base)
    merged, _, tokens = merge(
        tmp_path, tmp_path / "out", ("padded", "small"), "wide", tokenizer=choice, vocabulary="shared"
    )
    wide, padded, small = (weights(tmp_path / name)[EMBED] for name in ("wide", "padded", "small"))
    torch.testing.assert_close(merged[EMBED][:13], (padded[:13] + small[:13]) / 2)
    rest = {
        "base": wide[13:],
        "union": torch.cat([padded[13:15], small[13:14], wide[16:]]),
        "small": small[13:],
        "padded": padded[13:],
    }[choice]
    assert torch.equal(merged[EMBED][13:], rest)
    assert len(tokens) == {"base": 13, "union": 16, "small": 14, "padded": 15}[choice]
    if choice == "base":
        head = load_file(tmp_path / "out" / "heads" / "padded" / "head.safetensors")
        assert torch.equal(head[f"{EMBED}.extra_rows"], padded[13:])


def test_an_expert_without_a_tokenizer_has_the_bases(root: Path, tmp_path: Path) -> None:
    merged, _, _ = merge(root, tmp_path / "out", ("bare", "chat"), tokenizer="union")
    assert len(merged[EMBED]) == 15
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert any("taken to have the base's tokens: bare" in note for note in record["plan"]["notes"])


def test_nothing_new_changes_nothing(root: Path, tmp_path: Path) -> None:
    for choice in ("base", "union", "same"):
        merged, _, _ = merge(root, tmp_path / choice, ("same",), tokenizer=choice, vocabulary="shared")
        torch.testing.assert_close(merged[EMBED], weights(root / "same")[EMBED])
        mine, base = (f / "tokenizer.json" for f in (tmp_path / choice, root / "base"))
        assert mine.read_bytes() == base.read_bytes()


def test_rows_of_a_bias_are_its_values(tmp_path: Path) -> None:
    def state(rows: int, shift: float) -> dict[str, Tensor]:
        body = torch.arange(12.0).reshape(3, 4)
        return {
            "model.embed_tokens.weight": torch.arange(rows * 4.0).reshape(rows, 4) + shift,
            "lm_head.bias": torch.arange(float(rows)) + shift,
            **{f"model.layers.{n}.weight": body + n + shift for n in range(4)},
        }

    for method in ("della", {"breadcrumbs": {"granularity": "row"}}, "average"):
        method = [method] if isinstance(method, dict) else method
        merged = am.merge(
            state(6, 0.0),
            {"a": state(8, 0.1), "b": state(7, 0.1)},
            method=method,
            vocabulary="shared",
            heads=[],
        )
        assert merged.body["lm_head.bias"].shape == (6,)
        assert merged.heads["a"]["lm_head.bias.extra_rows"].tolist() == pytest.approx([6.1, 7.1])
    assert merged.body["lm_head.bias"].tolist() == pytest.approx([n + 0.1 for n in range(6)])


def test_tokenizers_that_disagree_are_refused(root: Path, tmp_path: Path) -> None:
    other = [*WORDS[:3], *reversed(WORDS[3:])]
    model(tmp_path / "other", tokenizer(words=other), 13, 5, root / "base")
    experts = {"same": root / "same", "other": tmp_path / "other"}
    for settings in ({"tokenizer": "union"}, {"tokenizer": "other"}, {"vocabulary": "shared"}):
        with pytest.raises(
            am.PlanError, match=r"'other'.*disagree: 3 is 'a' and 'j'(.|\n)*Leave these experts"
        ):
            am.merge(root / "base", experts, **settings)


def test_what_cannot_be_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    experts = {"same": root / "same", "bare": root / "bare", "chat": root / "chat"}
    with pytest.raises(am.UsageError, match="must be base, union, or an expert: same, bare, chat"):
        am.merge(root / "base", experts, tokenizer="chatty")
    with pytest.raises(am.UsageError, match="'bare' has no tokenizer files; those with them: same, chat"):
        am.merge(root / "base", experts, tokenizer="bare")
    with pytest.raises(am.UsageError, match="the base's tokenizer, and .* has none"):
        am.merge(root / "bare", experts, tokenizer="union")
    with pytest.raises(
        am.PlanError, match="copied from the base .* has 13 rows, and tokenizer: union has 15"
    ):
        am.merge(root / "base", experts, tokenizer="union", exclude=["*embed_tokens*", "lm_head*"])
    model(tmp_path / "anew", tokenizer(words=[*WORDS, "k"]), 14, 6, root / "base")
    with pytest.raises(am.UsageError, match="'anew' has 1 tokens in its model .*'k'.*trained anew"):
        am.merge(root / "base", {"anew": tmp_path / "anew"}, tokenizer="union")
    model(tmp_path / "short", tokenizer(IM), 13, 7, root / "base")
    with pytest.raises(am.PlanError, match="no expert has a row for the token '<|im_start|>'"):
        am.merge(root / "base", {"short": tmp_path / "short"}, tokenizer="union")
    with pytest.raises(am.PlanError, match="'short' has 15 tokens, and 13 rows"):
        am.merge(root / "base", {"short": tmp_path / "short"}, tokenizer="short")
    (tmp_path / "short" / "tokenizer.json").write_text("{}")
    with pytest.raises(am.UsageError, match="cannot be read"):
        am.merge(root / "base", {"short": tmp_path / "short"}, tokenizer="short")
