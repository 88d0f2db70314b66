"""Words go on to do what they did before the fit: which words are told, and the loss that keeps what they do."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from s2edit_pipeline import IdentityAdapter
from s2edit_pipeline.avatars.captions import vocabulary
from s2edit_pipeline.fit_losses import response_loss
from s2edit_pipeline.fit_objective import FitExample, Objective
from s2edit_pipeline.fit_settings import FitSettings
from s2edit_pipeline.fit_weights import full_weights, lora_weights
from s2edit_pipeline.fit_words import ResponseWords, ToldOtherwise, sayings_of
from s2edit_pipeline.pipeline import S2EditPipeline
from s2edit_pipeline.prompt_tokens import token_rows, with_tokens
from s2edit_pipeline.prompt_words import insert_token

from .test_fit_loop import assert_unchanged, example_of, snapshot

AVATARS = "\n".join(vocabulary())


def flat(sayings: Any) -> list[str]:
    return [text for phrases in sayings for texts in phrases for text in texts]


# ---------------------------------------------------------------------------- which words


def test_what_a_short_prompt_is_silent_about_is_said_beside_it() -> None:
    said = flat(sayings_of("a photo of a man", "man", None, AVATARS))
    wanted = {
        "a photo of a smiling man", "a photo of an angry man", "a photo of a bald man", "a photo of a man with glasses",
        "a photo of a man with long curly red hair", "a photo of a man with a blue hat",
        "a photo of a man on a green background", "a photo of a man with red overalls",
    }  # fmt: skip
    assert wanted <= set(said)
    assert "a photo of a man" not in said and len(said) == len(set(said))
    assert all("man" in text.split() for text in said)
    assert not any(word in text.split() for text in said for word in ("stripes", "crown"))  # a creature's


def test_what_a_prompt_says_is_exchanged_or_taken_away() -> None:
    prompt = "a photo of a sad lady with long red hair and glasses on a blue background"
    said = flat(sayings_of(prompt, "lady", None, AVATARS))
    wanted = {
        "a photo of a smiling lady with long red hair and glasses on a blue background",
        "a photo of a sad lady with short black hair and glasses on a blue background",
        "a photo of a sad lady with a green hat and glasses on a blue background",
        "a photo of a sad lady with long red hair on a blue background",
        "a photo of a sad lady with long red hair and sunglasses on a blue background",
        "a photo of a sad lady with long red hair and glasses on a green background",
        "a photo of a sad lady with long red hair and glasses and a beard on a blue background",
    }  # fmt: skip
    assert wanted <= set(said)
    assert prompt not in said
    # nothing is said twice over: one mood, one hair, one background
    moods = {"sad", "smiling", "angry", "surprised", "neutral", "winking"}
    for text in said:
        assert len(moods & set(text.split())) == 1, text
        assert text.count("hair") + text.count(" hat") + text.count("beanie") <= 1, text
        assert text.count("background") == 1, text


def test_the_subject_stays_and_words_of_ones_own_are_added() -> None:
    prompt = "a photo of a lady with a hat"
    assert all("hat" in text.split() for text in flat(sayings_of(prompt, "hat", None, AVATARS)))
    said = sayings_of(prompt, "lady", ["smiling", "hat", "a red scarf"], AVATARS)
    assert said == ((("a photo of a smiling lady with a hat",),), (("a photo of a lady with a hat and a red scarf",),))
    with pytest.raises(ValueError, match=r"says all of them already.*response_words=\['smiling', 'glasses'\]"):
        sayings_of(prompt, "lady", ["hat"], None)
    # a model without a vocabulary, and a subject that none of its nouns names
    assert "a photo of a dog with sunglasses on grass" in flat(
        sayings_of("a photo of a dog on grass", "dog", None, None)
    )


def told_of(pipe: S2EditPipeline, text: str) -> ToldOtherwise:
    tokenizers = {name: with_tokens(tokenizer, ["[I]"]) for name, tokenizer in pipe.family.tokenizers.items()}
    with_token = pipe.family.tokenize(insert_token(text, "lady", "[I]"), tokenizers)
    return ToldOtherwise(pipe.family.tokenize(text), with_token)


def test_kinds_are_drawn_alike_and_not_their_colours(pipe: S2EditPipeline) -> None:
    """One of two groups, one of its phrases, one of that phrase's colours, each as often as its equals."""
    moods = ("a photo of a sad lady",), ("a photo of a happy lady",)
    hats = (tuple(f"a photo of a lady with a {color} hat" for color in ("red", "blue", "green", "grey")),)
    words = ResponseWords.of((moods, hats), lambda text: told_of(pipe, text))
    drawn = words.drawn(2000, torch.Generator().manual_seed(0), torch.device("cpu"))
    counts = {text: sum(one.prompt.text == text for one in drawn) for text in flat(words.sayings)}
    for text, count in counts.items():
        share = 1 / 8 if "hat" in text else 1 / 4
        assert count == pytest.approx(2000 * share, abs=4 * (2000 * share) ** 0.5), text
    again = words.drawn(2000, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert [one.prompt.text for one in again] == [one.prompt.text for one in drawn]


def test_what_is_too_long_for_the_model_is_not_told(pipe: S2EditPipeline) -> None:
    long = "a photo of a lady" + " with a red hat" * 40
    words = ResponseWords.of(((("a photo of a sad lady",), (long,)), ((long,),)), lambda text: told_of(pipe, text))
    assert words.sayings == ((("a photo of a sad lady",),),)


# ---------------------------------------------------------------------------- the loss


def test_the_loss_is_the_square_between_two_differences() -> None:
    generator = torch.Generator().manual_seed(2)
    outputs = [torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(4)]
    flat_outputs = [output.flatten().tolist() for output in outputs]
    expected = sum(((a - b) - (c - d)) ** 2 for a, b, c, d in zip(*flat_outputs, strict=True)) / (2 * 3 * 4 * 5)
    loss = response_loss(outputs[:2], outputs[2:])
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    halves = [output.bfloat16() for output in outputs]
    assert response_loss(halves[:2], halves[2:]).dtype == torch.float32


def example_with_words(pipe: S2EditPipeline) -> tuple[FitExample, dict[str, torch.Tensor]]:
    example, rows = example_of(pipe)
    sayings = sayings_of(example.prompt.text, "lady", ["smiling", "hat", "beard"], None)
    return replace(example, words=ResponseWords.of(sayings, lambda text: told_of(pipe, text))), rows


@torch.no_grad()
def naive_response(
    pipe: S2EditPipeline, base: tuple[Any, Any], example: FitExample, row: torch.Tensor, draw: Any
) -> float:
    """The formula row by row, with text encoders whose tables really have the token."""
    token_id = example.token_id("text_encoder")

    def output(unet: Any, encoder: Any, ids: torch.Tensor, b: int) -> torch.Tensor:
        encoder = copy.deepcopy(encoder)
        encoder.resize_token_embeddings(token_id + 1, mean_resizing=False)
        encoder.get_input_embeddings().weight[token_id] = row
        a = float(pipe.scheduler.alphas_cumprod[int(draw.levels[b]) - 1])
        x = a**0.5 * example.latents[0] + (1 - a) ** 0.5 * draw.epsilon[b]
        predicted: torch.Tensor = unet(x[None], int(draw.levels[b]) - 1, encoder(ids).last_hidden_state).sample
        return predicted.double()

    total, count = 0.0, 0
    for b, told in zip(draw.rows, draw.told, strict=True):
        tuned_models, base_models = (pipe.unet, pipe.text_encoder), base
        tuned = output(*tuned_models, told.prompt_with_token.input_ids, b)
        tuned = tuned - output(*tuned_models, example.prompt_with_token.input_ids, b)
        kept = output(*base_models, told.prompt.input_ids, b) - output(*base_models, example.prompt.input_ids, b)
        total, count = total + float((tuned - kept).square().sum()), count + tuned.numel()
    return total / count


def test_the_response_is_the_formula_written_out(pipe: S2EditPipeline) -> None:
    """With U-Net and text encoder both moved away from the base model."""
    base = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.text_encoder)
    example, rows = example_with_words(pipe)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    moved = pipe.unet, pipe.text_encoder

    @contextmanager
    def untuned() -> Iterator[None]:
        pipe.unet, pipe.text_encoder = base
        try:
            yield
        finally:
            pipe.unet, pipe.text_encoder = moved

    settings = FitSettings(batch_size=3, response_loss_weight=2.0, response_batch_size=2, spatial_control=False)
    objective = Objective(pipe.family, example, settings, untuned)
    draw = objective.draw(generator, torch.device("cpu"))
    assert len(draw.rows) == len(set(draw.rows)) == len(draw.told) == 2
    with token_rows(pipe.text_encoder, {example.token_id("text_encoder"): rows["text_encoder"]}):
        losses = objective.losses(draw, objective.base_response(draw))
    expected = naive_response(pipe, base, example, rows["text_encoder"], draw)
    assert losses.response.item() == pytest.approx(expected, rel=1e-3) and expected > 1e-6
    alone = objective.draw(torch.Generator().manual_seed(6), torch.device("cpu"), words=False)
    assert alone.told == ()
    total = losses.reconstruction + 0.1 * losses.semantic + 2.0 * losses.response
    assert objective.total(losses).item() == pytest.approx(total.item())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_base_model_answers_to_the_bit_and_gets_no_gradient(pipe: S2EditPipeline, method: str) -> None:
    example, rows = example_with_words(pipe)
    settings = FitSettings(method=method, response_loss_weight=1.0, spatial_control=False)
    components = pipe.family.tuned_components
    for module in components.values():
        module.requires_grad_(False)
    before = Objective(pipe.family, example, settings)
    draw = before.draw(torch.Generator().manual_seed(1), torch.device("cpu"))
    expected = before.base_response(draw)
    targets = {name: pipe.family.lora_targets(name, "all") for name in components}
    context = full_weights(components) if method == "full" else lora_weights(components, targets, 2, 0)
    row = rows["text_encoder"].clone().requires_grad_()
    with context as tuning, token_rows(pipe.text_encoder, {example.token_id("text_encoder"): row}):
        with torch.no_grad():
            for parameter in tuning.parameters:
                parameter.add_(0.01)
        objective = Objective(pipe.family, example, settings, tuning.untuned)
        base = objective.base_response(draw)
        assert all(torch.equal(one, other) and not one.requires_grad for one, other in zip(base, expected, strict=True))
        with pytest.raises(RuntimeError, match="stop"), tuning.untuned():
            raise RuntimeError("stop")
        losses = objective.losses(draw, base)
        losses.response.backward()
        assert losses.response.item() > 1e-6
        graded = [p for p in tuning.parameters if p.grad is not None and float(p.grad.abs().max()) > 0]
        assert len(graded) > 0.8 * len(tuning.parameters) and float(row.grad.abs().max()) > 0
        trained = {id(p) for p in tuning.parameters}
        others = [p for m in components.values() for p in m.parameters() if id(p) not in trained]
        assert all(p.grad is None for p in others)
        assert all(p.requires_grad for p in tuning.parameters)
    for parameter in [p for m in components.values() for p in m.parameters()]:
        parameter.grad = None


# ---------------------------------------------------------------------------- the whole fit


def fit(pipe: S2EditPipeline, picture: Image.Image, prompt: str = "a photo of a lady", **more: Any) -> IdentityAdapter:
    arguments = {"num_steps": 3, "generator": torch.Generator().manual_seed(0), "response_loss_weight": 1.0, **more}
    return pipe.fit_identity(picture, prompt, "lady", **arguments)


@pytest.mark.parametrize("method", ["lora", "full", "token"])
def test_a_fit_leaves_the_pipeline_as_it_was_and_says_what_it_kept(
    pipe: S2EditPipeline, picture: Image.Image, method: str, tmp_path: Path
) -> None:
    before, heard = snapshot(pipe), []
    words = ["smiling", "a red hat"]
    identity = fit(
        pipe, picture, method=method, response_words=words, callback_on_step_end=lambda p, i, n, m: heard.append(m)
    )
    assert_unchanged(snapshot(pipe), before)
    assert all(set(m) == {"reconstruction_loss", "semantic_loss", "cosine", "response_loss"} for m in heard)
    assert heard[-1]["response_loss"] > 0
    identity.save_pretrained(tmp_path)
    settings = IdentityAdapter.from_pretrained(tmp_path).settings
    assert (settings["response_loss_weight"], settings["response_batch_size"]) == (1.0, FitSettings(method).batch_size)
    assert settings["response_words"] == "smiling, a red hat"
    again = fit(pipe, picture, method=method, response_words=words)
    assert all(torch.equal(again.rows[name], identity.rows[name]) for name in identity.rows)


def test_off_the_words_draw_nothing(pipe: S2EditPipeline, picture: Image.Image) -> None:
    """The same numbers are drawn as before there were any."""
    on, off = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    quick = {"lora_layers": "attention", "lora_init": "random", "num_steps": 1}
    fit(pipe, picture, generator=on, **quick)
    identity = fit(pipe, picture, generator=off, response_loss_weight=0, **quick)
    assert not torch.equal(on.get_state(), off.get_state())
    assert "response_loss_last" not in identity.measures and identity.settings["response_words"] is None


def test_a_prompt_that_fills_the_model_keeps_no_word(
    pipe: S2EditPipeline, picture: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    words = "a photo of a lady"
    while True:
        try:
            pipe.family.tokenize(f"{words} and")
            words += " and"
        except ValueError:
            break
    # one token short of the model's length, which [I] takes
    words = words.removesuffix(" and")
    with pytest.raises(ValueError, match="too long to say more: shorten it"):
        fit(pipe, picture, words, response_words=["smiling", "a hat"])
    fit(pipe, picture, words, num_steps=1)
    assert "keeps no word's effect" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"response_loss_weight": -1}, ValueError, "response_loss_weight must be a number of 0 or more, not -1"),
        ({"response_loss_weight": True}, ValueError, "response_loss_weight must be a number of 0 or more"),
        ({"response_words": "smiling"}, TypeError, r"strings, such as \['smiling', 'glasses'\], not 'smiling'"),
        ({"response_words": [3]}, TypeError, "must be strings"),
        ({"response_words": []}, ValueError, "must hold a word each"),
        ({"response_words": ["smiling", " "]}, ValueError, "must hold a word each"),
        ({"response_words": ["a very long word"] * 20}, ValueError, "200 characters in all"),
        ({"response_batch_size": 0}, ValueError, "response_batch_size must be a whole number of at least 1"),
        ({"response_batch_size": 4}, ValueError, "more than the batch_size=3 noise levels"),
        ({"response_loss_weight": 0, "response_words": ["a"]}, ValueError, "has no effect with response_loss_weight=0"),
        ({"response_loss_weight": 0, "response_batch_size": 2}, ValueError, "no effect with response_loss_weight=0"),
    ],
)
def test_what_it_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FitSettings(**{"response_loss_weight": 1.0, **arguments})
