"""Photographs as they come: out comes the picture that went in, but for the edit; small subjects are worked at close
up, and fit, mask, inversion and edit agree on where."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from s2edit_pipeline import IdentityAdapter, S2EditPipeline, load_avatars
from s2edit_pipeline import object_search as search
from s2edit_pipeline.attention_spatial import mask_at
from s2edit_pipeline.picture_files import read_picture
from s2edit_pipeline.picture_placement import PlacedPicture, place_picture
from s2edit_pipeline.prompt_parts import changes_only_the_subject, subject_noun

SOURCE, TARGET = "a photo of a sad lady with glasses", "a photo of a smiling lady with glasses"
WITH = "a photo of a smiling [I] lady with glasses"
SIZE = (200, 150)
SUBJECT = (130, 40, 154, 64)
"""Where the lady is: 24 x 24 of 200 x 150, and the model works at 32 x 32."""


def photograph(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(noise[..., :3]).convert(mode) if mode != "RGBA" else Image.fromarray(noise)


def box_mask(box: tuple[int, int, int, int], size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros((size[1], size[0]), np.float32)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return mask


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[PlacedPicture]:
    """Where the lady has been looked for: the attention that finds her is replaced by the truth."""
    seen: list[PlacedPicture] = []

    def look(self: search.Search, work: Any, placed: PlacedPicture) -> search.Found:
        seen.append(placed)
        self.prompt.find(self.subject)
        latents = work.family.encode_picture(placed.canvas)
        return search.Found(
            placed, latents, search.cells_of(box_mask(SUBJECT), placed.placement, latents.shape[-2:])
        )  # fmt: skip

    monkeypatch.setattr(search.Search, "look", look)
    return seen


@pytest.fixture(scope="module")
def identity(_tiny: dict[str, Any]) -> Iterator[IdentityAdapter]:
    """Fitted to the lady close up."""
    pipe = S2EditPipeline(**_tiny["epsilon"])
    pipe.set_progress_bar_config(disable=True)
    yield pipe.fit_identity(
        photograph(), SOURCE, "lady", method="token", mask=box_mask(SUBJECT), num_steps=1,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


# ------------------------------------------------------------------------------ size, mode, pixels


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "CMYK", "I;16", "P"])
def test_a_picture_keeps_its_size_its_mode_and_its_bits_outside_the_edit(pipe: S2EditPipeline, mode: str) -> None:
    picture, mask = photograph(mode), box_mask((100, 20, 180, 100))
    result = pipe(TARGET, picture, SOURCE, num_inference_steps=2, edit_mask=mask)
    (edited,), (where,) = result.images, result.edit_masks
    before, after, outside = (np.asarray(one) for one in (picture, edited, where))
    assert (edited.mode, edited.size, where.size) == (mode, SIZE, SIZE)
    if mode == "P":  # its unused places may hold other colours
        before, after = (np.asarray(one.convert("RGB")) for one in (picture, edited))
    assert np.array_equal(after[outside == 0], before[outside == 0])
    assert not np.array_equal(after, before) and not outside[mask == 0].any() and outside.max() == 255


def test_the_edit_is_whole_in_every_cell_that_it_may_change(pipe: S2EditPipeline, picture: Image.Image) -> None:
    """It fades out around them: within them the edit's own change is shown."""
    settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 7.0, "blend_threshold": 0.97}
    cells = np.asarray(pipe(TARGET, picture, SOURCE, output_type="latent", **settings).edit_masks[0]) > 127
    shown = np.asarray(pipe(TARGET, picture, SOURCE, **settings).edit_masks[0])
    assert 0.02 < cells.mean() < 0.6 and shown[cells].min() > 240
    assert (shown[~cells] == 0).mean() > 0.2  # and further out nothing is


def test_each_form_is_as_large_as_the_picture(pipe: S2EditPipeline) -> None:
    arguments: dict[str, Any] = {"image": photograph(), "source_prompt": SOURCE, "num_inference_steps": 1, "crop": None}
    arguments["inversion"] = pipe.invert(photograph(), SOURCE, num_inference_steps=1, crop=None)
    del arguments["num_inference_steps"]
    pil, array, tensor, latents = (
        pipe(TARGET, output_type=form, **arguments) for form in ("pil", "np", "pt", "latent")
    )
    assert array.images.shape == (1, 150, 200, 3) == array.source.shape and tensor.images.shape == (1, 3, 150, 200)
    assert np.array_equal((array.images[0] * 255).round(), np.asarray(pil.images[0]))
    assert np.array_equal(tensor.images[0].permute(1, 2, 0).numpy(), array.images[0])
    assert latents.images.shape == (1, 4, 14, 18) and latents.edit_masks[0].size == SIZE
    small = pipe(TARGET, output_size="model", **arguments)
    assert small.images[0].size == small.source.size == small.edit_masks[0].size == (36, 27)  # 0.75, of 36 x 28
    assert small.images[0].mode == "RGB"


def test_a_stopped_call_gives_the_picture_back(pipe: S2EditPipeline) -> None:
    stop = threading.Event()
    stop.set()
    result = pipe(
        [TARGET, "a photo of a lady"], photograph("RGBA"), SOURCE, num_inference_steps=2, stop=stop, crop=None
    )
    assert result.interrupted and result.edit_masks == [None, None]
    assert all(np.array_equal(np.asarray(one), np.asarray(photograph("RGBA"))) for one in result.images)


def test_an_inversion_keeps_its_picture(pipe: S2EditPipeline) -> None:
    inversion = pipe.invert(photograph("RGBA"), SOURCE, num_inference_steps=1, crop=SUBJECT)
    (edited,) = pipe(TARGET, inversion=inversion).images
    assert edited.mode == "RGBA" and edited.size == SIZE
    nothing_known = replace(inversion, source=None, placement=None)
    assert pipe(TARGET, inversion=nothing_known, edit_mask=np.ones((8, 8))).images[0].size == (32, 32)


# ------------------------------------------------------------------------------ close up


def test_a_small_subject_is_found_coarse_then_fine(pipe: S2EditPipeline, looks: list[PlacedPicture]) -> None:
    preview = np.asarray(pipe.preview_mask(photograph(), SOURCE, "lady"))
    assert [placed.is_whole for placed in looks] == [True, False]
    left, top, right, bottom = looks[1].placement.box
    assert left <= 130 and top <= 40 and right >= 154 and bottom >= 64  # all of her
    assert right - left == bottom - top < 70
    truth = box_mask(SUBJECT) > 0
    assert (preview[truth] > 0).mean() > 0.95 and preview.shape == (150, 200)
    found = preview > 0
    assert (found & truth).sum() / (found | truth).sum() > 0.75
    coarse = np.asarray(pipe.preview_mask(photograph(), SOURCE, "lady", crop=None)) > 0
    assert (coarse & truth).sum() / (coarse | truth).sum() < 0.65  # a cell is 11 pixels wide


def test_fit_inversion_and_edit_agree_on_the_crop(
    pipe: S2EditPipeline, looks: list[PlacedPicture], identity: IdentityAdapter
) -> None:
    found = pipe.fit_identity(photograph(), SOURCE, "lady", method="token", num_steps=1)
    box = looks[-1].placement.box
    assert found.settings["crop"] == ",".join(map(str, box)) and looks[-1].placement.canvas_size == (32, 32)
    looks.clear()
    result = pipe(WITH, photograph(), SOURCE, found, num_inference_steps=1)
    inversion = pipe.invert(photograph(), SOURCE, identity=found, num_inference_steps=1)
    assert inversion.placement.box == box and not looks  # it is known from the fit
    outside = np.ones((150, 200), bool)
    outside[box[1] : box[3], box[0] : box[2]] = False
    assert np.array_equal(np.asarray(result.images[0])[outside], np.asarray(photograph())[outside])

    again = pipe(WITH, photograph(), SOURCE, found, inversion, crop=box)
    assert np.array_equal(np.asarray(again.images[0]), np.asarray(pipe(WITH, None, SOURCE, found, inversion).images[0]))
    for crop in (None, (0, 0, 100, 100)):
        with pytest.raises(ValueError, match=r"crop=.*, but the inversion was made of \(\d+, .*pipe.invert"):
            pipe(WITH, photograph(), SOURCE, found, inversion, crop=crop)

    other = photograph().rotate(180)  # the identity edits another picture, in which she has to be looked for
    pipe(WITH, other, SOURCE, found, num_inference_steps=1)
    assert looks


def test_whoever_is_not_known_is_looked_for_by_the_captions_noun(
    pipe: S2EditPipeline, looks: list[PlacedPicture]
) -> None:
    inversion = pipe.invert(photograph(), SOURCE, num_inference_steps=1)
    assert looks[0].is_whole and inversion.placement.box != (0, 0, *SIZE)
    looks.clear()
    pipe("a photo of a sad lady with glasses on a beach", photograph(), SOURCE, num_inference_steps=1)
    assert not looks  # what changes isn't she
    pipe(TARGET, photograph(), SOURCE, num_inference_steps=1, edit_mask=box_mask(SUBJECT))
    assert not looks
    pipe(TARGET, photograph(), SOURCE, num_inference_steps=1, crop=(0, 0, 60, 60))
    assert not looks


def test_words_beyond_a_close_up_warn(
    pipe: S2EditPipeline, looks: list[PlacedPicture], caplog: pytest.LogCaptureFixture
) -> None:
    inversion = pipe.invert(photograph(), SOURCE, num_inference_steps=1)
    caplog.set_level(logging.WARNING, logger="s2edit_pipeline")
    pipe("a photo of a sad lady with glasses on a beach", None, SOURCE, inversion=inversion)
    assert "invert with pipe.invert(..., crop=None)" in caplog.text


@pytest.mark.parametrize(("with_words", "is_warned"), [(-0.1, False), (0.1, True)])
def test_a_place_that_words_do_not_explain_warns(
    pipe: S2EditPipeline,
    looks: list[PlacedPicture],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    with_words: float,
    is_warned: bool,
) -> None:
    """Whether the denoising error is less under the prompt than under none, at the place that was settled on."""
    seen: list[tuple[int, ...]] = []

    def errors(judge: search.DenoisingJudge, captions: list[str], share: float, k: int) -> list[float]:
        seen.append(tuple(judge.latents.shape))
        assert captions == [SOURCE, ""]
        return [with_words, 0.0]

    monkeypatch.setattr(search.DenoisingJudge, "errors", errors)
    pipe.preview_mask(photograph(), SOURCE, "lady")
    box = str(looks[-1].placement.box).replace("(", "[(]").replace(")", "[)]")
    said = re.search(f"'lady' .* wrong place.*at {box} no better.*pass crop=", caplog.text)
    assert (said is not None) is is_warned and set(seen) == {(1, 4, 16, 16)}


def test_the_model_is_not_asked_about_a_picture_of_about_its_size(
    pipe: S2EditPipeline, looks: list[PlacedPicture]
) -> None:
    picture = photograph(size=(50, 40))  # a close-up of less than 0.4 of it has fewer pixels than the canvas
    pipe(TARGET, picture, SOURCE, num_inference_steps=1)
    pipe.invert(picture, SOURCE, num_inference_steps=1)
    assert not looks


def test_an_identitys_mask_moves_with_the_crop(identity: IdentityAdapter) -> None:
    """Fitted close up and edited on the whole picture, it is where she is."""
    source = read_picture(photograph())
    whole = PlacedPicture(source, place_picture(SIZE, 32, 4))
    moved = search.mask_in(whole, identity.mask, identity.settings)
    wanted = mask_at(torch.from_numpy(whole.placement.mask_to_canvas(box_mask(SUBJECT))), 14, 18)
    assert torch.equal(mask_at(moved, 14, 18), wanted) and 0 < wanted.sum() < 10
    box = search.box_of(identity.settings, source)
    fitted = PlacedPicture(source, place_picture(SIZE, 32, 4, box))
    assert search.mask_in(fitted, identity.mask, identity.settings) is identity.mask
    other = PlacedPicture(read_picture(photograph().rotate(180)), whole.placement)
    assert search.mask_in(other, identity.mask, identity.settings) is identity.mask
    # one that the caller placed is of the whole picture, whatever is worked on
    placed = search.mask_in(fitted, torch.from_numpy(box_mask(SUBJECT)), search.PLACED_MASK)
    assert torch.equal(mask_at(placed, 16, 16), mask_at(identity.mask, 16, 16))


def test_an_odd_crop_is_refused(pipe: S2EditPipeline) -> None:
    for call in (pipe.invert, lambda *a, **k: pipe(TARGET, *a, **k)):
        with pytest.raises(ValueError, match="crop='close' is unknown; choose 'auto'"):
            call(photograph(), SOURCE, crop="close")
        with pytest.raises(ValueError, match=r"crop must be \(left, top, right, bottom\).*200 x 150, not \(0, 0, 201"):
            call(photograph(), SOURCE, crop=(0, 0, 201, 20))
    with pytest.raises(ValueError, match="output_size='large' is unknown; choose 'picture' or 'model'"):
        pipe(TARGET, photograph(), SOURCE, output_size="large")


def test_a_mask_that_is_seldom_meant_warns(pipe: S2EditPipeline, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="s2edit_pipeline")
    fit = {"method": "token", "num_steps": 1, "crop": None}
    pipe.fit_identity(photograph(), SOURCE, "lady", mask=box_mask((60, 30, 140, 120)), **fit)
    assert "of the picture" not in caplog.text
    pipe.fit_identity(photograph(), SOURCE, "lady", mask=np.ones((150, 200)), **fit)
    assert "The mask of 'lady' covers 100% of the picture" in caplog.text


# ------------------------------------------------------------------------------ what words change


@pytest.mark.parametrize(
    ("source", "target", "only"),
    [
        (SOURCE, TARGET, True),
        (SOURCE, WITH, True),
        (SOURCE, SOURCE, True),
        (SOURCE, "a photo of a sad lady", True),
        (SOURCE, "a photo of a sad lady with glasses and a hat", True),
        (SOURCE, "a photo of a sad man with glasses", True),
        (SOURCE, "a photo of a sad lady with glasses wearing a scarf", True),
        (SOURCE, "a photo of a sad lady with glasses on a beach", False),
        (SOURCE, "a painting of a sad lady with glasses", False),
        (SOURCE + " on a blue background", SOURCE + " on a red background", False),
        (SOURCE + " on a blue background", TARGET + " on a blue background", True),
        ("a cat", "a dog", True),
        ("a cat in a garden", "a cat in a garden and a house", False),
    ],
)
def test_what_changes_only_the_subject(source: str, target: str, only: bool) -> None:
    assert changes_only_the_subject(source, target) is only


def test_what_a_caption_is_about() -> None:
    assert [subject_noun(text) for text in (SOURCE, WITH, "a cat in a garden", "[I]")] == ["lady", "lady", "cat", None]


# ------------------------------------------------------------------------------ twelve megapixels


@pytest.mark.slow
def test_twelve_megapixels_cost_little_beside_the_models_own_work() -> None:
    """Beside the edit of a picture of the model's size: at most 3 seconds and 300 MB."""
    psutil = pytest.importorskip("psutil")
    pipe, process = load_avatars(), psutil.Process()
    pipe.set_progress_bar_config(disable=True)
    shades = np.add.outer(np.arange(3000) // 12, np.arange(4000) // 16).astype(np.uint8)
    whole = Image.fromarray(np.stack([shades, 255 - shades, shades // 2], -1))
    box = (1500, 900, 2700, 2100)

    def cost(image: Image.Image, crop: Any) -> tuple[float, float]:
        """CPU seconds, and how much the memory rose, in MB."""
        before, peak, ended = process.memory_info().rss, [0], threading.Event()

        def watch() -> None:
            while not ended.wait(0.002):
                peak[0] = max(peak[0], process.memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.process_time()
        pipe(TARGET, image, SOURCE, num_inference_steps=10, crop=crop)
        seconds = time.process_time() - start
        ended.set()
        watcher.join()
        return seconds, (peak[0] - before) / 2**20

    small = whole.crop(box).resize((128, 128))
    cost(small, None)
    alone, near = (cost(small, None) for _ in range(2))
    for crop in (box, "auto"):
        seconds, megabytes = cost(whole, crop)
        assert seconds - min(alone[0], near[0]) < 3 and megabytes < 300
