"""What the pipeline says without refusing: words, pictures and settings that will disappoint."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from s2edit_pipeline import S2EditPipeline, load_avatars
from s2edit_pipeline.avatars.world import render, sample_person

SOURCE, TARGET = "a photo of a sad lady", "a photo of a smiling lady"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    """The warnings so far, as one text."""
    caplog.set_level(logging.WARNING)
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def edit(pipe: S2EditPipeline, picture: Image.Image, target: str, **more: Any) -> Any:
    return pipe(target, picture, SOURCE, num_inference_steps=4, output_type="np", **more)


def test_a_long_negative_prompt_is_cut_and_what_is_lost_is_named(
    pipe: S2EditPipeline, picture: Image.Image, said: Any
) -> None:
    words = " ".join(["hat"] * 40)
    long = edit(pipe, picture, TARGET, negative_prompt=f"{words} and a very green sweater with glasses and a beard")
    assert "cut off was" in said() and "beard" in said()
    assert pipe.tokenizer.model_max_length == 48
    cut = edit(pipe, picture, TARGET, negative_prompt=f"{words} and a very green sweater with")
    np.testing.assert_allclose(long.images, cut.images, atol=1e-5)


def test_a_negative_prompt_is_one_string(pipe: S2EditPipeline, picture: Image.Image) -> None:
    with pytest.raises(TypeError, match="negative_prompt must be one string, not list"):
        edit(pipe, picture, TARGET, negative_prompt=["hat"])


def test_an_edit_that_can_change_nothing_says_so(pipe: S2EditPipeline, picture: Image.Image, said: Any) -> None:
    same = edit(pipe, picture, SOURCE)
    assert np.array_equal((same.images[0] * 255).round(), picture) and "Edit 1 of 1 is the picture itself" in said()


@pytest.mark.parametrize("settings", [{"num_inference_steps": 1}, {"strength": 0.1}])
def test_an_edit_that_nobody_will_see_says_so(said: Any, settings: dict[str, Any]) -> None:
    pipe, picture = load_avatars(), render(sample_person(3, "held_out"))
    pipe.set_progress_bar_config(disable=True)
    prompt = "a photo of a surprised man with short curly black hair"
    pipe(prompt.replace("surprised", "smiling"), picture, prompt, **{"num_inference_steps": 10, **settings})
    assert "Edit 1 of 1 can't be told from the picture" in said()


def test_an_edit_that_changes_something_says_nothing_of_it(
    pipe: S2EditPipeline, picture: Image.Image, said: Any
) -> None:
    edit(pipe, picture, TARGET)
    assert "is the picture itself" not in said()


def test_an_instruction_is_no_target_prompt(pipe: S2EditPipeline, picture: Image.Image, said: Any) -> None:
    edit(pipe, picture, "make her smile")
    assert "reads like an instruction" in said()


def test_words_that_a_small_vocabulary_lacks_are_named(pipe: S2EditPipeline, picture: Image.Image, said: Any) -> None:
    edit(pipe, picture, "a photo of a smilng lady")
    assert "doesn't know the word 'smilng' (did you mean 'smiling'?)" in said()


def test_written_weights_reweight(pipe: S2EditPipeline, picture: Image.Image) -> None:
    written = edit(pipe, picture, "a photo of a (smiling:1.7) lady")
    asked = edit(pipe, picture, TARGET, reweight={"smiling": 1.7})
    np.testing.assert_array_equal(written.images, asked.images)
    assert np.abs(written.images - edit(pipe, picture, TARGET).images).max() > 0
    with pytest.raises(ValueError, match="holds weights; they belong in the target prompt"):
        pipe(TARGET, picture, "a photo of a (sad:2) lady", num_inference_steps=2)


@pytest.mark.parametrize("word", ["[I]", "[l]", "<ada>"])
def test_what_looks_like_a_learned_token_and_is_none_is_refused(
    pipe: S2EditPipeline, picture: Image.Image, word: str
) -> None:
    prompt = f"a photo of a {word} lady"
    calls: list[Any] = [
        lambda: edit(pipe, picture, prompt),
        lambda: pipe(prompt, num_inference_steps=2),
        lambda: pipe.invert(picture, prompt, num_inference_steps=2),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"looks like a learned token.*pipe.load_identity\(identity\)"):
            call()


def test_a_lora_without_a_second_text_encoder_is_loaded_in_silence(pipe: S2EditPipeline, said: Any) -> None:
    name, layer = next((n, m) for n, m in pipe.unet.named_modules() if n.endswith("attn2.to_q"))
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, layer.in_features, generator=generator), torch.randn(layer.out_features, 2)
    pipe.load_lora_weights({f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up})
    assert pipe.get_active_adapters() and "NoneType" not in said()


def test_the_embedded_model_says_that_it_does_not_know_a_photograph(said: Any) -> None:
    from skimage import data

    pipe = load_avatars()
    pipe.set_progress_bar_config(disable=True)
    photograph = Image.fromarray(data.astronaut())
    prompt = "a photo of a lady with brown hair"
    pipe.fit_identity(photograph, prompt, "lady", num_steps=1, lora_init="random")
    assert "doesn't know such pictures: its loss at the first step" in said()


def test_nor_does_it_complain_of_an_avatar(said: Any) -> None:
    pipe = load_avatars()
    pipe.set_progress_bar_config(disable=True)
    picture = render(sample_person(3, "held_out"))
    prompt = "a photo of a surprised man with short curly black hair"
    pipe.fit_identity(picture, prompt, "man", num_steps=1, lora_init="random")
    assert "doesn't know such pictures" not in said()
