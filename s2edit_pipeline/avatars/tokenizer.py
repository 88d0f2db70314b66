"""The embedded model's tokenizer: CLIP's own class and normalisation over a small byte-pair vocabulary."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from .captions import describe
from .people import NOUNS
from .world import PERSON_ATTRIBUTES, sample_person

MAX_LENGTH = 48

_PART_WORDS = "person hair headwear glasses facial_hair expression clothes background".split()
# what is said of creatures, or what users say without being told
_MORE_WORDS = (
    "person woman boy girl face portrait picture drawing of the in wearing without not no very happy laughing crying "
    "creature critter monster animal cat dog horns ears antenna spikes crown stripes dots belly spots round square "
    "tall small big eyes mouth teeth grin frown cap headscarf jacket jumper shades spectacles young old dark light"
).split()


def build_tokenizer(num_captions: int = 4000, vocab_size: int = 1400) -> CLIPTokenizer:
    """Train byte-pair merges on captions of training people, so that each common word is one token."""
    plain = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    byte_symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tokenizer.normalizer = plain.backend_tokenizer.normalizer
    tokenizer.pre_tokenizer = plain.backend_tokenizer.pre_tokenizer
    tokenizer.decoder = decoders.BPEDecoder()
    rng = random.Random(0)
    corpus = [describe(sample_person(i), rng).text for i in range(num_captions)]
    known = [*NOUNS, *_PART_WORDS, *_MORE_WORDS, *(v for values in PERSON_ATTRIBUTES.values() for v in values)]
    corpus += [" ".join(known)] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=byte_symbols,
        # ties are broken by number: left alone, these are numbered in the order of a hash table, anew in each run
        special_tokens=[symbol + "</w>" for symbol in byte_symbols],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    learned = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes that end a word, merged symbols, then the two special tokens
    symbols = [*byte_symbols, *(symbol + "</w>" for symbol in byte_symbols), *("".join(pair) for pair in learned)]
    symbols = list(dict.fromkeys(symbols))
    vocab = {symbol: i for i, symbol in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=learned, model_max_length=MAX_LENGTH, pad_token="<|endoftext|>")


def save_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """Build the tokenizer, save it to ``folder`` and return it as loaded from there."""
    build_tokenizer().save_pretrained(str(folder))
    return CLIPTokenizer.from_pretrained(str(folder))
