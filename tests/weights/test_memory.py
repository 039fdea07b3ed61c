from __future__ import annotations

import pytest
import torch
from torch import nn

from adamerging.errors import UsageError, WeightsError
from adamerging.weights import open_weights


def tied_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def test_module_is_neither_copied_nor_changed() -> None:
    model = tied_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    opened = open_weights(model)
    assert opened.label == "module"
    assert opened.files == ()
    assert opened.aliases == {"2.weight": "0.weight"}
    assert "1.running_mean" in opened.specs
    read = opened.read("0.weight")
    assert read.data_ptr() == model[0].weight.data_ptr()
    assert not read.requires_grad
    assert model[0].weight.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_state_dict_keeps_its_names_and_ties() -> None:
    w = torch.ones(2, 2, requires_grad=True)
    opened = open_weights({"module.a": w, "module.b": w, "module.c": w.detach().clone()})
    assert list(opened.specs) == ["module.a", "module.c"]
    assert opened.aliases == {"module.b": "module.a"}
    assert not opened.read("module.a").requires_grad


def test_everything_that_cannot_be_merged_is_listed() -> None:
    state = {
        "good": torch.ones(2),
        "meta": torch.ones(2, device="meta"),
        "extra": {"x": 1},
        "sparse": torch.eye(2).to_sparse(),
        "lazy": nn.LazyLinear(2).weight,
        "none": None,
    }
    with pytest.raises(WeightsError) as caught:
        open_weights(state)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "good" not in message
    for name in (
        "meta: a tensor on the meta device",
        "extra: a dict",
        "sparse: a sparse",
        "lazy: ",
        "none: a None",
    ):
        assert name in message


def test_empty_state_dict() -> None:
    with pytest.raises(WeightsError, match="no tensor at all"):
        open_weights({})


def test_config_of_a_transformers_model_is_kept() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
    )
    opened = open_weights(BertModel(config))
    assert opened.config is not None
    assert opened.config["model_type"] == "bert"


@pytest.mark.parametrize("source", [3, None, [torch.ones(2)]])
def test_wrong_types(source: object) -> None:
    with pytest.raises(UsageError, match="cannot be opened from a"):
        open_weights(source)  # type: ignore[arg-type]


def test_open_weights_pass_through() -> None:
    opened = open_weights({"a": torch.ones(2)})
    assert open_weights(opened) is opened


def test_revision_is_for_the_hub() -> None:
    with pytest.raises(UsageError, match="revision='x'"):
        open_weights({"a": torch.ones(2)}, revision="x")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_tensors_stay_where_they_are() -> None:
    opened = open_weights(nn.Linear(2, 2).cuda())
    assert opened.read("weight").is_cuda
