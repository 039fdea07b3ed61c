"""Gram matrices of the inputs of linear maps, against inputs found without our code, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from adamerging.adaptation.statistics.grams import Grams
from adamerging.adaptation.statistics.linear_maps import LinearMaps
from adamerging.adaptation.statistics.patches import patches


def seen(module: nn.Module, *args, mask: Tensor | None = None, **kwargs) -> dict[str, Tensor]:
    """What is gathered of one forward pass, by parameter name."""
    found = Grams()
    found.begin(mask)
    module = module.double().eval()
    with torch.no_grad(), LinearMaps(dict(module.named_parameters()), found.add, found.look_up):
        module(*args, **kwargs)
    return found.means()


def gram_of(inputs: Tensor) -> Tensor:
    rows = inputs.reshape(-1, inputs.shape[-1])
    return rows.T @ rows / len(rows)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def hooked(module: nn.Module, kinds: tuple[type, ...], mask: Tensor, **kwargs) -> dict[str, Tensor]:
    """The same by hooks on modules, padding left out where inputs are tokens."""
    inputs: dict[str, list[Tensor]] = {}

    def look(name):
        def hook(_, args):
            x = args[0]
            inputs.setdefault(name, []).append(x[mask.bool()] if x.ndim == 3 else x)

        return hook

    parts = [(name, part) for name, part in module.named_modules() if isinstance(part, kinds)]
    handles = [part.register_forward_pre_hook(look(name)) for name, part in parts]
    with torch.no_grad():
        module(**kwargs)
    for handle in handles:
        handle.remove()
    return {f"{name}.weight": gram_of(torch.cat(rows)) for name, rows in inputs.items()}


def tokens(vocabulary: int) -> dict[str, Tensor]:
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = 0
    mask[2, 2:] = 0
    return {"input_ids": torch.arange(21).reshape(3, 7) % vocabulary, "attention_mask": mask}


def test_every_linear_of_a_bert_without_its_padding():
    from transformers import BertForSequenceClassification

    from models import bert_config

    torch.manual_seed(0)
    model = BertForSequenceClassification(bert_config()).double().eval()
    batch = tokens(40)
    wanted = hooked(model, (nn.Linear,), batch["attention_mask"], **batch)
    found = seen(model, mask=batch["attention_mask"], **batch)
    assert len(wanted) == 2 * 6 + 2  # q, k, v, out, up, down of each layer; pooler, classifier
    assert set(found) == set(wanted)
    for name, gram in wanted.items():
        torch.testing.assert_close(found[name], gram[None])


def test_conv1d_of_transformers_is_stored_in_by_out():
    from transformers import GPT2Config, GPT2Model
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=40, n_positions=8, n_embd=8, n_layer=2, n_head=2)).double().eval()
    batch = tokens(40)
    wanted = hooked(model, (Conv1D,), batch["attention_mask"], **batch)
    found = seen(model, mask=batch["attention_mask"], **batch)
    assert set(found) == set(wanted) and len(wanted) == 2 * 4
    for name, gram in wanted.items():
        torch.testing.assert_close(found[name], gram)  # (d, d): turned


def heads_of(attention: nn.MultiheadAttention, query, key, value, hidden=None) -> Tensor:
    """What goes into the last projection, by hand; ``(B, L, E)``."""
    width, count = attention.embed_dim, attention.num_heads
    if attention.in_proj_weight is not None:
        weights = attention.in_proj_weight.chunk(3)
    else:
        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    biases = attention.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (count, width // count)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    scores = q @ k.transpose(-1, -2) / (width // count) ** 0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_both_maps_of_fused_attention(batch_first, padded):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2, batch_first=batch_first).double().eval()
    nn.init.normal_(attention.in_proj_bias)
    x = drawn(3, 5, 6)
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[1, 3:] = hidden[2, 1:] = padded
    keep = ~hidden
    given = x if batch_first else x.transpose(0, 1)
    found = seen(attention, given, given, given, key_padding_mask=hidden if padded else None)
    heads = heads_of(attention, x, x, x, hidden)
    assert set(found) == {"in_proj_weight", "out_proj.weight"}
    torch.testing.assert_close(found["in_proj_weight"], gram_of(x[keep])[None])
    torch.testing.assert_close(found["out_proj.weight"], gram_of(heads[keep])[None])


@pytest.mark.parametrize("separate", [True, False])
def test_query_key_and_value_of_their_own(separate):
    torch.manual_seed(0)
    sizes = {"kdim": 4, "vdim": 3} if separate else {}
    attention = nn.MultiheadAttention(6, 2, batch_first=True, **sizes).double().eval()
    query, key, value = (
        drawn(3, 5, 6),
        drawn(3, 7, 4 if separate else 6),
        2 * drawn(3, 7, 3 if separate else 6),
    )
    found = seen(attention, query, key, value)
    wanted = [gram_of(x) for x in (query, key, value)]
    if separate:
        for letter, gram in zip("qkv", wanted, strict=True):
            torch.testing.assert_close(found[f"{letter}_proj_weight"], gram[None])
    else:
        torch.testing.assert_close(found["in_proj_weight"], torch.stack(wanted))
    heads = heads_of(attention, query, key, value)
    torch.testing.assert_close(found["out_proj.weight"], gram_of(heads)[None])


def test_what_a_watched_model_gives_is_what_it_gave():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2).double().eval()
    x, hidden = drawn(3, 5, 6), torch.zeros(3, 5, dtype=torch.bool)
    hidden[1, 3:] = True
    with torch.no_grad():
        for layer in model.layers:  # in training mode no fused code runs
            layer.dropout.p = layer.dropout1.p = layer.dropout2.p = layer.self_attn.dropout = 0.0
        plain = model.train()(x, src_key_padding_mask=hidden)
        names = []
        with LinearMaps(dict(model.named_parameters()), lambda use: names.append(use.name)):
            watched = model.eval()(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(watched, plain)
    parts = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert names == [f"layers.{i}.{part}" for i in range(2) for part in parts]


CONVOLUTIONS = [
    (nn.Conv2d(3, 4, 1), (2, 3, 5, 6)),
    (nn.Conv2d(3, 4, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2)), (2, 3, 7, 8)),
    (nn.Conv2d(4, 6, 3, groups=2, padding="same"), (2, 4, 5, 5)),
    (nn.Conv2d(4, 4, 3, groups=4, padding="valid"), (2, 4, 5, 5)),
    (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 5)),
    (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    (nn.Conv3d(2, 4, 2, groups=2), (2, 2, 3, 4, 3)),
]


@pytest.mark.parametrize("module, shape", CONVOLUTIONS, ids=str)
def test_a_convolution_is_a_linear_map_of_its_patches(module, shape):
    module = module.double()
    x, weight = drawn(*shape), module.weight
    settings = {"stride": module.stride, "dilation": module.dilation, "groups": module.groups}
    padding = module.padding
    if module.padding_mode != "zeros":
        x_in, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
    else:
        x_in = x
    pieces = list(patches(x_in, weight, padding=padding, **settings))
    rows = weight.reshape(module.groups, -1, pieces[0].shape[-1])
    outputs = torch.stack([(piece @ rows.transpose(1, 2)).transpose(1, 2).flatten(0, 1) for piece in pieces])
    with torch.no_grad():
        wanted = module(x) - module.bias.reshape(-1, *[1] * (x.ndim - 2))
    torch.testing.assert_close(outputs, wanted.flatten(2))
    all_rows = torch.cat(pieces, 1)
    gram = all_rows.transpose(1, 2) @ all_rows / all_rows.shape[1]
    torch.testing.assert_close(seen(module, x)["weight"], gram)


def test_patches_of_a_plain_convolution_are_those_of_unfold():
    x = drawn(2, 3, 6, 7)
    found = torch.cat(list(patches(x, torch.empty(4, 3, 3, 2), stride=2, padding=1, dilation=1)))
    wanted = F.unfold(x, (3, 2), stride=2, padding=1).transpose(1, 2)
    torch.testing.assert_close(found, wanted)


class Products(nn.Module):
    """Plain parameters used in all the ways that people write."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {"a": (4, 3), "b": (3, 4), "c": (4, 3), "d": (3, 4), "e": (9, 4)}.items():
            self.register_parameter(name, nn.Parameter(drawn(*shape)))

    def forward(self, x: Tensor) -> None:
        x @ self.a
        x @ self.b.T
        torch.matmul(x, self.c)
        self.d @ x.mT
        for part in self.e.split([3, 6]):
            F.linear(x, part)


def test_matrix_products_with_a_parameter():
    x = drawn(2, 5, 4)
    found, gram = seen(Products(), x), gram_of(x)
    for name in "ac":
        torch.testing.assert_close(found[name], gram)
    for name in "bd":
        torch.testing.assert_close(found[name], gram[None])
    torch.testing.assert_close(found["e"], gram.expand(3, 4, 4))


class Tied(nn.Module):
    """One matrix used twice, and an embedding that is a decoder too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.decoder = nn.Linear(4, 7, bias=False)
        self.decoder.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.two(torch.tanh(self.one(self.embed(ids))))))


def test_tied_maps_see_the_inputs_of_all_their_uses_and_a_tied_embedding_none():
    torch.manual_seed(0)
    model = Tied().double()
    ids = torch.arange(6).reshape(2, 3)
    first = model.embed(ids)
    second = torch.tanh(model.one(first))
    found = seen(model, ids)
    assert set(found) == {"one.weight"}
    torch.testing.assert_close(found["one.weight"], gram_of(torch.cat([first, second]).detach())[None])


def test_batches_add_up_to_the_mean_over_all_tokens():
    torch.manual_seed(0)
    layer, found = nn.Linear(4, 3).double(), Grams()
    parts = [drawn(2, 5, 4), drawn(1, 3, 4)]
    with torch.no_grad(), LinearMaps(dict(layer.named_parameters()), found.add, found.look_up):
        for part in parts:
            found.begin(None)
            layer(part)
    wanted = gram_of(torch.cat([part.flatten(0, 1) for part in parts]))
    torch.testing.assert_close(found.means()["weight"], wanted[None])


def test_only_the_names_of_interest_are_kept():
    model, found = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), Grams(["1.weight"])
    found.begin(None)
    with LinearMaps(dict(model.named_parameters()), found.add, found.look_up):
        model(torch.randn(2, 4))
    assert set(found.means()) == {"1.weight"}


def test_views_that_are_no_whole_parts_and_other_weights_are_left_alone():
    uses, weight = [], torch.randn(6, 4)
    with LinearMaps({"w": weight}, uses.append):
        for rows, cols in itertools.product((slice(1, 3), slice(0, 6)), (slice(0, 3), slice(1, 4))):
            F.linear(torch.randn(2, 3), weight[rows, cols])
        F.linear(torch.randn(2, 4), torch.randn(6, 4))
    assert uses == []
