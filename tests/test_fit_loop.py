"""Fitting: what it minimises, what it leaves behind (nothing), and that a seed decides all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from s2edit_pipeline import IdentityAdapter, ReferenceAttribute
from s2edit_pipeline.fit_loop import fit_weights
from s2edit_pipeline.fit_objective import FitExample
from s2edit_pipeline.fit_settings import FitSettings
from s2edit_pipeline.pipeline import S2EditPipeline
from s2edit_pipeline.prompt_tokens import initial_row, with_tokens
from s2edit_pipeline.prompt_words import insert_token

METHODS = ("lora", "full", "token")
PROMPT = "a photo of a sad lady with glasses"


def snapshot(pipe: S2EditPipeline) -> dict[str, Any]:
    """Everything about a pipeline that a fit could leave changed, the tensors' own identity included."""
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "vae": pipe.vae}
    return {
        "values": {f"{p}.{n}": t.clone() for p, m in parts.items() for n, t in m.state_dict().items()},
        "places": {f"{p}.{n}": t.data_ptr() for p, m in parts.items() for n, t in m.named_parameters()},
        "grads": {f"{p}.{n}": (t.grad, t.requires_grad) for p, m in parts.items() for n, t in m.named_parameters()},
        "modules": {f"{p}.{n}": (id(k), k.training) for p, m in parts.items() for n, k in m.named_modules()},
        "attributes": {p: sorted(vars(m)) for p, m in parts.items()},
        "hooks": {
            f"{p}.{n}": (list(k._forward_hooks), list(k._forward_pre_hooks))
            for p, m in parts.items()
            for n, k in m.named_modules()
        },
        "processors": {n: id(k) for n, k in pipe.unet.attn_processors.items()},
        "tokenizer": (id(pipe.tokenizer), len(pipe.tokenizer), sorted(pipe.tokenizer.get_vocab())),
        "scheduler": (id(pipe.scheduler), dict(pipe.scheduler.config), pipe.scheduler.timesteps.tolist()),
        "random": torch.get_rng_state(),
        "identities": pipe.identities,
    }


def assert_unchanged(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert now["values"].keys() == before["values"].keys()
    assert not [n for n, tensor in before["values"].items() if not torch.equal(now["values"][n], tensor)]
    assert torch.equal(now["random"], before["random"])
    for name in before.keys() - {"values", "random"}:
        assert now[name] == before[name], name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fails_at", [None, "callback", "unet", "interrupt"])
def test_the_pipeline_is_left_as_it_was(
    pipe: S2EditPipeline, picture: Image.Image, method: str, fails_at: str | None
) -> None:
    pipe.unet.train()  # someone was training it, and kept a gradient
    first = next(pipe.unet.parameters())
    first.grad = torch.ones_like(first)
    next(pipe.text_encoder.parameters()).requires_grad_(False)
    before = snapshot(pipe)
    steps: list[int] = []

    def callback(the_pipe: S2EditPipeline, step: int, num_steps: int, measures: dict[str, float]) -> None:
        assert the_pipe is pipe and num_steps == 4
        assert set(measures) == {"reconstruction_loss", "semantic_loss", "cosine"}
        steps.append(step)
        if step == 1 and fails_at == "callback":
            raise RuntimeError("stop here")
        if step == 1 and fails_at == "interrupt":
            pipe.interrupt = True

    def fit() -> Any:
        return pipe.fit_identity(
            picture, PROMPT, "lady", method=method, num_steps=4, callback_on_step_end=callback,
            generator=torch.Generator().manual_seed(3),
        )  # fmt: skip

    if fails_at in (None, "interrupt"):
        identity = fit()
        assert identity.settings["num_steps"] == (4 if fails_at is None else 2) == len(steps)
        assert identity.interrupted is (fails_at == "interrupt")
    else:
        if fails_at == "unet":
            calls, forward = [0], pipe.unet.conv_in.forward

            def breaks(x: torch.Tensor) -> torch.Tensor:
                calls[0] += 1
                if calls[0] > 6:  # the mask's four, then in the middle of the fit
                    raise RuntimeError("out of memory")
                return forward(x)

            pipe.unet.conv_in.forward = breaks  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match=r"stop here|out of memory"):
            fit()
        if fails_at == "unet":
            del pipe.unet.conv_in.forward
    assert_unchanged(snapshot(pipe), before)


def example_of(pipe: S2EditPipeline, half_mask: Any = None) -> tuple[FitExample, dict[str, torch.Tensor]]:
    """A fit's example on latents of 16 x 16, and where its token's rows start."""
    family = pipe.family
    tokenizers = {name: with_tokens(tokenizer, ["[I]"]) for name, tokenizer in family.tokenizers.items()}
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    prompt = family.tokenize(PROMPT)
    with_token = family.tokenize("a photo of a sad [I] lady with glasses", tokenizers)
    mask = None if half_mask is None else torch.from_numpy(half_mask[::2, ::2]).float()
    example = FitExample(latents, prompt, with_token, "[I]", mask)
    return example, rows_of(pipe, "lady")


def rows_of(pipe: S2EditPipeline, noun: str) -> dict[str, torch.Tensor]:
    family = pipe.family
    return {name: initial_row(family.tokenizers[name], encoder, noun) for name, encoder in family.text_encoders.items()}


def fit(
    pipe: S2EditPipeline, example: FitExample, rows: dict[str, torch.Tensor], seed: int = 0, **settings: Any
) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return fit_weights(pipe.family, [example], [rows], FitSettings(**settings), generator, lambda progress: True)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_losses_are_the_papers_written_out(make_pipe: Callable[[str], S2EditPipeline], kind: str) -> None:
    """The first step's L_recons and L_semantic, with a text encoder whose table really has the row."""
    pipe = make_pipe(kind)
    example, rows = example_of(pipe)
    result = fit(pipe, example, rows, method="token", num_steps=1, batch_size=3)

    generator = torch.Generator().manual_seed(0)
    torch.randint(2**31, (1,), generator=generator)  # the adapters' seed
    u = torch.rand(3, generator=generator)
    t = [int((i + float(u[i])) / 3 * 1000) for i in range(3)]
    eps = torch.randn(3, 4, 16, 16, generator=generator)
    encoder = copy.deepcopy(pipe.text_encoder)
    token_id = example.token_id("text_encoder")
    encoder.resize_token_embeddings(token_id + 1, mean_resizing=False)
    losses = []
    with torch.no_grad():
        encoder.get_input_embeddings().weight[token_id] = rows["text_encoder"]
        sentence = encoder(example.prompt.input_ids).last_hidden_state[0, 9]  # start, eight words, end
        hidden = encoder(example.prompt_with_token.input_ids).last_hidden_state
        for i in range(3):
            a = float(pipe.scheduler.alphas_cumprod[t[i]])
            x = a**0.5 * example.latents[0] + (1 - a) ** 0.5 * eps[i]
            target = eps[i] if kind == "epsilon" else a**0.5 * eps[i] - (1 - a) ** 0.5 * example.latents[0]
            losses.append(float(((pipe.unet(x[None], t[i], hidden).sample[0] - target) ** 2).mean()))
    token = hidden[0, 6]
    angle = float(sentence @ token / sentence.norm() / token.norm())
    (step,) = result.progress
    assert step.reconstruction_loss == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert step.semantic_loss == pytest.approx(abs(angle), rel=1e-4)
    assert step.cosine == pytest.approx(angle, rel=1e-4)


def test_the_semantic_loss_makes_the_token_square_to_the_sentence(pipe: S2EditPipeline) -> None:
    example, rows = example_of(pipe)
    settings: dict[str, Any] = {"method": "token", "num_steps": 60, "batch_size": 1, "learning_rate": 2e-2}
    with_loss = fit(pipe, example, rows, semantic_weight=0.1, **settings).progress
    without = fit(pipe, example, rows, semantic_weight=0.0, **settings).progress
    assert abs(with_loss[0].cosine) > 0.1  # there is something to do
    assert abs(with_loss[-1].cosine) < 0.05
    assert abs(without[-1].cosine) > 0.5 * abs(without[0].cosine)


def test_detaching_the_sentence_takes_it_out_of_the_gradient(pipe: S2EditPipeline) -> None:
    """With only the text encoder's sentence side to move, detached weights get another gradient."""
    example, rows = example_of(pipe)
    settings: dict[str, Any] = {"method": "full", "num_steps": 2, "batch_size": 1, "semantic_weight": 10.0}
    attached = fit(pipe, example, rows, detach_sentence=False, **settings)
    detached = fit(pipe, example, rows, detach_sentence=True, **settings)
    name = "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight"
    name = name if name in attached.weights else name.replace("text_model.", "")
    assert attached.progress[0] == detached.progress[0]
    assert float((attached.weights[name] - detached.weights[name]).abs().max()) > 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_tunes(pipe: S2EditPipeline, method: str) -> None:
    example, rows = example_of(pipe)
    result = fit(pipe, example, rows, method=method, num_steps=3)
    assert float((result.rows[0]["text_encoder"] - rows["text_encoder"]).abs().max()) > 1e-4
    tuned = {name for name, tensor in result.weights.items() if float(tensor.abs().max()) > 0}
    names = {f"unet.{n}" for n, _ in pipe.unet.named_parameters()}
    # as transformers 4 calls them, so that older stacks read what is saved
    names |= {f"text_encoder.text_model.{n}" for n, _ in pipe.text_encoder.named_parameters()}
    if method == "token":
        assert not result.weights
    elif method == "full":
        table = {n for n in names if n.endswith("token_embedding.weight")}
        assert result.weights.keys() == names - table and len(table) == 1  # words keep their rows
        assert len(tuned) > 0.9 * len(names)
    else:
        layers = {n.rsplit(".lora_", 1)[0] for n in result.weights}
        adaptable = {
            f"unet.{n}" for n, m in pipe.unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
        } | {
            n.removesuffix(".weight")
            for n in names
            if n.endswith(tuple(f"{p}_proj.weight" for p in "q k v out".split()))
        }
        assert layers == adaptable
        assert all(any(n.startswith(f"{layer}.lora_B") for n in tuned) for layer in layers)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_decides_everything(pipe: S2EditPipeline, method: str) -> None:
    example, rows = example_of(pipe)
    torch.manual_seed(1)
    one = fit(pipe, example, rows, seed=5, method=method, num_steps=2)
    torch.manual_seed(2)
    again = fit(pipe, example, rows, seed=5, method=method, num_steps=2)
    other = fit(pipe, example, rows, seed=6, method=method, num_steps=2)
    assert torch.equal(one.rows[0]["text_encoder"], again.rows[0]["text_encoder"]) and one.progress == again.progress
    assert all(torch.equal(one.weights[n], again.weights[n]) for n in one.weights)
    assert not torch.equal(one.rows[0]["text_encoder"], other.rows[0]["text_encoder"])


def test_no_other_generator_is_drawn_from(pipe: S2EditPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the process's nor a device's: they serve the caller's other work, in other threads too."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a generator that isn't the fit's was seeded")

    for name in ("manual_seed", "manual_seed_all", "set_rng_state", "set_rng_state_all"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    for name in ("fork_rng", "manual_seed", "set_rng_state", "seed"):
        monkeypatch.setattr(torch.random, name, refuse)
    example, rows = example_of(pipe)
    before, drawn_within = torch.get_rng_state(), []
    family = pipe.family
    denoise = type(family).denoise

    def denoise_and_look(*arguments: Any, **options: Any) -> torch.Tensor:
        drawn_within.append(torch.equal(torch.get_rng_state(), before))
        return denoise(*arguments, **options)

    monkeypatch.setattr(type(family), "denoise", denoise_and_look)
    fit(pipe, example, rows, method="lora", num_steps=1)
    assert drawn_within and all(drawn_within)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_the_cuda_generator_goes_on_as_if_nothing_had_been_fitted(pipe: S2EditPipeline, picture: Image.Image) -> None:
    pipe.to("cuda")
    torch.cuda.manual_seed(7)
    before = torch.cuda.get_rng_state()
    for method in METHODS:
        pipe.fit_identity(picture, PROMPT, "lady", method=method, num_steps=2)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("method", METHODS)
def test_fitting_fits(pipe: S2EditPipeline, picture: Image.Image, method: str) -> None:
    """At the same noise and levels, the picture is denoised better after than before."""
    identity = pipe.fit_identity(
        picture, PROMPT, "lady", method=method, spatial_control=False, num_steps=40,
        learning_rate={"lora": 1e-2, "full": 1e-3, "token": 5e-2}[method], generator=torch.Generator().manual_seed(0),
    )  # fmt: skip

    def loss() -> float:
        prompt = pipe.family.tokenize("a photo of a sad [I] lady with glasses")
        generator, total = torch.Generator().manual_seed(4), 0.0
        with torch.no_grad():
            embeds = pipe.family.encode([prompt]).embeds
            latents = pipe.family.encode_picture(picture)
            for t in range(50, 1000, 100):
                eps, a = torch.randn(latents.shape, generator=generator), float(pipe.scheduler.alphas_cumprod[t])
                out = pipe.unet(a**0.5 * latents + (1 - a) ** 0.5 * eps, t, embeds).sample
                total += float(((out - eps) ** 2).mean())
        return total

    pipe.load_identity(replace(identity, method="token", weights={}, rows=rows_of(pipe, "lady")))  # where it began
    before = loss()
    pipe.unload_identity()
    pipe.load_identity(identity)
    assert loss() < before - (0.2 if method != "token" else 1e-3)


def test_a_loss_that_runs_away_is_named(pipe: S2EditPipeline) -> None:
    example, rows = example_of(pipe)
    with pytest.raises(FloatingPointError, match=r"The loss is (nan|inf) at step \d+; lower learning_rate"):
        fit(pipe, example, rows, method="full", num_steps=6, learning_rate=1e20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "'magic' is unknown; choose 'full', 'lora' or 'token'"),
        ({"num_steps": 0}, "num_steps must be a whole number of at least 1"),
        ({"num_steps": 2.5}, "num_steps"),
        ({"lora_rank": True}, "lora_rank"),
        ({"learning_rate": 0.0}, "learning_rate must be a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0"),
        ({"token_learning_rate": -1.0}, "token_learning_rate must be a number above 0"),
        ({"semantic_weight": -1.0}, "semantic_weight must be a number of 0 or more"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FitSettings(**settings)


# ------------------------------------------------------------------------------ composition


REFERENCE_PROMPT = "a photo of a man with a hat"


@pytest.fixture
def reference() -> ReferenceAttribute:
    array = np.random.default_rng(5).integers(0, 255, (24, 40, 3), dtype=np.uint8)  # of another shape
    mask = np.zeros((24, 40), bool)
    mask[:12] = True
    return ReferenceAttribute(Image.fromarray(array), REFERENCE_PROMPT, "hat", mask=mask)


@pytest.mark.parametrize("method", METHODS)
def test_two_tokens_are_tuned_jointly_each_with_its_own_controls(
    pipe: S2EditPipeline,
    picture: Image.Image,
    half_mask: Any,
    reference: ReferenceAttribute,
    method: str,
    tmp_path: Path,
) -> None:
    before, reports = snapshot(pipe), []
    identity = pipe.fit_identity(
        picture, PROMPT, "lady", mask=half_mask, method=method, reference=reference, num_steps=3,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=lambda pipe, step, steps, measures: reports.append(measures),
    )  # fmt: skip
    assert_unchanged(snapshot(pipe), before)
    assert len(reports) == 3 and reports[0]["cosine"] != reports[0]["reference_cosine"]
    hat = identity.reference
    assert hat is not None and (hat.token, hat.subject, hat.source_prompt) == ("[A]", "hat", REFERENCE_PROMPT)
    assert hat.mask is not None and identity.mask is not None
    assert hat.mask.shape == (12, 20) and identity.mask.shape == (16, 16)  # each at its own picture's size
    assert float(hat.mask[:6].min()) == 1 and float(hat.mask[6:].max()) == 0
    for row, noun in ((identity.rows["text_encoder"], "lady"), (hat.rows["text_encoder"], "hat")):
        assert 1e-4 < float((row - rows_of(pipe, noun)["text_encoder"]).abs().max()) < 0.2
    # saved, loaded, used in one prompt, taken out again
    identity.save_pretrained(tmp_path / "both")
    again = IdentityAdapter.from_pretrained(tmp_path / "both")
    assert again.reference is not None and torch.equal(again.reference.rows["text_encoder"], hat.rows["text_encoder"])
    assert torch.equal(again.reference.mask, hat.mask)
    pipe.load_identity(again)
    assert pipe.tokenizer.tokenize("a [I] lady with [A] hat").count("[A]") == 1
    mixed = pipe("a sad [I] lady with [A] hat", picture, "a sad lady", num_inference_steps=2, output_type="latent")
    pipe.unload_identity()
    assert_unchanged(snapshot(pipe), before)
    plain = pipe("a sad lady with hat", picture, "a sad lady", num_inference_steps=2, output_type="latent")
    assert not torch.equal(mixed.images, plain.images)


def test_the_joint_loss_is_the_sum_of_both(pipe: S2EditPipeline) -> None:
    """A joint step moves what is shared along the sum of both gradients: SGD in place of AdamW makes it exact."""
    examples, rows = [], []
    tokenizers = {"text_encoder": with_tokens(pipe.tokenizer, ["[I]", "[A]"])}
    for i, (prompt, noun, token) in enumerate(((PROMPT, "lady", "[I]"), (REFERENCE_PROMPT, "hat", "[A]"))):
        latents = torch.randn(1, 4, 16, 16 - 4 * i, generator=torch.Generator().manual_seed(i))
        texts = (prompt, insert_token(prompt, noun, token))
        tokenized = [pipe.family.tokenize(text, tokenizers) for text in texts]
        examples.append(FitExample(latents, *tokenized, token, None))
        rows.append(rows_of(pipe, noun))

    class Descent(torch.optim.SGD):
        def __init__(self, groups: Any, weight_decay: float, fused: bool) -> None:
            super().__init__([{**g, "lr": 1.0} for g in groups])

    def step(chosen: list[int], generator: torch.Generator) -> Any:
        settings = FitSettings(method="full", num_steps=1)
        return fit_weights(
            pipe.family, [examples[i] for i in chosen], [rows[i] for i in chosen], settings, generator, lambda _: True
        )

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.optim, "AdamW", Descent)
        both = step([0, 1], torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(0)
        first = step([0], generator)
        # the second's noise follows the first's, as in the joint step: no draw for the adapters' seed between
        patched.setattr(torch, "randint", lambda *args, **kwargs: torch.zeros(1, dtype=torch.int64))
        second = step([1], generator)
    for name in list(both.weights)[::7]:
        torch.testing.assert_close(both.weights[name], first.weights[name] + second.weights[name], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(both.rows[0]["text_encoder"], first.rows[0]["text_encoder"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(both.rows[1]["text_encoder"], second.rows[0]["text_encoder"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"subject": "glasses"}, ValueError, r"subject='glasses' is not in the prompt 'a photo of a man with a hat'"),
        ({"prompt": ""}, ValueError, r"reference\.prompt is empty"),
        ({"image": 3}, TypeError, r"reference\.image must be a PIL picture"),
        ({"token": "[I]"}, ValueError, r"the name of two tokens.*ReferenceAttribute\(\.\.\., token='\[I2\]'\)"),
        ({"mask": np.zeros((24, 40), bool)}, ValueError, r"reference\.mask has nothing inside"),
    ],
)
def test_a_reference_that_cannot_be_used(
    pipe: S2EditPipeline,
    picture: Image.Image,
    reference: ReferenceAttribute,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        pipe.fit_identity(picture, PROMPT, "lady", reference=replace(reference, **changes), num_steps=1)
    with pytest.raises(TypeError, match="reference must be a ReferenceAttribute"):
        pipe.fit_identity(picture, PROMPT, "lady", reference=picture, num_steps=1)
