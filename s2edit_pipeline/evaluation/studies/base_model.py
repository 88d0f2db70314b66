"""How good the embedded base model is: its autoencoder, and whether it draws what captions say."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ...avatars.autoencoder_training import reconstruct
from ...avatars.captions import Caption, describe
from ...avatars.creatures import UNSEEN_PAIRS
from ...avatars.dataset import load_pictures
from ...avatars.world import KINDS, Subject, part_masks, render, sample
from ..metrics.classifier import accuracy_by_attribute, agreement_with_captions, load_attribute_classifier
from ..metrics.pixels import psnr, ssim
from ..tables import markdown_table, number

CAPTIONS_FIRST = 50_000
"""The first of the training split's subjects whose captions are drawn; none of them was trained on."""
NUM_TRAINED = {"person": 16_000, "creature": 12_000}
"""How many of each kind were trained on, the first ones of the training split."""


@dataclass(frozen=True)
class KindReport:
    """One kind of subject. ``classifier_accuracy`` by attribute, on held-out pictures; ``agreement``, attribute ->
    share of the captions' named values that the classifier finds in the generated pictures; ``grounding``, part ->
    mean intersection over union of its word's mask and its true pixels."""

    classifier_accuracy: dict[str, float]
    agreement: dict[str, float]
    grounding: dict[str, float]


@dataclass(frozen=True)
class BaseModelReport:
    """``autoencoder_psnr`` in dB, ``autoencoder_ssim`` and ``autoencoder_delta_e`` (CIE 2000, mean over pixels), means
    over held-out pictures of all kinds; ``kinds``, kind -> its own report; ``seconds``, the median to draw one picture
    in 50 steps; ``agreement``, the share of named attributes that the classifiers find in the pictures (N, H, W, 3)
    uint8 ``generated`` for ``captions``; the same where no training subject fits the caption, and where it says a pair
    of words that training captions never did (``num_unseen`` and ``num_pairs`` captions); the latter's pictures."""

    autoencoder_psnr: float
    autoencoder_ssim: float
    autoencoder_delta_e: float
    kinds: dict[str, KindReport]
    seconds: float
    agreement: float
    agreement_unseen: float
    num_unseen: int
    agreement_pairs: float
    num_pairs: int
    generated: np.ndarray = field(metadata={"json": False})
    captions: list[Caption]
    generated_pairs: np.ndarray = field(metadata={"json": False})

    def table(self) -> str:
        """As Markdown."""
        summary = [
            f"Autoencoder: {self.autoencoder_psnr:.2f} dB PSNR, {self.autoencoder_ssim:.4f} SSIM, "
            f"{self.autoencoder_delta_e:.2f} CIE ΔE2000.",
            f"Agreement of {len(self.captions)} pictures with their captions: {self.agreement:.1%}; of the "
            f"{self.num_unseen} whose caption fits no training subject: {self.agreement_unseen:.1%}; of "
            f"{self.num_pairs} more with a pair of words that no training caption had: {self.agreement_pairs:.1%}.",
            f"One picture, 50 steps, guided: {self.seconds:.1f} s.",
        ]
        attributes = (
            [kind, name, number(accuracy, ".1%"), number(report.agreement.get(name), ".1%")]
            for kind, report in self.kinds.items()
            for name, accuracy in report.classifier_accuracy.items()
        )
        parts = (
            [kind, part, number(overlap)]
            for kind, report in self.kinds.items()
            for part, overlap in report.grounding.items()
        )
        head = ["kind", "attribute", "classifier on held-out pictures", "agreement of generated pictures"]
        tables = [markdown_table(head, attributes), markdown_table(["kind", "part", "IoU of its word's mask"], parts)]
        return "\n\n".join(["\n".join(summary), *tables])


def draw_captions(
    pipe: Any, captions: list[str], *, num_inference_steps: int, guidance_scale: float, seed: int, batch_size: int = 16
) -> np.ndarray:
    """(N, H, W, 3) uint8: one picture for each caption, the same for the same seed."""
    pictures = []
    for i in tqdm(range(0, len(captions), batch_size), desc="drawing captions"):
        batch = captions[i : i + batch_size]
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + i + j) for j in range(len(batch))]
        out = pipe(
            batch,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generators,
            output_type="np",
        )
        pictures.append((out.images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def grounding_overlaps(pipe: Any, subjects: Sequence[Subject]) -> dict[str, float]:
    """Part ("beard" and "moustache" apart) -> mean over the subjects that show it of the intersection over union of the
    mask of the word that names it (``preview_mask``) and the renderer's own pixels of it."""
    overlaps: dict[str, list[float]] = {}
    for subject in subjects:
        caption, truth, picture = describe(subject), part_masks(subject), render(subject)
        nouns = {subject.PART: subject.noun, "hair": "hair"}
        nouns |= {part: getattr(subject, part) for part in subject.parts() if part != "hair"}
        for part, noun in nouns.items():
            if part not in truth or noun not in caption.words:
                continue
            mask = np.asarray(pipe.preview_mask(picture, caption.text, noun)) > 127
            name = noun if part == "facial_hair" else part  # a beard is no moustache
            overlaps.setdefault(name, []).append(float((mask & truth[part]).sum() / (mask | truth[part]).sum()))
    return {part: float(np.mean(values)) for part, values in sorted(overlaps.items())}


def fits(caption: Caption, subject: Subject) -> bool:
    """Whether ``subject`` is all that ``caption`` says."""
    return all(getattr(subject, name, None) == value for name, value in caption.said.items())


def captions_with_unseen_pairs(rng: random.Random) -> Iterator[Caption]:
    """Captions of held-out creatures that say both words of a pair which training left out."""
    for seed in itertools.count():
        caption = describe(sample("creature", seed, "held_out"), rng)
        if any(pair.items() <= caption.said.items() for pair in UNSEEN_PAIRS):
            yield caption


def mean_delta_e(a: np.ndarray, b: np.ndarray) -> float:
    """Mean CIE ΔE2000 over the pixels of two arrays of pictures (N, H, W, 3) uint8."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    return float(np.mean([deltaE_ciede2000(rgb2lab(x), rgb2lab(y)).mean() for x, y in zip(a, b, strict=True)]))


def _seconds(pipe: Any, runs: int = 3) -> float:
    """The median of ``runs`` pictures in 50 guided steps."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        pipe("a photo of a smiling lady", num_inference_steps=50, guidance_scale=4.5)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def measure_base_model(
    pipe: Any,
    *,
    num_held_out: int = 500,
    num_captions: int = 256,
    num_pairs: int = 64,
    num_grounded: int = 60,
    num_inference_steps: int = 30,
    guidance_scale: float = 4.5,
    seed: int = 0,
) -> BaseModelReport:
    """Measure the model in ``pipe`` on held-out subjects (seeds 0 and up) and on captions that it wasn't trained on,
    half of each number for either kind."""
    rng = random.Random(seed)
    settings: dict[str, Any] = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
    }
    kinds, images, decoded, generated = {}, [], [], []
    captions: list[Caption] = []
    hits: list[bool] = []
    unseen_hits: list[list[bool]] = []  # of the captions that fit no training subject
    for kind in KINDS:
        classifier = load_attribute_classifier(kind)
        held_out = load_pictures(num_held_out // len(KINDS), "held_out", kind=kind)
        images.append(held_out.images)
        decoded.append(reconstruct(pipe.vae, held_out.images))
        count = num_captions // len(KINDS)
        captions_of_kind = [describe(sample(kind, CAPTIONS_FIRST + i), rng) for i in range(count)]
        drawn = draw_captions(pipe, [c.text for c in captions_of_kind], **settings)
        _, by_attribute = agreement_with_captions(classifier, drawn, captions_of_kind)
        trained = [sample(kind, i) for i in range(NUM_TRAINED[kind])]
        for caption, predicted in zip(captions_of_kind, classifier.predict(drawn), strict=True):
            right = [predicted[name] == value for name, value in caption.said.items()]
            hits += right
            if not any(fits(caption, subject) for subject in trained):
                unseen_hits.append(right)
        captions += captions_of_kind
        generated.append(drawn)
        kinds[kind] = KindReport(
            classifier_accuracy=accuracy_by_attribute(classifier, held_out.subjects, held_out.images),
            agreement=by_attribute,
            grounding=grounding_overlaps(pipe, held_out.subjects[: num_grounded // len(KINDS)]),
        )
    pairs = list(itertools.islice(captions_with_unseen_pairs(rng), num_pairs))
    drawn_pairs = draw_captions(pipe, [c.text for c in pairs], **settings)
    agreement_pairs, _ = agreement_with_captions(load_attribute_classifier("creature"), drawn_pairs, pairs)
    pictures, returned = np.concatenate(images), np.concatenate(decoded)
    return BaseModelReport(
        autoencoder_psnr=float(np.mean([psnr(a, b) for a, b in zip(pictures, returned, strict=True)])),
        autoencoder_ssim=float(np.mean([ssim(a, b) for a, b in zip(pictures, returned, strict=True)])),
        autoencoder_delta_e=mean_delta_e(pictures, returned),
        kinds=kinds,
        seconds=_seconds(pipe),
        agreement=float(np.mean(hits)),
        agreement_unseen=float(np.mean(list(itertools.chain(*unseen_hits)))) if unseen_hits else float("nan"),
        num_unseen=len(unseen_hits),
        agreement_pairs=agreement_pairs,
        num_pairs=len(pairs),
        generated=np.concatenate(generated),
        captions=captions,
        generated_pairs=drawn_pairs,
    )
