"""The converter of OpenCLIP image encoders: the converted tower computes what the original computes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "convert_task_vectors.py"
WIDTH, PATCH, SIDE, OUT, LAYERS = 64, 4, 8, 10, 2  # OpenCLIP has heads of 64


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_task_vectors", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Block(nn.Module):
    """A block as OpenAI's CLIP and OpenCLIP have it."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, WIDTH // 64, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(WIDTH, 4 * WIDTH))
        self.mlp.add_module("c_proj", nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        hidden = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))


class Visual(nn.Module):
    """A small image encoder with OpenCLIP's names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((SIDE // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.proj = nn.Parameter(torch.randn(WIDTH, OUT))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


def test_the_converted_tower_computes_the_same(script: ModuleType, tmp_path: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    torch.manual_seed(0)
    visual = Visual().eval()
    with torch.no_grad():
        for parameter in visual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = {f"model.visual.{name}": tensor for name, tensor in visual.state_dict().items()}
    script.write({**state, "model.logit_scale": torch.ones(())}, tmp_path / "expert")
    model, info = CLIPVisionModelWithProjection.from_pretrained(
        tmp_path / "expert", output_loading_info=True
    )  # fmt: skip
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixels = torch.randn(3, 3, SIDE, SIDE)
    with torch.no_grad():
        assert torch.allclose(model.eval()(pixels).image_embeds, visual(pixels), atol=1e-4)
    config = json.loads((tmp_path / "expert" / "config.json").read_text())
    assert config["checkpoint_family"] == "task_vectors"


def test_what_has_no_place_is_refused(script: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"no tensor's name holds 'visual\.'"):
        script.convert({"a": torch.ones(1)})
    with pytest.raises(ValueError, match=r"visual\.strange has no place"):
        script.convert({"visual.strange": torch.ones(1)})


def test_nothing_is_opened_unless_it_is_trusted(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.pt").write_bytes(b"no pickle")
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, str(tmp_path / "a.pt"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2 and "--trust" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
