"""An inversion's folder: the same edits after it, and nothing read that can't be an inversion's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from s2edit_pipeline import Inversion, S2EditPipeline
from s2edit_pipeline.identity_schema import checksum_of, sha256_of
from s2edit_pipeline.inversion_files import CONFIG_FILE, TENSORS_FILE

SOURCE, TARGET = "a photo of a sad lady", "a photo of a smiling lady"


@pytest.fixture
def inversion(pipe: S2EditPipeline, picture: Image.Image) -> Inversion:
    return pipe.invert(picture, SOURCE, num_inference_steps=2)


@pytest.mark.parametrize("method", ["direct", "null_text", "edit_friendly"])
def test_a_saved_inversion_edits_as_before(
    pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path, method: str
) -> None:
    noise = {"generator": torch.Generator().manual_seed(0)} if method == "edit_friendly" else {}
    inversion = pipe.invert(picture, SOURCE, method, 2, crop=None, **noise)
    inversion.save_pretrained(tmp_path / "inversion")
    assert sorted(path.name for path in (tmp_path / "inversion").iterdir()) == [CONFIG_FILE, TENSORS_FILE]
    loaded = Inversion.from_pretrained(tmp_path / "inversion")
    assert loaded.source is None and loaded.attention is None
    bare = replace(inversion, source=None, attention=None)
    for name in ("trajectory", "unconditional_embeds", "residuals"):
        one, other = getattr(loaded, name), getattr(bare, name)
        assert (one is None and other is None) or torch.equal(one, other)
    assert loaded.made_with == bare.made_with and loaded.placement == bare.placement
    arguments: dict[str, Any] = {"image": picture, "source_prompt": SOURCE, "output_type": "np"}
    expected = pipe(TARGET, inversion=bare, **arguments).images
    assert np.array_equal(pipe(TARGET, inversion=loaded, **arguments).images, expected)
    assert pipe(TARGET, inversion=loaded, source_prompt=SOURCE).images  # without the picture too


def test_a_loaded_inversion_is_checked_as_a_new_one(
    make_pipe: Callable[[str], S2EditPipeline], picture: Image.Image, tmp_path: Path
) -> None:
    pipe, other = make_pipe("epsilon"), make_pipe("v_prediction")
    pipe.invert(picture, SOURCE, num_inference_steps=2).save_pretrained(tmp_path)
    loaded = Inversion.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made of another picture"):
        pipe(TARGET, picture.rotate(180), SOURCE, inversion=loaded)
    with pytest.raises(ValueError, match=r"made with another scheduler|made with other weights"):
        other(TARGET, picture, SOURCE, inversion=loaded)
    with pytest.raises(ValueError, match="was made under"):
        pipe(TARGET, picture, "a photo of a lady", inversion=loaded)
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] += 0.5
    with pytest.raises(ValueError, match="other weights of the unet"):
        pipe(TARGET, picture, SOURCE, inversion=loaded)


def test_what_cannot_be_saved_is_refused(inversion: Inversion, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stopped before its end"):
        replace(inversion, interrupted=True).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"trajectory is torch\.float64"):
        replace(inversion, trajectory=inversion.trajectory.double()).save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(note.txt\)"):
        inversion.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a file; give a new folder"):
        inversion.save_pretrained(tmp_path / "note.txt")
    inversion.save_pretrained(tmp_path / "b")
    inversion.save_pretrained(tmp_path / "b")  # its own folder may be written again


def rewrite(folder: Path, **changes: Any) -> None:
    """As somebody who knows the format would: with a checksum that fits."""
    config = json.loads((folder / CONFIG_FILE).read_text()) | changes
    config["checksum"] = checksum_of(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def rewrite_tensors(folder: Path, **changes: torch.Tensor) -> None:
    save_file(load_file(folder / TENSORS_FILE) | changes, folder / TENSORS_FILE)
    data = (folder / TENSORS_FILE).read_bytes()
    rewrite(folder, tensors={"bytes": len(data), "sha256": sha256_of(data)})


def damage(folder: Path) -> None:
    data = bytearray((folder / TENSORS_FILE).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS_FILE).write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / CONFIG_FILE).unlink(), "no inversion that save_pretrained wrote"),
        (lambda f: (f / TENSORS_FILE).unlink(), "isn't there as an ordinary file"),
        (lambda f: (f / CONFIG_FILE).write_text("{"), "is damaged"),
        (lambda f: (f / CONFIG_FILE).write_text('{"format_version": 9}'), "format version 9 and this release reads 1"),
        (lambda f: rewrite(f, surprise=1), "'surprise'"),
        (lambda f: rewrite(f, prompt=7), "prompt must be a string"),
        (lambda f: rewrite(f, clip_skip=-1), "clip_skip must be"),
        (lambda f: rewrite(f, guidance_scale="4"), "guidance_scale must be a number"),
        (lambda f: rewrite(f, placement={"box": [1]}), "placement must be"),
        (lambda f: rewrite(f, made_with={}), "made_with must be a record"),
        (lambda f: rewrite(f, method="magic"), "inversion method='magic' is unknown"),
        (damage, "is damaged or another file"),
        (lambda f: rewrite_tensors(f, trajectory=torch.zeros(3, 4)), "trajectory has the shape"),
        (lambda f: rewrite_tensors(f, residuals=torch.zeros(9, 4, 16, 16)), "residuals has the shape"),
        (lambda f: rewrite_tensors(f, unconditional_embeds=torch.zeros(9, 4, 4)), "unconditional_embeds has the shape"),
        (lambda f: rewrite_tensors(f, more=torch.zeros(1)), "holds more, trajectory"),
        (lambda f: rewrite_tensors(f, residuals=torch.full((2, 4, 16, 16), torch.nan)), "no numbers"),
    ],
)
def test_what_no_inversion_can_hold_is_refused(
    inversion: Inversion, tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    inversion.save_pretrained(tmp_path / "it")
    change(tmp_path / "it")
    with pytest.raises(ValueError, match=message):
        Inversion.from_pretrained(tmp_path / "it")


def test_a_change_by_hand_is_seen(inversion: Inversion, tmp_path: Path) -> None:
    inversion.save_pretrained(tmp_path / "it")
    config = json.loads((tmp_path / "it" / CONFIG_FILE).read_text())
    (tmp_path / "it" / CONFIG_FILE).write_text(json.dumps(config | {"prompt": "a cat"}))
    with pytest.raises(ValueError, match="was changed by hand: its checksum is another"):
        Inversion.from_pretrained(tmp_path / "it")


def test_a_link_out_of_the_folder_is_not_followed(inversion: Inversion, tmp_path: Path) -> None:
    inversion.save_pretrained(tmp_path / "it")
    (tmp_path / "it" / TENSORS_FILE).rename(tmp_path / "elsewhere")
    (tmp_path / "it" / TENSORS_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="isn't there as an ordinary file"):
        Inversion.from_pretrained(tmp_path / "it")
