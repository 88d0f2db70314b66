import itertools
import json

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch.nn import functional as F
from transformers import CLIPTextModel

from s2edit_pipeline import avatars
from s2edit_pipeline.avatars import MODEL_FOLDER, load_avatars
from s2edit_pipeline.avatars.flow_model import (
    SHARED,
    build_flow_scheduler,
    build_transformer,
    encode_captions,
    load_text_encoder,
    save_flow_folder,
    shared_parts,
)
from s2edit_pipeline.pipeline import S2EditPipeline

PROMPTS = ["a photo of a smiling lady with a red hat", "a dog"]


def lively(transformer):
    """The transformer with gates and an output that are not zero."""
    torch.manual_seed(3)
    for parameter in transformer.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return transformer.eval()


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(2)
    return lively(build_transformer())


@pytest.fixture(scope="module")
def shared():
    return shared_parts(MODEL_FOLDER)


@pytest.fixture(scope="module")
def folder(transformer, tmp_path_factory):
    out = tmp_path_factory.mktemp("flow")
    save_flow_folder(transformer, out)
    return out


def _tokens(shared):
    return torch.tensor(shared["tokenizer"](PROMPTS, padding="max_length").input_ids)


# ---------------------------------------------------------------------------- the start


def test_fresh_weights_draw_nothing_and_change_nothing():
    torch.manual_seed(0)
    fresh = build_transformer()
    x, text, pooled = torch.randn(2, 16, 16, 16), torch.randn(2, 5, 384), torch.randn(2, 384)
    time = torch.tensor([100.0, 900.0])
    with torch.no_grad():
        assert not fresh(x, text, pooled, time).sample.any()
        torch.nn.init.normal_(fresh.proj_out.weight)
        drawn = fresh(x, text, pooled, time).sample
        # every block is the identity: the cells' embeddings, normalised and projected
        cells = F.layer_norm(fresh.pos_embed(x), (256,), eps=1e-6) @ fresh.proj_out.weight.T
    assert (drawn - cells.unflatten(1, (16, 16)).permute(0, 3, 1, 2)).abs().max() < 1e-4


def test_xavier_weights():
    torch.manual_seed(0)
    feed_forward = build_transformer().transformer_blocks[2].ff.net[2].weight
    assert feed_forward.shape == (256, 1024)
    bound = (6 / (256 + 1024)) ** 0.5
    assert 0.99 * bound < feed_forward.abs().max() <= bound
    assert feed_forward.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)


# ---------------------------------------------------------------------------- what is shared


def test_the_text_encoder_is_the_unets_with_its_end_token_for_pooled(shared):
    plain = CLIPTextModel.from_pretrained(str(MODEL_FOLDER / "text_encoder"), dtype=torch.float32)
    ids = _tokens(shared)
    with torch.no_grad():
        expected = plain(ids, output_hidden_states=True)
        got = load_text_encoder(MODEL_FOLDER / "text_encoder")(ids, output_hidden_states=True)
    for one, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(one, other)
    ends = [row.tolist().index(shared["tokenizer"].eos_token_id) for row in ids]
    assert ends[0] != ends[1]
    for i, end in enumerate(ends):
        assert (got.text_embeds[i] - expected.last_hidden_state[i, end]).abs().max() < 1e-6


def test_captions_are_encoded_as_the_stock_pipeline_does(folder, shared):
    pipe = StableDiffusion3Pipeline.from_pretrained(str(folder), **shared)
    stock, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None)
    columns, mine = encode_captions(shared["text_encoder"], _tokens(shared))
    length = shared["tokenizer"].model_max_length
    assert columns.shape == (2, length + 1, 384) and stock.shape == (2, length + 256, 384)
    assert torch.equal(columns, stock[:, : length + 1]) and torch.equal(mine, pooled)
    assert columns[:, :length].abs().amin(1).max() > 0 and not stock[:, length:].any()


def test_the_shared_parts_are_all_that_is_left_out(folder, shared):
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    assert {name for name in SHARED if index[name] == [None, None]} == set(SHARED) == set(shared)
    assert {path.name for path in folder.iterdir()} == {"model_index.json", "transformer", "scheduler"}
    vae = AutoencoderKL.from_pretrained(str(MODEL_FOLDER / "vae"))
    assert shared["vae"].config.shift_factor == 0 and shared["vae"].config.scaling_factor == 1
    for name, weight in vae.state_dict().items():
        assert torch.equal(shared["vae"].state_dict()[name], weight)
    half = shared_parts(MODEL_FOLDER, torch.float16)
    assert {half[name].dtype for name in ("vae", "text_encoder", "text_encoder_2")} == {torch.float16}


def test_a_new_token_in_one_encoder_is_not_in_the_other():
    parts = shared_parts(MODEL_FOLDER)
    parts["text_encoder"].resize_token_embeddings(900)
    parts["tokenizer"].add_tokens("[I]")
    assert parts["text_encoder_2"].get_input_embeddings().num_embeddings == len(parts["tokenizer_2"]) == 818


# ---------------------------------------------------------------------------- the stock pipeline


def test_the_stock_pipeline_draws_by_eulers_steps(folder, shared, transformer):
    pipe = StableDiffusion3Pipeline.from_pretrained(str(folder), **shared)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.dtype == torch.float32
    noise = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    told, plain, told_pooled, plain_pooled = pipe.encode_prompt(PROMPTS, None, None, max_sequence_length=2)
    x = noise.double()
    double = pipe.transformer.double()

    def shifted(level):
        return 3 * level / (1 + 2 * level)

    lowest = shifted(1 / 1000)  # stock shifts the lowest level twice
    levels = [shifted(1.0), shifted((1 + lowest) / 2), shifted(lowest), 0.0]
    with torch.no_grad():
        for level, below in itertools.pairwise(levels):
            time = torch.full((2,), 1000 * level, dtype=torch.float64)
            v = double(x, plain.double(), plain_pooled.double(), time).sample
            v = v + 3.0 * (double(x, told.double(), told_pooled.double(), time).sample - v)
            x = x + (below - level) * v
    pipe.transformer.float()
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "max_sequence_length": 2, "latents": noise}
    latents = pipe(PROMPTS, output_type="latent", **settings).images
    assert (latents - x).norm() < 1e-3 * x.norm()
    pictures = pipe(PROMPTS, output_type="np", **settings).images
    with torch.no_grad():
        pixels = shared["vae"].decode(x.float()).sample
    assert abs(pictures - (pixels.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy()).max() < 0.02


def test_the_weights_are_the_transformers_rounded_to_float16(folder, transformer, shared):
    pipe = StableDiffusion3Pipeline.from_pretrained(str(folder), **shared)
    for name, weight in transformer.state_dict().items():
        assert torch.equal(pipe.transformer.state_dict()[name], weight.half().float()), name
    assert transformer.dtype == torch.float32


def test_saved_whole_it_needs_nothing_else(folder, shared, tmp_path):
    pipe = StableDiffusion3Pipeline.from_pretrained(str(folder), **shared)
    pipe.save_pretrained(str(tmp_path))
    # as stock wants to be told of any folder without T5
    alone = StableDiffusion3Pipeline.from_pretrained(str(tmp_path), text_encoder_3=None, tokenizer_3=None)
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    drawn = [
        p("a dog", latents=noise, num_inference_steps=1, max_sequence_length=1, output_type="np").images
        for p in (pipe, alone)
    ]
    assert (drawn[0] == drawn[1]).all()


def test_the_scheduler_is_stable_diffusion_3s():
    config = build_flow_scheduler().config
    assert (config.shift, config.num_train_timesteps, config.use_dynamic_shifting) == (3.0, 1000, False)


# ---------------------------------------------------------------------------- load_avatars


def test_load_avatars_gives_the_pipeline_both_folders(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(avatars, "FLOW_FOLDER", folder)
    monkeypatch.setattr(S2EditPipeline, "from_pretrained", lambda path, **more: calls.append((path, more)))
    load_avatars("flow", dtype=torch.bfloat16)
    load_avatars("flow", vae=None)
    (path, given), (_, other) = calls
    assert path == str(folder) and given["dtype"] == torch.bfloat16 and other["dtype"] == torch.float32
    assert given["text_encoder_2"].dtype == torch.bfloat16 and other["vae"] is None
    pipe = StableDiffusion3Pipeline.from_pretrained(path, **given)
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16


def test_load_avatars_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(avatars, "FLOW_FOLDER", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"none is missing; train it .*recipe\.export_flow\(RUN, "):
        load_avatars("flow")
    with pytest.raises(ValueError, match="family is 'unet' or 'flow', not 'sdxl'"):
        load_avatars("sdxl")
