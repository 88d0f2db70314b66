"""The one place where attention is seen and changed, for every kind of model.

For the length of :func:`attention_control` each attention layer's processor has a wrapper in front of it. Where a
controller wants a layer, the wrapper lets the processor that was there do its own work and steps in only where it calls
``scaled_dot_product_attention``: there the controller gets queries, keys and values, or the probabilities
``softmax(Q K^T / sqrt(d))`` made explicitly. So no model's arithmetic is copied: projections, norms, rotary positions
and adapters are the layer's own.

Joint attention, in which picture and text look at both, is two: what the picture's cells look at, and what all others
do (:attr:`AttentionSite.parts`). A controller may do other things to the one than to the other.

What a call does to attention belongs to that call: the wrappers are shared by all threads that are at work on a model,
and each looks up the controller of its own thread.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .attention_opaque import OpaqueLayer


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer at the size it has in this call.

    Attributes:
        name: the layer's path in the denoiser.
        kind: who asks whom: "self" (picture to picture), "cross" (picture to text), "joint" (picture to both) or
            "text" (what is no picture cell, to both or to the text alone).
        height, width: of the grid of picture cells; ``height * width`` of them.
        tells_words: whether its maps tell where words look.
        holds_layout: whether its self-attention carries the picture's layout, which prompt-to-prompt takes over.
        text: of "joint" and "text": where the text stands among the keys.
        picture: likewise, where the picture's cells stand among queries and keys; None where there are none.
    """

    name: str
    kind: str
    height: int
    width: int
    tells_words: bool = False
    holds_layout: bool = False
    text: slice | None = None
    picture: slice | None = None

    @property
    def parts(self) -> tuple[AttentionSite, ...]:
        """Of joint attention, the site of the picture's cells and that of all others that ask; else the site itself."""
        return (self, replace(self, kind="text")) if self.kind == "joint" else (self,)


SiteOf = Callable[[str, nn.Module, torch.Tensor, Any], AttentionSite | None]
"""``site_of(name, layer, hidden_states, encoder_hidden_states)``: a family's own; None where nothing is to be seen."""


class AttentionAccess(IntEnum):
    """How much of a layer a controller needs; of several controllers the largest need decides."""

    NONE = 0
    """The installed processor runs untouched."""
    INPUTS = 1
    """Queries, keys and values are enough: the fused kernel runs."""
    PROBABILITIES = 2
    """They are made explicitly."""


@dataclass(frozen=True)
class Cuts:
    """Which keys each query is cut off from.

    Attributes:
        queries: for each group of queries that are cut alike, their indices; every query is in one group.
        kept: for each group, (batch, 1, keys, 1) of 0 and 1.
        allowed: for each group, (batch, 1, 1, keys) of bool: the keys that the softmax is over, or None for all. What
            is cut off and not allowed leaves its share to the others.
        restore: (queries,), where in the groups, one after the other, each query is.
    """

    queries: tuple[torch.Tensor, ...]
    kept: tuple[torch.Tensor, ...]
    allowed: tuple[torch.Tensor | None, ...]
    restore: torch.Tensor


class AttentionController:
    """What stands at the seam; as it is, it changes nothing."""

    def access_needed(self, site: AttentionSite) -> AttentionAccess:
        """How much of this layer is needed now."""
        return AttentionAccess.NONE

    def exchange(
        self, query: torch.Tensor, key: torch.Tensor, site: AttentionSite
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The queries and keys to go on with, from (batch, heads, length, channels of a head) each; of joint attention
        the queries are those of the site's part."""
        return query, key

    def weigh(self, value: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        """The values to go on with, from (batch, heads, keys, channels of a head)."""
        return value

    def cuts(self, site: AttentionSite, keys: int, device: torch.device) -> Cuts | None:
        """Where probabilities aren't made: which of them ``__call__`` would set to 0, if any."""
        return None

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        """The probabilities to go on with, from ``probs`` (batch, heads, queries, keys)."""
        return probs


# ------------------------------------------------------------------------------ the formula


@dataclass(frozen=True)
class _Attention:
    """The arguments of one ``scaled_dot_product_attention``, by its own names."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def fused(self) -> torch.Tensor:
        return F.scaled_dot_product_attention(**vars(self))

    def of(self, queries: torch.Tensor | slice) -> _Attention:
        """Of these queries alone."""
        mask = self.attn_mask
        rows = mask if mask is None or mask.shape[-2] == 1 else mask[..., queries, :]
        return replace(self, query=self.query[:, :, queries], attn_mask=rows)


def _attend_explicitly(
    attention: _Attention, controller: AttentionController, site: AttentionSite, upcast: bool
) -> torch.Tensor:
    """``controller(softmax(Q K^T / sqrt(d))) V``, the softmax in float32: (batch, heads, queries, channels).

    Scores and probabilities are the largest tensors that an edit makes, so each goes as soon as it has served.
    """
    query, key = controller.exchange(attention.query, attention.key, site)
    value, dtype = controller.weigh(attention.value, site), attention.query.dtype
    if attention.enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if upcast:  # Stable Diffusion 2's scores overflow in float16
        query, key = query.float(), key.float()
    scale = query.shape[-1] ** -0.5 if attention.scale is None else attention.scale
    scores = (query * scale) @ key.transpose(-1, -2)
    del query, key
    mask = attention.attn_mask
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    probs = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(dtype)
    del scores
    return controller(probs, site) @ value


def _attend_fused(attention: _Attention, controller: AttentionController, site: AttentionSite) -> torch.Tensor:
    """The same without the probabilities. ``(A * gate) V`` is, for queries that are cut off from the same
    keys, ``A (kept * V)``: they look at values from which those keys' are missing."""
    query, key = controller.exchange(attention.query, attention.key, site)
    value = controller.weigh(attention.value, site)
    attention = replace(attention, query=query, key=key, value=value)
    cuts = controller.cuts(site, key.shape[2], key.device)
    if cuts is None:
        return attention.fused()
    groups = []
    for queries, kept, allowed in zip(cuts.queries, cuts.kept, cuts.allowed, strict=True):
        group = attention.of(queries)
        mask = group.attn_mask if allowed is None else _narrowed(group.attn_mask, allowed)
        groups.append(replace(group, value=value * kept.to(value), attn_mask=mask).fused())
    return torch.cat(groups, 2)[:, :, cuts.restore]


def _narrowed(mask: torch.Tensor | None, allowed: torch.Tensor) -> torch.Tensor:
    """``mask`` without the keys that aren't ``allowed``."""
    if mask is None:
        return allowed
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, float("-inf"))


def _attend(attention: _Attention, controller: AttentionController, site: AttentionSite, upcast: bool) -> torch.Tensor:
    access = controller.access_needed(site)
    if access is AttentionAccess.PROBABILITIES:
        return _attend_explicitly(attention, controller, site, upcast)
    return _attend_fused(attention, controller, site) if access else attention.fused()


def _attend_jointly(
    attention: _Attention, controller: AttentionController, site: AttentionSite, upcast: bool
) -> torch.Tensor:
    """Joint attention: the picture's cells, and all others, each by themselves."""
    picture = site.picture
    assert picture is not None
    everybody = torch.arange(attention.query.shape[2], device=attention.query.device)
    others = torch.cat([everybody[: picture.start], everybody[picture.stop :]])
    asking: tuple[torch.Tensor | slice, ...] = (picture, others)
    of_picture, of_others = (
        _attend(attention.of(queries), controller, part, upcast)
        for queries, part in zip(asking, site.parts, strict=True)
    )
    start = picture.start
    return torch.cat([of_others[:, :, :start], of_picture, of_others[:, :, start:]], 2)


class _Interception(TorchFunctionMode):
    """Within the context, of this thread, ``scaled_dot_product_attention`` passes by the controller. IP-Adapter's
    attention to pictures comes after the one to the text, and is let be."""

    def __init__(self, controller: AttentionController, site: AttentionSite, upcast: bool) -> None:
        super().__init__()
        self.controller, self.site, self.upcast, self.num_calls = controller, site, upcast, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.num_calls += 1
        if self.num_calls > 1:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        attention = _Attention(**dict(zip(names, args, strict=False)), **(kwargs or {}))
        attend = _attend_jointly if self.site.kind == "joint" else _attend
        return attend(attention, self.controller, self.site, self.upcast)


# ------------------------------------------------------------------------------ wrappers


@dataclass(frozen=True, eq=False)
class _Control:
    """What one call does to a denoiser's attention; ``has_gradients`` where it may be differentiated."""

    denoiser: nn.Module
    controller: AttentionController
    site_of: SiteOf
    has_gradients: bool


_CONTROL: ContextVar[_Control | None] = ContextVar("s2edit_attention_control", default=None)


class _Wrappers:
    """The wrappers of one denoiser, there while any thread's call needs them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.installed: list[tuple[Any, Any]] = []
        self.compiled: list[tuple[nn.Module, Any]] = []
        self.controls: list[_Control] = []

    def enter(self, control: _Control) -> None:
        with self.lock:
            if not self.controls:
                layers = attention_layers(control.denoiser)
                check_processors(layers)
                try:
                    for name, layer in layers.items():
                        self._wrap(name, layer)
                except BaseException:
                    self._unwrap()
                    raise
                if control.has_gradients or not _can_stay_compiled(control.denoiser, layers):
                    self.compiled = [
                        (m, m._compiled_call_impl)
                        for m in control.denoiser.modules()
                        if m._compiled_call_impl is not None
                    ]
                    for module, _ in self.compiled:
                        module._compiled_call_impl = None
            self.controls.append(control)

    def _wrap(self, name: str, layer: Any) -> None:
        processor = layer.processor
        kind: Any = type(processor)
        wrapper = _wrapper_class(kind)(name, processor, self)
        wrapper.opaque = OpaqueLayer(wrapper.attend, layer) if kind.__name__ in _ONE_OUTPUT else None
        self.installed.append((layer, processor))
        layer.set_processor(wrapper)

    def _unwrap(self) -> None:
        for layer, processor in self.installed:
            layer.set_processor(processor)
        self.installed.clear()

    def leave(self, control: _Control) -> None:
        with self.lock:
            self.controls.remove(control)
            if not self.controls:
                self._unwrap()
                for module, compiled in self.compiled:
                    module._compiled_call_impl = compiled
                self.compiled.clear()

    def current(self) -> _Control | None:
        control = _CONTROL.get()
        if control is not None:
            return control if control in self.controls else None
        # gradient checkpointing runs a layer again on autograd's own threads, which have no context: what is
        # differentiated has the pipeline to itself, so that there is one control it can be
        if torch.is_grad_enabled() and len(self.controls) == 1 and self.controls[0].has_gradients:
            return self.controls[0]
        return None


_WRAPPERS: weakref.WeakKeyDictionary[nn.Module, _Wrappers] = weakref.WeakKeyDictionary()
_WRAPPERS_LOCK = threading.Lock()


class ControlledProcessor:
    """In front of the processor ``installed``: steps in where this thread's controller wants the layer."""

    def __init__(self, name: str, installed: Any, wrappers: _Wrappers) -> None:
        self.name, self.installed, self.wrappers = name, installed, wrappers
        self.opaque: OpaqueLayer | None = None
        self.fusing = AttnProcessor2_0() if type(installed).__name__ in _WITHOUT_FUSED_KERNEL else installed

    @torch.compiler.disable
    def attend(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        control = self.wrappers.current()
        site = None
        if control is not None:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
            site = control.site_of(self.name, attn, hidden_states, text)
        if control is None or site is None or not any(map(control.controller.access_needed, site.parts)):
            return self.installed(attn, *args, **kwargs)
        with _Interception(control.controller, site, getattr(attn, "upcast_attention", False)) as seen:
            output = self.fusing(attn, *args, **kwargs)
        if seen.num_calls != 1 and not (seen.num_calls and _attends_to_pictures(type(self.installed))):
            raise ValueError(
                f"{self.name} holds {type(self.installed).__name__}, which made {seen.num_calls} attentions where one "
                "was expected, so they can't be edited. Put the model's own back, set_default_attn_processor(), and "
                "PyTorch's kernel, reset_attention_backend()."
            )
        return output


@functools.cache
def _wrapper_class(kind: type) -> type[ControlledProcessor]:
    """diffusers hands a processor those arguments alone that its signature names: a wrapper's is its processor's."""

    def __call__(self: ControlledProcessor, attn: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and self.opaque is not None and not torch.is_grad_enabled():
            text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
            others = [*args[2:], *(v for n, v in kwargs.items() if n not in ("hidden_states", "encoder_hidden_states"))]
            if all(other is None for other in others):
                return self.opaque(args[0] if args else kwargs["hidden_states"], text)
        return self.attend(attn, *args, **kwargs)

    call: Any = __call__
    call.__signature__ = inspect.signature(kind.__call__)
    return type(f"Controlled{kind.__name__}", (ControlledProcessor,), {"__call__": __call__})


_ONE_OUTPUT = {
    "AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor",
}  # fmt: skip
"""Processors that answer with one tensor, of the picture cells' shape."""
_WITHOUT_FUSED_KERNEL = {"AttnProcessor", "XFormersAttnProcessor", "SlicedAttnProcessor"}
"""Processors that do AttnProcessor2_0's arithmetic without its kernel; it stands in where a layer is controlled."""


def _can_stay_compiled(denoiser: nn.Module, layers: dict[str, Any]) -> bool:
    """Whether a graph of ``denoiser``'s blocks wouldn't break at a layer, nor be made anew for each adapter in them."""
    is_adapted = any(isinstance(module, LoraLayer) for module in denoiser.modules())
    return not is_adapted and all(layer.processor.opaque is not None for layer in layers.values())


def _attends_to_pictures(kind: type) -> bool:
    """Whether a processor of this kind is IP-Adapter's, which adds an attention to each picture."""
    return kind.__name__ == "IPAdapterAttnProcessor2_0"


def attention_layers(denoiser: nn.Module) -> dict[str, Any]:
    """Path -> each layer of ``denoiser`` that holds an attention processor."""
    return {
        name: module
        for name, module in denoiser.named_modules()
        if hasattr(module, "set_processor") and getattr(module, "processor", None) is not None
    }


def check_processors(layers: dict[str, Any]) -> None:
    """Raises:
    ValueError: a layer's processor makes no attention that can be taken over, or several.
    """
    for name, layer in layers.items():
        kind = type(layer.processor)
        names = getattr(kind.__call__, "__code__", None)
        makes_attention = names is not None and {"scaled_dot_product_attention", "dispatch_attention_fn"} & {
            *names.co_names
        }
        one = _attends_to_pictures(kind) or not any(part in kind.__name__ for part in ("IPAdapter", "AddedKV"))
        if kind.__name__ not in _WITHOUT_FUSED_KERNEL and not (makes_attention and one):
            raise ValueError(
                f"{name} holds {kind.__name__}, whose attention can't be edited. Take it out first: "
                "pipe.unload_ip_adapter(), or unet.set_default_attn_processor()."
            )


@contextmanager
def attention_control(denoiser: nn.Module, controller: AttentionController, site_of: SiteOf) -> Iterator[None]:
    """Within the context, of this thread, ``controller`` stands at every attention layer of ``denoiser``.

    The processors that were there are put back when the last thread leaves. Contexts nest; the inner one counts.

    Raises:
        ValueError: a layer's attention can't be taken over (xFormers' IP-Adapter, added keys); nothing is changed then.
    """
    denoiser = getattr(denoiser, "_orig_mod", denoiser)  # behind torch.compile, what it wraps
    with _WRAPPERS_LOCK:
        wrappers = _WRAPPERS.setdefault(denoiser, _Wrappers())
    control = _Control(denoiser, controller, site_of, torch.is_grad_enabled())
    wrappers.enter(control)
    token = _CONTROL.set(control)
    try:
        yield
    finally:
        _CONTROL.reset(token)
        wrappers.leave(control)
