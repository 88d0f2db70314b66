"""The demo's edits of several people under several settings, each graded against its drawing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ...avatars.autoencoder_training import reconstruct
from ...avatars.captions import describe
from ...avatars.world import Subject, changed_pixels, render, sample_person
from ...prompt_alignment import insert_token
from ..methods.pipeline_methods import Setting
from ..metrics.classifier import load_attribute_classifier
from ..metrics.counterfactual import CounterfactualEdit, demo_edits, grade
from ..metrics.pixels import psnr

PEOPLE = (3, 12, 5, 18, 9, 21)
"""Held-out people, on whom the defaults were chosen too."""


SETTINGS: Mapping[str, Setting] = {
    "the defaults": Setting(),
    "no identity": Setting(fit=None),
    "guided to the end": Setting(edit={"guidance_stop": 1.0}),
    "no identity, guided to the end": Setting(fit=None, edit={"guidance_stop": 1.0}),
    "λ = 0": Setting(fit={"semantic_weight": 0.0}),
    "no spatial control": Setting(fit={"spatial_control": False}),
    "positions behind `[I]` masked too": Setting(fit={"mask_after": True}),
    "full": Setting(fit={"method": "full"}),
    "the paper's fit": Setting(fit={"preset": "paper"}),
    "token alone": Setting(fit={"method": "token"}),
    "null-text": Setting(inversion="null_text"),
    "negative prompt": Setting(inversion="negative_prompt"),
    "edit-friendly": Setting(inversion="edit_friendly"),
    "edit-friendly, strength 0.64": Setting(inversion="edit_friendly", edit={"strength": 0.64}),
    "DDIM": Setting(inversion="ddim"),
    "drift left": Setting(edit={"change_threshold": 0.0}),
    "not confined": Setting(edit={"blend_words": False}),
}


@dataclass(frozen=True)
class EditRow:
    """Means over the edits: PSNR to the truth in dB, whole, inside the pixels that truly change and outside them, where
    the truth is the picture itself; ``autoencoder_outside``, what the autoencoder alone would score there; the
    share ``done`` of edits whose attribute the classifier then reads; |cos(e_P, e_[I])| at the fit's ends, or None;
    the median ``seconds`` of one person's inversion and edits."""

    name: str
    whole: float
    inside: float
    outside: float
    unedited_inside: float
    autoencoder_outside: float
    done: float
    cosines: tuple[float, float] | None
    seconds: float


def measure_edits(
    pipe: Any,
    names: Sequence[str] = tuple(SETTINGS),
    *,
    settings: Mapping[str, Setting] = SETTINGS,
    people: Sequence[int] = PEOPLE,
    edits_of: Callable[[Subject], list[CounterfactualEdit]] = demo_edits,
    num_inference_steps: int = 25,
    seed: int = 0,
    num_steps: int | None = None,
) -> list[EditRow]:
    """One row for each of the ``settings`` named; identities that several rows share are fitted once.

    Args:
        num_inference_steps: of the settings that don't name their own.
        num_steps: of the fits; None takes each method's own.
    """
    classifier = load_attribute_classifier()
    fitted: dict[tuple[str, int], Any] = {}
    rows = []
    for name in names:
        setting = settings[name]
        scores, own, done, cosines, seconds = [], [], [], [], []
        for number in tqdm(people, desc=name, leave=False):
            person = sample_person(number, "held_out")
            picture, prompt = render(person), describe(person).text
            identity = None
            if setting.fit is not None:
                key = (repr(sorted(setting.fit.items())), number)
                if key not in fitted:
                    fitting = setting.with_changes(fit={} if num_steps is None else {"num_steps": num_steps})
                    fitted[key] = fitting.fit_identity(pipe, picture, prompt, person.noun, seed)
                identity = fitted[key]
                cosines.append([abs(identity.measures[f"cosine_{end}"]) for end in ("first", "last")])
            edits = edits_of(person)
            returned = reconstruct(pipe.vae, np.asarray(picture)[None])[0]
            targets = [edit.target_prompt for edit in edits]
            if identity is not None:
                targets = [insert_token(target, person.noun, identity.token) for target in targets]
            started = time.perf_counter()
            result = pipe(
                targets,
                image=picture,
                source_prompt=prompt,
                identity=identity,
                inversion=setting.inversion,
                generator=torch.Generator().manual_seed(seed),
                **{"num_inference_steps": num_inference_steps, **setting.edit},
            )
            seconds.append(time.perf_counter() - started)
            read = classifier.predict(np.stack([np.asarray(image) for image in result.images]))
            for edit, image, found in zip(edits, result.images, read, strict=True):
                scores.append(astuple(grade(edit, image)))
                own.append(psnr(returned, picture, ~changed_pixels(person, edit.target)))
                done.append(edit.is_read_in(found))
        whole, inside, outside, unedited = np.mean(scores, 0)
        ends = (float(np.mean([c[0] for c in cosines])), float(np.mean([c[1] for c in cosines]))) if cosines else None
        rows.append(
            EditRow(
                name, float(whole), float(inside), float(outside), float(unedited), float(np.mean(own)),
                float(np.mean(done)), ends, float(np.median(seconds)),
            )
        )  # fmt: skip
    return rows


def table(rows: Sequence[EditRow]) -> str:
    """As Markdown."""
    lines = [
        "| setting | whole | inside | outside | done | \\|cos\\| before, after | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cosines = "-" if r.cosines is None else f"{r.cosines[0]:.3f}, {r.cosines[1]:.3f}"
        scores = f"{r.whole:.2f} | {r.inside:.2f} | {r.outside:.2f} | {r.done:.2f}"
        lines.append(f"| {r.name} | {scores} | {cosines} | {r.seconds:.1f} |")
    lines.append(f"| (the picture as it was) | | {rows[0].unedited_inside:.2f} | | 0.00 | | |")
    lines.append(f"| (the autoencoder alone) | | | {rows[0].autoencoder_outside:.2f} | | | |")
    return "\n".join(lines)
