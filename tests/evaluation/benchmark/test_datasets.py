"""Loaders of real pictures, on samples in each format, written here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from s2edit_pipeline.evaluation.benchmark.datasets import decode_runs, load_edit_dataset, without_brackets

ROW = {
    "file": "a.png",
    "source_prompt": "a photo of a lady with glasses",
    "target_prompts": ["a photo of a lady", "a photo of a sad lady with glasses"],
    "subject": "lady",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures of 6 x 4, and a mask of the first's left half."""
    for i, name in enumerate(("a.png", "b.jpg")):
        Image.new("RGB", (6, 4), (200 * i, 90, 30)).save(tmp_path / name)
    mask = np.zeros((4, 6), np.uint8)
    mask[:, :3] = 255
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    return tmp_path


def _jsonl(folder: Path, *rows: Any) -> Path:
    file = folder / "captions.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8")
    return file


# ---------------------------------------------------------------------------- a folder with captions


def test_jsonl_csv_and_sidecars_say_the_same(folder: Path) -> None:
    second = {
        "file": "b.jpg", "source_prompt": "a cat, asleep", "target_prompt": "a dog, asleep", "subject": "cat",
        "instruction": "make it a dog",
    }  # fmt: skip
    listing = _jsonl(folder, {**ROW, "mask": "masks/a.png"}, "", second)
    from_folder = load_edit_dataset(folder)
    first, other = from_folder
    assert (first.name, first.file, first.subject) == ("a.png", folder / "a.png", "lady")
    assert first.target_prompts == tuple(ROW["target_prompts"]) and other.target_prompts == ("a dog, asleep",)
    assert first.source_prompt == ROW["source_prompt"]
    assert (first.instruction, other.instruction, other.mask) == (None, "make it a dog", None)
    assert first.mask is not None and first.mask.dtype == bool
    assert np.array_equal(first.mask, np.arange(6)[None].repeat(4, 0) < 3)
    assert first.picture().mode == "RGB" and first.picture().getpixel((0, 0)) == (0, 90, 30)
    listing.unlink()

    (folder / "captions.csv").write_text(
        "file,source_prompt,target_prompts,subject,mask,instruction\r\n"
        f"a.png,{ROW['source_prompt']},{' | '.join(ROW['target_prompts'])},lady,masks/a.png,\r\n"
        'b.jpg,"a cat, asleep","a dog, asleep",cat,,make it a dog\r\n',
        "utf-8-sig",
    )
    as_csv = load_edit_dataset(folder / "captions.csv")
    (folder / "captions.csv").unlink()

    (folder / "a.txt").write_text("\n".join(["lady", ROW["source_prompt"], *ROW["target_prompts"]]) + "\n")
    (folder / "b.txt").write_text("cat\na cat, asleep\n\na dog, asleep\n")
    (folder / "masks" / "a.png").rename(folder / "a.mask.png")
    as_text = load_edit_dataset(str(folder))
    for read, instruction in ((as_csv, "make it a dog"), (as_text, None)):
        for got, wanted in zip(read, from_folder, strict=True):
            for field in ("name", "file", "source_prompt", "target_prompts", "subject"):
                assert getattr(got, field) == getattr(wanted, field)
        assert np.array_equal(read[0].mask, first.mask) and read[1].mask is None
        assert read[1].instruction == instruction


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({**ROW, "file": ""}, ValueError, r"line 2 has no file"),
        ({**ROW, "file": "c.png"}, FileNotFoundError, r"line 2 \(c.png\): .*c.png isn't there"),
        ({**ROW, "mask": "m.png"}, FileNotFoundError, r"\(a.png\): .*m.png isn't there"),
        ({**ROW, "subject": "man"}, ValueError, r"\(a.png\): the subject 'man' is not in the source prompt"),
        ({**ROW, "subject": "lad"}, ValueError, "the subject 'lad' is not in"),
        ({**ROW, "subject": " "}, ValueError, r"\(a.png\) has no subject"),
        ({**ROW, "source_prompt": 3}, ValueError, r"\(a.png\) has no source_prompt"),
        ({**ROW, "target_prompts": []}, ValueError, "has no target_prompts, or an empty one"),
        ({**ROW, "target_prompts": ["a", " "]}, ValueError, "has no target_prompts, or an empty one"),
        ({**ROW, "target_prompt": "a"}, ValueError, "target_prompt and target_prompts; give one"),
        ({**ROW, "prompt": "a"}, ValueError, "has 'prompt', which is no field; the fields are file,"),
        ({**ROW, "file": "b.jpg"}, ValueError, "b.jpg is listed twice"),
        ("{", ValueError, "line 2 is no JSON: .*each line is one object"),
        ("[1]", ValueError, "line 2 is a list"),
    ],
)
def test_a_bad_entry_is_named_with_the_fix(folder: Path, row: Any, kind: type[Exception], message: str) -> None:
    _jsonl(folder, {**ROW, "file": "b.jpg"}, row)
    with pytest.raises(kind, match=message):
        load_edit_dataset(folder)


def test_a_mask_of_another_size_a_ragged_csv_and_a_short_sidecar_are_refused(folder: Path) -> None:
    Image.new("L", (4, 6)).save(folder / "masks" / "tall.png")
    listing = _jsonl(folder, {**ROW, "mask": "masks/tall.png"})
    with pytest.raises(ValueError, match=r"\(a.png\): the mask is \(4, 6\) and the picture \(6, 4\)"):
        load_edit_dataset(folder)
    listing.unlink()
    table = folder / "captions.csv"
    table.write_text("file,source_prompt,target_prompts,subject\na.png,a lady, asleep,a lady,lady\n")
    with pytest.raises(ValueError, match=r"line 2 has another number of cells.*double quotes"):
        load_edit_dataset(folder)
    table.unlink()
    (folder / "a.txt").write_text("lady\na photo of a lady\n")
    with pytest.raises(ValueError, match=r"a.txt has 2 lines; it takes the subject, the source prompt"):
        load_edit_dataset(folder)
    (folder / "a.txt").rename(folder / "c.txt")
    with pytest.raises(FileNotFoundError, match=r"c.txt has no picture c.png"):
        load_edit_dataset(folder)


def test_a_folder_without_a_dataset_or_with_two_is_refused(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no picture's .txt; write one"):
        load_edit_dataset(folder)
    with pytest.raises(FileNotFoundError, match="isn't there"):
        load_edit_dataset(folder / "elsewhere")
    _jsonl(folder, "")
    with pytest.raises(ValueError, match="lists no picture"):
        load_edit_dataset(folder)
    (folder / "captions.csv").write_text("file\n")
    with pytest.raises(ValueError, match=r"captions.jsonl and captions.csv; pass the one to read"):
        load_edit_dataset(folder)
    with pytest.raises(ValueError, match=r"is no .jsonl"):
        load_edit_dataset(folder / "a.png")


# ---------------------------------------------------------------------------- PIE-Bench


def _naive(runs: list[int], side: int) -> list[list[bool]]:
    """Pixel by pixel, the border on top."""
    inside = [
        [any(s <= y * side + x < s + n for s, n in zip(runs[::2], runs[1::2], strict=True)) for x in range(side)]
        for y in range(side)
    ]
    return [
        [inside[y][x] or y in (0, side - 1) or x in (0, side - 1) for x in range(side)] for y in range(side)
    ]  # fmt: skip


@pytest.mark.parametrize("runs", [[], [9, 3], [9, 3, 20, 1], [17, 40], [0, 64], [9, 0], [60, 99], [33, 2, 10, 30]])
def test_masks_are_runs_over_the_rows(runs: list[int]) -> None:
    wanted = np.array(_naive(runs, 8))
    assert np.array_equal(decode_runs(runs, 8), wanted)
    bare = decode_runs(runs, 8, border=False)
    assert np.array_equal(bare[1:-1, 1:-1], wanted[1:-1, 1:-1])
    assert bare.sum() == len({p for s, n in zip(runs[::2], runs[1::2], strict=True) for p in range(s, min(s + n, 64))})


@pytest.mark.parametrize(
    ("runs", "message"),
    [([1], "pairs"), ([-1, 2], "from 0"), ([1, -2], "from 0"), ([1.5, 2], "whole numbers"), ([64, 1], "starts at 64")],
)
def test_runs_that_are_none_are_refused(runs: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_runs(runs, 8)


def test_brackets_are_taken_out_and_remembered() -> None:
    assert without_brackets("a [round] cake with [orange frosting]on it") == (
        "a round cake with orange frosting on it", ["round", "orange frosting"],
    )  # fmt: skip
    assert without_brackets("a cat") == ("a cat", [])


PIE = {
    "000000000000": {
        "image_path": "0_random_140/000000000000.jpg",
        "original_prompt": "a slanted mountain bicycle on the road",
        "editing_prompt": "a slanted [rusty] mountain bicycle on the road",
        "editing_instruction": "Make the frame of the bike rusty",
        "editing_type_id": "0",
        "blended_word": "bicycle bicycle",
        "mask": [513, 2, 262143, 9],
    },
    "111000000001": {
        "image_path": "1_change_object_80/1_artificial/111000000001.jpg",
        "original_prompt": "a [grey cat] sitting on a chair",
        "editing_prompt": "a [dog] sitting on a chair",
        "editing_instruction": "",
        "editing_type_id": "1",
        "blended_word": "",
        "mask": None,
    },
}


@pytest.fixture
def pie(tmp_path: Path) -> Path:
    for entry in PIE.values():
        file = tmp_path / "annotation_images" / entry["image_path"]
        file.parent.mkdir(parents=True)
        Image.new("RGB", (512, 512)).save(file)
    (tmp_path / "mapping_file.json").write_text(json.dumps(PIE))
    return tmp_path


def test_pie_bench_is_read_as_it_comes(pie: Path) -> None:
    first, second = load_edit_dataset(pie)
    assert first.name == "000000000000" and first.kind == "0" and second.kind == "1"
    assert first.file == pie / "annotation_images" / "0_random_140" / "000000000000.jpg"
    assert first.source_prompt == "a slanted mountain bicycle on the road"
    assert first.target_prompts == ("a slanted rusty mountain bicycle on the road",)
    assert first.instruction == "Make the frame of the bike rusty" and second.instruction is None
    assert (first.subject, second.subject) == ("bicycle", "cat")
    assert second.source_prompt == "a grey cat sitting on a chair" and second.mask is None
    assert first.mask is not None and first.mask.shape == (512, 512)
    assert first.mask.sum() == 4 * 511 + 2 and first.mask[1, 1:4].tolist() == [True, True, False]
    assert [e.name for e in load_edit_dataset(pie / "mapping_file.json")] == list(PIE)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"image_path": "x.jpg"}, FileNotFoundError, "entry 111000000001: .*x.jpg isn't there; annotation_images/"),
        ({"original_prompt": None}, ValueError, "entry 111000000001 has no original_prompt"),
        ({"editing_prompt": "[]"}, ValueError, "entry 111000000001 has an empty prompt"),
        ({"mask": [1]}, ValueError, "entry 111000000001: a mask is whole numbers .*set it to null"),
        ({"mask": [262144, 1]}, ValueError, "entry 111000000001: a run starts at 262144, outside 512 x 512"),
    ],
)
def test_a_bad_entry_of_pie_bench_is_named(
    pie: Path, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    entries = {**PIE, "111000000001": {**PIE["111000000001"], **change}}
    (pie / "mapping_file.json").write_text(json.dumps(entries))
    with pytest.raises(kind, match=message):
        load_edit_dataset(pie)


def test_what_is_no_mapping_is_refused(pie: Path) -> None:
    for text, message in (("[]", "holds a list"), ("{", "is no JSON"), ("{}", "lists no picture")):
        (pie / "mapping_file.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_edit_dataset(pie)


def test_a_subject_is_found_where_nobody_names_one(pie: Path) -> None:
    subjects = {}
    for blended, source in (("", "a photo of a church"), ("dog cat", "a [small dog] runs"), ("bird x", "two horses")):
        entry = {**PIE["111000000001"], "blended_word": blended, "original_prompt": source}
        (pie / "mapping_file.json").write_text(json.dumps({"only": entry}))
        subjects[source] = load_edit_dataset(pie)[0].subject
    assert list(subjects.values()) == ["church", "dog", "horses"]
