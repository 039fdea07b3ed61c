from __future__ import annotations

import pytest

from adamerging.blocks import places


def blocks(*names: str):
    return {name: (place.block, place.index, place.count) for name, place in places(names).items()}


def test_a_transformer():
    found = blocks(
        "embeddings.word_embeddings.weight",
        "encoder.layer.0.attention.self.query.weight",
        "encoder.layer.11.output.dense.bias",
        "encoder.layer.2.output.dense.bias",
        "pooler.dense.weight",
    )
    assert found == {
        "embeddings.word_embeddings.weight": (None, None, 0),
        "encoder.layer.0.attention.self.query.weight": ("encoder.layer.0", 0, 3),
        "encoder.layer.11.output.dense.bias": ("encoder.layer.11", 2, 3),
        "encoder.layer.2.output.dense.bias": ("encoder.layer.2", 1, 3),
        "pooler.dense.weight": (None, None, 0),
    }


def test_stages_of_a_convolutional_network_follow_each_other():
    found = blocks("layer1.0.conv1.weight", "layer1.1.conv1.weight", "layer2.0.conv1.weight", "conv1.weight")
    assert found["layer1.0.conv1.weight"] == ("layer1.0", 0, 3)
    assert found["layer1.1.conv1.weight"] == ("layer1.1", 1, 3)
    assert found["layer2.0.conv1.weight"] == ("layer2.0", 2, 3)
    assert found["conv1.weight"] == (None, None, 0)


def test_encoder_and_decoder_stand_side_by_side():
    found = places(["encoder.block.0.w", "encoder.block.1.w", "decoder.block.0.w"])
    assert [found[n].depth for n in found] == [0.0, 1.0, 1.0]


def test_a_bare_number_in_front():
    assert blocks("0.weight", "3.weight", "10.weight")["10.weight"] == ("10", 2, 3)


@pytest.mark.parametrize(
    "name",
    ["wte.weight", "embed.weight", "vision.patch_embed.w", "conv_stem.weight", "class_embedding"],
)
def test_what_comes_first_has_depth_0(name):
    assert places([name])[name].depth == 0.0


@pytest.mark.parametrize("name", ["ln_post.weight", "lm_head.weight", "model.norm.weight", "proj"])
def test_what_comes_last_has_depth_1(name):
    assert places([name])[name].depth == 1.0


def test_the_order_of_names_does_not_matter():
    names = [f"h.{i}.w" for i in range(12)] + ["wte", "ln_f"]
    assert places(reversed(names)) == places(names)
    assert [places(names)[f"h.{i}.w"].depth for i in range(12)] == [i / 11 for i in range(12)]
