"""Identities over a model: the formula, off again to the bit, and whatever a user's own LoRAs do meanwhile."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import CLIPTextModel

from s2edit_pipeline.identity_adapter import IdentityAdapter, LearnedAttribute
from s2edit_pipeline.identity_fingerprint import fingerprint
from s2edit_pipeline.identity_lora_names import lora_metadata, published_name
from s2edit_pipeline.identity_overlay import IdentityOverlay

from .effective_weights import effective_weights

Components = dict[str, nn.Module]


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def parts(_tiny: Any) -> dict[str, Any]:
    return copy.deepcopy(_tiny["epsilon"])


@pytest.fixture
def components(parts: dict[str, Any]) -> Components:
    return {"unet": parts["unet"], "text_encoder": parts["text_encoder"]}


@pytest.fixture
def tokenizers(parts: dict[str, Any]) -> dict[str, Any]:
    return {"text_encoder": parts["tokenizer"]}


def adapter(components: Components, token: str = "[I]", method: str = "lora", seed: int = 1) -> IdentityAdapter:
    """Made up: of every layer that LoRA may be of, or of every parameter."""
    weights: dict[str, torch.Tensor] = {}
    metadata: dict[str, Any] = {}
    for name, module in components.items():
        kinds = (nn.Linear, nn.Conv2d) if name in ("unet", "transformer") else (nn.Linear,)
        layers = {n: m for n, m in module.named_modules() if isinstance(m, kinds)}
        if method == "lora":
            for i, (path, layer) in enumerate(layers.items()):
                rank = 3 if path.endswith("to_q") else 2
                down = noise(rank, *layer.weight.shape[1:], seed=seed + i, scale=0.1)
                up = noise(len(layer.weight), rank, *[1] * (layer.weight.ndim - 2), seed=seed - i, scale=0.1)
                key = published_name(name, path)
                weights |= {f"{key}.lora_A.weight": down.half(), f"{key}.lora_B.weight": up.half()}
            fields = lora_metadata(2, layers) | {"lora_alpha": 3}
            fields["rank_pattern"] = {path: 3 for path in layers if path.endswith("to_q")}
            metadata |= {f"{name}.{field}": value for field, value in fields.items()}
        elif method == "full":
            for i, (path, parameter) in enumerate(module.named_parameters()):
                if not path.endswith("token_embedding.weight"):
                    weights[published_name(name, path)] = noise(*parameter.shape, seed=seed + i, scale=0.02)
    rows = {n: noise(32, seed=seed) for n in components if n.startswith("text_encoder")}
    prints = {name: fingerprint(module) for name, module in components.items()}
    return IdentityAdapter(
        token, "lady", "a photo of a lady", method, rows, weights, metadata, torch.ones(4, 4), "tiny", prints
    )


def condition(components: Components) -> list[Any]:
    """All that lifting off must put back."""
    seen: list[Any] = []
    for module in components.values():
        for name, inner in module.named_modules():
            attributes = sorted(key for key in vars(inner) if not key.startswith("_forward") and key != "_is_full")
            hooks = len(inner._forward_hooks) + len(inner._forward_pre_hooks)
            seen.append((name, id(inner), inner.training, attributes, hooks, type(inner.forward)))
        for name, parameter in module.named_parameters():
            seen.append((name, parameter.requires_grad, parameter.dtype, parameter.detach().clone()))
    return seen


def assert_as_before(found: list[Any], wanted: list[Any]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        same = [torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True)]
        assert all(same), (one, other)


def outputs(components: Components, **arguments: Any) -> list[torch.Tensor]:
    unet, encoder = components["unet"], components["text_encoder"]
    dtype = next(unet.parameters()).dtype
    x, context = noise(1, 4, 16, 16, seed=5).to(dtype), noise(1, 9, 32, seed=6).to(dtype)
    with torch.no_grad():
        hidden = encoder(torch.tensor([[3, 9, 40, 7]])).last_hidden_state
        return [unet(x, 500, context, **arguments).sample, hidden]


def assert_near(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def merged(components: Components, *laid: tuple[IdentityAdapter, float]) -> Components:
    """Copies with the formula written out: W + scale * (alpha / r) sum_r B[:, r] A[r]."""
    twins = copy.deepcopy(components)
    for identity, scale in laid:
        for name, module in twins.items():
            fields = identity.lora_metadata
            for path, parameter in module.named_parameters():
                key = published_name(name, path)
                layer = path.removesuffix(".weight")
                down = identity.weights.get(key.removesuffix("weight") + "lora_A.weight")
                if down is not None:
                    up = identity.weights[key.removesuffix("weight") + "lora_B.weight"]
                    rank = fields[f"{name}.rank_pattern"].get(layer, fields[f"{name}.r"])
                    for r in range(rank):
                        outer = up[:, r].reshape(-1, 1).double() * down[r].reshape(1, -1).double()
                        factor = scale * fields[f"{name}.lora_alpha"] / rank
                        parameter.data += (factor * outer).reshape(parameter.shape).to(parameter)
                elif key in identity.weights:
                    parameter.data += (scale * identity.weights[key].double()).to(parameter)
    return twins


# ------------------------------------------------------------------------------ laying on and lifting off


def test_two_identities_add_up_to_the_formula(components: Components, tokenizers: Any) -> None:
    components = {name: module.double() for name, module in components.items()}
    one, other = adapter(components), adapter(components, "[J]", seed=50)
    full = adapter(components, "[K]", "full", seed=90)
    wanted = outputs(merged(components, (one, 0.5), (other, -1.0), (full, 2.0)))
    bare = outputs(components)
    overlay = IdentityOverlay()
    for identity, scale in ((one, 0.5), (other, -1.0), (full, 2.0)):
        tokenizers = overlay.lay(identity, scale, components, tokenizers)
    found = outputs(components)
    assert_near(found, wanted, 1e-6)  # what is added to whole tensors is summed in float32
    assert min(float((a - b).abs().max()) for a, b in zip(found, bare, strict=True)) > 0.1
    assert overlay.tokens == ("[I]", "[J]", "[K]") == tuple(overlay.identities)


@pytest.mark.parametrize("method", ["lora", "full", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_off_again_to_the_bit(components: Components, tokenizers: Any, method: str, dtype: torch.dtype) -> None:
    for module in components.values():
        module.to(dtype)
    components["unet"].train()
    next(components["unet"].parameters()).requires_grad_(False)
    before, plain = condition(components), tokenizers["text_encoder"]
    overlay = IdentityOverlay()
    first, second = (adapter(components, token, method, seed) for token, seed in (("[I]", 1), ("[J]", 50)))
    tokenizers = overlay.lay(first, 1.0, components, tokenizers)
    alone = [effective_weights(module) for module in components.values()]
    tokenizers = overlay.lay(second, 0.5, components, tokenizers)
    tokenizers = overlay.lift("[J]", components)
    for module, weights in zip(components.values(), alone, strict=True):
        assert all(torch.equal(weight, weights[name]) for name, weight in effective_weights(module).items())
    tokenizers = overlay.lift(None, components)
    assert_as_before(condition(components), before)
    assert tokenizers["text_encoder"] is plain and not overlay.identities and not overlay.tokens
    assert overlay.lift(None, components) == {}


def test_a_loaded_identity_costs_what_its_factors_take(components: Components, tokenizers: Any) -> None:
    def elements() -> int:
        tensors = [t for module in components.values() for t in (*module.parameters(), *module.buffers())]
        return sum(t.numel() for t in {id(t): t for t in tensors}.values())

    before, identity = elements(), adapter(components)
    originals = {id(p): p.data_ptr() for module in components.values() for p in module.parameters()}
    IdentityOverlay().lay(identity, 1.0, components, tokenizers)
    assert elements() == before + sum(t.numel() for t in identity.weights.values())
    present = {id(p): p.data_ptr() for module in components.values() for p in module.parameters()}
    assert originals.items() <= present.items()  # no weight was copied


def test_300_rounds_leave_nothing_behind() -> None:
    components: Components = {"unet": nn.Sequential(nn.Linear(32, 48), nn.Conv2d(8, 4, 3))}
    identities = [adapter(components, token, method) for token, method in (("[I]", "lora"), ("[J]", "full"))]
    before, overlay, counts = condition(components), IdentityOverlay(), []
    for i in range(300):
        for identity in identities:
            overlay.lay(identity, 1.0, components, {})
        assert not torch.equal(components["unet"][0].weight, before[-4][-1])  # type: ignore[index]
        for identity in identities[:: 1 if i % 2 else -1]:
            overlay.lift(identity.token, components)
        if i in (9, 299):
            gc.collect()
            counts.append(sum(isinstance(one, (torch.Tensor, nn.Module)) for one in gc.get_objects()))
    assert_as_before(condition(components), before)
    assert counts[0] == counts[1]
    assert not hasattr(components["unet"], "peft_config")


def test_no_random_number_is_taken(components: Components, tokenizers: Any) -> None:
    identity, overlay = adapter(components), IdentityOverlay()
    state = torch.get_rng_state()
    overlay.lay(identity, 1.0, components, tokenizers)
    overlay.ensure(components)
    overlay.lift(None, components)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
def test_no_random_number_is_taken_on_a_gpu(components: Components, tokenizers: Any) -> None:
    for module in components.values():
        module.to("cuda")
    identity, overlay = adapter(components), IdentityOverlay()
    state = torch.cuda.get_rng_state()
    overlay.lay(identity, 1.0, components, tokenizers)
    overlay.lift(None, components)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_its_state_tells_fits_scales_and_masks(components: Components, tokenizers: Any) -> None:
    identity, states = adapter(components), set()
    changes = [
        (identity, 1.0), (identity, 0.5), (replace(identity, mask=torch.eye(4)), 1.0), (identity.renamed("[J]"), 1.0),
        (adapter(components, seed=2), 1.0),
    ]  # fmt: skip
    for changed, scale in changes:
        overlay = IdentityOverlay()
        overlay.lay(changed, scale, components, tokenizers)
        assert overlay.state(changed.token) in overlay.state()
        states.add(overlay.state())
        overlay.lift(None, components)
    assert len(states) == 5


# ------------------------------------------------------------------------------ refused before anything is done


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: replace(a, weights={**a.weights, "vae.conv.weight": torch.zeros(1)}), "changes vae, which"),
        (lambda a: replace(a, weights={**a.weights, "unet.no.weight": torch.zeros(1)}), "unet.no.weight, which"),
        (lambda a: replace(a, weights={**a.weights, "unet.conv_in.bias": torch.zeros(1)}), r"is \(1,\); the model's"),
        (lambda a: replace(a, rows={"text_encoder": torch.zeros(7)}), r"rows of .*\(7,\).*this model's are of .*32"),
        (lambda a: replace(a, base_fingerprint={}), "doesn't say which weights"),
        (lambda a: replace(a, base_fingerprint={"unet": a.base_fingerprint["unet"]}), "was fitted to 'tiny', of unet;"),
        (lambda a: a.renamed("lady"), "brackets"),
        (lambda a: a.renamed("[J]"), r"'\[J\]' is loaded already"),
        (
            lambda a: replace(a, reference=LearnedAttribute("[J]", "hat", "a hat", a.rows)),
            r"'\[J\]' is loaded already, .*reference_token='\[J2\]'",
        ),
    ],
)
def test_what_does_not_fit_changes_nothing(
    components: Components, tokenizers: Any, change: Callable[[IdentityAdapter], IdentityAdapter], said: str
) -> None:
    overlay = IdentityOverlay()
    tokenizers = overlay.lay(adapter(components, "[J]", "token"), 1.0, components, tokenizers)
    before = condition(components)
    with pytest.raises(ValueError, match=said):
        overlay.lay(change(adapter(components)), 1.0, components, tokenizers)
    assert_as_before(condition(components), before)
    assert tuple(overlay.identities) == ("[J]",)


def test_other_refusals(components: Components, tokenizers: Any) -> None:
    overlay, identity = IdentityOverlay(), adapter(components)
    for scale in (float("nan"), "1", True):
        with pytest.raises(ValueError, match="scale must be a number"):
            overlay.lay(identity, scale, components, tokenizers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"No identity '\[I\]' is loaded; loaded are: none"):
        overlay.lift("[I]", components)
    fused = copy.deepcopy(components)
    fused["unet"].fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"unfuse_qkv_projections\(\) first"):
        overlay.lay(adapter(fused), 1, fused, tokenizers)
    overlay.lay(identity, 1.0, components, tokenizers)
    other = {**components, "unet": copy.deepcopy(components["unet"])}
    with pytest.raises(ValueError, match=r"The unet is another module .*\[I\].*unload_identity"):
        overlay.ensure(other)


# ------------------------------------------------------------------------------ beside a user's LoRA


@pytest.fixture
def stock(parts: dict[str, Any]) -> StableDiffusionPipeline:
    """diffusers' own pipeline over the same modules: what its loaders do, they do to these."""
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@pytest.fixture
def style(components: Components) -> dict[str, torch.Tensor]:
    """A user's LoRA, of layers that an identity changes too and in both components."""
    made = adapter(components, seed=200)
    return {
        name: tensor.float()
        for name, tensor in made.weights.items()
        if "to_v" in name or "v_proj" in name or "conv1" in name
    }


class Story:
    """A user's doings around an identity, and what the model should be after each."""

    def __init__(self, stock: Any, components: Components, tokenizers: Any, style: dict[str, torch.Tensor]) -> None:
        self.stock, self.components, self.tokenizers, self.style = stock, components, tokenizers, style
        self.overlay, self.identity = IdentityOverlay(), adapter(components)
        self.bare, self.before = copy.deepcopy(components), condition(components)

    def lay(self) -> None:
        self.overlay.lay(self.identity, 0.5, self.components, self.tokenizers)

    def lift(self) -> None:
        self.overlay.lift(None, self.components)

    def load(self) -> None:
        self.stock.load_lora_weights(dict(self.style), adapter_name="style")

    def assert_is(self, identity: float, style: float) -> None:
        self.overlay.ensure(self.components)
        names = {name.rsplit(".lora_", 1)[0].partition(".")[0] for name in self.style}
        metadata = {f"{name}.{k}": v for name in names for k, v in lora_metadata(2, []).items()}
        theirs = replace(self.identity, weights=self.style, lora_metadata=metadata)
        wanted = outputs(merged(self.bare, (self.identity, 0.5 * identity), (theirs, style)))
        assert_near(outputs(self.components), wanted, 2e-4)


@pytest.fixture
def story(stock: Any, components: Components, tokenizers: Any, style: dict[str, torch.Tensor]) -> Story:
    return Story(stock, components, tokenizers, style)


@pytest.fixture(params=["theirs first", "ours first"])
def both(story: Story, request: pytest.FixtureRequest) -> Story:
    for step in (story.load, story.lay) if request.param == "theirs first" else (story.lay, story.load):
        step()
    story.assert_is(1, 1)
    return story


def test_theirs_stays_active_when_ours_comes(story: Story) -> None:
    story.load()
    story.assert_is(0, 1)
    story.lay()
    assert story.components["unet"].conv_in.active_adapters == ["s2edit_1"]
    story.assert_is(1, 1)


def test_set_adapters_is_about_theirs(both: Story) -> None:
    both.stock.set_adapters("style", 0.25)
    both.assert_is(1, 0.25)
    both.stock.load_lora_weights(dict(both.style), adapter_name="other")
    both.stock.set_adapters(["style", "other"], [0.25, 0.5])
    both.assert_is(1, 0.75)
    both.lift()
    both.assert_is(0, 0.75)


def test_disable_lora_switches_theirs_off_and_enable_lora_on(both: Story) -> None:
    both.stock.disable_lora()
    both.assert_is(1, 0)
    both.stock.disable_lora()
    both.assert_is(1, 0)
    both.stock.enable_lora()
    both.assert_is(1, 1)
    both.stock.disable_lora()
    both.stock.enable_lora()
    both.assert_is(1, 1)
    both.stock.disable_lora()
    both.assert_is(1, 0)
    both.stock.set_adapters("style", 0.5)  # which, not whether
    both.assert_is(1, 0)
    both.stock.enable_lora()
    both.assert_is(1, 0.5)


def test_lifting_leaves_theirs_switched_off(both: Story) -> None:
    both.stock.disable_lora()
    both.assert_is(1, 0)
    both.lift()
    both.assert_is(0, 0)
    both.stock.enable_lora()
    both.assert_is(0, 1)


@pytest.mark.parametrize("call", [lambda s: s.delete_adapters("style"), lambda s: s.unload_lora_weights()])
def test_theirs_goes_and_ours_stays(both: Story, call: Callable[[Any], None]) -> None:
    call(both.stock)
    both.assert_is(1, 0)
    both.load()
    both.assert_is(1, 1)
    call(both.stock)
    both.assert_is(1, 0)
    both.lift()
    both.assert_is(0, 0)
    assert_as_before_but_flags(both)


def assert_as_before_but_flags(story: Story) -> None:
    """diffusers and transformers leave flags of theirs behind, and emptied layers that nothing of ours was in."""
    story.stock.unload_lora_weights()
    for module in story.components.values():
        for flag in ("_hf_peft_config_loaded", "_weight_conversions"):
            vars(module).pop(flag, None)
        module.requires_grad_(True)
    assert_as_before(condition(story.components), story.before)


def test_ours_goes_and_theirs_stays(both: Story) -> None:
    both.lift()
    both.assert_is(0, 1)
    wrapped = [n for n, m in both.components["unet"].named_modules() if isinstance(m, LoraLayer)]
    assert wrapped and all("to_v" in name or "conv1" in name for name in wrapped)
    assert list(both.components["unet"].peft_config) == ["style"]
    assert_as_before_but_flags(both)


def test_ours_deleted_by_name_comes_back(both: Story) -> None:
    for layer in both.components["unet"].modules():
        if isinstance(layer, LoraLayer):
            layer.delete_adapter("s2edit_1")
    both.assert_is(1, 1)


def test_a_scale_for_one_call_leaves_ours_as_it_was(both: Story) -> None:
    for scale in (0.3, 0.0):
        outputs(both.components, cross_attention_kwargs={"scale": scale})
        both.overlay.ensure(both.components)
        layer = both.components["unet"].conv_in
        assert layer.scaling["s2edit_1"] == 0.5 * 3 / 2
    both.assert_is(1, 1)


def test_a_lora_that_is_fused_is_refused_until_it_is_unfused(both: Story) -> None:
    both.stock.fuse_lora()
    with pytest.raises(ValueError, match=r"fused into the \w+ while identities \(\[I\]\) .*pipe.unfuse_lora\(\)"):
        both.overlay.ensure(both.components)
    both.stock.unfuse_lora()
    both.assert_is(1, 1)


def test_weights_fused_for_good_are_seen(both: Story) -> None:
    both.stock.fuse_lora()
    both.stock.unload_lora_weights()
    with pytest.raises(ValueError, match=r"weights of the \w+ were changed below the loaded identities \(\[I\]\)"):
        both.overlay.ensure(both.components)


def test_another_kind_of_adapter_around_ours(story: Story) -> None:
    """PEFT wraps LoRA's layer in LoKr's."""
    from peft import LoKrConfig, inject_adapter_in_model

    story.lay()
    torch.manual_seed(0)
    config = LoKrConfig(r=2, target_modules=["to_v"], init_weights=False)
    inject_adapter_in_model(config, story.components["unet"], adapter_name="lokr")
    around = outputs(story.components)
    story.overlay.ensure(story.components)
    assert_near(outputs(story.components), around, 0)
    story.lift()
    layers = [m for m in story.components["unet"].modules() if hasattr(m, "lokr_w1")]
    assert layers and all(not isinstance(layer.base_layer, LoraLayer) for layer in layers)
    story.lay()
    assert_near(outputs(story.components), around)


def test_saved_models_hold_no_adapters_of_ours_after_theirs_went(both: Story, tmp_path: Path) -> None:
    both.stock.delete_adapters("style")
    both.lift()
    both.stock.unload_lora_weights()
    both.components["text_encoder"].save_pretrained(tmp_path / "encoder")
    again = CLIPTextModel.from_pretrained(tmp_path / "encoder")
    wanted = both.bare["text_encoder"].state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())


def test_a_lora_in_training_keeps_its_gradients(components: Components, tokenizers: Any) -> None:
    overlay, identity, unet = IdentityOverlay(), adapter(components), components["unet"]
    unet.add_adapter(LoraConfig(target_modules=["to_q"]), "mine")  # type: ignore[operator]
    required = {name: p.requires_grad for name, p in unet.named_parameters()}
    assert {required[name] for name in required if ".mine." in name} == {True}
    overlay.lay(identity, 1.0, components, tokenizers)
    overlay.ensure(components)
    present = {name.replace(".base_layer.", "."): p.requires_grad for name, p in unet.named_parameters()}
    assert {name: present[name.replace(".base_layer.", ".")] for name in required} == required
    overlay.lift(None, components)
    assert {name: p.requires_grad for name, p in unet.named_parameters()} == required


# ------------------------------------------------------------------------------ tokens


@pytest.fixture
def laid(components: Components, tokenizers: Any) -> Iterator[tuple[IdentityOverlay, Any, IdentityAdapter]]:
    overlay = IdentityOverlay()
    identity = adapter(components, method="token")
    hat = LearnedAttribute("[A]", "hat", "a hat", {"text_encoder": noise(32, seed=70)})
    identity = replace(identity, reference=hat)
    yield overlay, overlay.lay(identity, 1.0, components, tokenizers)["text_encoder"], identity


def embedded(components: Components, tokenizer: Any, text: str) -> torch.Tensor:
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        return components["text_encoder"].get_input_embeddings()(ids)[0]  # type: ignore[operator, no-any-return]


def test_rows_are_there_without_a_context(components: Components, laid: Any) -> None:
    overlay, tokenizer, identity = laid
    assert overlay.tokens == ("[I]", "[A]") and overlay.owner("[A]") == "[I]"
    found = embedded(components, tokenizer, "[I] [A] lady")
    assert torch.equal(found[0], identity.rows["text_encoder"])
    assert torch.equal(found[1], identity.reference.rows["text_encoder"])
    later = replace(identity, reference=None).renamed("[J]")
    with_j = overlay.lay(replace(later, rows={"text_encoder": noise(32, seed=9)}), 1.0, components, {})
    assert torch.equal(embedded(components, with_j["text_encoder"], "[J]")[0], noise(32, seed=9))
    alone = overlay.lift("[I]", components)["text_encoder"]  # its place in the tokenizer moves up
    assert alone.s2edit_tokens == ("[J]",)
    assert torch.equal(embedded(components, alone, "[J]")[0], noise(32, seed=9))


def test_rows_outlive_a_longer_table(components: Components, laid: Any) -> None:
    overlay, tokenizer, identity = laid
    components["text_encoder"].resize_token_embeddings(len(tokenizer) + 1, mean_resizing=False)  # type: ignore[operator]
    overlay.ensure(components)
    assert torch.equal(embedded(components, tokenizer, "[I]")[0], identity.rows["text_encoder"])


def test_a_copied_model_takes_them_along(components: Components, laid: Any) -> None:
    overlay, tokenizer, identity = laid
    twin_overlay, twins = copy.deepcopy((overlay, components))
    pickled = pickle.loads(pickle.dumps(components["text_encoder"]))
    for encoder in (twins["text_encoder"], pickled):
        found = embedded({"text_encoder": encoder}, tokenizer, "[I]")
        assert torch.equal(found[0], identity.rows["text_encoder"])
    twin_overlay.lift(None, twins)
    assert not twins["text_encoder"].get_input_embeddings()._forward_hooks
    assert torch.equal(embedded(components, tokenizer, "[I]")[0], identity.rows["text_encoder"])


def test_a_copied_model_with_a_lora_is_lifted_alone(components: Components, tokenizers: Any) -> None:
    overlay, before = IdentityOverlay(), outputs(components)
    overlay.lay(adapter(components), 1.0, components, tokenizers)
    loaded = outputs(components)
    twin_overlay, twins = copy.deepcopy((overlay, components))
    assert_near(outputs(twins), loaded, 0)
    twin_overlay.lift(None, twins)
    assert_near(outputs(twins), before, 0)
    assert_near(outputs(components), loaded, 0)


def test_threads_embed_beside_each_other(components: Components, laid: Any) -> None:
    _, tokenizer, _ = laid
    texts = ["[I] lady", "lady [A] [I] man", "a man", "[A]"] * 2
    wanted = [embedded(components, tokenizer, text) for text in texts]
    wrong: list[str] = []

    def work(text: str, expected: torch.Tensor) -> None:
        for _ in range(200):
            if not torch.equal(embedded(components, tokenizer, text), expected):
                wrong.append(text)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(texts, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
