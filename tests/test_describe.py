"""Descriptions: vocabularies, the model as a judge, captioners, and short prompts made complete."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
)

from s2edit_pipeline import Description, S2EditPipeline, describe_captioner, load_avatars
from s2edit_pipeline.avatars.captions import describe, read_caption, vocabulary
from s2edit_pipeline.avatars.world import KINDS, render, sample
from s2edit_pipeline.describe_captioner import as_prompt, caption_of, load_captioner
from s2edit_pipeline.describe_completion import completed, heard_in, template_of
from s2edit_pipeline.describe_judge import LEVELS, NOISES, DenoisingJudge, choose_all, choose_noun
from s2edit_pipeline.describe_stage import own_vocabulary
from s2edit_pipeline.describe_vocabulary import Template, Wording, read_template, read_vocabulary

SMALL = "a photo of [sad|smiling] {lady|man} [|with glasses|with sunglasses] [with a [red|blue] hat|with a beard]"
SOURCE, TARGET = "a photo of a lady", "a photo of a smiling lady"


# ------------------------------------------------------------------------------ vocabularies


def test_a_template_says_one_choice_of_each_bracket() -> None:
    template = read_template(SMALL)
    captions = [template.caption(said) for said in _all_sayings(template)]
    assert len(set(captions)) == len(captions) == 2 * 2 * 3 * 3
    assert "a photo of a sad lady with a blue hat" in captions
    assert "a photo of a smiling man with glasses and a beard" in captions
    animals = read_template("a drawing of [|old] {owl|cats} [in a [|orange] box] [|with an [apple|melon]|on ice]")
    assert animals.caption(["", "owl", "in a box", ""]) == "a drawing of an owl in a box"
    wording = animals.groups[3].phrases[1].said(("melon",))
    assert animals.caption(["old", "cats", "in an orange box", wording]) == (
        "a drawing of old cats in an orange box with a melon"
    )


def _all_sayings(template: Template) -> list[list[str]]:
    sayings: list[list[str]] = [[]]
    for g, group in enumerate(template.groups):
        sayings = [[*said, template.saying(g, wording)] for said in sayings for wording in group.wordings()]
    return sayings


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("a photo of [sad|smiling] lady", ValueError, "outside brackets"),
        ("a photo of [sad|smiling] [lady]", ValueError, "one pair of braces"),
        ("[sad] {lady}", ValueError, "says what the picture is"),
        ("a photo of {lady} [with [a [red|blue] hat]]", ValueError, "nested too deep"),
        ("a photo of {lady} [with a hat", ValueError, "isn't closed"),
        ("a photo of {lady|} [with a hat]", ValueError, "is empty"),
        ([], ValueError, "The vocabulary is empty"),
        ([3], TypeError, "such as .* not int"),
    ],
)
def test_what_is_no_vocabulary(text: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_vocabulary(text)
    with pytest.raises(error, match=message):
        S2EditPipeline(vocabulary=text)


# ------------------------------------------------------------------------------ the judge


def test_errors_are_the_denoising_loss_written_out(pipe: S2EditPipeline) -> None:
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    captions, state = ["a photo of a lady", "a photo of a man", "a photo of a lady"], torch.get_rng_state()
    judge = DenoisingJudge(pipe.family, latents)
    assert torch.equal(torch.get_rng_state(), state)
    noises = torch.randn((NOISES, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    for share in LEVELS:
        level = round(share * 1000)
        alpha_bar = pipe.scheduler.alphas_cumprod[level - 1]
        for k in range(NOISES):
            x = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noises[k]
            for caption, got in zip(captions, judge.errors(captions, share, k), strict=True):
                ids = pipe.tokenizer(caption, padding="max_length", return_tensors="pt").input_ids
                with torch.no_grad():
                    output = pipe.unet(x, level - 1, pipe.text_encoder(ids)[0]).sample
                assert got == pytest.approx(math.log(((output - noises[k]) ** 2).mean()), rel=1e-4)


class _Oracle(DenoisingJudge):
    """Instead of a model: the farther a caption is from the truth, the larger the error."""

    def __init__(self, distance: Callable[[str], int]) -> None:
        self.distance, self.asked = distance, 0

    def errors(self, captions: Sequence[str], share: float, k: int) -> list[float]:
        self.asked += len(captions)
        return [0.1 * self.distance(caption) for caption in captions]


def test_the_best_is_measured_by_all_noises_and_the_worse_half_is_dropped() -> None:
    oracle = _Oracle(lambda caption: len({*caption.split()} ^ {"one", "two", "three", "four"}))
    captions = ["one", "one two", "one two three", "five six", "seven", "eight", "nine", "ten"]
    best, score = oracle.best(captions)
    assert captions[best] == "one two three"
    assert score == pytest.approx(math.exp(0.2 - 0.1) - 1)  # the second best lacks one word more
    assert oracle.asked == 2 * (8 + 4 + 2)
    assert oracle.best(["one"]) == (0, 0.0)


def _untrue(caption: str, truth: dict[str, str]) -> int:
    """How many attributes a caption says otherwise than the truth, what it doesn't say among them."""
    said = read_caption(caption)
    return sum(said.get(name) != truth.get(name) for name in {*said, *truth})


@pytest.mark.parametrize("kind", KINDS)
def test_choice_by_choice_finds_every_caption_of_the_avatars(kind: str) -> None:
    templates = read_vocabulary(vocabulary())
    for number in range(40):
        subject = sample(kind, number, "held_out")
        truth = describe(subject).text
        oracle = _Oracle(partial(_untrue, truth=read_caption(truth)))
        choices = choose_noun(oracle, templates, [subject.noun])
        heard: list[None] = []
        choose_all(oracle, choices, {}, lambda heard=heard: heard.append(None))
        assert len(heard) == 2 * (len(choices.template.groups) - 1)
        assert read_caption(choices.caption()) == read_caption(truth)
        assert sorted(choices.caption().split()) == sorted(truth.split())  # but for the order of its phrases


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_read_as_they_were_said(kind: str) -> None:
    rng = random.Random(0)
    for number in range(200):
        subject = sample(kind, number, "held_out")
        caption = describe(subject, rng)
        unsaid = [name for name in ("glasses", "facial_hair", "headwear", "pattern") if name not in caption.said]
        read = read_caption(caption.text)
        assert {name: value for name, value in read.items() if name not in unsaid or value != "none"} == caption.said


# ------------------------------------------------------------------------------ complete prompts

SHORT = "a photo of a man"
FULL = "a photo of a surprised man with short curly black hair and a moustache and a green sweater on a blue background"


def _account(text: str) -> tuple[Template, list[Wording | None]]:
    """The avatars' template with what ``text`` says of each group, by brute force."""
    template = next(t for t in read_vocabulary(vocabulary()) if _noun_number(t, text) is not None)
    chosen: list[Wording | None] = []
    for g, group in enumerate(template.groups):
        tails = [(f"{template.saying(g, wording)} ".split(" ", 1)[-1], wording) for wording in group.wordings()]
        found = [w for tail, w in tails if tail.strip() and tail in f"{text} "] or [
            w for w in group.wordings() if template.saying(g, w) in text.split()
        ]
        chosen.append(found[0] if found else None)
    chosen[template.subject] = Wording(_noun_number(template, text) or 0)
    return template, chosen


def _noun_number(template: Template, text: str) -> int | None:
    phrases = template.groups[template.subject].phrases
    return next((k for k, phrase in enumerate(phrases) if phrase.texts[0] in text.split()), None)


@pytest.mark.parametrize(
    ("source", "target", "completed_target", "of_the_target"),
    [
        (SHORT, "a photo of a smiling [I] man", FULL.replace("surprised man", "smiling [I] man"), {"expression"}),
        (SHORT, "a photo of a man with red hair", None, {"hair_color"}),  # short curly red hair
        (SHORT, "a photo of a bald man", None, {"hair", "hair_color"}),
        (f"{SHORT} with a moustache", SHORT, FULL.replace(" and a moustache", ""), {"facial_hair"}),
        (SHORT, "a man on a pink background", FULL.removeprefix("a photo of ").replace("blue", "pink"), {"background"}),
    ],
)  # fmt: skip
def test_a_target_keeps_its_own_words_and_takes_the_rest(
    source: str, target: str, completed_target: str | None, of_the_target: set[str]
) -> None:
    template, chosen = _account(FULL)
    full_source = completed(source, template, chosen)
    assert read_caption(full_source) == read_caption(FULL)
    full_target = completed(target, template, chosen, heard_in(source, template))
    if completed_target is not None:
        assert full_target == completed_target
    said, before = read_caption(full_target.replace("[I] ", "")), read_caption(FULL)
    changed = {name for name in {*said, *before} if said.get(name) != before.get(name)}
    assert changed == of_the_target
    assert completed(full_target, template, chosen, heard_in(source, template)) == full_target  # nothing is said twice


def test_a_completed_colour_keeps_what_goes_with_it() -> None:
    template, chosen = _account(FULL)
    full = completed("a photo of a man with red hair", template, chosen, {})
    assert read_caption(full)["hair"] == "short curly" and read_caption(full)["hair_color"] == "red"
    bald = completed("a photo of a bald man", template, chosen, {})
    assert "hair" not in bald.split() and "bald man" in bald
    strange = completed("a photo of my uncle Bob with very long hair", template, chosen, {})
    assert strange.startswith("a photo of my surprised uncle Bob with very long hair and a moustache")


def test_a_free_caption_completes_too() -> None:
    template, chosen = template_of("a photo of a woman wearing sunglasses with long hair and a hat on the beach")
    prompt = completed("a photo of a smiling woman with a hat", template, chosen)
    assert prompt == "a photo of a smiling woman with a hat and long hair wearing sunglasses on the beach"
    assert completed("a photo of a woman in sunglasses", template, chosen, heard_in(prompt, template)) == (
        "a photo of a woman in sunglasses"
    )


# ------------------------------------------------------------------------------ captioners


@pytest.mark.parametrize(
    ("said", "prompt"),
    [
        ("A lady with glasses.", "a photo of a lady with glasses"),
        ("Ada at a desk", "a photo of Ada at a desk"),
        ("a close-up of a cat", "a close-up of a cat"),
        ([{"generated_text": "a photo of a cat "}], "a photo of a cat"),
        ([{"generated_text": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a cat"}]}],
         "a photo of a cat"),
    ],
)  # fmt: skip
def test_captions_of_all_forms_become_prompts(said: Any, prompt: str) -> None:
    picture = Image.new("RGB", (8, 8))
    assert caption_of(picture, lambda image: said if image is picture else None, torch.device("cpu")) == prompt
    assert as_prompt(prompt) == prompt


def test_what_is_no_captioner(pipe: S2EditPipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="captioner must be a function from picture to text or a model's name, not int"):
        pipe.describe(picture, captioner=3)
    with pytest.raises(ValueError, match="captioner returned None"):
        pipe.describe(picture, captioner=lambda image: None)
    with pytest.raises(ValueError, match="pass one of them"):
        pipe.describe(picture, captioner=lambda image: "a cat", vocabulary=SMALL)

    def away(name: str) -> Any:
        raise OSError(f"{name} isn't here\nand more")

    monkeypatch.setattr(AutoConfig, "from_pretrained", away)
    message = r"captioner 'Salesforce/blip\S+' can't be loaded \(\S+ isn't here\).*source_prompt=.*captioner=folder"
    with pytest.raises(ValueError, match=message):
        pipe(TARGET, picture, num_inference_steps=1)
    with pytest.raises(ValueError, match=message):
        pipe.fit_identity(picture, num_steps=1)


def test_a_captioner_of_transformers(pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path) -> None:
    """A tiny BLIP, with weights that say one thing always, from its folder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "lady", "with", "glasses"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"), bos_token="[DEC]")
    text = {
        "vocab_size": len(words), "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3,
        "pad_token_id": 0, "max_position_embeddings": 64,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    order = torch.zeros(len(words), len(words))
    model.text_decoder.cls.predictions.decoder.bias.data = order[0].clone()
    model.save_pretrained(tmp_path)
    processor = BlipProcessor(BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer)
    processor.save_pretrained(tmp_path)
    load_captioner.cache_clear()
    expected = processor.batch_decode(
        model.eval().generate(
            **processor(images=picture, return_tensors="pt"), max_new_tokens=describe_captioner.MOST_TOKENS
        ),
        skip_special_tokens=True,
    )[0]
    assert load_captioner(str(tmp_path), torch.device("cpu"))(picture) == expected
    assert load_captioner(str(tmp_path), torch.device("cpu")) is load_captioner(str(tmp_path), torch.device("cpu"))


def test_a_caption_is_described_with_what_it_is_worth(pipe: S2EditPipeline, picture: Image.Image) -> None:
    about = pipe.describe(picture, captioner=lambda image: "A lady with glasses on a beach")
    assert isinstance(about, Description) and about.subject == "lady"
    assert about.prompt == "a photo of a lady with glasses on a beach"
    judge = DenoisingJudge(pipe.family, pipe.family.encode_picture(picture))
    totals = [
        sum(judge.errors([text], share, k)[0] for share in LEVELS for k in range(NOISES)) for text in (about.prompt, "")
    ]
    gain = math.exp(abs(totals[1] - totals[0]) / (NOISES * len(LEVELS))) - 1
    assert about.scores == {about.prompt: pytest.approx(math.copysign(gain, totals[1] - totals[0]), rel=1e-2)}
    with pytest.raises(ValueError, match="names nothing"):
        pipe.describe(picture, captioner=lambda image: "a the")
    known = pipe.describe(picture, prompt="a portrait of a lady", captioner=lambda image: "a woman with glasses")
    assert (known.prompt, known.subject) == ("a portrait of a lady with glasses", "lady")


# ------------------------------------------------------------------------------ in the pipeline


@pytest.fixture(scope="module")
def worded(_tiny: dict[str, dict[str, Any]]) -> S2EditPipeline:
    """A pipeline with a vocabulary of its own."""
    made = S2EditPipeline(**copy.deepcopy(_tiny["epsilon"]), vocabulary=SMALL)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def about(worded: S2EditPipeline, picture: Image.Image) -> Description:
    return worded.describe(picture)


def test_the_vocabulary_goes_where_the_model_goes(worded: S2EditPipeline, about: Description, tmp_path: Path) -> None:
    template = read_template(SMALL)
    assert about.prompt in {template.caption(said) for said in _all_sayings(template)}
    assert sum(about.subject == text for text in about.scores) == 1
    assert all(score > 0 for score in about.scores.values())
    assert all(text.removeprefix("with ") in about.prompt for text in about.scores)
    worded.save_pretrained(tmp_path)
    for again in (S2EditPipeline.from_pretrained(tmp_path), S2EditPipeline.from_pipe(worded)):
        assert own_vocabulary(again) == SMALL
    assert own_vocabulary(S2EditPipeline(**worded.components)) is None


def test_a_fit_without_words_is_described(worded: S2EditPipeline, about: Description, picture: Image.Image) -> None:
    settings: dict[str, Any] = {"num_steps": 1, "batch_size": 1, "mask": np.ones((32, 32), bool)}
    identity = worded.fit_identity(picture, **settings)
    assert (identity.source_prompt, identity.subject) == (about.prompt, about.subject)
    full = worded.fit_identity(picture, "a photo of a lady with glasses", complete_prompt=True, **settings)
    assert full.subject == "lady" and full.source_prompt.startswith("a photo of a s")
    assert " lady with glasses and a " in full.source_prompt
    assert worded.fit_identity(picture, "a photo of a lady with glasses", **settings).subject == "lady"
    with pytest.raises(ValueError, match="prompt='of the' names nothing; pass subject="):
        worded.fit_identity(picture, "of the", **settings)
    assert np.array_equal(worded.preview_mask(picture), worded.preview_mask(picture, about.prompt, about.subject))


def test_an_edit_without_a_source_prompt_is_described(
    worded: S2EditPipeline, about: Description, picture: Image.Image
) -> None:
    template, target = read_template(SMALL), "a photo of a lady with sunglasses"
    (chosen,) = (
        said
        for said in itertools.product(*(group.wordings() for group in template.groups))
        if template.caption([template.saying(g, wording) for g, wording in enumerate(said)]) == about.prompt
    )
    full = completed(target, template, chosen, {})
    assert "with sunglasses" in full and ("hat" in full or "beard" in full)
    settings: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
    edited, bare = (worded(target, picture, complete_prompt=c, **settings).images for c in (None, False))
    assert np.array_equal(edited, worded(full, picture, about.prompt, **settings).images)
    assert np.array_equal(bare, worded(target, picture, about.prompt, **settings).images)


def test_a_description_completes_targets_as_an_edit_would(
    worded: S2EditPipeline, picture: Image.Image, about: Description
) -> None:
    """Without judging the picture again."""
    mood = "sad" if "sad" in about.prompt else "smiling"
    other = {"sad": "smiling", "smiling": "sad"}[mood]
    short = f"a photo of a {other} {about.subject}"
    assert about.complete(short) == about.prompt.replace(mood, other) != short
    assert about.complete(about.prompt) == about.prompt
    settings: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
    edited = worded(short, picture, complete_prompt=True, **settings).images
    assert np.array_equal(edited, worded(about.complete(short), picture, about.prompt, **settings).images)


def test_short_prompts_are_completed_alike(worded: S2EditPipeline, picture: Image.Image) -> None:
    source = worded.describe(picture, prompt=SOURCE).prompt
    mood = "sad" if "sad" in source else "smiling"
    other = {"sad": "smiling", "smiling": "sad"}[mood]
    short, full = f"a photo of a {other} lady", source.replace(mood, other)
    settings: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
    edited = worded(short, picture, SOURCE, complete_prompt=True, **settings).images
    assert np.array_equal(edited, worded(full, picture, source, **settings).images)
    inversion = worded.invert(picture, source, num_inference_steps=2)
    edited = worded(short, picture, inversion=inversion, complete_prompt=True, output_type="np").images
    assert np.array_equal(edited, worded(full, picture, inversion=inversion, output_type="np").images)
    with pytest.raises(ValueError, match=r"complete_prompt=True looks at the picture: pass image="):
        worded(TARGET, inversion=inversion, complete_prompt=True)
    other_words = worded.invert(picture, SOURCE, num_inference_steps=2)
    with pytest.raises(ValueError, match=r"complete_prompt=True makes .* invert under those words"):
        worded(TARGET, picture, SOURCE, inversion=other_words, complete_prompt=True)


def test_the_embedded_model_reads_its_avatars() -> None:
    pipe = load_avatars()
    pipe.set_progress_bar_config(disable=True)
    words = "a photo of [angry|smiling] [red|blue] {cat|dog} [|with stripes] [on a [green|pink] background]"
    about = pipe.describe(render(sample("creature", 3, "held_out")), vocabulary=words)
    assert about.prompt == "a photo of an angry red dog with stripes on a green background"
    assert about.subject == "dog"
    assert own_vocabulary(pipe) == "\n".join(vocabulary())
