import functools
import json
import math

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTokenizer

from s2edit_pipeline.avatars import MODEL_FOLDER, denoiser_training, flow_training, latent_dataset, recipe
from s2edit_pipeline.avatars.autoencoder_training import (
    AutoencoderSettings,
    build_autoencoder,
    fit_linear_code,
    install_linear_encoder,
    mean_psnr,
    reconstruct,
    to_tensor,
)
from s2edit_pipeline.avatars.autoencoder_training import trained_parameters as autoencoder_parameters
from s2edit_pipeline.avatars.dataset import load_pictures
from s2edit_pipeline.avatars.denoiser_training import (
    DenoiserSettings,
    build_scheduler,
    build_text_encoder,
    build_unet,
    sample_latents,
)
from s2edit_pipeline.avatars.denoiser_training import trained_parameters as denoiser_parameters
from s2edit_pipeline.avatars.flow_model import build_transformer, shared_parts
from s2edit_pipeline.avatars.recipe import (
    draw_flow_sheet,
    export_checkpoint,
    export_flow,
    export_model,
    load_checkpoints,
    load_flow_checkpoint,
    train_avatars,
    train_flow_avatars,
)
from s2edit_pipeline.avatars.world import sample


def small_unet(latent_channels, cross_attention_dim):
    config = {**build_unet(latent_channels, cross_attention_dim).config, "block_out_channels": (32, 48)}
    return UNet2DConditionModel.from_config(config)


def _states(components):
    return {name: components[name].state_dict() for name in ("vae", "text_encoder", "unet")}


# ---------------------------------------------------------------------------- export


@pytest.fixture(scope="module")
def components(pictures, tokenizer):
    torch.manual_seed(2)
    vae = build_autoencoder()
    install_linear_encoder(vae, fit_linear_code(pictures.images))
    text_encoder = build_text_encoder(tokenizer)
    return {
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": tokenizer,
        "unet": small_unet(16, text_encoder.config.hidden_size).eval(),
        "scheduler": build_scheduler(),
    }


@pytest.fixture(scope="module")
def exported(components, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_model(folder, **components)
    return folder


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_it_loads_as_plain_stable_diffusion_in_one_dtype(exported, dtype):
    pipe = StableDiffusionPipeline.from_pretrained(str(exported), **({} if dtype is None else {"torch_dtype": dtype}))
    assert {m.dtype for m in (pipe.vae, pipe.text_encoder, pipe.unet)} == {dtype or torch.float32}
    assert type(pipe.tokenizer) is CLIPTokenizer and pipe.safety_checker is None


def test_the_weights_are_the_originals_rounded_to_float16(components, exported):
    pipe = StableDiffusionPipeline.from_pretrained(str(exported))
    for name, original in _states(components).items():
        loaded = getattr(pipe, name).state_dict()
        assert loaded.keys() == original.keys()
        for key, weight in original.items():
            assert torch.equal(loaded[key], weight.half().to(weight.dtype)), f"{name}.{key}"


def test_what_was_exported_is_left_as_it_was(components, tmp_path):
    before = {name: {k: w.clone() for k, w in state.items()} for name, state in _states(components).items()}
    export_model(tmp_path / "model", **components)
    torch.testing.assert_close(_states(components), before, rtol=0, atol=0)
    assert components["vae"].dtype == torch.float32


def test_the_pipeline_draws_what_the_recipe_samples(components, exported):
    pipe = StableDiffusionPipeline.from_pretrained(str(exported))
    pipe.set_progress_bar_config(disable=True)
    prompt = "a photo of a smiling lady with a red hat"
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(7))
    steps = {"num_inference_steps": 2, "guidance_scale": 4.5}
    latents = pipe(prompt, latents=noise, output_type="latent", **steps).images
    models = [components[name] for name in ("unet", "text_encoder", "tokenizer", "scheduler")]
    expected = sample_latents(*models, [prompt], seed=7, **steps)
    assert (latents - expected).norm() < 5e-3 * expected.norm()
    image = pipe(prompt, latents=noise, **steps).images[0]
    assert image.size == (128, 128)
    with torch.no_grad():
        pixels = components["vae"].decode(expected).sample[0].permute(1, 2, 0)
    assert np.abs(np.asarray(image) - 127.5 * (pixels.clamp(-1, 1).numpy() + 1)).mean() < 1


def test_float16_keeps_the_reconstruction(components, exported):
    pipe = StableDiffusionPipeline.from_pretrained(str(exported))
    images = load_pictures(4, "held_out").images
    scores = [mean_psnr(images, reconstruct(vae, images)) for vae in (components["vae"], pipe.vae)]
    assert abs(scores[0] - scores[1]) < 0.05
    code = fit_linear_code(load_pictures(8).images)
    with torch.no_grad():
        mode = pipe.vae.encode(to_tensor(images)).latent_dist.mode()
    expected = code.encode(to_tensor(images))
    assert ((mode - expected).square().mean((0, 2, 3)).sqrt() / expected.std((0, 2, 3))).max() < 0.01


def test_the_folder_is_standard_and_says_nothing_of_where_it_was_made(exported):
    names = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    assert {n for n in names if n.endswith(".safetensors")} == {
        "vae/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    assert not [n for n in names if n.endswith((".bin", ".ckpt", ".pt"))]
    for path in exported.rglob("*.json"):
        assert str(exported.parent) not in path.read_text("utf-8"), path
    assert json.loads((exported / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_older_transformers_find_their_names_and_files(exported, tokenizer):
    with safe_open(str(exported / "text_encoder" / "model.safetensors"), "pt") as weights:
        assert all(name.startswith("text_model.") for name in weights.keys())  # noqa: SIM118
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118
    vocab = json.loads((exported / "tokenizer" / "vocab.json").read_text("utf-8"))
    assert vocab == tokenizer.get_vocab()
    merges = (exported / "tokenizer" / "merges.txt").read_text("utf-8").splitlines()[1:]
    pairs = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert [tuple(line.split(" ")) for line in merges] == [tuple(pair) for pair in pairs]


# ---------------------------------------------------------------------------- training


@pytest.fixture
def small(monkeypatch):
    """A small U-Net, two validation pictures, one picture on the sample sheet."""
    for module in (denoiser_training, recipe):
        monkeypatch.setattr(module, "build_unet", small_unet)
    monkeypatch.setattr(recipe, "_VALIDATION_COUNT", 2)
    monkeypatch.setattr(denoiser_training, "SAMPLE_PROMPTS", ("a photo of a lady",))
    monkeypatch.setattr(denoiser_training, "sample_latents", functools.partial(sample_latents, num_inference_steps=1))


TINY = {
    "num_pictures": 4, "num_creatures": 3, "device": "cpu",
    "autoencoder": AutoencoderSettings(num_steps=1), "denoiser": DenoiserSettings(num_steps=2),
}  # fmt: skip


def test_the_stages_can_be_trained_apart_and_the_last_one_writes_the_model(small, tmp_path):
    assert train_avatars(tmp_path, **TINY, stages=["autoencoder"]) is None
    assert not (tmp_path / "denoiser.ckpt").exists()
    with pytest.raises(FileNotFoundError, match=r"holds no denoiser\.ckpt; run train_avatars\(.*stages=\['denoiser'\]"):
        load_checkpoints(tmp_path)
    model = train_avatars(tmp_path, **TINY, stages=["denoiser"])
    assert model == tmp_path / "model"
    pipe = StableDiffusionPipeline.from_pretrained(str(model))
    assert pipe("a lady", num_inference_steps=1, output_type="np").images.shape == (1, 128, 128, 3)

    # the averaged weights, not the last ones
    loaded = load_checkpoints(tmp_path)
    states = {s: torch.load(tmp_path / f"{s}.ckpt", weights_only=True) for s in ("autoencoder", "denoiser")}
    pairs = [
        (autoencoder_parameters(loaded["vae"]), states["autoencoder"]["average"]["average"]),
        (denoiser_parameters(loaded["unet"], loaded["text_encoder"]), states["denoiser"]["average"]["average"]),
    ]
    for parameters, average in pairs:
        assert all(torch.equal(p, a) for p, a in zip(parameters, average, strict=True))
    assert not torch.equal(loaded["unet"].conv_in.weight, states["denoiser"]["unet"]["conv_in.weight"])
    assert not any(m.training for m in (loaded["vae"], loaded["unet"], loaded["text_encoder"]))
    assert torch.equal(pipe.unet.conv_in.weight, loaded["unet"].conv_in.weight.half().float())

    # nothing is left to train: going on changes nothing
    train_avatars(tmp_path, **TINY)
    again = torch.load(tmp_path / "denoiser.ckpt", weights_only=True)
    torch.testing.assert_close(again["unet"], states["denoiser"]["unet"], rtol=0, atol=0)

    # another tokenizer's numbers would be other words
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"tokenizer is missing; put there the tokenizer"):
        export_checkpoint(tmp_path, tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"tokenizer is missing; put there the tokenizer"):
        train_avatars(tmp_path, **TINY)


def test_the_denoiser_is_given_the_code_of_every_picture(tmp_path, monkeypatch):
    given = {}

    def record(data, tokenizer, decode, folder, settings, **where):
        given.update(data=data, decode=decode, settings=settings, where=where)

    monkeypatch.setattr(recipe, "train_denoiser", record)
    monkeypatch.setattr(recipe, "_CHUNK", 3)
    settings = {"num_pictures": 8, "num_creatures": 5, "device": "cpu"}
    denoiser = DenoiserSettings(num_steps=9, seed=4)
    assert train_avatars(tmp_path, **settings, denoiser=denoiser, stages=["denoiser"]) is None
    people = load_pictures(8, masks=True)
    both = people + load_pictures(5, kind="creature", masks=True)
    images, data = both.images, given["data"]
    assert data.subjects == both.subjects and len(images) == 13
    assert np.array_equal(data.masks, both.masks)
    code = fit_linear_code(images)
    assert (data.latents - code.encode(to_tensor(images))).abs().max() < 1e-5
    assert given["settings"] == denoiser and denoiser.learning_rate == 8e-4
    assert given["where"] == {"device": "cpu", "start_from": None}
    # sixteen numbers a patch: what the sheet shows is near the pictures
    assert mean_psnr(images, given["decode"](data.latents)) > 20
    assert math.isclose(data.latents.square().mean().item(), 1, rel_tol=0.05)


def test_it_starts_from_a_models_weights_and_words(small, tmp_path):
    model = train_avatars(tmp_path / "first", **TINY)
    none = {"autoencoder": AutoencoderSettings(num_steps=0), "denoiser": DenoiserSettings(num_steps=0)}
    later = train_avatars(tmp_path / "later", **{**TINY, **none}, start_from=model)
    assert later is None  # no step, no checkpoint
    kept = [
        CLIPTokenizer.from_pretrained(str(f)).get_vocab() for f in (model / "tokenizer", tmp_path / "later/tokenizer")
    ]
    assert kept[0] == kept[1]
    start = StableDiffusionPipeline.from_pretrained(str(model))
    train_avatars(tmp_path / "step", **{**TINY, "denoiser": DenoiserSettings(num_steps=1)}, start_from=model)
    moved = load_checkpoints(tmp_path / "step")
    for name in ("unet", "text_encoder"):
        before, after = getattr(start, name).state_dict(), moved[name].state_dict()
        # one step of the warm-up, 8e-6, averaged in
        assert 0 < max((after[k] - w).abs().max() for k, w in before.items() if w.is_floating_point()) < 1e-4


def test_each_stage_goes_on_from_its_part_of_a_model_at_half_the_rate(small, tmp_path, monkeypatch):
    calls = {}
    for stage in ("autoencoder", "denoiser"):
        # how it is trained is the last of the arguments
        monkeypatch.setattr(
            recipe, f"train_{stage}", lambda *args, s=stage, **where: calls.update({s: (args[-1], where)})
        )
    assert train_avatars(tmp_path, **TINY, start_from=MODEL_FOLDER) is None
    assert calls == {
        "autoencoder": (
            AutoencoderSettings(num_steps=1, learning_rate=1e-3),
            {"start_from": MODEL_FOLDER / "vae", "device": "cpu"},
        ),
        "denoiser": (
            DenoiserSettings(num_steps=2, learning_rate=4e-4),
            {"start_from": MODEL_FOLDER, "device": "cpu"},
        ),
    }


def test_a_stage_of_another_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="stages are autoencoder, denoiser, not unet"):
        train_avatars(tmp_path, stages=["unet"])
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- the flow transformer


@pytest.fixture
def small_flow(monkeypatch):
    """The transformer one eighth as wide, three pictures a file, a sheet of few prompts and steps."""

    def build(latent_channels, text_width, side):
        config = build_transformer(latent_channels, text_width, side).config
        return SD3Transformer2DModel.from_config(
            {**config, "attention_head_dim": 16, "num_attention_heads": 2, "caption_projection_dim": 32}
        )

    for module in (flow_training, recipe):
        monkeypatch.setattr(module, "build_transformer", build)
    monkeypatch.setattr(latent_dataset, "CHUNK", 3)


FLOW = {"num_pictures": 6, "num_creatures": 3, "device": "cpu"}


def test_the_flow_transformer_is_trained_and_written(small_flow, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no flow\.ckpt; run train_flow_avatars\("):
        export_flow(tmp_path, tmp_path / "model")
    settings = flow_training.FlowSettings(num_steps=2, batch_size=2)
    model = train_flow_avatars(tmp_path, MODEL_FOLDER, settings=settings, **FLOW)
    assert model == tmp_path / "model"
    pipe = StableDiffusion3Pipeline.from_pretrained(str(model), **shared_parts(MODEL_FOLDER))
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "max_sequence_length": 1}
    assert pipe("a lady", output_type="np", **settings).images.shape == (1, 128, 128, 3)

    # the averaged weights, not the last ones
    state = torch.load(tmp_path / "flow.ckpt", weights_only=True)
    loaded = load_flow_checkpoint(tmp_path)
    average = state["average"]["shadow_params"]
    assert all(torch.equal(p, a) for p, a in zip(loaded.parameters(), average, strict=True))
    assert not torch.equal(loaded.proj_out.weight, state["transformer"]["proj_out.weight"])
    assert torch.equal(pipe.transformer.proj_out.weight, loaded.proj_out.weight.half().float())
    export_flow(tmp_path, tmp_path / "exported")
    for file in ("model_index.json", "transformer/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "exported" / file).read_bytes() == (model / file).read_bytes()

    # a sheet: eight a row, drawn by the stock pipeline
    draw_flow_sheet(tmp_path, MODEL_FOLDER, tmp_path / "sheet.png", prompts=["a lady"] * 9, num_inference_steps=2)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (256, 1024, 3) and (sheet[128:, 128:] == 255).all()
    pipe.transformer = loaded
    generator = torch.Generator().manual_seed(0)
    drawn = pipe(["a lady"] * 9, guidance_scale=4.5, generator=generator, output_type="np", **settings).images
    assert np.abs(sheet[128:, :128] / 255 - drawn[8]).max() < 0.003


def test_the_flow_transformer_sees_both_kinds(small_flow, tmp_path, monkeypatch):
    given = []

    def record(data, text_encoder, tokenizer, folder, settings, *, device):
        given.append((data, settings, device))
        return build_transformer()

    monkeypatch.setattr(recipe, "train_flow", record)
    train_flow_avatars(tmp_path, MODEL_FOLDER, **FLOW)
    data, settings, device = given[0]
    assert [type(s).__name__ for s in data.subjects] == ["Person"] * 6 + ["Creature"] * 3
    assert data.subjects[1] == sample("person", 1, "varied") and data.subjects[7] == sample("creature", 1, "varied")
    assert data.latents.shape == (9, 16, 16, 16) and settings == flow_training.FlowSettings() and device == "cpu"
    with pytest.raises(ValueError, match="7 pictures don't fill files of 3"):
        train_flow_avatars(tmp_path, MODEL_FOLDER, num_pictures=7, num_creatures=0, device="cpu")
