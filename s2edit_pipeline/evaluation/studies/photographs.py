"""Avatars drawn into photographs and edited there, each beside the avatar edited alone: the truth of both is known."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ...avatars.captions import describe
from ...avatars.world import IMAGE_SIZE, Subject, changed_pixels, render, sample_person
from ...picture_sheet import Captioned, picture_sheet
from ...prompt_words import insert_token
from ..metrics.classifier import AttributeClassifier, load_attribute_classifier
from ..metrics.counterfactual import CounterfactualEdit, demo_edits
from ..metrics.pixels import psnr
from ..tables import markdown_table, number

SIZE = (1600, 1200)
"""(width, height) of the photographs."""
SIDES = (96, 400)
"""The least and the most of an avatar's side in them, in pixels."""
BACKGROUNDS = ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field", "retina")
"""Photographs that come with scikit-image."""
TOLD, FOUND, WHOLE = "close up, told where", "close up, found", "the whole picture"
WAYS = (TOLD, FOUND, WHOLE)
"""How a photograph is worked at: ``crop`` the person's square, "auto" or None."""
ALONE = "the avatar alone"
FIRST_PERSON = 2000
"""The first of the held-out people; defaults were chosen on others."""


@dataclass(frozen=True)
class Scene:
    """A photograph, and the ``person`` drawn into it: ``side`` pixels across, its left upper corner at ``place``."""

    number: int
    background: str
    person: Subject
    side: int
    place: tuple[int, int]

    def photograph(self) -> Image.Image:
        """With the person in it."""
        picture = background(self.background)
        picture.paste(render(self.person, self.side), self.place)
        return picture

    def part(self, picture: Image.Image, margin: int = 0) -> Image.Image:
        """What ``picture``, of the photograph's size, shows where the person is, and ``margin`` pixels around."""
        (left, top), side = self.place, self.side
        return picture.crop((left - margin, top - margin, left + side + margin, top + side + margin))

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The person's square: (left, top, right, bottom)."""
        left, top = self.place
        return left, top, left + self.side, top + self.side

    def edits(self) -> list[CounterfactualEdit]:
        return demo_edits(self.person)


def scenes(number: int) -> list[Scene]:
    """The same ``number`` of scenes everywhere; sides are spread evenly over the logarithm of ``SIDES``."""
    made = []
    for i in range(number):
        rng = np.random.default_rng((17, i))
        share = (i * 0.6180339887) % 1.0  # any number of scenes covers the range
        side = round(SIDES[0] * (SIDES[1] / SIDES[0]) ** share)
        x, y = (int(rng.integers(0, length - side + 1)) for length in SIZE)
        person = sample_person(FIRST_PERSON + i, "held_out")
        made.append(Scene(i, BACKGROUNDS[i % len(BACKGROUNDS)], person, side, (x, y)))
    return made


def background(name: str) -> Image.Image:
    """One of ``BACKGROUNDS``, of ``SIZE``: scaled to fill it, and cut.

    Raises:
        ImportError: scikit-image isn't there.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError('photographs need scikit-image: pip install "s2edit-pipeline[evaluation]".') from error
    picture = Image.fromarray(getattr(data, name)()).convert("RGB")
    scale = max(length / own for length, own in zip(SIZE, picture.size, strict=True))
    width, height = (max(length, round(scale * own)) for length, own in zip(SIZE, picture.size, strict=True))
    left, top = (width - SIZE[0]) // 2, (height - SIZE[1]) // 2
    return picture.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + SIZE[0], top + SIZE[1]))


# ---------------------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class PhotographRow:
    """One edit of one scene.

    Attributes:
        inside: PSNR in dB to the truth, in the pixels that truly change.
        unedited_inside: what the photograph as it was would score there.
        outside: PSNR in dB to the photograph, in what isn't the person's square; infinite where it is equal to the
            bit.
        done: whether the classifier then reads all that the edit changes.
        overlap: intersection over union of the part that was worked at and the person's square.
        seconds: of the scene's fit and edits, shared out over the edits.
    """

    scene: int
    way: str
    side: int
    edit: str
    inside: float
    unedited_inside: float
    outside: float
    done: bool
    overlap: float
    seconds: float


@dataclass(frozen=True)
class PhotographReport:
    """A row for each edit of each scene in each way."""

    rows: tuple[PhotographRow, ...]

    def of(self, way: str) -> list[PhotographRow]:
        return [row for row in self.rows if row.way == way]

    def table(self) -> str:
        """As Markdown: means over the edits; the share of photographs that are equal to the bit outside the square."""
        head = ["worked at", "scenes, edits", "inside", "beside the avatar alone", "equal outside", "done", "seconds"]
        alone = {(row.scene, row.edit): row for row in self.of(ALONE)}
        lines: list[list[str | int | None]] = []
        for way in (*WAYS, ALONE):
            rows = self.of(way)
            if not rows:
                continue
            pairs = [row.inside - alone[row.scene, row.edit].inside for row in rows if (row.scene, row.edit) in alone]
            equal = None if way == ALONE else number(float(np.mean([np.isinf(row.outside) for row in rows])))
            lines.append(
                [
                    way,
                    f"{len({row.scene for row in rows})}, {len(rows)}",
                    number(float(np.mean([row.inside for row in rows]))),
                    None if way == ALONE or not pairs else f"{np.mean(pairs):+.2f}",
                    equal,
                    number(float(np.mean([row.done for row in rows]))),
                    number(float(np.mean([row.seconds for row in rows])), ".1f"),
                ]
            )
        unedited = float(np.mean([row.unedited_inside for row in self.rows]))
        lines.append(["(the photograph as it was)", None, number(unedited), None, None, None, None])
        return markdown_table(head, lines)


def measure_photographs(
    pipe: Any,
    number: int = 20,
    *,
    ways: Sequence[str] = (*WAYS, ALONE),
    num_inference_steps: int = 25,
    num_steps: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
) -> PhotographReport:
    """Each scene's person fitted and edited in each of the ``ways``.

    Args:
        number: of scenes.
        ways: of ``WAYS``, or ``ALONE``: the same square as a picture of its own.
        num_steps: of the fits; None takes the method's own.
        folder: rows are kept there as they come, with the squares as PNG, and the same call goes on from them.

    Raises:
        ValueError: another way.
    """
    if unknown := [way for way in ways if way not in WAYS and way != ALONE]:
        raise ValueError(f"There is no way {', '.join(unknown)}; choose from {', '.join((*WAYS, ALONE))}.")
    classifier, kept = load_attribute_classifier(), _Rows(folder)
    for scene in tqdm(scenes(number), desc="photographs", leave=False):
        for way in ways:
            if not kept.has(scene, way):
                call = _Call(pipe, num_inference_steps, num_steps, seed)
                kept.add(*_edit_scene(call, scene, way, classifier))
    return PhotographReport(tuple(row for row in kept.rows if row.scene < number and row.way in ways))


@dataclass(frozen=True)
class _Call:
    pipe: Any
    num_inference_steps: int
    num_steps: int | None
    seed: int

    def edit(self, picture: Image.Image, person: Subject, targets: Sequence[str], crop: Any) -> tuple[Any, Any]:
        """The identity, and the pictures of its edits."""
        source = describe(person).text
        generator = torch.Generator().manual_seed(self.seed)
        identity = self.pipe.fit_identity(
            picture, source, person.noun, num_steps=self.num_steps, crop=crop, generator=generator
        )
        result = self.pipe(
            [insert_token(target, person.noun, identity.token) for target in targets],
            image=picture,
            source_prompt=source,
            identity=identity,
            num_inference_steps=self.num_inference_steps,
            crop=crop,
            generator=torch.Generator().manual_seed(self.seed),
        )
        return identity, result.images


def _edit_scene(
    call: _Call, scene: Scene, way: str, classifier: AttributeClassifier
) -> tuple[list[PhotographRow], dict[str, Image.Image]]:
    """The rows, and name -> the edited square with a margin around it."""
    edits, photograph, start = scene.edits(), scene.photograph(), time.perf_counter()
    picture = scene.part(photograph) if way == ALONE else photograph
    targets = [edit.target_prompt for edit in edits]
    crop = {TOLD: scene.box, FOUND: "auto"}.get(way)
    identity, images = call.edit(picture, scene.person, targets, crop)
    seconds = (time.perf_counter() - start) / len(edits)
    rows, squares = [], {}
    for edit, image in zip(edits, images, strict=True):
        square = image if way == ALONE else scene.part(image)
        changed = changed_pixels(scene.person, edit.target, scene.side)
        truth = render(edit.target, scene.side)
        (read,) = classifier.predict(np.asarray(_as_seen(square))[None])
        rows.append(
            PhotographRow(
                scene.number, way, scene.side, edit.name,
                inside=psnr(square, truth, changed), unedited_inside=psnr(scene.part(photograph), truth, changed),
                outside=float("inf") if way == ALONE else _outside(scene, image, photograph),
                done=edit.is_read_in(read), overlap=_overlap(scene, way, identity.settings), seconds=seconds,
            )
        )  # fmt: skip
        squares[edit.name] = image if way == ALONE else scene.part(image, scene.side // 8)
    return rows, squares


def _as_seen(square: Image.Image) -> Image.Image:
    """As large as the classifier's pictures."""
    return square.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)


def _outside(scene: Scene, image: Image.Image, photograph: Image.Image) -> float:
    beyond = np.ones((SIZE[1], SIZE[0]), bool)
    (left, top), side = scene.place, scene.side
    beyond[top : top + side, left : left + side] = False
    return psnr(image, photograph, beyond)


def _overlap(scene: Scene, way: str, settings: Mapping[str, Any]) -> float:
    """Of what was worked at, as an identity's ``settings`` say it, and the person's square."""
    if way == ALONE:
        return 1.0
    crop, ((left, top), side) = settings.get("crop"), (scene.place, scene.side)
    a, b, c, d = (0, 0, *SIZE) if crop is None else map(int, str(crop).split(","))
    across, down = (
        max(0, min(e, f) - max(g, h)) for e, f, g, h in ((c, left + side, a, left), (d, top + side, b, top))
    )
    return across * down / ((c - a) * (d - b) + side**2 - across * down)


class _Rows:
    """The rows so far; in ``folder`` ``rows.jsonl``, a line for each scene and way."""

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.rows: list[PhotographRow] = []
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for line in self._lines():
                self.rows += [PhotographRow(**row) for row in json.loads(line)]

    def _lines(self) -> Iterator[str]:
        """Whole ones: the last may have been cut short."""
        assert self.folder is not None
        path = self.folder / "rows.jsonl"
        for line in path.read_text("utf-8").splitlines(keepends=True) if path.exists() else ():
            if line.endswith("\n"):
                yield line

    def has(self, scene: Scene, way: str) -> bool:
        return any((row.scene, row.way) == (scene.number, way) for row in self.rows)

    def add(self, rows: list[PhotographRow], squares: Mapping[str, Image.Image]) -> None:
        self.rows += rows
        if self.folder is None:
            return
        for row in rows:
            squares[row.edit].save(self.folder / _square_name(row.scene, row.way, row.edit))
        with (self.folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps([asdict(row) for row in rows]) + "\n")


def _square_name(scene: int, way: str, edit: str) -> str:
    return f"{scene}-{way}-{edit}.png".replace(" ", "_")


# ---------------------------------------------------------------------------- the sheet


def sheet(
    folder: str | Path, numbers: Sequence[int], edit: Callable[[Scene], int] = lambda scene: 0, side: int = 256
) -> Image.Image:
    """Of the scenes ``numbers`` that ``folder`` holds, a line each: the photograph's square and the truth with what
    lies around, then the edits that are there: close up, on the whole picture, and alone.

    Args:
        edit: which of a scene's edits.
        side: of each picture there.
    """
    lines: list[list[Captioned]] = []
    for scene in (one for one in scenes(max(numbers) + 1) if one.number in numbers):
        chosen = scene.edits()[edit(scene)]
        before, truth = scene.photograph(), replace(scene, person=chosen.target).photograph()
        names = (f"{scene.side} pixels", chosen.name)
        shown: list[Captioned] = [
            (name, scene.part(one, scene.side // 8)) for name, one in zip(names, (before, truth), strict=True)
        ]
        for way in (*WAYS, ALONE):
            path = Path(folder) / _square_name(scene.number, way, chosen.name)
            if path.exists():
                shown.append((way, Image.open(path).convert("RGB")))
        lines.append(shown)
    return picture_sheet(lines, side)
