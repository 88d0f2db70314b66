"""The public calls' arguments: checked before any work is spent, and never ignored."""

from __future__ import annotations

import inspect
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from .argument_checks import check_choice, check_guidance, is_number
from .edit_loop import edit_method
from .family_base import ModelFamily
from .fit_settings import ReferenceAttribute
from .identity_card import EMBEDDED
from .inversion_record import inversion_method, is_finished
from .offloaded_weights import check_gathering
from .packed_weights import check_fine
from .picture_inputs import load_picture
from .pipeline_turns import Call
from .pipeline_work import Report
from .prompt_embeds import ShownPicture

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
EDIT_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
"""What an edit can show its callback."""


def _check_output_type(output_type: Any) -> None:
    """Raises:
    ValueError: no such form of pictures.
    """
    check_choice("output_type", output_type, OUTPUT_TYPES)


def _check_keep(keep_attention: Any) -> None:
    """Raises:
    TypeError: it is no ``KeepAttention``.
    """
    if keep_attention is not None and not hasattr(keep_attention, "max_bytes"):
        raise TypeError(
            f"keep_attention must be a KeepAttention, not {keep_attention!r}; KeepAttention(max_bytes=0) keeps nothing."
        )


def _check_generator(generator: Any, what: str) -> None:
    """Raises:
    TypeError: it is no generator.
    ValueError: it is a list of them; ``what`` takes one.
    """
    if isinstance(generator, (list, tuple)):
        raise ValueError(
            f"generator must be one for {what}, not a list of {len(generator)}: all of it shares one picture's noise."
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be one torch.Generator for {what}, not {type(generator).__name__}; a number is a seed: "
            "seed=0."
        )


def generator_of(generator: Any, seed: Any) -> Any:
    """``generator``, or without one that which begins at ``seed``, of a list one for each; on the CPU, so that a seed
    is the same noise on every device.

    Raises:
        TypeError, ValueError: both are given, or a seed isn't a whole number that PyTorch takes.
    """
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError("seed= and generator= both say what noise is drawn; pass one of them.")
    if isinstance(seed, (list, tuple)):
        return [generator_of(None, _checked_seed(one)) for one in seed]
    return torch.Generator().manual_seed(_checked_seed(seed))


def _checked_seed(seed: Any) -> int:
    """Raises:
    TypeError: it is no whole number.
    ValueError: PyTorch doesn't take it.
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed must be a whole number, or a list of them, not {seed!r}.")
    number = operator.index(seed)
    if not 0 <= number < 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - 1, not {number}.")
    return number


def _check_autograd() -> None:
    """Raises:
    ValueError: gradients can't be made here.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("This needs gradients: call it outside torch.inference_mode() (torch.no_grad() is fine).")


def _check_can_train(family: ModelFamily) -> None:
    """Raises:
    ValueError: gradients can't be made here, or a component that a fit changes is offloaded in a way that isn't
        served.
    """
    _check_autograd()
    check_gathering(family.tuned_components, to_train=True)


def _checked_reference(reference: Any) -> tuple[ReferenceAttribute, ...]:
    """Nothing, or the one reference attribute.

    Raises:
        TypeError: it is none.
    """
    if reference is None:
        return ()
    if not all(hasattr(reference, name) for name in ("image", "prompt", "subject")):
        raise TypeError(
            "reference must be a ReferenceAttribute(image, prompt='a lady with makeup', subject='makeup'), "
            f"not {type(reference).__name__}."
        )
    return (reference,)


def _checked_tensor_inputs(names: Sequence[str] | None) -> tuple[str, ...]:
    """The tensors that an edit's callback is shown.

    Raises:
        ValueError: there is no such tensor.
    """
    names = tuple(names or ("latents",))
    for name in names:
        if name not in EDIT_TENSORS:
            raise ValueError(f"{name!r} can't be handed to callbacks; choose from {list(EDIT_TENSORS)}.")
    return names


def _check_callback(callback: Any) -> None:
    """Raises:
    TypeError: a callback that is made for Stable Diffusion's own loop.
    """
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        raise TypeError(
            f"{type(callback).__name__} steers Stable Diffusion's own loop, which an edit's isn't. To stop guidance "
            "early pass guidance_stop=; other callbacks are functions (pipe, step, timestep, tensors)."
        )
    _check_callable(callback)


def _check_callable(callback: Any) -> None:
    """Raises:
    TypeError: it is no function.
    """
    if callback is not None and not callable(callback):
        raise TypeError(f"callback_on_step_end must be a function, not {type(callback).__name__}.")


def step_report(pipe: Any, callback: Callable[..., Any] | None, names: Sequence[str]) -> Callable[[Call], Report]:
    """What a stage reports its steps to: the caller's ``callback(pipe, step, timestep, tensors)``, shown the tensors
    ``names``; what it changed comes back, and a call that was stopped goes no further.

    Raises:
        TypeError: it is no callback.
    """
    _check_callback(callback)

    def of_call(call: Call) -> Report:
        def report(step: int, timestep: Any, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
            changed: dict[str, torch.Tensor] = {}
            if callback is not None:
                shown = {name: tensors[name] for name in names if name in tensors}
                returned = callback(pipe, step, timestep, dict(shown)) or {}
                unknown = [name for name in returned if name not in shown]
                if unknown:
                    raise ValueError(
                        f"A callback may change {', '.join(map(repr, shown))}, which it was shown; it returned "
                        f"{', '.join(map(repr, unknown))}. Name it in callback_on_step_end_tensor_inputs."
                    )
                changed = dict(returned)  # also what was changed in place
            call.check()
            return changed

        return report

    return of_call


@dataclass(frozen=True)
class Arguments:
    """A call's arguments by name, and which of them the caller changed from their defaults."""

    values: Mapping[str, Any]
    changed: frozenset[str]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def only(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of ``names`` that were changed."""
        return {name: self.values[name] for name in names if name in self.changed}


def arguments_of(call: Callable[..., Any], values: Mapping[str, Any]) -> Arguments:
    """``values``, the local variables at the start of ``call``; a seed has become the generator.

    Raises:
        TypeError, ValueError: a seed that can't be used.
    """
    parameters = dict(inspect.signature(call).parameters)
    named = {n: values[n] for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    named["generator"] = generator_of(named["generator"], named["seed"])
    changed = frozenset(n for n, value in named.items() if not _is_default(value, parameters[n].default))
    return Arguments(named, changed)


def _is_default(value: Any, default: Any) -> bool:
    plain = (bool, int, float, str, tuple)
    return value is default or (isinstance(value, plain) and isinstance(default, plain) and value == default)


EDITING = (
    "source_prompt", "inversion", "preset", "reweight", "edit_mask", "keep_words", "keep_pixels", "blend_words",
    "blend_threshold", "change_threshold", "guidance_stop", "strength", "edit", "cross_replace_steps",
    "self_replace_steps", "return_attention_maps", "keep_attention", "residuals", "output_size", "crop",
    "complete_prompt", "edit_method",
)  # fmt: skip
"""Arguments that only editing a picture can obey."""
DRAWING = (
    "num_images_per_prompt", "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds", "latents", "original_size", "crops_coords_top_left", "target_size",
)  # fmt: skip
"""Arguments that only drawing from noise can obey."""
BOTH = (
    "prompt", "guidance_scale", "guidance_rescale", "negative_prompt", "generator", "height", "width", "clip_skip",
    "output_type",
)  # fmt: skip
"""Arguments of both."""


def _refuse_for_drawing(arguments: Arguments) -> None:
    """Raises:
    ValueError: an argument that only editing a picture can obey.
    """
    for name in arguments.only(EDITING):
        raise ValueError(f"{name}= is for editing a picture: pass image= too.")


def _refuse_for_editing(arguments: Arguments, stock_arguments: Mapping[str, Any]) -> None:
    """Raises:
    TypeError: an argument that there isn't.
    ValueError: an argument that only drawing from noise can obey.
    """
    for name in arguments.only(DRAWING):
        reason = (
            "an edit is deterministic, a second one would be the same" if name == "num_images_per_prompt"
            else "the edit is made from the words and is as large as the picture"
        )  # fmt: skip
        raise ValueError(f"{name} can't be combined with image: {reason}.")
    for name in stock_arguments:
        raise TypeError(f"An edit has no argument {name!r}; without image= diffusers' own pipeline may have it.")


def check_adapters(arguments: Arguments) -> tuple[float, ShownPicture | None]:
    """The factor on the loaded LoRAs, and what IP-Adapters are shown.

    Raises:
        TypeError, ValueError: an argument that can't be used, or that no loaded adapter obeys.
    """
    attention = dict(arguments["cross_attention_kwargs"] or {})
    scale, masks = attention.pop("scale", 1.0), attention.pop("ip_adapter_masks", None)
    for name in attention:
        raise ValueError(f"cross_attention_kwargs holds {name!r}; known are 'scale' and 'ip_adapter_masks'.")
    if not is_number(scale):
        raise ValueError(f"cross_attention_kwargs['scale'] must be a number, not {scale!r}.")
    family = arguments["self"].family
    if scale != 1 and not any(getattr(one, "peft_config", None) for one in family.tuned_components.values()):
        raise ValueError(
            "cross_attention_kwargs['scale'] weighs LoRAs, and none is loaded. An identity has a scale of its own: "
            "pipe.load_identity(identity, scale=...)."
        )
    if isinstance(masks, torch.Tensor):
        masks = list(masks.unsqueeze(1))
    shown = ShownPicture(_opened(arguments["ip_adapter_image"]), arguments["ip_adapter_image_embeds"], masks)
    if all(value is None for value in vars(shown).values()):
        return float(scale), None
    if family.num_picture_adapters == 0:
        name = next(iter(arguments.only(("ip_adapter_image", "ip_adapter_image_embeds", "cross_attention_kwargs"))))
        raise ValueError(f"{name}= is for an IP-Adapter, and none is loaded; call pipe.load_ip_adapter(...) first.")
    return float(scale), shown


def _opened(pictures: Any) -> Any:
    """``pictures``, of which files have become PIL pictures: diffusers reads none.

    Raises:
        ValueError: an unreadable file.
    """
    if isinstance(pictures, (list, tuple)):
        return [_opened(one) for one in pictures]
    is_file = isinstance(pictures, (str, os.PathLike, bytes, bytearray)) or callable(getattr(pictures, "read", None))
    return load_picture(pictures, "ip_adapter_image") if is_file else pictures


def stock_names(shown: ShownPicture | None) -> dict[str, Any]:
    """``shown`` as diffusers' pipelines call it."""
    if shown is None:
        return {}
    attention = None if shown.masks is None else {"ip_adapter_masks": list(shown.masks)}
    return {
        "ip_adapter_image": shown.image,
        "ip_adapter_image_embeds": shown.embeds,
        "cross_attention_kwargs": attention,
    }


_OF_GUIDANCE = {
    "branch": (),
    "told": ("negative_prompt", "guidance_rescale"),
    "none": ("guidance_scale", "guidance_stop", "negative_prompt", "guidance_rescale"),
}
"""Arguments that an edit can't obey -> where guidance has this form."""


def _refuse_guidance(arguments: Arguments) -> None:
    """Raises:
    ValueError: an argument about guidance that this model doesn't have.
    """
    form = arguments["self"].family.guidance.form
    for name in arguments.only(_OF_GUIDANCE[form]):
        why = "it is told how strongly the words pull" if form == "told" else "it was distilled at one strength"
        raise ValueError(f"{name} has no effect on this model, which has no unconditional branch: {why}. Leave it out.")


def _refuse_guidance_in_drawing(arguments: Arguments, stock_arguments: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: an argument about guidance that the stock pipeline of this model would pass over without a word.
    """
    guidance = arguments["self"].family.guidance
    form = guidance.form
    is_guided = form == "branch" or (stock_arguments.get("true_cfg_scale") or 1) > 1
    for name in () if is_guided else arguments.only(_NEGATIVE):
        raise ValueError(
            f"{name} has no effect on this model, which has no unconditional branch; where its stock pipeline can make "
            "one, pass true_cfg_scale= above 1 with it. Leave it out."
        )
    if form == "branch" and "true_cfg_scale" in stock_arguments and arguments["guidance_scale"] is not None:
        raise ValueError("guidance_scale and true_cfg_scale are one thing in this model; pass one of them.")
    if form == "none" and (arguments["guidance_scale"] or 0) > guidance.neutral:  # their cards say 0 or 1
        raise ValueError("guidance_scale has no effect on this model: it was distilled at one strength. Leave it out.")


_NEGATIVE = ("negative_prompt", "negative_prompt_embeds", "negative_pooled_prompt_embeds")


def check_fit(pipe: Any, method: str, generator: Any, reference: Any) -> tuple[ReferenceAttribute, ...]:
    """The one reference attribute of a fit, or nothing.

    Raises:
        TypeError, ValueError: an argument, or a pipeline, that a fit can't use.
    """
    pipe.family.check()
    _check_generator(generator, "a fit")
    _check_can_train(pipe.family)
    if method == "full":
        check_fine(pipe.family.tuned_components)
    return _checked_reference(reference)


def check_call(arguments: Arguments, what: str, method: Any = None) -> str:
    """Checks what inversions and edits have in common; returns why the call needs the model to itself, or "".

    Args:
        method: an inversion, made or by name; None takes the argument ``method``.

    Raises:
        TypeError, ValueError: an argument that can't be used.
    """
    arguments["self"].family.check()
    _check_keep(arguments["keep_attention"])
    _check_generator(arguments["generator"], what)
    if arguments["guidance_scale"] is not None:
        check_guidance(arguments["guidance_scale"])
    method = arguments["method"] if method is None else method
    if not isinstance(method, str) and not is_finished(method):
        raise TypeError(
            f"An inversion is a method's name, such as 'direct', or what pipe.invert returned, not {method!r}."
        )
    if is_finished(method) or not inversion_method(method).needs_gradients:
        return ""
    _check_autograd()
    return str(method)


def check_drawing(arguments: Arguments, stock_arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """The tensors that the callback is shown, which the stock pipeline checks.

    Raises:
        TypeError, ValueError: an argument that drawing can't use.
    """
    _check_output_type(arguments["output_type"])
    _refuse_for_drawing(arguments)
    generator = arguments["generator"]
    for one in generator if isinstance(generator, (list, tuple)) else [generator]:
        _check_generator(one, "a picture")
    _refuse_guidance_in_drawing(arguments, stock_arguments)
    callback = arguments["callback_on_step_end"]
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        return tuple(callback.tensor_inputs)
    _check_callable(callback)
    return tuple(arguments["callback_on_step_end_tensor_inputs"] or ("latents",))


def check_editing(arguments: Arguments, stock_arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """The tensors that the callback is shown.

    Raises:
        TypeError, ValueError: an argument that an edit can't use.
    """
    _check_output_type(arguments["output_type"])
    _refuse_for_editing(arguments, stock_arguments)
    edit_method(arguments["edit_method"])
    check_choice("output_size", arguments["output_size"], ("picture", "model"))
    _refuse_guidance(arguments)
    return _checked_tensor_inputs(arguments["callback_on_step_end_tensor_inputs"])


def base_name(pipe: Any) -> str:
    """What the base model calls itself: a Hub name, the last part of a folder's, or one of the embedded models'."""
    name = str(getattr(pipe, "name_or_path", "") or pipe.config.get("_name_or_path", ""))
    parts = name.replace("\\", "/").rstrip("/").split("/")
    if parts[-3:-1] == ["s2edit_pipeline", "avatars"] and parts[-1] in EMBEDDED:
        return EMBEDDED[parts[-1]][0]
    return parts[-1] if name.startswith(("/", ".")) or name.count("/") > 1 else name
