"""Identities on disk and on a model: whole or not at all, and off again without a trace."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from s2edit_pipeline import identity_adapter, identity_overlay
from s2edit_pipeline.identity_adapter import IdentityAdapter, LearnedAttribute
from s2edit_pipeline.identity_fingerprint import fingerprint
from s2edit_pipeline.identity_lora_names import lora_metadata
from s2edit_pipeline.identity_overlay import IdentityOverlay
from s2edit_pipeline.identity_schema import DIFFERENCES_FILE, LORA_FILE, TOKEN_FILES
from s2edit_pipeline.pipeline import S2EditPipeline

from .effective_weights import effective_weights

METHODS = ("lora", "full", "token")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def make_identity(pipe: S2EditPipeline, picture: Any, half_mask: Any) -> Any:
    """Fitted for two steps, then perturbed, so that nothing in it is a zero or a default."""

    def make(method: str = "lora", **changes: Any) -> IdentityAdapter:
        fitted = pipe.fit_identity(
            picture, "a photo of a sad lady", "lady", method=method, mask=half_mask,
            generator=torch.Generator().manual_seed(0), **{"num_steps": 2, **changes},
        )  # fmt: skip
        for i, tensor in enumerate(fitted.weights.values()):
            tensor.add_(0.02 * noise(*tensor.shape, seed=i))
        return fitted

    return make


def state(pipe: S2EditPipeline) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor.clone()
        for part in ("unet", "text_encoder", "vae")
        for name, tensor in getattr(pipe, part).state_dict().items()
    }


def effective(pipe: S2EditPipeline) -> dict[str, torch.Tensor]:
    """The weights with what is laid over them."""
    parts = {part: effective_weights(getattr(pipe, part)) for part in ("unet", "text_encoder")}
    return {f"{part}.{name}": tensor for part, weights in parts.items() for name, tensor in weights.items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("method", METHODS)
def test_saving_and_loading_is_a_round_trip(make_identity: Any, tmp_path: Path, method: str) -> None:
    identity = make_identity(method)
    identity.save_pretrained(tmp_path / "ada", exact=True)
    found = IdentityAdapter.from_pretrained(tmp_path / "ada")
    assert_same(dict(found.weights), dict(identity.weights))
    assert torch.equal(found.rows["text_encoder"], identity.rows["text_encoder"]) and torch.equal(
        found.mask, identity.mask
    )
    for name in ("token", "subject", "source_prompt", "method", "base_model"):
        assert getattr(found, name) == getattr(identity, name) != "" or name == "base_model"
    for name in ("lora_metadata", "base_fingerprint", "settings", "measures", "library_versions"):
        assert dict(getattr(found, name)) == dict(getattr(identity, name))
    assert not [p for p in tmp_path.iterdir() if p.name != "ada"]
    files = {p.name for p in (tmp_path / "ada").iterdir()}
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".ckpt")) for name in files)


def test_a_lora_identity_is_what_diffusers_own_loader_reads(
    pipe: S2EditPipeline, make_identity: Any, tmp_path: Path
) -> None:
    """The weights of the file through diffusers' load_lora_weights, against our own laying on."""
    identity = make_identity()
    identity.save_pretrained(tmp_path / "ada")
    names = load_file(str(tmp_path / "ada" / LORA_FILE))
    encoders = [name for name in names if not name.startswith("unet.")]
    assert encoders and all(name.startswith("text_encoder.text_model.encoder.") for name in encoders)  # as ever was
    x, context = noise(1, 4, 16, 16), noise(1, 9, 32)
    pipe.load_identity(identity)
    with torch.no_grad():
        ours = pipe.unet(x, 500, context).sample
    pipe.unload_identity()
    with torch.no_grad():
        plain = pipe.unet(x, 500, context).sample
    pipe.load_lora_weights(str(tmp_path / "ada"), weight_name=LORA_FILE)
    with torch.no_grad():
        theirs = pipe.unet(x, 500, context).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert float((ours - plain).abs().max()) > 1e-2


def test_the_weight_differences_are_the_formula(make_identity: Any) -> None:
    """LoRA: W' = W + (alpha / r) B A, element by element in float64."""
    identity = make_identity(lora_rank=3)
    metadata = {**identity.lora_metadata, "unet.lora_alpha": 6}
    changed = replace(identity, lora_metadata=metadata)
    differences = changed.weight_differences("unet")
    assert len(differences) == sum(n.startswith("unet.") and "lora_A" in n for n in identity.weights)
    for name, found in list(differences.items())[:3]:
        layer = "unet." + name.removesuffix(".weight")
        down = identity.weights[f"{layer}.lora_A.weight"].double()
        up = identity.weights[f"{layer}.lora_B.weight"].double()
        wanted = torch.zeros(found.shape, dtype=torch.float64)
        for r in range(3):
            wanted += 6 / 3 * up[:, r, None] * down[None, r]
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)


def composed(*encoders: str) -> IdentityAdapter:
    """A composition's two tokens alone, with a row for each of ``encoders``."""

    def rows(seed: int) -> dict[str, torch.Tensor]:
        return {name: noise(32, seed=seed + i) for i, name in enumerate(encoders)}

    hat = LearnedAttribute("[A]", "hat", "a man with a hat", rows(10))
    return IdentityAdapter("[I]", "lady", "a sad lady", "token", rows(0), reference=hat)


@pytest.mark.parametrize("encoders", [("text_encoder",), ("text_encoder", "text_encoder_2")])
def test_stock_pipelines_load_the_learned_words(
    pipe: S2EditPipeline, tmp_path: Path, encoders: tuple[str, ...]
) -> None:
    """Each token from a file of its own, as diffusers demands; with two encoders under SDXL embeddings' keys."""
    identity = composed(*encoders)
    identity.save_pretrained(tmp_path / "ada")
    found = IdentityAdapter.from_pretrained(tmp_path / "ada")
    assert found.reference is not None and identity.reference is not None
    tokens = zip(("[I]", "[A]"), TOKEN_FILES, (identity, identity.reference), (found, found.reference), strict=True)
    for token, file, wanted, again in tokens:
        assert_same(dict(again.rows), dict(wanted.rows))
        if len(encoders) == 1:
            assert load_file(str(tmp_path / "ada" / file)).keys() == {token}
            pipe.load_textual_inversion(str(tmp_path / "ada"), weight_name=file)
            row = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.convert_tokens_to_ids(token)]
            assert torch.equal(row, wanted.rows["text_encoder"])
        else:
            state = load_file(str(tmp_path / "ada" / file))
            assert state.keys() == {"clip_l", "clip_g"}
            assert torch.equal(state["clip_g"], wanted.rows["text_encoder_2"])
    assert found.digest == identity.digest
    moved = {**identity.rows, encoders[-1]: identity.rows[encoders[-1]] + 1}
    assert replace(identity, rows=moved).digest != identity.digest  # every row counts


@pytest.mark.parametrize("method", METHODS)
def test_unloading_puts_every_bit_back(pipe: S2EditPipeline, make_identity: Any, method: str) -> None:
    identity = make_identity(method)
    before, tokenizer, length = state(pipe), pipe.tokenizer, len(pipe.tokenizer)
    assert pipe.load_identity(identity) == "[I]"
    assert pipe.identities == ("[I]",) and len(pipe.tokenizer) == length + 1
    assert pipe.load_identity(identity, token="[J]", scale=0.5) == "[J]"
    changed = sum(not torch.equal(tensor, before[name]) for name, tensor in effective(pipe).items())
    assert (changed == 0) is (method == "token")
    pipe.unload_identity("[I]")
    assert pipe.identities == ("[J]",)
    alone = effective(pipe)
    pipe.unload_identity()
    assert_same(state(pipe), before)
    assert pipe.tokenizer is tokenizer and pipe.identities == ()
    pipe.load_identity(identity, token="[J]", scale=0.5)  # taking one out left the other as if it had come alone
    assert_same(effective(pipe), alone)


def test_scale_is_the_strength_of_the_weights(pipe: S2EditPipeline, make_identity: Any) -> None:
    identity, before = make_identity(), effective(pipe)
    differences = {
        f"{part}.{n}": d for part in ("unet", "text_encoder") for n, d in identity.weight_differences(part).items()
    }
    for scale in (0.25, -1.0, 0.0):
        pipe.load_identity(identity, scale=scale)
        found = effective(pipe)
        for published, difference in differences.items():
            name = published.replace(".text_model.", ".")
            torch.testing.assert_close(found[name], before[name] + scale * difference)
        if scale == 0:
            assert_same(found, before)  # as if none were loaded
        pipe.unload_identity()


def test_names_that_are_taken_and_identities_that_are_not_there(pipe: S2EditPipeline, make_identity: Any) -> None:
    identity = make_identity("token")
    pipe.load_identity(identity)
    with pytest.raises(ValueError, match=r"'\[I\]' is loaded already.*token='\[I2\]'"):
        pipe.load_identity(identity)
    with pytest.raises(ValueError, match=r"No identity '\[X\]' is loaded; loaded are: \[I\]"):
        pipe.unload_identity("[X]")
    with pytest.raises(ValueError, match="brackets"):
        pipe.load_identity(identity, token="lady")
    assert pipe.identities == ("[I]",)


def test_an_identity_of_another_model_is_refused(make_pipe: Any, pipe: S2EditPipeline, make_identity: Any) -> None:
    identity = make_identity()
    other = make_pipe()
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter.add_(0.05)
    before = state(other)
    with pytest.raises(ValueError, match="unet has other weights than this pipeline's"):
        other.load_identity(identity)
    assert_same(state(other), before)
    assert other.identities == ()
    # the same model in half precision is the same model
    half = make_pipe().to(torch.bfloat16)
    assert half.load_identity(identity) == "[I]"
    half.unload_identity()


def test_weights_that_do_not_fit_change_nothing(pipe: S2EditPipeline, make_identity: Any) -> None:
    identity, before = make_identity("full"), state(pipe)
    name = next(iter(identity.weights))
    components = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    for weights, said in (
        ({**identity.weights, name: torch.zeros(3)}, r"is \(3,\); the model's is"),
        ({**identity.weights, "unet.nowhere.weight": torch.zeros(3)}, "unet.nowhere.weight, which this model doesn't"),
    ):
        overlay = IdentityOverlay()
        with pytest.raises(ValueError, match=said):
            overlay.lay(replace(identity, weights=weights), 1.0, components, {"text_encoder": pipe.tokenizer})
        assert not overlay.identities
        assert_same(state(pipe), before)


def test_saving_never_leaves_half_an_identity(
    make_identity: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_identity("token"), make_identity("lora")
    place = tmp_path / "ada"
    first.save_pretrained(place)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", fail)  # when all else is written
        with pytest.raises(OSError, match="disk full"):
            second.save_pretrained(place)
    assert IdentityAdapter.from_pretrained(place).method == "token"
    assert [p.name for p in tmp_path.iterdir()] == ["ada"]
    second.save_pretrained(place)  # and now over it
    assert IdentityAdapter.from_pretrained(place).method == "lora"
    assert [p.name for p in tmp_path.iterdir()] == ["ada"]
    assert (place / LORA_FILE).exists() and not (place / DIFFERENCES_FILE).exists()


def test_other_peoples_folders_are_never_replaced(make_identity: Any, tmp_path: Path) -> None:
    identity = make_identity("token")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"holds other files \(mine.txt\)"):
        identity.save_pretrained(tmp_path / "photos")
    for name in ("mask.png", "README.md", "pytorch_lora_weights.safetensors"):  # named as ours, and no identity
        (tmp_path / name[:4]).mkdir()
        (tmp_path / name[:4] / name).write_text("precious")
        with pytest.raises(ValueError, match=f"holds other files .{name}."):
            identity.save_pretrained(tmp_path / name[:4])
        assert (tmp_path / name[:4] / name).read_text() == "precious"
    with pytest.raises(ValueError, match="is a file"):
        identity.save_pretrained(tmp_path / "photos" / "mine.txt")
    assert (tmp_path / "photos" / "mine.txt").read_text() == "precious"


@pytest.mark.skipif(os.name != "posix", reason="no modes")
def test_who_may_read_it_is_the_callers_to_say(make_identity: Any, tmp_path: Path) -> None:
    identity = make_identity("token")
    held = os.umask(0o077)
    try:
        identity.save_pretrained(tmp_path / "ada")
    finally:
        os.umask(held)
    assert stat.S_IMODE((tmp_path / "ada").stat().st_mode) == 0o700
    identity.save_pretrained(tmp_path / "ada")  # under another umask: the folder's own mode stays
    assert stat.S_IMODE((tmp_path / "ada").stat().st_mode) == 0o700
    identity.save_pretrained(tmp_path / "bob")
    assert stat.S_IMODE((tmp_path / "bob").stat().st_mode) == 0o777 & ~held


def test_factors_that_multiply_out_to_more_than_the_model_are_refused(make_identity: Any, pipe: S2EditPipeline) -> None:
    identity = make_identity("lora")
    name = next(n for n in identity.weights if n.endswith(".lora_A.weight"))
    other = name.replace(".lora_A.", ".lora_B.")
    huge = {**identity.weights, name: torch.zeros(1, 400_000), other: torch.zeros(400_000, 1)}
    before = state(pipe)
    with pytest.raises(ValueError, match=r"is \(400000, 400000\); the model's is"):  # 640 GB
        pipe.load_identity(replace(identity, weights=huge))
    assert_same(state(pipe), before)


def test_an_exception_half_way_leaves_what_was_loaded(
    make_identity: Any, pipe: S2EditPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_identity("lora"), make_identity("full")
    bare = state(pipe)
    pipe.load_identity(first)
    before = state(pipe)

    def break_down(*args: Any) -> None:
        raise MemoryError("no more")

    with monkeypatch.context() as patched:
        patched.setattr(identity_overlay, "lay_rows", break_down)  # when its weights are laid
        with pytest.raises(MemoryError):
            pipe.load_identity(second, token="[J]")
    assert_same(state(pipe), before)
    assert pipe.identities == ("[I]",)
    pipe.unload_identity()
    assert_same(state(pipe), bare)


def test_an_identity_that_is_loaded_is_not_laid_twice(
    make_identity: Any, pipe: S2EditPipeline, picture: Any, half_mask: Any
) -> None:
    identity = make_identity("lora")
    arguments = {"image": picture, "num_inference_steps": 2, "output_type": "latent"}
    pipe.load_identity(identity, token="[J]", mask=half_mask)
    before = state(pipe)
    wanted = pipe("a photo of a smiling [J] lady", **arguments).images
    found = pipe("a photo of a smiling [J] lady", identity=identity, **arguments).images
    assert torch.equal(found, wanted) and pipe.identities == ("[J]",)
    assert_same(state(pipe), before)
    pipe.load_identity(identity)
    with pytest.raises(ValueError, match=r"loaded more than once, as \[J\] and \[I\]; say which: identity='\[J\]'"):
        pipe("a photo of a smiling [J] lady", identity=identity, **arguments)


def test_a_place_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        IdentityAdapter.from_pretrained(tmp_path / "nobody")
    with pytest.raises(ValueError, match="is not a folder"):
        IdentityAdapter.from_pretrained("./nobody")


def test_a_full_fine_tuning_is_saved_small_and_says_what_it_lost(make_identity: Any, tmp_path: Path) -> None:
    identity = make_identity("full")
    identity.save_pretrained(tmp_path / "small", max_bytes=200_000)
    identity.save_pretrained(tmp_path / "exact", exact=True)
    small, exact = (IdentityAdapter.from_pretrained(tmp_path / name) for name in ("small", "exact"))
    assert_same(dict(exact.weights), dict(identity.weights))
    assert "kept_energy" not in exact.measures
    total = lost = 0.0
    for component in ("unet", "text_encoder"):
        left = small.weight_differences(component)
        for name, wanted in identity.weight_differences(component).items():
            total += float(wanted.double().square().sum())
            lost += float((wanted - left.get(name, torch.zeros(()))).double().square().sum())
    assert small.measures["kept_energy"] == pytest.approx(1 - lost / total, abs=1e-5)
    assert 0.05 < small.measures["kept_energy"] < 0.99
    assert sum(file.stat().st_size for file in (tmp_path / "small").iterdir()) < 220_000
    assert f"{small.measures['kept_energy']:.4g}" in (tmp_path / "small" / "README.md").read_text()
    assert small.compressed() is small
    for wrong in ({"kept_energy": 0.0}, {"kept_energy": 1.5}, {"max_bytes": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            identity.save_pretrained(tmp_path / "small", **wrong)


def test_everything_that_is_kept_is_laid_on(pipe: S2EditPipeline, make_identity: Any, tmp_path: Path) -> None:
    """With bytes enough the low-rank differences are the differences, up to float16."""
    identity = make_identity("full")
    identity.save_pretrained(tmp_path / "ada", kept_energy=1.0, max_bytes=10**8)
    pipe.load_identity(identity)
    wanted = effective(pipe)
    pipe.unload_identity()
    pipe.load_identity(tmp_path / "ada")
    for name, tensor in effective(pipe).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=2e-4)


def test_numbers_of_numpy_and_torch_are_saved_as_numbers(make_identity: Any, tmp_path: Path) -> None:
    given = {
        "learning_rate": np.float32(0.25), "semantic_weight": torch.tensor(0.5), "renormalize": np.bool_(True),
        "num_steps": np.int64(1),
    }  # fmt: skip
    identity = make_identity("token", **given)
    assert {name: identity.settings[name] for name in given} == {
        "learning_rate": 0.25,
        "semantic_weight": 0.5,
        "renormalize": True,
        "num_steps": 1,
    }
    assert all(type(identity.settings[name]) in (bool, int, float) for name in given)
    identity.save_pretrained(tmp_path / "ada")
    assert IdentityAdapter.from_pretrained(tmp_path / "ada").settings == identity.settings


def test_its_card_names_what_it_is_and_shows_its_pictures(make_identity: Any, tmp_path: Path, picture: Any) -> None:
    make_identity("token").save_pretrained(
        tmp_path / "ada", previews={"a [I] lady, smiling": picture}, license="cc-by-4.0"
    )
    card = (tmp_path / "ada" / "README.md").read_text()
    assert "instance_prompt: a photo of a sad lady\n" in card and "`[I]`" in card and "consent" in card
    assert "license: cc-by-4.0\n" in card
    assert str(tmp_path) not in card
    shown = re.findall(r'!\[.*?\]\((.*?)\)|src="(.*?)"', card)
    assert ["".join(each) for each in shown] == ["preview_1.png", "mask.png"] and "a [I] lady, smiling" in card
    with Image.open(tmp_path / "ada" / "preview_1.png") as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(picture))


# ------------------------------------------------------------------------------ which fit it is


def test_the_digest_covers_all_that_changes_a_picture(make_identity: Any, tmp_path: Path) -> None:
    identity = replace(
        make_identity("full"), reference=LearnedAttribute("[A]", "hat", "a hat", {"text_encoder": noise(32)})
    )
    first = next(iter(identity.weights))
    hat = identity.reference
    changes = {
        "row": replace(identity, rows={"text_encoder": noise(32, seed=3)}),
        "weight": replace(identity, weights={**identity.weights, first: identity.weights[first] + 1e-3}),
        "a weight's name": replace(identity, weights={n + "x" * (n == first): t for n, t in identity.weights.items()}),
        "mask": replace(identity, mask=torch.eye(16)),
        "no mask": replace(identity, mask=None),
        "no reference": replace(identity, reference=None),
        "reference's row": replace(identity, reference=replace(hat, rows={"text_encoder": noise(32, seed=4)})),
        "reference's mask": replace(identity, reference=replace(hat, mask=torch.eye(16))),
        "compressed": identity.compressed(max_bytes=100_000),
    }
    digests = {name: changed.digest for name, changed in changes.items()}
    assert len({identity.digest, *digests.values()}) == len(changes) + 1
    assert identity.renamed("[J]", "[B]").digest == identity.digest
    assert {name for name, changed in changes.items() if changed.fit_digest == identity.fit_digest} == {
        "mask", "no mask", "reference's mask",
    }  # fmt: skip
    for exact in (True, False):
        identity.save_pretrained(tmp_path / "ada", exact=exact, max_bytes=100_000)
        again = IdentityAdapter.from_pretrained(tmp_path / "ada")
        assert again.digest == (identity if exact else changes["compressed"]).digest


def test_a_loras_strength_is_in_its_digest(make_identity: Any) -> None:
    identity = make_identity("lora")
    stronger = replace(identity, lora_metadata={**identity.lora_metadata, "unet.lora_alpha": 20})
    assert stronger.digest != identity.digest


def test_the_digest_is_made_once_and_again_after_a_change_in_place(
    make_identity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity, made = make_identity("lora"), []
    sha256 = hashlib.sha256
    monkeypatch.setattr(identity_adapter.hashlib, "sha256", lambda *a: made.append(1) or sha256(*a))
    first = identity.fit_digest
    assert identity.fit_digest == first and len(made) == 1
    next(iter(identity.weights.values())).add_(1)
    assert identity.fit_digest != first and len(made) == 2
    with torch.inference_mode():
        assert replace(identity, rows={"text_encoder": noise(32)}).digest


def test_a_fit_that_was_cut_short_says_so(make_identity: Any, tmp_path: Path) -> None:
    identity = make_identity("token")
    cut = replace(identity, settings={**identity.settings, "interrupted": True})
    assert cut.interrupted and not identity.interrupted
    cut.save_pretrained(tmp_path / "ada")
    assert IdentityAdapter.from_pretrained(tmp_path / "ada").interrupted


def test_a_transformers_identity_with_three_text_encoders(tmp_path: Path) -> None:
    """Stable Diffusion 3's components; FLUX has rows for its T5 alone."""
    weights = {
        "transformer.blocks.0.attn.to_q.lora_A.weight": noise(2, 8).half(),
        "transformer.blocks.0.attn.to_q.lora_B.weight": noise(6, 2).half(),
    }
    metadata = {f"transformer.{name}": value for name, value in lora_metadata(2, ["attn.to_q"]).items()}
    prints = {"transformer": fingerprint(torch.nn.Linear(3, 3))}
    for encoders, keys in (
        (("text_encoder", "text_encoder_2", "text_encoder_3"), {"clip_l", "clip_g", "t5"}),
        (("text_encoder_2",), {"t5"}),
        (("text_encoder", "text_encoder_3"), {"text_encoder", "text_encoder_3"}),
    ):
        rows = {name: noise(8 + i, seed=i) for i, name in enumerate(encoders)}
        identity = IdentityAdapter("[I]", "lady", "a lady", "lora", rows, weights, metadata, base_fingerprint=prints)
        identity.save_pretrained(tmp_path / "ada")
        assert set(load_file(str(tmp_path / "ada" / TOKEN_FILES[0]))) == keys
        found = IdentityAdapter.from_pretrained(tmp_path / "ada")
        assert_same(dict(found.rows), rows)
        assert_same(dict(found.weights), weights)
        assert found.base_fingerprint == prints and found.digest == identity.digest
