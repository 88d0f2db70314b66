"""What an edit returns, saved and shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.edit_output import S2EditPipelineOutput
from s2edit_pipeline.picture_files import read_picture
from s2edit_pipeline.picture_marks import DRAWN, EDITED, origin_of
from s2edit_pipeline.picture_sheet import difference_picture, picture_sheet

SOURCE, TARGETS = "a photo of a sad lady", ["a photo of a smiling lady", "a photo of a sad lady with glasses"]


def edit(pipe: S2EditPipeline, picture: Any, **more: Any) -> S2EditPipelineOutput:
    return pipe(TARGETS, picture, SOURCE, num_inference_steps=2, **more)


def test_pictures_are_saved_with_their_marks(pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path) -> None:
    out = edit(pipe, picture)
    paths = out.save([tmp_path / "a.png", str(tmp_path / "b.tif")])
    assert [path.name for path in paths] == ["a.png", "b.tif"]
    for path, image, prompt in zip(paths, out.images, TARGETS, strict=True):
        saved = read_picture(path)
        assert np.array_equal(np.asarray(saved.rgb), np.asarray(image.convert("RGB")))
        assert origin_of(saved.xmp).source_type == EDITED and origin_of(saved.xmp).prompt == prompt
    out.save(paths, prompt_in_metadata=False)
    assert origin_of(read_picture(paths[0]).xmp).prompt is None


def test_what_is_drawn_says_so(pipe: S2EditPipeline, tmp_path: Path) -> None:
    out = pipe(TARGETS[0], num_inference_steps=2, num_images_per_prompt=2)
    for path in out.save([tmp_path / "a.png", tmp_path / "b.png"]):
        origin = origin_of(read_picture(path).xmp)
        assert origin.source_type == DRAWN and origin.prompt == TARGETS[0]
    assert out.visualize().width > 256


def test_a_16_bit_picture_stays_one(pipe: S2EditPipeline, tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 2**16, (48, 64), np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    out = pipe(TARGETS[0], tmp_path / "deep.png", SOURCE, num_inference_steps=2)
    (path,) = out.save(tmp_path / "edited.png")
    kept = np.asarray(out.edit_masks[0]) == 0 if out.edit_masks[0] is not None else np.zeros((48, 64), bool)
    assert np.array_equal(np.asarray(Image.open(path))[kept], deep[kept])


@pytest.mark.parametrize("call", ["save", "visualize"])
def test_what_is_no_picture_is_refused(call: str, pipe: S2EditPipeline, picture: Image.Image) -> None:
    out = edit(pipe, picture, output_type="latent")
    with pytest.raises(ValueError, match="output_type='pil'"):
        out.save(["a.png", "b.png"]) if call == "save" else out.visualize()


def test_a_path_for_each(pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 pictures and 1 paths"):
        edit(pipe, picture).save(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_everything_in_one_picture(pipe: S2EditPipeline, picture: Image.Image) -> None:
    out = edit(pipe, picture, return_attention_maps=True, edit_mask=Image.new("L", picture.size, "white"))
    shown = out.visualize(side=64)
    row = 64 + 22 + 8
    count = -(-len(out.attention_maps or {}) // 4)
    assert shown.size == (4 * 72 + 8, (2 + count) * row + 8)
    left_of = np.asarray(shown.crop((8, 8 + 22, 8 + 64, 8 + 22 + 64)), float)
    assert np.abs(left_of - np.asarray(picture.convert("RGB").resize((64, 64), 1), float)).mean() < 1  # before


def test_a_sheet_and_a_difference_by_hand() -> None:
    red, blue = (Image.new("RGB", (10, 20), color) for color in ("red", "blue"))
    sheet = np.asarray(picture_sheet([[("one", red), ("none", None)], [("two", blue)]], side=40, title="all"))
    assert sheet.shape == (2 * (40 + 22 + 8) + 22 + 8, 2 * 48 + 8, 3)
    assert tuple(sheet[30 + 22 + 20, 8 + 10]) == (255, 0, 0) and tuple(sheet[30 + 70 + 22 + 20, 8 + 10]) == (0, 0, 255)
    same = np.asarray(difference_picture(red, red))
    assert (same == 128).all()
    faint = Image.new("RGB", (10, 20), (250, 3, 0))
    assert tuple(np.asarray(difference_picture(red, faint))[0, 0]) == (128 - 4 * 5, 128 + 4 * 3, 128)
