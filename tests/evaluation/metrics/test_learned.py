"""What is missing is always said; where torchmetrics is installed, its numbers are compared with formulas.

The comparisons are skipped without torchmetrics, which no other part of the tests needs:
pip install "s2edit-pipeline[metrics]" runs them.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import nn

from s2edit_pipeline.avatars.tokenizer import build_tokenizer
from s2edit_pipeline.evaluation.metrics import learned
from s2edit_pipeline.evaluation.metrics.learned import clip_score, fid, lpips


def _pictures(seed: int, count: int = 3, size: tuple[int, int] = (40, 32)) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 256, (count, 5, 4, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize(size, Image.Resampling.BICUBIC) for one in low]


BEFORE, AFTER = _pictures(0), _pictures(1)
MEASURES: dict[str, Any] = {
    "fid": lambda: fid(BEFORE, AFTER),
    "lpips": lambda: lpips(BEFORE, AFTER),
    "clip_score": lambda: clip_score(BEFORE, ["a lady"] * 3),
}


# ---------------------------------------------------------------------------- what is missing


@pytest.mark.parametrize("name", ["fid", "lpips"])
def test_without_torchmetrics_the_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ImportError, match=r'pip install "s2edit-pipeline\[metrics\]"'):
        MEASURES[name]()


class _Broken(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")


def test_a_torchvision_of_another_build_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torchmetrics", "torchmetrics.image"):
        monkeypatch.setitem(sys.modules, module, _Broken(module))
    with pytest.raises(ImportError, match=r"nms does not exist.*mend or remove torchvision.*index-url"):
        lpips(BEFORE, AFTER)


@pytest.mark.parametrize(
    ("name", "failure", "kind", "message"),
    [
        ("fid", ModuleNotFoundError("x"), ImportError, "FID needs torch-fidelity, .*torchvision from where your torch"),
        ("lpips", ModuleNotFoundError("x"), ImportError, "LPIPS needs torchvision from where your torch"),
        ("fid", OSError("no route"), OSError, "FID could not get its network's weights: no route.*checkpoints"),
        ("lpips", OSError("no route"), OSError, "LPIPS could not get its network's weights: no route.*checkpoints"),
        (
            "clip_score",
            OSError("no route"),
            OSError,
            "CLIP score could not get its model: no route.*pass the folder of one",
        ),
    ],
)
def test_missing_networks_and_weights_are_errors_that_say_what_to_do(
    name: str, failure: Exception, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Metric:
        def __init__(self, **_: Any) -> None:
            raise failure

    def missing(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(learned, "_metric", lambda *_: Metric)
    monkeypatch.setattr(learned.CLIPModel, "from_pretrained", missing)
    with pytest.raises(kind, match=message):
        MEASURES[name]()


def test_pictures_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="they hold 3 and 2"):
        lpips(BEFORE, AFTER[:2])
    with pytest.raises(ValueError, match="Pair 1 differs in size: 40 x 32 and 32 x 32"):
        lpips(BEFORE, [AFTER[0], AFTER[1].resize((32, 32)), AFTER[2]])
    with pytest.raises(ValueError, match="empty"):
        lpips([], [])
    with pytest.raises(ValueError, match="3 pictures and 1 prompts"):
        clip_score(BEFORE, ["a lady"])
    with pytest.raises(ValueError, match="at least 2 pictures each; there are 3 and 1"):
        fid(BEFORE, AFTER[:1])


# ---------------------------------------------------------------------------- the numbers


class _Corners(nn.Module):
    """Five numbers of a picture."""

    num_features = 5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.double()
        return torch.stack([x[:, 0, 0, 0], x[:, 1, 3, 4], x[:, 2].mean((1, 2)), x[:, 0, -1, -1], x[:, 1, 9, 2]], 1)


def test_fid_is_the_distance_of_two_gaussians() -> None:
    pytest.importorskip("torchmetrics")
    before, after = _pictures(2, 30), _pictures(3, 20)
    a, b = (
        np.array([[p[0, 0, 0], p[3, 4, 1], p[..., 2].mean(), p[-1, -1, 0], p[9, 2, 1]] for p in map(np.asarray, some)])
        for some in (before, after)
    )
    cov_a, cov_b = np.cov(a.T.astype(float)), np.cov(b.T.astype(float))
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert fid(before, after, features=_Corners()) == pytest.approx(wanted, rel=1e-6)


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """A tiny CLIP model with random weights."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = build_tokenizer(num_captions=200)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        **small, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=16)
    )
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    model.save_pretrained(str(tmp_path))
    CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(str(tmp_path))
    return tmp_path


def test_clip_score_is_the_mean_cosine(clip_folder: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    pictures, prompts = _pictures(4, 4), ["a lady", "a man with a hat", "a red cat", "a dog"]
    model = CLIPModel.from_pretrained(str(clip_folder)).eval()
    processor = CLIPProcessor.from_pretrained(str(clip_folder))
    with torch.no_grad():
        out = model(**processor(text=prompts, images=pictures, return_tensors="pt", padding=True))
    image, text = out.image_embeds.double(), out.text_embeds.double()
    cosines = (image * text).sum(1) / image.norm(dim=1) / text.norm(dim=1)
    assert cosines.min() > 0.01
    wanted = (100 * cosines).mean().item()
    assert clip_score(pictures, prompts, model=str(clip_folder)) == pytest.approx(wanted, abs=1e-3)
    with torch.no_grad():  # all the other way: none counts below 0
        model.text_projection.weight.neg_()
    model.save_pretrained(str(clip_folder))
    assert clip_score(pictures, prompts, model=str(clip_folder)) == 0
