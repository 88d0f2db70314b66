"""One visitor's work: a picture, its words, its mask, who is in it, and the edits; nothing of a page.

Every method returns what it found or made, and keeps it. The pipeline is shared by all visitors: identities are handed
to each call, never loaded into it.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from ..attention_source import KeepAttention
from ..describe_stage import Description
from ..identity_adapter import IdentityAdapter
from ..inversion_record import Inversion
from ..picture_files import SourcePicture, read_picture
from ..prompt_changes import change_words
from ..prompt_words import insert_token, split_words

if TYPE_CHECKING:
    from ..edit_output import S2EditPipelineOutput
    from ..pipeline import S2EditPipeline

MOST_PROMPTS = 8
"""Edits at once."""

KEPT_ATTENTION = 1 << 26
"""Bytes of a picture's attention that a visitor may keep between edits."""

OnStep = Callable[[int, int, Mapping[str, float]], None]
"""``on_step(step, num_steps, measures)``."""


class Missing(ValueError):
    """Something has to be done first; the message says what."""


@dataclass
class Knobs:
    """How to edit, in plain words.

    Attributes:
        strength: how much of the picture's noise the edit goes through, above 0 to 1.
        guidance: how strongly the words pull; None is the model's own.
        reach: how far the edit may reach, from 0 (where the words look most) to 1 (wherever they look a little).
        keep_shape: how long the picture's own shapes are kept, from 0 to 1.
        steps: of the edit.
    """

    strength: float = 1.0
    guidance: float | None = None
    reach: float = 0.6
    keep_shape: float = 0.4
    steps: int = 25

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call."""
        return {
            "strength": self.strength,
            "guidance_scale": self.guidance,
            "blend_threshold": min(max(1.0 - self.reach, 0.05), 0.95),
            "cross_replace_steps": self.keep_shape,
            "self_replace_steps": self.keep_shape,
        }


@dataclass
class Edit:
    """One edited picture, as it was asked for."""

    prompt: str
    picture: PIL.Image.Image
    file: Path
    region: PIL.Image.Image | None


@dataclass
class Session:
    """One visitor's work with ``pipe``.

    Attributes:
        folder: of the visitor's files; gone with the session.
    """

    pipe: S2EditPipeline
    source: SourcePicture | None = None
    prompt: str = ""
    subject: str = ""
    about: Description | None = None
    mask: PIL.Image.Image | None = None
    identity: IdentityAdapter | None = None
    edits: list[Edit] = field(default_factory=list)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="s2edit-")))
    _stop: threading.Event = field(default_factory=threading.Event)
    _inversion: tuple[tuple[Any, ...], Inversion] | None = None

    def __post_init__(self) -> None:
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def stop(self) -> None:
        """Stop what is going on; it ends after its step."""
        self._stop.set()

    def open(self, file: Any) -> PIL.Image.Image:
        """Take another picture; what belonged to the last one is put away.

        Raises:
            Missing: there is none.
            TypeError, ValueError: it can't be used.
        """
        if file is None:
            raise Missing("Choose a picture first.")
        self.source = read_picture(file)
        self.prompt = self.subject = ""
        self.about = None
        self.mask = self._inversion = None
        self.edits = []
        return self.source.rgb

    def describe(self) -> tuple[str, str]:
        """Words for the picture, and its subject."""
        about = self.about = self.pipe.describe(self._picture())
        self.prompt, self.subject = about.prompt, about.subject
        return self.prompt, self.subject

    def say(self, prompt: str, subject: str) -> None:
        """Take the visitor's own words."""
        prompt, subject = prompt.strip(), subject.strip()
        if not prompt or not subject:
            raise Missing("Say what the picture shows and who is kept, or let the words be found.")
        if (prompt, subject) != (self.prompt, self.subject):
            self.mask = None
        self.prompt, self.subject = prompt, subject

    def find_mask(self) -> PIL.Image.Image:
        """Where the subject is, "L"."""
        self._check_words()
        self.mask = self.pipe.preview_mask(self._picture(), self.prompt, self.subject)
        return self.mask

    def paint_mask(self, mask: PIL.Image.Image) -> None:
        """Take the visitor's own mask.

        Raises:
            ValueError: it is empty.
        """
        if mask.convert("L").getextrema()[1] < 128:  # type: ignore[operator]
            raise ValueError("The mask is empty: paint over who or what is to be kept.")
        self.mask = mask.convert("L").resize(self._picture().size)

    def fit(self, steps: int | None, on_step: OnStep, seed: int = 0) -> IdentityAdapter:
        """Learn who is in the picture; stopped half way, what there is."""
        self._check_words()
        self._stop.clear()
        self.identity = self.pipe.fit_identity(
            self._picture(),
            self.prompt,
            self.subject,
            mask=self.mask,
            num_steps=steps,
            seed=seed,
            callback_on_step_end=lambda pipe, step, total, measures: on_step(step, total, measures),
            stop=self._stop,
        )
        self._inversion = None
        return self.identity

    def targets(self, lines: str, add: Sequence[str], remove: Sequence[str]) -> list[str]:
        """The target prompts: one for each line, or for each of the words to add or to take away. A short line is
        completed by what the picture shows, as long as the words found for it stand: what a target leaves out would
        change too.

        Raises:
            Missing: nothing is asked for.
            ValueError: too many.
        """
        self._check_words()
        prompts = [line.strip() for line in lines.splitlines() if line.strip()]
        if self.about is not None and self.about.prompt == self.prompt:
            prompts = [self.about.complete(line) for line in prompts]
        prompts += [change_words(self.prompt, add=[word], subject=self.subject) for word in add]
        prompts += [change_words(self.prompt, remove=[word], subject=self.subject) for word in remove]
        if not prompts:
            raise Missing("Say what to change: write the new description, or choose a word.")
        if len(prompts) > MOST_PROMPTS:
            raise ValueError(f"{len(prompts)} edits at once are too many; at most {MOST_PROMPTS} are made together.")
        return prompts

    def edit(self, targets: Sequence[str], knobs: Knobs, on_step: Callable[[int], None]) -> list[Edit]:
        """Edit, each target by itself from one inversion."""
        picture = self._picture()
        self._check_words()
        self._stop.clear()
        prompts = [self._with_token(target) for target in targets]

        def tell(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step)
            return tensors

        inversion = self._inverted(knobs.steps)
        if inversion.interrupted:
            return []
        out: Any = self.pipe(
            prompts,
            image=picture,
            source_prompt=inversion.prompt,
            identity=self.identity,
            inversion=inversion,
            callback_on_step_end=tell,
            stop=self._stop,
            **knobs.arguments,
        )
        return self._kept(targets, out)

    def _with_token(self, prompt: str) -> str:
        """``prompt`` with the identity's token before its subject, where it speaks of that."""
        identity = self.identity
        if identity is None or identity.subject not in split_words(prompt):
            return prompt
        return insert_token(prompt, identity.subject, identity.token)

    def _inverted(self, steps: int) -> Inversion:
        """The picture's inversion: made once, for all edits under the same words."""
        identity = self.identity
        key = (self.prompt, None if identity is None else (identity.digest, identity.token), steps)
        if self._inversion is None or self._inversion[0] != key:
            keep = KeepAttention(max_bytes=KEPT_ATTENTION)
            inversion = self.pipe.invert(
                self._picture(),
                self._with_token(self.prompt),
                num_inference_steps=steps,
                identity=identity,
                keep_attention=keep,
                stop=self._stop,
            )
            if inversion.interrupted:
                return inversion
            self._inversion = (key, inversion)
        return self._inversion[1]

    def _kept(self, targets: Sequence[str], out: S2EditPipelineOutput) -> list[Edit]:
        made = []
        masks: Sequence[Any] = out.edit_masks or [None] * len(targets)
        files = [self.folder / f"edit-{len(self.edits) + i + 1}.png" for i in range(len(targets))]
        out.save(files)
        for prompt, picture, file, region in zip(targets, out.images, files, masks, strict=True):
            made.append(Edit(prompt, picture, file, region))
        self.edits += made
        return made

    # -------------------------------------------------------------------- identities

    def save_identity(self) -> Path:
        """A zip of the identity."""
        if self.identity is None:
            raise Missing("Learn who is in the picture first.")
        target = self.folder / "identity"
        self.identity.save_pretrained(target)
        return Path(shutil.make_archive(str(self.folder / "identity"), "zip", target))

    def load_identity(self, name: str | None, archive: str | None) -> IdentityAdapter:
        """The identity of a zip, or of a Hub repository.

        Raises:
            Missing: neither is given.
            ValueError: it is none, or another model's.
        """
        if archive:
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                _unpack(Path(archive), Path(folder))
                loaded = IdentityAdapter.from_pretrained(folder)
        elif name and name.strip():
            loaded = IdentityAdapter.from_pretrained(name.strip())
        else:
            raise Missing("Choose an identity's zip, or write its Hub name.")
        self.identity = loaded
        return loaded

    def rename_identity(self, token: str) -> IdentityAdapter:
        """Another name for it."""
        if self.identity is None:
            raise Missing("Learn who is in the picture first.")
        self.identity = self.identity.renamed(token.strip())
        return self.identity

    def push_identity(self, repo_id: str, consent: bool, token: str | None) -> str:
        """Share it on the Hub.

        Raises:
            Missing: nobody says that whom it shows agreed.
        """
        if self.identity is None:
            raise Missing("Learn who is in the picture first.")
        if not consent:
            raise Missing("Say that whom it shows has agreed to its being shared.")
        if not repo_id.strip():
            raise Missing("Write the Hub repository's name, such as me/ada.")
        return self.identity.push_to_hub(repo_id.strip(), private=True, token=token or None)

    # -------------------------------------------------------------------- checks

    def _picture(self) -> PIL.Image.Image:
        if self.source is None:
            raise Missing("Choose a picture first.")
        return self.source.native

    def _check_words(self) -> None:
        if not self.prompt or not self.subject:
            raise Missing("Say what the picture shows and who is kept, or let the words be found.")


_MOST_FILES, _MOST_BYTES = 20, 1 << 30


def _unpack(archive: Path, folder: Path) -> None:
    """The files of a zip, flat, into ``folder``; a bomb, or a path that leads out of it, is refused.

    Raises:
        ValueError: it is no zip of an identity.
    """
    import zipfile

    try:
        with zipfile.ZipFile(archive) as file:
            entries = [entry for entry in file.infolist() if not entry.is_dir()]
            if len(entries) > _MOST_FILES or sum(entry.file_size for entry in entries) > _MOST_BYTES:
                raise ValueError("This zip is too large to be an identity.")
            for entry in entries:
                name = Path(entry.filename).name
                with file.open(entry) as source, open(folder / name, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except zipfile.BadZipFile as error:
        raise ValueError("This is no zip file: choose one that was downloaded here.") from error
