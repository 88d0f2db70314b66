"""Tiny random models of the real classes: nothing here needs trained weights."""

from __future__ import annotations

import copy
import gc
import gzip
import json
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer

from s2edit_pipeline.avatars.tokenizer import build_tokenizer
from s2edit_pipeline.pipeline import S2EditPipeline

# the same cases in every run, so that a gate says the same twice; HYPOTHESIS_PROFILE=random looks for others
hypothesis.settings.register_profile("same", derandomize=True, database=None)
hypothesis.settings.register_profile("random")
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # and a process of theirs adds up in the same order

PROMPT = "a photo of a smiling lady with glasses"


def pytest_collection_finish() -> None:
    """The libraries' million objects stay until the end: the collector needn't walk through them again and again."""
    gc.collect()
    gc.freeze()


def _components(prediction_type: str) -> dict[str, Any]:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(num_captions=200)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    with torch.no_grad():  # a fresh text encoder tells prompts apart by hundredths only
        text_encoder.get_input_embeddings().weight.mul_(50)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return {
        "vae": vae.eval(), "text_encoder": text_encoder.eval(), "tokenizer": tokenizer, "unet": unet.eval(),
        "scheduler": scheduler,
    }  # fmt: skip


@pytest.fixture(scope="session")
def _tiny() -> dict[str, dict[str, Any]]:
    return {kind: _components(kind) for kind in ("epsilon", "v_prediction")}


@pytest.fixture
def make_pipe(_tiny: dict[str, dict[str, Any]]) -> Callable[[str], S2EditPipeline]:
    """A fresh tiny pipeline of the given prediction type."""

    def make(prediction_type: str = "epsilon") -> S2EditPipeline:
        pipe = S2EditPipeline(**copy.deepcopy(_tiny[prediction_type]))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def pipe(make_pipe: Callable[[str], S2EditPipeline]) -> S2EditPipeline:
    return make_pipe("epsilon")


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """32 x 32, smooth, another colour in each corner."""
    y, x = np.mgrid[0:32, 0:32] / 31.0
    return Image.fromarray((np.stack([x, y, 1 - x * y], -1) * 255).round().astype(np.uint8))


@pytest.fixture(scope="session")
def half_mask() -> np.ndarray:
    """(32, 32) bool: the left half."""
    mask = np.zeros((32, 32), bool)
    mask[:, :16] = True
    return mask


# ---------------------------------------------------------------------------- tokenizers


def clip_vocabulary() -> Path | None:
    """CLIP's byte-pair merges, where open_clip_torch lies installed: a file of it, nothing of it is imported."""
    try:
        found = metadata.distribution("open_clip_torch").locate_file("open_clip/bpe_simple_vocab_16e6.txt.gz")
    except metadata.PackageNotFoundError:
        return None
    return Path(str(found)) if Path(str(found)).is_file() else None


def real_tokenizer(vocabulary: Path) -> CLIPTokenizer:
    """CLIP's own 49,408 words (Radford et al. 2021), put together as OpenAI's tokenizer does."""
    lines = gzip.decompress(vocabulary.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [
        *symbols,
        *(s + "</w>" for s in symbols),
        *("".join(m) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=merges, pad_token="<|endoftext|>")


@pytest.fixture(scope="session")
def clip_tokenizer() -> CLIPTokenizer:
    """77 positions; CLIP's own words, or without open_clip_torch a small vocabulary of the same form."""
    vocabulary = clip_vocabulary()
    tokenizer = build_tokenizer(num_captions=200) if vocabulary is None else real_tokenizer(vocabulary)
    tokenizer.model_max_length = 77
    return tokenizer


_SENTENCES = [
    *['a photo of a smiling lady with glasses and a beard (man), "hello".'] * 20,
    *["女性の写真 女性 一个女人的照片"] * 20,
    *["the ladies, it's 5.3"] * 10,
]


@pytest.fixture(scope="session")
def t5_tokenizer() -> T5Tokenizer:
    """T5's class over a small vocabulary: no start token, "▁" for a space, no limit of its own."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False, initial_alphabet=["▁"]
    )
    trained.train_from_iterator(_SENTENCES, trainer)
    pieces = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=2)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


@pytest.fixture(scope="session")
def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen's class over a small vocabulary: neither start nor end token, tokens begin with their space."""
    pieces = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    trained = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pieces), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    trained.train_from_iterator(_SENTENCES, trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer
