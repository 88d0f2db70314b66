"""What every transformer family has to show, on tiny random models: each check leaves the pipeline as it found it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from s2edit_pipeline import IdentityAdapter, ReferenceAttribute, S2EditPipeline
from s2edit_pipeline.attention_seam import AttentionAccess, AttentionController, AttentionSite, attention_layers
from s2edit_pipeline.attention_spatial import SpatialControl

from ..test_custom_pipeline import PACKAGE, last_line

SOURCE, TARGET = "a photo of a sad lady with glasses", "a photo of a smiling lady with glasses"
WITH_TOKEN = "a photo of a smiling [I] lady with glasses"
WIDE, SQUARE = {"height": 16, "width": 24}, {"height": 16, "width": 16}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def state(pipe: S2EditPipeline) -> dict[str, torch.Tensor]:
    parts = {**pipe.family.tuned_components, "vae": pipe.vae}
    return {f"{part}.{n}": t.clone() for part, module in parts.items() for n, t in module.state_dict().items()}


@contextmanager
def left_as_found(pipe: S2EditPipeline) -> Iterator[None]:
    """After the context, and after an exception in it, every weight, module and processor is the one of before."""
    before, components = state(pipe), pipe.family.tuned_components
    modules = {name: list(module.modules()) for name, module in components.items()}
    processors = {name: layer.processor for name, layer in attention_layers(pipe.transformer).items()}
    tokenizers = pipe.family.tokenizers
    flags = [p.requires_grad for module in components.values() for p in module.parameters()]
    try:
        yield
    finally:
        now = state(pipe)
        assert now.keys() == before.keys()
        assert not [name for name, value in before.items() if not torch.equal(now[name], value)]
        for name, module in pipe.family.tuned_components.items():
            assert list(module.modules()) == modules[name]
        assert all(layer.processor is processors[n] for n, layer in attention_layers(pipe.transformer).items())
        assert all(tokenizer is tokenizers[name] for name, tokenizer in pipe.family.tokenizers.items())
        assert flags == [p.requires_grad for module in components.values() for p in module.parameters()]
        assert pipe.identities == ()


def fit(pipe: S2EditPipeline, picture: Image.Image, method: str = "lora", **changes: Any) -> IdentityAdapter:
    settings = {"num_steps": 2, "batch_size": 2, "generator": seeded(), "crop": None, **WIDE, **changes}
    return pipe.fit_identity(picture, SOURCE, "lady", method=method, **settings)


def edited(pipe: S2EditPipeline, picture: Image.Image, prompt: Any = TARGET, **changes: Any) -> Any:
    settings = {"num_inference_steps": 4, "output_type": "latent", "keep_pixels": False, "crop": None, **WIDE}
    made = hasattr(changes.get("inversion"), "trajectory")
    settings = {k: v for k, v in settings.items() if not made or k not in ("height", "width", "num_inference_steps")}
    return pipe(prompt, picture, SOURCE, **{**settings, **changes})


# ------------------------------------------------------------------------------ drawing


class Unchanged(AttentionController):
    """Needs every layer, and changes nothing."""

    def access_needed(self, site: AttentionSite) -> AttentionAccess:
        return AttentionAccess.INPUTS


def check_drawing_is_the_stock_pipelines(pipe: S2EditPipeline, **arguments: Any) -> None:
    """To the bit; with the seam on, to rounding."""
    given = {"num_inference_steps": 2, "output_type": "latent", "generator": None, **WIDE, **arguments}
    stock = pipe.family.stock()
    stock.set_progress_bar_config(disable=True)
    theirs = stock(prompt=SOURCE, **{**given, "generator": seeded(1)}).images
    ours = pipe(SOURCE, **{**given, "generator": seeded(1)}).images
    assert torch.equal(ours, theirs)
    scale = pipe.family.pixels_per_latent
    with pipe.family.control_attention(Unchanged(), WIDE["height"] // scale, WIDE["width"] // scale):
        seen = stock(prompt=SOURCE, **{**given, "generator": seeded(1)}).images
    torch.testing.assert_close(seen, theirs, rtol=1e-5, atol=1e-5)


def check_folders(pipe: S2EditPipeline, stock_class: Any, tmp_path: Path, **arguments: Any) -> None:
    """Saved, and loaded here and by the stock pipeline; handed over to it and back: each draws the same."""
    given = {"num_inference_steps": 2, "output_type": "latent", **WIDE, **arguments}
    expected = pipe(SOURCE, generator=seeded(1), **given).images
    pipe.save_pretrained(tmp_path)
    stock = stock_class.from_pretrained(tmp_path)
    for again in (
        S2EditPipeline.from_pretrained(tmp_path), stock, S2EditPipeline.from_pipe(stock),
        stock_class.from_pipe(pipe), stock_class(**pipe.components),
    ):  # fmt: skip
        again.set_progress_bar_config(disable=True)
        torch.testing.assert_close(
            again(prompt=SOURCE, generator=seeded(1), **given).images, expected, rtol=1e-4, atol=1e-4
        )


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def check_steps_are_the_stock_pipelines(
    pipe: S2EditPipeline,
    guidance_scale: float | None,
    pack: Callable[[torch.Tensor], torch.Tensor] = same,
    given: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **arguments: Any,
) -> None:
    """What our own loops ask of the model, and do with its answer, is what the stock pipeline does at each step.

    Args:
        pack: latents as its loop has them.
        given: latents as it takes them; None: as its loop has them.
    """
    family, seen = pipe.family, []
    size = [side // family.pixels_per_latent for side in WIDE.values()]
    x = torch.randn(1, family.latent_channels, *size, generator=seeded(3))
    pipe(
        SOURCE, latents=(given or pack)(x), num_inference_steps=3, guidance_scale=guidance_scale, output_type="latent",
        callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(tensors["latents"].clone()),
        **WIDE, **arguments,
    )  # fmt: skip
    schedule, form = family.schedule(3, (WIDE["height"], WIDE["width"])), family.guidance.form
    with torch.no_grad():
        words = family.encode([family.tokenize(SOURCE)])
        null = family.encode_negative(None, words)
        if form == "told":
            words = words.told(guidance_scale)
        for k, after in zip((3, 2, 1), seen, strict=True):
            output = family.denoise(x, schedule.timestep(k), words, torch.float32)
            if form == "branch":
                nulls = family.denoise(x, schedule.timestep(k), null, torch.float32)
                output = family.combine(nulls, output, guidance_scale)
            x = schedule.move(x, output, k, k - 1)
            torch.testing.assert_close(pack(x), after, rtol=1e-4, atol=1e-4)


def check_prompts_of_any_length_are_drawn_together(
    pipe: S2EditPipeline, picture: Image.Image, noise: torch.Tensor, **arguments: Any
) -> None:
    """Each as if it were drawn alone, its token masked where it stands in it; and drawn from embeddings."""
    prompts = ["a [I] lady", "a photo of a smiling [I] lady with glasses and a beard"]
    given = {"num_inference_steps": 2, "output_type": "latent", **WIDE, **arguments}
    with left_as_found(pipe):
        pipe.load_identity(fit(pipe, picture, "token", num_steps=1, mask=np.arange(24)[None].repeat(16, 0) < 12))
        both = pipe(prompts, latents=noise.expand(2, *noise.shape[1:]), **given).images
        for prompt, together in zip(prompts, both, strict=True):
            alone = pipe(prompt, latents=noise, **given).images[0]
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
        pipe.unload_identity()
    words, null = pipe.encode_prompt(SOURCE, negative_prompt="a hat")[:2]
    from_words = pipe(SOURCE, negative_prompt="a hat", latents=noise, **given).images
    handed = pipe(prompt_embeds=words, negative_prompt_embeds=null, latents=noise, **given).images
    torch.testing.assert_close(handed, from_words, rtol=1e-4, atol=1e-4)


BY_TRUE_CFG: tuple[dict[str, Any], dict[str, Any]] = (
    {"true_cfg_scale": 1.0}, {"true_cfg_scale": 3.0, "negative_prompt": "a hat"},
)  # fmt: skip


def check_drawn_branches(
    pipe: S2EditPipeline,
    picture: Image.Image,
    combine: Callable[..., torch.Tensor],
    noise: torch.Tensor,
    pack: Callable[[torch.Tensor], torch.Tensor] = same,
    null: str = "a hat",
    said: tuple[dict[str, Any], dict[str, Any]] = BY_TRUE_CFG,
) -> None:
    """A learned token is masked in the prompt's branch and not in the unconditional one: the first step of both
    together is that of each alone, ``combine(unconditional, conditional, 3.0)`` of what they predict.

    Args:
        noise: latents as the stock pipeline takes them, ``pack`` makes them those of its loop.
        null: the unconditional branch's words.
        said: how it is told to draw unguided, and guided by 3 away from ``null``.
    """

    def first_step(prompt: str, arguments: dict[str, Any]) -> torch.Tensor:
        """Of the packed latents, over the step's length."""
        steps: list[torch.Tensor] = []
        pipe(
            prompt, latents=noise, num_inference_steps=2, output_type="latent", **WIDE, **arguments,
            callback_on_step_end=lambda pipe, step, timestep, tensors: steps.append(tensors["latents"]),
        )  # fmt: skip
        sigmas = pipe.family.schedule(2, (WIDE["height"], WIDE["width"])).noise
        return (steps[0] - pack(noise)) / float(sigmas[1] - sigmas[2])

    unguided, guided = said
    with left_as_found(pipe):
        identity = fit(pipe, picture, "token", num_steps=1, mask=np.arange(24)[None].repeat(16, 0) < 12)
        pipe.load_identity(identity)
        alone, nulls = first_step("a [I] lady", unguided), first_step(null, unguided)
        both = first_step("a [I] lady", guided)
        pipe.unload_identity()
        pipe.load_identity(replaced(identity, mask=None))
        unmasked = first_step("a [I] lady", unguided)
        pipe.unload_identity()
    torch.testing.assert_close(both, combine(nulls, alone, 3.0), rtol=1e-4, atol=1e-4)
    assert float((alone - unmasked).abs().max()) > 1e-4


FITS_AND_EDITS = """
import sys
from diffusers import DiffusionPipeline
from PIL import Image
model, folder, out, height, width, source, target = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(model, custom_pipeline=folder, trust_remote_code=True)
assert type(pipe).__name__ == "S2EditPipeline" and type(pipe).__module__.startswith("diffusers_modules"), type(pipe)
picture, size = Image.new("RGB", (24, 16), "teal"), {"height": int(height), "width": int(width)}
mask = Image.new("L", (24, 16), 255)
identity = pipe.fit_identity(picture, source, "lady", num_steps=1, mask=mask, crop=None, **size)
identity.save_pretrained(out)
token = pipe.load_identity(out)
result = pipe(target, image=picture, source_prompt=source, num_inference_steps=2, crop=None, **size)
print(token, result.images[0].size, *sorted(m for m in sys.modules if m.startswith("s2edit_pipeline")))
"""


def check_a_fresh_process_serves_it(pipe: S2EditPipeline, tmp_path: Path) -> None:
    """Loaded as a custom pipeline, where the package isn't installed."""
    pipe.save_pretrained(tmp_path / "model")
    paths = [str(path) for path in (tmp_path / "model", PACKAGE, tmp_path / "ada")]
    line = last_line(FITS_AND_EDITS, tmp_path, *paths, *map(str, WIDE.values()), SOURCE, WITH_TOKEN)
    assert line == "[I] (24, 16)"  # and no module of the installed package


# ------------------------------------------------------------------------------ the whole way


def check_the_whole_way(
    pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path, size: dict[str, int], dtype: torch.dtype
) -> None:
    """Fit, save, load, invert, edit, unload."""
    scale = pipe.family.pixels_per_latent
    height, width = size["height"] // scale, size["width"] // scale
    with left_as_found(pipe):
        identity = fit(pipe, picture, mask=np.arange(24)[None].repeat(16, 0) < 12, **size)
        assert identity.mask is not None and identity.mask.shape == (height, width)
        assert identity.rows.keys() == pipe.family.text_encoders.keys()
        assert {name.split(".")[0] for name in identity.weights} <= set(pipe.family.lora_components)
        identity.save_pretrained(tmp_path / "ada")
        pipe.load_identity(IdentityAdapter.from_pretrained(tmp_path / "ada"))
        inversion = pipe.invert(picture, SOURCE, "direct", 3, crop=None, **size)
        assert inversion.prompt == "a photo of a sad [I] lady with glasses"
        assert inversion.trajectory.dtype == dtype and inversion.trajectory.shape[-2:] == (height, width)
        left = np.arange(24)[None].repeat(16, 0) < 12
        result = edited(pipe, picture, WITH_TOKEN, inversion=inversion, edit_mask=left)
        assert torch.equal(result.source, inversion.trajectory[:1])
        outside = slice(-(width // 2 - 1), None)
        assert torch.equal(result.images[..., outside], result.source[..., outside])
        assert float((result.images - result.source)[..., : width // 2].float().abs().max()) > 1e-3
        shown = edited(pipe, picture, WITH_TOKEN, inversion=inversion, output_type="pil")
        assert shown.images[0].size == picture.size
        pipe.unload_identity()


def check_methods(pipe: S2EditPipeline, picture: Image.Image, methods: tuple[str, ...] = ("token", "full")) -> None:
    """What each trains, and that all is put back; the mask is found by the words' own maps."""
    start = fit(pipe, picture, "token", num_steps=1, token_learning_rate=1e-12).rows
    for method in methods:
        with left_as_found(pipe):
            identity = fit(pipe, picture, method, num_steps=1)
            assert identity.mask is not None and 0 < float(identity.mask.mean()) < 1
            moved = {name: float((row - start[name]).abs().max()) for name, row in identity.rows.items()}
            assert all(amount > 1e-5 for amount in moved.values()), moved
            trained = {name.split(".")[0] for name in identity.weights}
            assert trained == (set() if method == "token" else set(pipe.family.tuned_components)) - set(
                pipe.family.fixed_components
            )


def check_a_lora_in_the_stock_pipeline(
    pipe: S2EditPipeline, stock: Any, picture: Image.Image, tmp_path: Path, **arguments: Any
) -> None:
    """Through diffusers' own loader, and through ours; ``stock`` is another pipeline of the same weights."""
    identity = fit(pipe, picture, learning_rate=1e-2)
    for i, tensor in enumerate(identity.weights.values()):
        tensor.add_(0.02 * torch.randn(tensor.shape, generator=seeded(i)))  # so that every layer counts
    identity.save_pretrained(tmp_path / "ada")
    given = {"num_inference_steps": 2, "output_type": "latent", **WIDE, **arguments}
    plain = pipe(SOURCE, generator=seeded(1), **given).images
    stock.load_lora_weights(str(tmp_path / "ada"), weight_name="pytorch_lora_weights.safetensors")
    theirs = stock(prompt=SOURCE, generator=seeded(1), **given).images
    with left_as_found(pipe):
        pipe.load_identity(identity)
        torch.testing.assert_close(pipe(SOURCE, generator=seeded(1), **given).images, theirs, rtol=1e-4, atol=1e-4)
        pipe.unload_identity()
    assert float((theirs - plain).abs().max()) > 1e-2
    before = state(pipe)
    pipe.load_lora_weights(str(tmp_path / "ada"), weight_name="pytorch_lora_weights.safetensors")
    loaded = pipe(SOURCE, generator=seeded(1), **given).images
    assert set(pipe.get_list_adapters()) == {name.split(".")[0] for name in identity.weights}
    pipe.unload_lora_weights()
    assert not [name for name, value in state(pipe).items() if not torch.equal(value, before[name])]
    torch.testing.assert_close(loaded, theirs, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------ inversions


def check_inversions(pipe: S2EditPipeline, picture: Image.Image, methods: tuple[str, ...]) -> None:
    """Each serves; what is pinned comes back to the bit; unchanged words, unguided, come back with what is found."""
    for method in methods:
        noise = {"generator": seeded()} if method in ("edit_friendly", "flowedit") else {}
        inversion = pipe.invert(picture, SOURCE, method, 3, crop=None, **WIDE, **noise)
        result = edited(pipe, picture, inversion=inversion)
        assert bool(torch.isfinite(result.images).all()), method
        if inversion.pinned:
            assert torch.equal(result.source, inversion.trajectory[:1]), method
        if method in ("direct", "midpoint"):
            free = {"guidance_stop": 0.0, "blend_words": False, "cross_replace_steps": 0.0, "self_replace_steps": 0.0}
            free = {k: v for k, v in free.items() if k != "guidance_stop" or pipe.family.guidance.form != "none"}
            again = edited(pipe, picture, SOURCE, inversion=inversion, **free)
            torch.testing.assert_close(again.images, inversion.trajectory[:1], rtol=1e-5, atol=1e-5)
            lost = edited(pipe, picture, SOURCE, inversion=inversion, residuals=False, **free)
            assert float((lost.images - inversion.trajectory[:1]).abs().max()) > 1e-3


def check_flowedit_is_the_published_update(
    pipe: S2EditPipeline, picture: Image.Image, n: int = 4, scale: float = 5.0
) -> None:
    """z <- z + ds (v_target(z + x_k - x_0) - v_source(x_k)) (Kulikov et al. 2024), written out over the model."""
    family = pipe.family
    inversion = pipe.invert(picture, SOURCE, "flowedit", n, crop=None, generator=seeded(3), **WIDE)
    free = {"cross_replace_steps": 0.0, "self_replace_steps": 0.0, "blend_words": False}
    if family.guidance.form != "none":
        free |= {"guidance_scale": scale, "guidance_stop": 1.0}
    ours = edited(pipe, picture, inversion=inversion, **free).images
    source, target = (family.encode([family.tokenize(text)]) for text in (SOURCE, TARGET))
    null = family.encode_negative(None, source)
    schedule = family.schedule(n, family.pixel_size(inversion.trajectory))
    x0 = z = inversion.trajectory[:1]
    with torch.no_grad():
        for k in range(n, 0, -1):
            x = inversion.trajectory[k : k + 1]
            time = schedule.timestep(k)
            of_source = family.denoise(x, time, source, torch.float32)
            told = target.told(scale) if family.guidance.form == "told" else target
            of_target = family.denoise(z + x - x0, time, told, torch.float32)
            if family.guidance.form == "branch":
                of_target = family.combine(family.denoise(z + x - x0, time, null, torch.float32), of_target, scale)
            z = z + float(schedule.noise[k - 1] - schedule.noise[k]) * (of_target - of_source)
    torch.testing.assert_close(ours, z, rtol=1e-5, atol=1e-5)
    assert float((z - x0).abs().max()) > 1e-2


def count_rows(pipe: S2EditPipeline, call: Callable[[], Any], rows_of: Callable[[Any], int] = len) -> int:
    """The rows that the transformer is asked for in ``call``."""
    counted = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        counted.append(rows_of(args[0] if args else kwargs["hidden_states"]))

    handle = pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    try:
        call()
    finally:
        handle.remove()
    return sum(counted)


# ------------------------------------------------------------------------------ spatial control


class Naively(TorchFunctionMode):
    """Every attention of the model made explicitly in float64, nobody but the token itself and the object's cells
    looking at the token.

    Args:
        layout: queries -> where the picture's cells and the text stand among them, (None, None) of another attention.
        inside: (cells,) of bool.
        columns: the token's.
    """

    def __init__(self, layout: Callable[[int], Any], inside: torch.Tensor, columns: tuple[int, ...]) -> None:
        super().__init__()
        self.layout, self.inside, self.columns = layout, inside, columns

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key, value, mask = (given.get(name) for name in names)
        if key.shape[1] != query.shape[1]:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        scores = query @ key.transpose(-1, -2) * (given.get("scale") or query.shape[-1] ** -0.5)
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e30) if mask.dtype == torch.bool else scores + mask
        picture, text = self.layout(key.shape[2])
        if text is not None:
            for i in range(query.shape[2]):
                is_cell = picture is not None and picture.start <= i < picture.stop
                for column in self.columns:
                    looks = self.inside[i - picture.start] if is_cell else i in [text.start + c for c in self.columns]
                    if not bool(looks):
                        scores[:, :, i, text.start + column] = -1e30
        return scores.softmax(-1) @ value


def check_spatial_control(pipe: S2EditPipeline, layout: Callable[[int], Any], text: str = SOURCE) -> None:
    """The whole model under our control against the naive one, in float64; and with a mask that is empty, nothing of
    the token reaches the picture, not even through other words or layers of the text alone."""
    family = pipe.family
    prompt = family.tokenize(text)
    columns = prompt.columns("sad")
    scale = family.pixels_per_latent
    height, width = WIDE["height"] // scale, WIDE["width"] // scale
    with torch.no_grad():
        embeds = family.encode([prompt])
    ((_, grid),) = [item for item in family.attention_grids(height, width).items()]
    x = torch.randn(1, family.latent_channels, height, width, generator=seeded(1), dtype=torch.float64)
    mask = torch.zeros(grid)
    mask[:, : grid[1] // 2] = 1
    time = family.schedule(4, (WIDE["height"], WIDE["width"])).timestep(2)

    def answer(words: Any = embeds) -> torch.Tensor:
        with torch.no_grad():
            return family.denoise(x, time, words, torch.float64)

    def controlled(inside: torch.Tensor, words: Any = embeds) -> torch.Tensor:
        control = SpatialControl({"it": inside}, [{"it": columns}], renormalize=True)
        with family.control_attention(control, height, width):
            return answer(words)

    pipe.transformer.double()
    try:
        with Naively(layout, mask.flatten() > 0.5, columns):
            naive = answer()
        plain, ours = answer(), controlled(mask)
        torch.testing.assert_close(ours, naive, rtol=1e-5, atol=1e-5)
        assert float((ours - plain).abs().max()) > 1e-4
        changed = embeds.embeds.clone()
        changed[:, list(columns)] += torch.randn(len(columns), changed.shape[-1], generator=seeded(2))
        other = embeds.with_embeds(changed)
        assert float((answer(other) - plain).abs().max()) > 1e-3
        nowhere = torch.zeros(grid)
        torch.testing.assert_close(controlled(nowhere, other), controlled(nowhere), rtol=1e-9, atol=1e-9)
    finally:
        pipe.transformer.float()


# ------------------------------------------------------------------------------ words, people, errors


def check_words(pipe: S2EditPipeline, picture: Image.Image) -> None:
    """Replacement, refinement, re-weighting, self-attention, local blend, several prompts: each does something."""
    plain = pipe.invert(picture, SOURCE, "direct", 4, crop=None, **WIDE)
    steady = {"inversion": plain, "blend_words": False}
    reference = edited(pipe, picture, **steady).images

    def differs(**changes: Any) -> bool:
        return float((edited(pipe, picture, **{**steady, **changes}).images - reference).abs().max()) > 1e-4

    assert differs(cross_replace_steps=1.0) and differs(self_replace_steps=1.0)
    assert differs(reweight={"smiling": 3.0}) and not differs(reweight={"smiling": 1.0})
    assert differs(edit="refine")
    both = edited(pipe, picture, [TARGET, "a photo of a sad lady with a beard and glasses"], **steady)
    assert len(both.images) == 2 and float((both.images[0] - reference[0]).abs().max()) < 1e-3
    confined = edited(pipe, picture, inversion=plain, return_attention_maps=True)
    assert set(confined.attention_maps) >= {"smiling", "lady", "glasses"}
    assert confined.edit_masks[0].size == picture.size


def check_identities(pipe: S2EditPipeline, picture: Image.Image) -> None:
    """Several at once, a composition, and drawing from noise with a token in the prompt."""
    left = np.arange(24)[None].repeat(16, 0) < 12
    with left_as_found(pipe):
        reference = ReferenceAttribute(picture, SOURCE, "glasses", "[G]", mask=~left)
        one = fit(pipe, picture, "token", num_steps=1, mask=left, reference=reference)
        pipe.load_identity(one)
        pipe.load_identity(fit_of(pipe, one), "[J]", reference_token="[H]")
        source = "a photo of a sad [I] lady with [G] glasses"
        target = "a photo of a smiling [I] lady with [G] glasses"
        mixed = pipe(
            [target, target.replace("[I]", "[J]")], picture, source, num_inference_steps=2, crop=None,
            output_type="latent", keep_pixels=False, **WIDE,
        ).images  # fmt: skip
        assert float((mixed[0] - mixed[1]).abs().max()) > 1e-5
        given = {"num_inference_steps": 2, "output_type": "latent", **WIDE}
        drawn = pipe("a [I] lady", generator=seeded(1), **given).images
        plain = pipe("a lady", generator=seeded(1), **given).images
        assert drawn.shape == plain.shape and float((drawn - plain).abs().max()) > 1e-4
        pipe.unload_identity()


def fit_of(pipe: S2EditPipeline, identity: IdentityAdapter) -> IdentityAdapter:
    """``identity`` with other rows."""
    rows = {name: row + torch.randn(row.shape, generator=seeded(5)) for name, row in identity.rows.items()}
    return replaced(identity, rows=rows)


def replaced(identity: IdentityAdapter, **changes: Any) -> IdentityAdapter:
    return IdentityAdapter(**{**{n: getattr(identity, n) for n in identity.__dataclass_fields__}, **changes})


def check_errors_leave_all_as_found(pipe: S2EditPipeline, picture: Image.Image) -> None:
    """An exception in the middle of a fit, an inversion, an edit and a drawing."""

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    identity = fit(pipe, picture, "lora", num_steps=1)
    calls: list[Callable[[], Any]] = [
        lambda: fit(pipe, picture, callback_on_step_end=stop),
        lambda: fit(pipe, picture, "full", callback_on_step_end=stop),
        lambda: pipe.invert(picture, SOURCE, "direct", 2, identity=identity, callback_on_step_end=stop, **WIDE),
        lambda: edited(pipe, picture, WITH_TOKEN, identity=identity, callback_on_step_end=stop),
        lambda: pipe("a [I] lady", identity=identity, num_inference_steps=2, callback_on_step_end=stop, **WIDE),
    ]
    for call in calls:
        with left_as_found(pipe), pytest.raises(Stop):
            call()
