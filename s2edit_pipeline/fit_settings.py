"""What a caller may ask of a fit: each setting, and the check of it, once."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from .argument_checks import check_choice, check_share, is_number, with_preset
from .object_masks import MASK_THRESHOLD
from .prompt_words import words_of

MOST_RESPONSE_WORDS = 200
"""Characters that ``response_words`` may have, with ", " between them: what an identity's settings hold."""


@dataclass(frozen=True)
class Recipe:
    """How a method is fitted where nothing else is said; see ``FitSettings``."""

    num_steps: int
    learning_rate: float
    token_learning_rate: float
    batch_size: int
    timestep_sampling: str
    lr_scheduler: str


RECIPES: Mapping[str, Recipe] = {
    "full": Recipe(60, 2e-5, 5e-3, 4, "uniform", "constant"),
    "lora": Recipe(20, 2.5e-3, 5e-3, 3, "uniform", "linear"),
    "token": Recipe(20, 2e-2, 2e-2, 4, "uniform", "constant"),
}

FIT_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "method": "full",
        "num_steps": 400,
        "learning_rate": 5e-6,
        "token_learning_rate": 5e-6,
        "batch_size": 1,
        "timestep_sampling": "uniform",
        "lr_scheduler": "constant",
        "early_stop": False,
        "renormalize": False,
    },
}
"""What ``preset=`` stands for in a fit. How many steps the paper takes and at what rate isn't in what we know of it
(95 s a picture, on some GPU). These are DreamBooth's (Ruiz et al. 2023) as diffusers' example has them, one rate for
everything that is trained: the method that stage one adds its two controls to."""

_OF_THE_METHOD = ("num_steps", "learning_rate", "token_learning_rate", "lr_scheduler", "batch_size")


def fit_preset(preset: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` without its Nones, and in place of these what ``preset`` says. A preset's steps, rates and batch are
    its method's: with another method they are that one's own.

    Raises:
        ValueError: there is no such preset.
    """
    presets = FIT_PRESETS
    method = given.get("method")
    if preset is not None and preset in FIT_PRESETS and method not in (None, FIT_PRESETS[preset]["method"]):
        others = {name: value for name, value in FIT_PRESETS[preset].items() if name not in _OF_THE_METHOD}
        presets = {preset: others}
    return with_preset(preset, presets, given)


TIMESTEP_SAMPLING: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "uniform": lambda u: u,
    "low_noise": lambda u: 1 - (1 - u).sqrt(),
    "high_noise": lambda u: u.sqrt(),
    "logit_normal": lambda u: torch.special.ndtri(u).sigmoid(),
}
"""Name -> quantile function of the noise levels on [0, 1]: densities 1, 2 (1 - x), 2 x, and the logit-normal of Esser
et al. 2024."""

LR_SCHEDULERS = ("constant", "linear", "cosine")
"""How the rates go on from the first step's, diffusers' own of these names: the latter two come down to 0."""

LORA_LAYERS = ("all", "attention")
LORA_INITS = ("gradient", "random")
OPTIMIZERS = ("adamw", "adamw_8bit")


def bitsandbytes() -> Any:
    """The package of the 8-bit optimizer.

    Raises:
        ImportError: it isn't there.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ImportError(
            "optimizer='adamw_8bit' needs bitsandbytes: pip install bitsandbytes. optimizer='adamw' needs nothing."
        ) from error


@dataclass(frozen=True)
class FitSettings:
    """How to fit. Where it says *ours* the paper leaves it open or does without.

    Attributes:
        method: "full" tunes U-Net and text encoders (the paper's), "lora" low-rank adapters on both (ours),
            "token" the embedding row alone (textual inversion, Gal et al. 2022).
        num_steps, learning_rate: None takes the method's own, see ``RECIPES``; so with the next three.
        token_learning_rate: the rate of the token's own row.
        batch_size: noise levels a step, one in each of as many equally likely stretches of them.
        timestep_sampling: which levels are drawn how often, see ``TIMESTEP_SAMPLING``; "uniform" is the base model's,
            the others are ours.
        lr_scheduler: of every rate, see ``LR_SCHEDULERS``; None takes the method's own.
        early_stop: end when the loss at fixed noise and levels has stopped falling (ours), see
            ``fit_loop.Plateau``; the last weights are kept.
        optimizer: "adamw", or "adamw_8bit", whose state takes a quarter of the memory (Dettmers et al. 2022).
        gradient_checkpointing: make the U-Net's activations again in the backward pass instead of keeping them.
        semantic_weight: lambda of the semantic loss; 0.1 is the paper's.
        spatial_control: mask ``[I]``'s cross-attention.
        detach_sentence: keep e_P out of the gradient (ours; off is the default reading).
        renormalize, mask_after: see ``attention_spatial.SpatialControl`` (ours); None renormalises in joint attention
            alone.
        lora_rank: of every adapter.
        lora_layers: which layers of the U-Net have one, see ``ModelFamily.lora_targets``.
        lora_init: where their first matrices start: "gradient" turns them along the first gradient, see
            ``fit_lora_start.start_along_gradient``, which costs about as much as a step; "random" is PEFT's.
        mask_threshold: of the automatic mask, in (0, 1).
        response_loss_weight: of ``fit_losses.response_loss``, by which words go on to do what they did before the fit
            (ours); 0 leaves it out.
        response_words: these words, things and adjectives as ``change_words`` adds them, such as "smiling" and
            "glasses", at most 200 characters in all; None takes those of the model's own vocabulary, else of
            ``fit_words.GENERAL_VOCABULARY``, said beside the prompt's or in place of what it says.
        response_batch_size: at how many of a step's noise levels, each with a word of its own; None: all. Each is one
            more row a step through the denoiser, forward and back, and two more forward.
    """

    method: str = "lora"
    num_steps: int | None = None
    learning_rate: float | None = None
    token_learning_rate: float | None = None
    batch_size: int | None = None
    timestep_sampling: str | None = None
    lr_scheduler: str | None = None
    early_stop: bool | None = None
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    semantic_weight: float = 0.1
    spatial_control: bool = True
    detach_sentence: bool = False
    renormalize: bool | None = None
    mask_after: bool = False
    lora_rank: int = 2
    lora_layers: str = "all"
    lora_init: str = "gradient"
    mask_threshold: float = MASK_THRESHOLD
    response_loss_weight: float = 0.0
    response_words: Sequence[str] | None = None
    response_batch_size: int | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> FitSettings:
        """From a call's arguments, its ``preset`` among them."""
        names = [one.name for one in fields(cls)]
        given = {name: arguments[name] for name in names if name in arguments}
        return cls(**fit_preset(arguments.get("preset"), given))

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            if hasattr(value, "item"):  # numpy's and torch's numbers, which JSON doesn't know
                object.__setattr__(self, name, value.item())
        check_choice("method", self.method, tuple(RECIPES))
        if self.method == "token":
            self._give_the_row_the_one_rate()
        for name, default in (vars(RECIPES[self.method]) | {"early_stop": False}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        check_choice("timestep_sampling", self.timestep_sampling, tuple(TIMESTEP_SAMPLING))
        check_choice("lr_scheduler", self.lr_scheduler, LR_SCHEDULERS)
        check_choice("lora_layers", self.lora_layers, LORA_LAYERS)
        check_choice("lora_init", self.lora_init, LORA_INITS)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        if self.optimizer == "adamw_8bit":
            bitsandbytes()
        if self.response_loss_weight and self.response_batch_size is None:
            object.__setattr__(self, "response_batch_size", self.batch_size)
        counts = ["num_steps", "batch_size", "lora_rank"]
        for name in (*counts, *(["response_batch_size"] if self.response_batch_size is not None else [])):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}.")
        for name in ("learning_rate", "token_learning_rate"):
            if not is_number(getattr(self, name)) or not getattr(self, name) > 0:
                raise ValueError(f"{name} must be a number above 0, not {getattr(self, name)!r}.")
        check_share("mask_threshold", self.mask_threshold, open_ended=True)
        for name in ("semantic_weight", "response_loss_weight"):
            if not is_number(getattr(self, name)) or not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be a number of 0 or more, not {getattr(self, name)!r}.")
        self._check_response_words()
        self._refuse_what_has_no_effect()

    def _give_the_row_the_one_rate(self) -> None:
        """Where the token's row is all that is trained, both rates are the one that is given.

        Raises:
            ValueError: two are given.
        """
        rates = [rate for rate in (self.learning_rate, self.token_learning_rate) if rate is not None]
        if len(set(rates)) > 1:
            raise ValueError(
                f"learning_rate={self.learning_rate!r} and token_learning_rate={self.token_learning_rate!r}: with "
                "method='token' the token's row is all that is trained. Give one of them."
            )
        for name in ("learning_rate", "token_learning_rate"):
            object.__setattr__(self, name, rates[0] if rates else None)

    def _check_response_words(self) -> None:
        """Raises:
        TypeError, ValueError: they are none, or too many; or more rows are asked for than there are.
        """
        words = self.response_words
        if words is not None:
            if isinstance(words, str) or not all(isinstance(word, str) for word in words):
                raise TypeError(f"response_words must be strings, such as ['smiling', 'glasses'], not {words!r}.")
            if not words or not all(words_of(word) for word in words) or len(", ".join(words)) > MOST_RESPONSE_WORDS:
                raise ValueError(
                    f"response_words must hold a word each and {MOST_RESPONSE_WORDS} characters in all, such as "
                    f"['smiling', 'glasses'], not {list(words)!r}."
                )
            object.__setattr__(self, "response_words", tuple(words))
        assert self.batch_size is not None
        if self.response_batch_size is not None and self.response_batch_size > self.batch_size:
            raise ValueError(
                f"response_batch_size={self.response_batch_size} is more than the batch_size={self.batch_size} noise "
                "levels of a step; lower it, or raise batch_size."
            )

    def _refuse_what_has_no_effect(self) -> None:
        """Raises:
        ValueError: a setting is changed that another one leaves nothing to do.
        """
        without = {
            "lora_rank": (self.method != "lora", f"with method={self.method!r}, which has no adapters"),
            "lora_layers": (self.method != "lora", f"with method={self.method!r}, which has no adapters"),
            "lora_init": (self.method != "lora", f"with method={self.method!r}, which has no adapters"),
            "detach_sentence": (
                self.method == "token" or self.semantic_weight == 0,
                "where the sentence's encoding gets no gradient: with method='token' or semantic_weight=0",
            ),
            "renormalize": (not self.spatial_control, "with spatial_control=False"),
            "mask_after": (not self.spatial_control, "with spatial_control=False"),
            "mask_threshold": (not self.spatial_control, "with spatial_control=False"),
            "response_words": (self.response_loss_weight == 0, "with response_loss_weight=0"),
            "response_batch_size": (self.response_loss_weight == 0, "with response_loss_weight=0"),
        }
        for field in fields(self):
            is_idle, reason = without.get(field.name, (False, ""))
            value = getattr(self, field.name)
            if is_idle and value not in (field.default, False):
                raise ValueError(f"{field.name}={value!r} has no effect {reason}; leave it out.")


@dataclass(frozen=True)
class ReferenceAttribute:
    """A second picture whose attribute gets a token of its own, to be mixed in: "a lady with [A] makeup".

    Attributes:
        image: the picture that has it.
        prompt: what that picture shows, without the token.
        subject: the noun that the token stands before.
        token: the token.
        mask: where it is, white inside; None finds it by itself.
        crop: what part of the picture is looked at: "auto" goes close up at the subject where it is small in it, None
            takes all of it, (left, top, right, bottom) that.
    """

    image: Any
    prompt: str
    subject: str
    token: str = "[A]"
    mask: Any = None
    crop: Any = "auto"


@dataclass(frozen=True, kw_only=True)
class FitRequest:
    """One call's fit, its arguments as they came.

    Attributes:
        pictures: the picture to fit, and after it the reference attribute's where there is one.
        settings: how to fit.
        generator: makes the fit repeatable.
        size: (height, width) to work at; None is the model's own.
        checkpoint_folder: where the fit is kept on its way, or None.

    Raises:
        ValueError: a mask that the settings leave nothing to do, or a threshold where no mask is made.
    """

    pictures: tuple[ReferenceAttribute, ...]
    settings: FitSettings
    generator: Any = None
    size: tuple[int | None, int | None] = (None, None)
    checkpoint_folder: Any = None

    def __post_init__(self) -> None:
        if any(picture.mask is not None for picture in self.pictures) and not self.settings.spatial_control:
            raise ValueError("mask= has no effect with spatial_control=False; leave one of them out.")
        threshold = self.settings.mask_threshold
        if threshold != MASK_THRESHOLD and all(picture.mask is not None for picture in self.pictures):
            raise ValueError(
                f"mask_threshold={threshold!r} has no effect beside mask=, which is taken as it is; leave it out."
            )
