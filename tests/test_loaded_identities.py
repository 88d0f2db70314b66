"""Identities in a pipeline that lives: beside each other, beside LoRAs and learned words, saved, shared, asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file

from s2edit_pipeline import IdentityAdapter, ReferenceAttribute, S2EditPipeline

SOURCE = "a photo of a sad lady with glasses"
WITH = "a photo of a smiling [I] lady with glasses"


def _fit(
    pipe: S2EditPipeline, picture: Image.Image, mask: np.ndarray, seed: int = 0, **changes: Any
) -> IdentityAdapter:
    return pipe.fit_identity(
        picture, SOURCE, "lady", mask=mask, num_steps=2, learning_rate=1e-2,
        generator=torch.Generator().manual_seed(seed), **changes,
    )  # fmt: skip


@pytest.fixture
def identity(pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray) -> IdentityAdapter:
    return _fit(pipe, picture, half_mask)


def _edit(pipe: S2EditPipeline, picture: Image.Image, **arguments: Any) -> torch.Tensor:
    settings = {"source_prompt": SOURCE, "num_inference_steps": 3, "output_type": "latent", **arguments}
    return pipe(WITH, picture, **settings).images


def test_an_identity_that_is_loaded_may_be_passed_too(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray, identity: IdentityAdapter, tmp_path: Path
) -> None:
    """Itself, by its token, or by the folder that it lies in."""
    wanted = _edit(pipe, picture, identity=identity)
    identity.save_pretrained(tmp_path)
    pipe.load_identity(identity)
    for same in (identity, "[I]", str(tmp_path), tmp_path, None):
        assert torch.equal(_edit(pipe, picture, identity=same), wanted)
    assert pipe.identities == ("[I]",)
    with pytest.raises(ValueError, match="is loaded already"):
        _edit(pipe, picture, identity=_fit_elsewhere(pipe, picture, half_mask))
    pipe.unload_identity()
    with pytest.raises(ValueError, match=r"No identity '\[I\]' is loaded; loaded are: none"):
        _edit(pipe, picture, identity="[I]")
    # the prompt of an identity that is passed is known, also where the target doesn't say its token
    plain = pipe("a photo of a smiling lady with glasses", picture, identity=identity, num_inference_steps=2)
    assert plain.images


def _fit_elsewhere(pipe: S2EditPipeline, picture: Image.Image, mask: np.ndarray) -> IdentityAdapter:
    other = copy.deepcopy(pipe)
    other.unload_identity()
    return _fit(other, picture, mask, seed=1)


def test_an_inversion_knows_its_identity(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray, identity: IdentityAdapter
) -> None:
    other = _fit(pipe, picture, half_mask, seed=1)
    inversion = pipe.invert(picture, SOURCE, identity=identity, num_inference_steps=3)
    arguments: dict[str, Any] = {"inversion": inversion, "output_type": "latent"}
    with pytest.raises(ValueError, match=r"'\[I\]' in .* looks like a learned token, and none of that name is loaded"):
        pipe(WITH, picture, SOURCE, **arguments)
    without = WITH.replace("[I] ", "")
    with pytest.raises(ValueError, match=r"made under .*\[I\].* and the edit's source prompt is"):
        pipe(without, picture, SOURCE, **arguments)
    with pytest.raises(
        ValueError, match=r"made with the identity '\[I\]', and another identity, scale or mask is loaded"
    ):
        pipe(WITH, picture, SOURCE, other, **arguments)
    found = pipe(WITH, picture, SOURCE, identity, **arguments).images
    # in one call the source's row is in the targets' batch: other sums
    torch.testing.assert_close(found, _edit(pipe, picture, identity=identity), rtol=0, atol=1e-4)
    assert identity.digest == identity.renamed("[J]").digest != other.digest


def test_two_identities_before_the_same_noun(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray, identity: IdentityAdapter
) -> None:
    pipe.load_identity(identity)
    pipe.load_identity(identity, token="[J]")
    for prompt in ("a photo of a sad [I] lady with glasses", "a photo of a sad [J] lady with glasses"):
        assert pipe.invert(picture, prompt, num_inference_steps=2).prompt == prompt
    assert pipe.invert(picture, SOURCE, identity="[J]", num_inference_steps=2).prompt.count("[") == 1
    with pytest.raises(ValueError, match=r"same noun .*: \[I\], \[J\]. Say which, identity='\[I\]'"):
        pipe.invert(picture, SOURCE, num_inference_steps=2)


def test_each_identity_keeps_its_own_switches(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray, identity: IdentityAdapter
) -> None:
    switched = _fit(pipe, picture, half_mask, mask_after=True)
    alone = _edit(pipe, picture, identity=switched)
    pipe.load_identity(switched)
    loaded = _edit(pipe, picture)
    pipe.load_identity(identity, token="[J]", scale=0.0)
    assert torch.equal(loaded, alone)
    torch.testing.assert_close(_edit(pipe, picture), alone, rtol=1e-4, atol=1e-4)


def test_compositions_can_be_renamed_whole(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray, identity: IdentityAdapter
) -> None:
    reference = ReferenceAttribute(picture, "a man with a hat", "hat", mask=half_mask)
    both = _fit(pipe, picture, half_mask, reference=reference)
    pipe.load_identity(both)
    with pytest.raises(
        ValueError, match=r"'\[A\]' is loaded already, with the identity '\[I\]'.*\(\.\.\., reference_token='\[A2\]'"
    ):
        pipe.load_identity(both, token="[J]")
    with pytest.raises(
        ValueError, match=r"'\[A\]' is loaded already, with the identity '\[I\]'.*\.\.\., token='\[A2\]'"
    ):
        pipe.load_identity(identity, token="[A]")
    assert pipe.load_identity(both, token="[J]", reference_token="[B]") == "[J]"
    assert pipe.tokenizer.tokenize("a [J] lady with [B] hat and [A] hat").count("[B]") == 1
    pipe.unload_identity()
    with pytest.raises(ValueError, match=r"can't both be '\[A\]'"):
        both.renamed("[A]")
    with pytest.raises(ValueError, match="fitted without a reference"):
        identity.renamed(reference_token="[B]")


def test_a_pipeline_is_saved_without_its_identities(
    pipe: S2EditPipeline, picture: Image.Image, identity: IdentityAdapter, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path / "bare")
    pipe.load_identity(identity, scale=0.5)
    wanted = _edit(pipe, picture)
    pipe.save_pretrained(tmp_path / "loaded")
    assert torch.equal(_edit(pipe, picture), wanted) and pipe.identities == ("[I]",)
    for file in (tmp_path / "bare").rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "loaded" / file.relative_to(tmp_path / "bare")).read_bytes()
    again = S2EditPipeline.from_pretrained(tmp_path / "loaded")
    again.set_progress_bar_config(disable=True)
    again.load_identity(identity, scale=0.5)
    assert torch.equal(_edit(again, picture), wanted)
    with pytest.raises(ValueError, match=r"loaded \(\[I\]\). Call unload_identity"):
        S2EditPipeline.from_pipe(pipe)
    pipe.unload_identity()
    assert S2EditPipeline.from_pipe(pipe).identities == ()


def test_an_identity_beside_someone_elses_lora(
    make_pipe: Callable[[], S2EditPipeline], picture: Image.Image, identity: IdentityAdapter
) -> None:
    """Attached before or after, the same base model is recognised, and the same picture comes out."""
    edits = []
    for first in (True, False):
        pipe = make_pipe()
        if not first:
            pipe.load_identity(identity)
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
        if first:
            pipe.load_identity(identity)
        edits.append(_edit(pipe, picture))
        with pytest.raises(ValueError, match="fuse_lora changes what the loaded identities"):
            pipe.fuse_lora()
    torch.testing.assert_close(edits[0], edits[1])


def test_a_second_identity_is_checked_as_the_first(
    make_pipe: Callable[[], S2EditPipeline], pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray,
    identity: IdentityAdapter,
) -> None:  # fmt: skip
    other = make_pipe()
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter.add_(0.05)
    foreign = _fit(other, picture, half_mask)
    full = _fit(pipe, picture, half_mask, method="full")
    pipe.load_identity(full)  # every weight is changed now
    pipe.load_identity(identity, token="[J]")
    with pytest.raises(ValueError, match="other weights than this pipeline's"):
        pipe.load_identity(foreign, token="[K]")
    assert pipe.identities == ("[I]", "[J]")


def test_learned_words_come_before_identities(pipe: S2EditPipeline, identity: IdentityAdapter, tmp_path: Path) -> None:
    save_file({"<cat>": torch.zeros(1, 32)}, str(tmp_path / "cat.safetensors"))
    pipe.load_identity(identity)
    with pytest.raises(ValueError, match=r"load_textual_inversion changes .*\[I\].*unload_identity"):
        pipe.load_textual_inversion(str(tmp_path / "cat.safetensors"), token="<cat>")
    pipe.unload_identity()
    pipe.load_textual_inversion(str(tmp_path / "cat.safetensors"), token="<cat>")
    pipe.load_identity(identity)
    assert pipe.tokenizer.tokenize("a <cat> and a [I] lady").count("<cat>") == 1
    assert pipe("a <cat> and a [I] lady", num_inference_steps=1).images
    pipe.unload_identity()
    assert "<cat>" in pipe.tokenizer.get_added_vocab()


def test_where_gradients_are_off_for_good(pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray) -> None:
    with torch.no_grad():
        assert _fit(pipe, picture, half_mask).measures["cosine_first"]
    with torch.inference_mode():
        for call in (
            lambda: _fit(pipe, picture, half_mask),
            lambda: pipe.invert(picture, SOURCE, "null_text", 2),
            lambda: pipe(SOURCE, picture, SOURCE, inversion="null_text", num_inference_steps=2),
        ):
            with pytest.raises(ValueError, match=r"outside torch.inference_mode\(\)"):
                call()
        plain = pipe(WITH.replace("[I] ", ""), picture, SOURCE, num_inference_steps=3, output_type="latent").images
        assert plain.shape == (1, 4, 16, 16)  # an edit needs none


def test_an_offloaded_model_is_not_fitted(pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(pipe.unet, ModelHook())
    with pytest.raises(ValueError, match=r"The unet is offloaded.*pipe.remove_all_hooks\(\)"):
        _fit(pipe, picture, half_mask)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"inversion": "null_text"}, ValueError, "inversion= is for editing a picture: pass image= too"),
        ({"source_prompt": SOURCE}, ValueError, "source_prompt= is for editing"),
        ({"edit_mask": np.ones((4, 4))}, ValueError, "edit_mask= is for editing"),
        ({"return_attention_maps": True}, ValueError, "return_attention_maps= is for editing"),
        ({"blend_words": ["hat"]}, ValueError, "blend_words= is for editing"),
        ({"guidance_stop": 0.3}, ValueError, "guidance_stop= is for editing"),
        ({"strength": 0.5}, ValueError, "strength= is for editing"),
        ({"edit": "replace"}, ValueError, "edit= is for editing"),
        ({"cross_replace_steps": 0.2}, ValueError, "cross_replace_steps= is for editing"),
        ({"change_threshold": 0.5}, ValueError, "change_threshold= is for editing"),
        # these are the stock pipeline's own refusals
        ({"prompt_embeds": torch.zeros(1, 48, 32)}, ValueError, "Cannot forward both `prompt`"),
        ({"generator": [torch.Generator()] * 2}, ValueError, "list of generators of length 2"),
        ({"pooled_prompt_embeds": torch.zeros(1, 9)}, TypeError, "no argument 'pooled_prompt_embeds'"),
        ({"magic": 1}, TypeError, "StableDiffusionPipeline, which draws .* has no argument 'magic'"),
    ],
)
def test_drawing_refuses_what_it_would_ignore(
    pipe: S2EditPipeline, arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        pipe("a photo of a lady", num_inference_steps=2, **arguments)


def test_a_fit_takes_one_generator(pipe: S2EditPipeline, picture: Image.Image) -> None:
    with pytest.raises(ValueError, match=r"generator must be one for a fit, not a list of 1"):
        pipe.fit_identity(picture, SOURCE, "lady", generator=[torch.Generator()])  # type: ignore[arg-type]


def test_the_tuple_has_every_field_in_its_place(pipe: S2EditPipeline, picture: Image.Image) -> None:
    images, maps, masks, source, flagged, interrupted, pictures, before = pipe(
        SOURCE, picture, SOURCE, num_inference_steps=1, return_dict=False, callback_on_step_end_tensor_inputs=None
    )
    assert len(images) == len(masks) == 1 and maps is None and flagged is None and source.size == (32, 32)
    assert interrupted is False and pictures[0].native is images[0]
    assert np.array_equal(np.asarray(before.native), np.asarray(picture))
    assert len(pipe("a lady", num_inference_steps=1, return_dict=False)) == 8


def test_weighing_a_word_down_stays_in_its_place(pipe: S2EditPipeline, picture: Image.Image) -> None:
    regions = []
    for weight in (0.5, 0.0, -1.0):
        result = pipe(SOURCE, picture, SOURCE, reweight={"glasses": weight}, num_inference_steps=4, blend_threshold=0.9)
        regions.append(np.asarray(result.edit_masks[0]) > 127)
    assert 0 < regions[0].sum() < regions[0].size
    assert all(0 < region.sum() < region.size for region in regions[1:])


def test_every_step_that_the_schedule_has_room_for(pipe: S2EditPipeline, picture: Image.Image) -> None:
    assert pipe.scheduler.config.steps_offset == 1
    with pytest.raises(ValueError, match=r"num_inference_steps=1000 is too many .* start at 1000 of 999"):
        pipe("a lady", picture, "a lady", num_inference_steps=1000)


class Checker(torch.nn.Module):
    """Stable Diffusion's safety checker as this pipeline calls it; flags the second picture."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    device = torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def forward(self, images: torch.Tensor, clip_input: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
        assert len(images) == len(clip_input)
        return images, [i == 1 for i in range(len(images))]


def test_flagged_pictures_come_back_black(pipe: S2EditPipeline, picture: Image.Image) -> None:
    class Features(dict):
        pixel_values = torch.zeros(2, 3, 8, 8)

        def to(self, device: Any) -> Any:
            return self

    wanted = pipe([SOURCE, SOURCE], picture, SOURCE, num_inference_steps=2)
    pipe.safety_checker = Checker()
    with pytest.raises(ValueError, match="needs the feature_extractor"):
        pipe([SOURCE, SOURCE], picture, SOURCE, num_inference_steps=2)
    pipe.feature_extractor = lambda pictures, return_tensors: Features()
    found = pipe([SOURCE, SOURCE], picture, SOURCE, num_inference_steps=2)
    assert found.nsfw_content_detected == [False, True]
    assert np.asarray(found.images[1]).max() == 0
    assert np.array_equal(np.asarray(found.images[0]), np.asarray(wanted.images[0]))
    assert np.array_equal(np.asarray(found.source), np.asarray(wanted.source))
