"""Real pictures to be edited: a folder with captions, or PIE-Bench.

A folder is how FFHQ, CelebA-HQ, AFHQ or LSUN pictures come once they have been captioned; its format is in
docs/benchmark-rivals.md. PIE-Bench (Ju et al. 2024) is read from its own ``mapping_file.json``.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...prompt_words import split_words
from ..methods.protocol import contains_phrase

CAPTIONS = ("captions.jsonl", "captions.csv")
PIE_MAPPING, PIE_PICTURES, PIE_SIDE = "mapping_file.json", "annotation_images", 512
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FIELDS = ("file", "source_prompt", "target_prompts", "subject", "mask", "instruction")
_SEPARATOR = "|"  # between the target prompts of one cell or line


@dataclass(frozen=True)
class DatasetEdit:
    """A picture, and what it is to become.

    Attributes:
        name: unique in the dataset; errors and reports name the entry by it.
        file: the picture.
        source_prompt: what it shows.
        target_prompts: what is asked of it, one edit each.
        subject: the noun in ``source_prompt`` that names who or what is to be kept.
        mask: (H, W) bool, the region that may change, or None where the dataset doesn't say.
        instruction: the edit in words such as "make her smile", or None.
        kind: the dataset's own class of edit, or None.
    """

    name: str
    file: Path
    source_prompt: str
    target_prompts: tuple[str, ...]
    subject: str
    mask: np.ndarray | None = None
    instruction: str | None = None
    kind: str | None = None

    def picture(self) -> Image.Image:
        """RGB."""
        with Image.open(self.file) as opened:
            return opened.convert("RGB")


def load_edit_dataset(path: str | Path) -> list[DatasetEdit]:
    """What is in a folder, or beside a PIE-Bench ``mapping_file.json``; every entry is checked, no picture decoded.

    Args:
        path: a folder with ``captions.jsonl``, ``captions.csv`` or a ``.txt`` beside each picture; PIE-Bench's folder;
            or one of these files.

    Raises:
        FileNotFoundError: nothing of the kind is there, or a picture or a mask is missing.
        ValueError: an entry can't be used; the message names it and the fix.
    """
    path = Path(path)
    if path.is_file():
        listing, folder = path, path.parent
    else:
        folder = path
        listings = [folder / name for name in (*CAPTIONS, PIE_MAPPING) if (folder / name).is_file()]
        if len(listings) > 1:
            raise ValueError(f"{folder} has {listings[0].name} and {listings[1].name}; pass the one to read.")
        if not listings:
            return _checked(list(_from_sidecars(folder)), folder)
        listing = listings[0]
    if listing.suffix == ".json":
        return _checked(list(_from_pie_bench(listing, folder)), listing)
    if listing.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"{listing} is no .jsonl, .csv or {PIE_MAPPING}; pass one of these, or the folder.")
    return _checked(list(_from_captions(listing, folder)), listing)


def _checked(edits: list[DatasetEdit], where: Path) -> list[DatasetEdit]:
    if not edits:
        raise ValueError(f"{where} lists no picture.")
    names: set[str] = set()
    for edit in edits:
        if edit.name in names:
            raise ValueError(f"{where}: {edit.name} is listed twice; put all its target prompts into one entry.")
        names.add(edit.name)
    return edits


# ---------------------------------------------------------------------------- a folder with captions


def _from_captions(listing: Path, folder: Path) -> Iterator[DatasetEdit]:
    for number, row in _rows(listing):
        where = f"{listing}, line {number}"
        if not isinstance(row.get("file"), str) or not row["file"]:
            raise ValueError(f"{where} has no file; say which picture it is about.")
        yield _entry(row, row["file"], f"{where} ({row['file']})", folder)


def _rows(listing: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Each entry with its line's number."""
    with listing.open(encoding="utf-8-sig", newline="") as file:
        if listing.suffix == ".csv":
            reader = csv.DictReader(file)
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{listing}, line {reader.line_num} has another number of cells than the first line; put cells "
                        "with commas into double quotes."
                    )
                yield reader.line_num, {name: cell.strip() for name, cell in row.items() if cell.strip()}
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{listing}, line {number} is no JSON: {error}; each line is one object.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{listing}, line {number} is a {type(row).__name__}; each line is one JSON object.")
            yield number, row


def _from_sidecars(folder: Path) -> Iterator[DatasetEdit]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} isn't there.")
    texts = sorted(folder.glob("*.txt"))
    if not texts:
        raise FileNotFoundError(
            f"{folder} has no {', '.join(CAPTIONS)}, no {PIE_MAPPING} and no picture's .txt; write one of them."
        )
    for text in texts:
        pictures = [text.with_suffix(suffix) for suffix in PICTURE_SUFFIXES if text.with_suffix(suffix).is_file()]
        if not pictures:
            raise FileNotFoundError(f"{text} has no picture {text.stem}.png (or {', '.join(PICTURE_SUFFIXES[1:])}).")
        lines = [line.strip() for line in text.read_text("utf-8-sig").splitlines() if line.strip()]
        if len(lines) < 3:
            raise ValueError(
                f"{text} has {len(lines)} lines; it takes the subject, the source prompt, and one target prompt a line."
            )
        row = {"subject": lines[0], "source_prompt": lines[1], "target_prompts": lines[2:]}
        mask = text.with_name(f"{text.stem}.mask.png")
        if mask.is_file():
            row["mask"] = mask.name
        yield _entry(row, pictures[0].name, str(text), folder)


def _entry(row: Mapping[str, Any], file: str, where: str, folder: Path) -> DatasetEdit:
    """One entry of a folder; ``where`` names it in messages."""
    unknown = sorted(set(row) - set(_FIELDS) - {"target_prompt"})
    if unknown:
        raise ValueError(f"{where} has {unknown[0]!r}, which is no field; the fields are {', '.join(_FIELDS)}.")
    if "target_prompt" in row and "target_prompts" in row:
        raise ValueError(f"{where} has target_prompt and target_prompts; give one of them.")
    prompts = row.get("target_prompts", row.get("target_prompt"))
    targets = prompts if isinstance(prompts, list) else [] if prompts is None else str(prompts).split(_SEPARATOR)
    targets = [target.strip() if isinstance(target, str) else "" for target in targets]
    if not targets or not all(targets):
        raise ValueError(f"{where} has no target_prompts, or an empty one; say what the picture is to become.")
    for name in ("source_prompt", "subject"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f"{where} has no {name}; it is needed beside file and target_prompts.")
    source, subject = row["source_prompt"].strip(), row["subject"].strip()
    _check_subject(source, subject, where)
    picture = _existing(folder / file, where)
    mask = None if row.get("mask") is None else _read_mask(_existing(folder / row["mask"], where), picture, where)
    return DatasetEdit(file, picture, source, tuple(targets), subject, mask, row.get("instruction"))


def _existing(file: Path, where: str) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"{where}: {file} isn't there; paths are relative to the folder.")
    return file


def _check_subject(source: str, subject: str, where: str) -> None:
    if not contains_phrase(source, subject):
        raise ValueError(f"{where}: the subject {subject!r} is not in the source prompt {source!r}; take a noun of it.")


def _read_mask(file: Path, picture: Path, where: str) -> np.ndarray:
    with Image.open(file) as opened, Image.open(picture) as shown:
        mask = np.asarray(opened.convert("L")) > 127
        if opened.size != shown.size:
            raise ValueError(f"{where}: the mask is {opened.size} and the picture {shown.size}; they must be equal.")
    return mask


# ---------------------------------------------------------------------------- PIE-Bench


def decode_runs(runs: Sequence[int], side: int = PIE_SIDE, *, border: bool = True) -> np.ndarray:
    """(side, side) bool of PIE-Bench's runs: start, length, start, length, … over the pixels row by row.

    Args:
        border: also true on the outermost pixels all around, as PIE-Bench's own scores take it: its annotators'
            strokes don't reach the edge. A run beyond the last pixel is cut off there.

    Raises:
        ValueError: an odd number of numbers, one below 0 or none at all, or a run that starts outside.
    """
    numbers = np.asarray(list(runs))
    whole = numbers.size == 0 or (np.issubdtype(numbers.dtype, np.integer) and numbers.ndim == 1)
    if not whole or len(numbers) % 2 or (numbers < 0).any():
        raise ValueError("a mask is whole numbers from 0, in pairs of a start and a length")
    mask = np.zeros((side, side), bool)
    flat = mask.reshape(-1)
    for start, length in numbers.reshape(-1, 2):
        if start >= flat.size:
            raise ValueError(f"a run starts at {start}, outside {side} x {side} pixels")
        flat[start : start + length] = True
    if border:
        mask[[0, -1], :] = mask[:, [0, -1]] = True
    return mask


def without_brackets(prompt: str) -> tuple[str, list[str]]:
    """The prompt as a model is told it, and what PIE-Bench had in brackets there."""
    marked = [text.strip() for text in re.findall(r"\[([^\]]*)\]", prompt)]
    return " ".join(prompt.replace("[", " ").replace("]", " ").split()), marked


def _from_pie_bench(listing: Path, folder: Path) -> Iterator[DatasetEdit]:
    try:
        entries = json.loads(listing.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{listing} is no JSON: {error}; take PIE-Bench's own {PIE_MAPPING}.") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{listing} holds a {type(entries).__name__}; PIE-Bench's has an object of entries by id.")
    for name, entry in entries.items():
        where = f"{listing}, entry {name}"
        needed = ("image_path", "original_prompt", "editing_prompt")
        missing = [field for field in needed if not isinstance(entry, dict) or not isinstance(entry.get(field), str)]
        if missing:
            raise ValueError(f"{where} has no {missing[0]}; take PIE-Bench's own {PIE_MAPPING}.")
        source, _ = without_brackets(entry["original_prompt"])
        target, _ = without_brackets(entry["editing_prompt"])
        if not source or not target:
            raise ValueError(f"{where} has an empty prompt; fill it in or take the entry out.")
        picture = folder / PIE_PICTURES / entry["image_path"]
        if not picture.is_file():
            raise FileNotFoundError(f"{where}: {picture} isn't there; {PIE_PICTURES}/ belongs beside {listing.name}.")
        mask = None
        if entry.get("mask") is not None:
            try:
                mask = decode_runs(_numbers(entry["mask"]))
            except ValueError as error:
                raise ValueError(f"{where}: {error}; fix the mask, or set it to null.") from error
        kind = entry.get("editing_type_id")
        yield DatasetEdit(
            name, picture, source, (target,), _subject(entry, source), mask,
            entry.get("editing_instruction") or None, None if kind is None else str(kind),
        )  # fmt: skip


def _numbers(mask: Any) -> list[int]:
    """A list, or the same as text."""
    return [int(number) for number in mask.split()] if isinstance(mask, str) else mask


def _subject(entry: Mapping[str, Any], source: str) -> str:
    """PIE-Bench names no subject: the blended words' source word where it gives any, else what is in brackets in the
    source prompt; failing both, the prompt's last word. In each case the last word of it, the noun of a phrase."""
    _, marked = without_brackets(entry["original_prompt"])
    blended = entry.get("blended_word")
    first = blended.split()[:1] if isinstance(blended, str) else []
    words = split_words(source)
    for phrase in (*first, *marked):
        shared = [word for word in split_words(phrase) if word in words]
        if shared:
            return shared[-1]
    return words[-1]
