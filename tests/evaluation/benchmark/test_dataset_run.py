"""The methods on real pictures: datasets of both kinds written here; most systems are drawn, two ask the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.avatars.world import render, sample_person
from s2edit_pipeline.cli import main
from s2edit_pipeline.evaluation.benchmark import runner
from s2edit_pipeline.evaluation.benchmark.dataset_report import (
    dataset_report,
    standard_measures,
    write_dataset_report,
)
from s2edit_pipeline.evaluation.benchmark.dataset_run import DatasetRun, preservation
from s2edit_pipeline.evaluation.benchmark.datasets import load_edit_dataset
from s2edit_pipeline.evaluation.benchmark.runner import run_benchmark
from s2edit_pipeline.evaluation.methods import registry
from s2edit_pipeline.evaluation.methods.registry import MethodFactory, MethodSpec, method_specs
from s2edit_pipeline.evaluation.methods.rivals import InstructPix2Pix
from s2edit_pipeline.evaluation.metrics import learned

SIZE = (40, 24)
ROWS = [
    {
        "file": "faces/ada.png", "source_prompt": "a photo of a lady with glasses", "subject": "lady",
        "target_prompts": ["a photo of a lady", "a photo of a sad lady with glasses"], "mask": "mask.png",
        "instruction": "change her",
    },
    {
        "file": "tom.png", "source_prompt": "a photo of a cat", "subject": "cat",
        "target_prompt": "a photo of a dog", "instruction": "make it a dog",
    },
]  # fmt: skip


def _noise(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two captioned pictures, the first with a mask of its left half and two targets."""
    path = tmp_path / "captioned"
    (path / "faces").mkdir(parents=True)
    for seed, row in enumerate(ROWS):
        _noise(seed).save(path / row["file"])
    Image.fromarray(np.where(np.arange(SIZE[0]) < 20, 255, 0).astype(np.uint8)[None].repeat(SIZE[1], 0)).save(
        path / "mask.png"
    )
    (path / "captions.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return path


class Shade:
    """Darkens by as many levels as a prompt has letters, and by one more for each unit of the seed."""

    def __init__(self, name: str, prompts_seen: list[Sequence[str]], takes_instructions: bool) -> None:
        self.name, self.prompts_seen, self.takes_instructions = name, prompts_seen, takes_instructions

    def resolved(self) -> dict[str, Any]:
        return {}

    def prepare(self, picture: Image.Image, source_prompt: str, subject: str, seed: int) -> Any:
        def edit(targets: Sequence[str]) -> list[Image.Image]:
            self.prompts_seen.append((self.name, *targets))
            levels = [np.asarray(picture).astype(int) - len(target) - seed for target in targets]
            return [Image.fromarray(level.clip(0).astype(np.uint8)) for level in levels]

        return edit


@pytest.fixture
def prompts_seen(make_pipe: Callable[[], S2EditPipeline], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What "shade" and "instructed" were told so far; the model is a tiny one."""
    monkeypatch.setattr(runner, "load_model", lambda run: make_pipe())
    heard: list[Any] = []
    for name in ("shade", "instructed"):
        make = lambda name, pipe, steps: Shade(name, heard, name == "instructed")  # noqa: E731
        monkeypatch.setitem(registry.METHODS, name, MethodFactory(make))
    return heard


def _run(folder: Path, *names: str, **more: Any) -> DatasetRun:
    entries = tuple(load_edit_dataset(folder))
    return DatasetRun(folder.parent / "out", method_specs(names), entries, **{"num_inference_steps": 2, **more})


def _naive(a: Image.Image, b: Image.Image, mask: np.ndarray) -> tuple[float, float]:
    """PSNR and SSIM of two pictures, black where ``mask``, pixel by pixel."""
    x, y = np.array(a).astype(float), np.array(b).astype(float)
    total = 0.0
    for i, j in np.ndindex(mask.shape):
        if mask[i, j]:
            x[i, j] = y[i, j] = 0
        total += sum((x[i, j, c] - y[i, j, c]) ** 2 for c in range(3))
    similarity = structural_similarity(x, y, channel_axis=2, data_range=255)
    return 10 * np.log10(255**2 * 3 * mask.size / total), similarity


def test_records_and_report_hold_what_the_pictures_say(folder: Path, prompts_seen: list[Any]) -> None:
    run = _run(folder, "unedited", "shade", "instructed", seed=3)
    assert run_benchmark(run) == {}
    report = json.loads(write_dataset_report(run, {}).with_suffix(".json").read_text())
    source, mask = _noise(0), np.arange(SIZE[0])[None].repeat(SIZE[1], 0) < 20
    wanted = []
    with Image.open(run.out / "records" / "shade" / "faces%2Fada.png" / "edits.png") as strip:
        for i, target in enumerate(ROWS[0]["target_prompts"]):
            edited = strip.crop((40 * i, 0, 40 * i + 40, 24))
            assert np.array_equal(edited, np.maximum(np.array(source).astype(int) - len(target) - 3, 0))
            wanted.append(_naive(source, edited, mask))
    row = report["methods"]["shade"]
    assert (row["pictures"], row["edits"], row["edits_with_mask"], row["failures"]) == (2, 3, 2, [])
    assert row["psnr_outside"]["mean"] == pytest.approx(np.mean([p for p, _ in wanted]))
    assert row["ssim_outside"]["mean"] == pytest.approx(np.mean([s for _, s in wanted]))
    assert (run.out / "report.md").read_text().count(f"| shade | 3 | 2 | {row['psnr_outside']['mean']:.2f} [") == 1
    same = report["methods"]["unedited"]
    assert same["psnr_outside"]["mean"] == 60 and same["ssim_outside"]["mean"] == 1
    # an instruction is of one edit
    assert prompts_seen == [
        ("shade", *ROWS[0]["target_prompts"]), ("instructed", *ROWS[0]["target_prompts"]),
        ("shade", "a photo of a dog"), ("instructed", "make it a dog"),
    ]  # fmt: skip
    counts = [report["methods"][name]["told_instructions"] for name in ("shade", "instructed")]
    assert counts == [0, 1]
    assert InstructPix2Pix.takes_instructions


def test_a_mask_that_tells_nothing_or_does_not_fit() -> None:
    a, b = _noise(0), _noise(1)
    nothing = {"psnr_outside": None, "ssim_outside": None}
    assert preservation(a, b, None) == preservation(a, b, np.ones((24, 40), bool)) == nothing
    with pytest.raises(ValueError, match=r"the mask is \(24, 40\) and the picture \(40, 24\)"):
        preservation(a, b, np.zeros((40, 24), bool))


def test_a_run_goes_on_and_refuses_other_entries(folder: Path, prompts_seen: list[Any]) -> None:
    run = _run(folder, "shade")
    run_benchmark(replace(run, subjects=run.subjects[:1]))
    run_benchmark(run)
    run_benchmark(run)
    assert len(prompts_seen) == 2  # each picture once
    with pytest.raises(ValueError, match="seed 0, not 1"):
        run_benchmark(replace(run, seed=1))
    for change in (
        {"target_prompts": ("a photo of a horse",)},
        {"file": run.subjects[0].file},
        {"mask": np.zeros((24, 40), bool)},
        {"source_prompt": "a picture of a cat"},
        {"instruction": "make it bark"},
    ):
        with pytest.raises(ValueError, match="'shade' with other edits"):
            run_benchmark(replace(run, subjects=(run.subjects[0], replace(run.subjects[1], **change))))
    assert len(prompts_seen) == 2


def test_an_entry_that_fails_is_named_and_the_run_goes_on(folder: Path, prompts_seen: list[Any]) -> None:
    whole = (folder / "faces" / "ada.png").read_bytes()
    (folder / "faces" / "ada.png").write_bytes(whole[: len(whole) // 2])
    run = _run(folder, "shade")
    run_benchmark(run)
    row = dataset_report(run, {})["methods"]["shade"]
    assert row["pictures"] == 1
    (failure,) = row["failures"]
    assert failure["picture"] == "faces/ada.png" and "truncated" in failure["error"]
    path = write_dataset_report(run, {"other": "no weights"} | {"shade": "gone"})
    assert f"- shade failed on faces/ada.png: {failure['error']}" in path.read_text()
    assert "- shade could not be made. gone" in path.read_text()
    (folder / "faces" / "ada.png").write_bytes(whole)
    run_benchmark(run)  # what failed is tried once more
    assert dataset_report(run, {})["methods"]["shade"]["failures"] == []


def test_a_target_without_the_subject_goes_without_the_token(
    folder: Path, prompts_seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two targets one has the token. The pictures are edited smaller, and come back at their own size."""
    prompts_of_calls: list[list[str]] = []
    call = S2EditPipeline.__call__

    def spy(pipe: S2EditPipeline, prompt: list[str], *args: Any, **kwargs: Any) -> Any:
        prompts_of_calls.append(prompt)
        return call(pipe, prompt, *args, **kwargs)

    monkeypatch.setattr(S2EditPipeline, "__call__", spy)
    _noise(1, (80, 48)).save(folder / "tom.png")
    (cat,) = load_edit_dataset(folder)[1:]
    cat = replace(cat, target_prompts=("a photo of a dog", "a photo of a sad cat"))
    spec = MethodSpec("S2Edit", "S2Edit", {"fit": {"num_steps": 1}})
    run = DatasetRun(folder.parent / "out", (spec, *method_specs(["direct + P2P", "autoencoder alone"])), (cat,), 2)
    run_benchmark(run)
    report = dataset_report(run, {})["methods"]
    assert [row["failures"] for row in report.values()] == [[], [], []]
    assert prompts_of_calls[0] == ["a photo of a dog", "a photo of a sad [I] cat"] and prompts_of_calls[1] == list(
        cat.target_prompts
    )
    assert report["S2Edit"]["token_left_out"] == [{"picture": "tom.png", "prompt": "a photo of a dog"}]
    assert report["direct + P2P"]["token_left_out"] == []
    assert "S2Edit left its token out of 'a photo of a dog' (tom.png)" in write_dataset_report(run, {}).read_text()
    for name in ("S2Edit", "direct-P2P", "autoencoder-alone"):
        assert Image.open(run.out / "records" / name / "tom.png" / "edits.png").size == (160, 48)
    costs = {name: row["cost"] for name, row in report.items()}
    assert costs["S2Edit"]["cost_prepare"] > costs["direct + P2P"]["cost_prepare"] >= 2
    assert costs["autoencoder alone"]["cost_edit"] == 0


def test_standard_metrics_are_numbers_or_say_why_not(
    folder: Path, prompts_seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(folder, "instructed")
    run_benchmark(run)
    seen: dict[str, Any] = {}

    def score(pictures: Sequence[Image.Image], prompts: Sequence[str], *, model: str) -> float:
        seen["clip"] = (pictures, list(prompts), model)
        return 12.345

    def missing(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> float:
        seen["pairs"] = (before, after)
        raise OSError("no | weights\nhere")

    for name, function in (("clip_score", score), ("lpips", missing), ("fid", missing)):
        monkeypatch.setattr(learned, name, function)
    path = write_dataset_report(run, {}, standard_measures("clip/"))
    values = json.loads(path.with_suffix(".json").read_text())["methods"]["instructed"]["standard_metrics"]
    reason = "not measured: no | weights\nhere"
    assert values == {"CLIP score ↑": 12.345, "LPIPS ↓": reason, "FID ↓": reason}
    assert "| instructed | 12.35 | not measured: no \\| weights here | not measured: no \\| weights here |" in (
        path.read_text()
    )
    pictures, prompts, model = seen["clip"]
    # the target prompts, whatever the system was told
    assert prompts == [*ROWS[0]["target_prompts"], "a photo of a dog"] and model == "clip/"
    before, after = seen["pairs"]
    sources = [_noise(0), _noise(0), _noise(1)]
    for source, first, second, picture, levels in zip(
        sources, before, after, pictures, [17, 34, 13], strict=True
    ):  # letters of what was told
        darker = np.maximum(np.array(source).astype(int) - levels, 0)
        assert np.array_equal(first, source) and np.array_equal(second, darker) and np.array_equal(picture, darker)


# ---------------------------------------------------------------------------- the command


@pytest.fixture
def pie(tmp_path: Path) -> Path:
    """PIE-Bench's files, of drawn people at its 512 x 512; the first one's mask is the upper half."""
    entries = {}
    for number, runs in ((0, [0, 256 * 512]), (1, None)):
        name = f"00000000000{number}"
        file = tmp_path / "pie" / "annotation_images" / "0_random_140" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        render(sample_person(3 + number, "held_out")).resize((512, 512)).save(file)
        entries[name] = {
            "image_path": f"0_random_140/{name}.png", "original_prompt": "a photo of a [man] with a moustache",
            "editing_prompt": "a photo of a [lady] with a moustache", "editing_instruction": "make him a lady",
            "editing_type_id": "0", "blended_word": "man lady", "mask": runs,
        }  # fmt: skip
    (tmp_path / "pie" / "mapping_file.json").write_text(json.dumps(entries))
    return tmp_path / "pie"


def test_the_command_on_pie_bench(pie: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = tmp_path / "best.json"
    best.write_text(json.dumps({"methods": {"S2Edit": {"fit": {"num_steps": 1}}}}))
    argv = ["bench", "--dataset", str(pie), "--out", str(tmp_path / "out"), "--steps", "2", "--device", "cpu"]
    argv += ["--settings", str(best), "--methods", "S2Edit", "InstructPix2Pix", "unedited", "--limit", "1"]
    argv += ["--standard-metrics", "--clip-model", str(tmp_path / "none")]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    row = report["methods"]["S2Edit"]
    assert report["settings"]["pictures"] == ["000000000000"]
    assert (row["pictures"], row["edits_with_mask"], len(row["token_left_out"])) == (1, 1, 1)
    mask = np.zeros((512, 512), bool)
    mask[:256] = mask[[0, -1]] = mask[:, [0, -1]] = True
    source = load_edit_dataset(pie)[0].picture()
    edited = Image.open(tmp_path / "out" / "records" / "S2Edit" / "000000000000" / "edits.png")
    first, second = np.where(mask[..., None], 0.0, source), np.where(mask[..., None], 0.0, edited)
    decibel = 10 * np.log10(255**2 / ((first - second) ** 2).mean())
    assert row["psnr_outside"]["mean"] == pytest.approx(decibel) and 15 < decibel < 60
    assert "train-instruct" in report["methods"]["InstructPix2Pix"]["unavailable"]
    assert row["standard_metrics"]["CLIP score ↑"].startswith("not measured: CLIP score could not get its model")
    assert row["standard_metrics"]["FID ↓"].startswith("not measured: FID needs at least 2 pictures")
    assert f"| S2Edit | 1 | 1 | {decibel:.2f} [" in shown


def test_arguments_that_do_not_go_together_are_told(
    pie: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = ["--dataset", str(pie)]
    for more, message in (
        ([*dataset, "--quick"], "--quick is not for --dataset"),
        ([*dataset, "--people", "0"], "--people is not for --dataset"),
        ([*dataset, "--limit", "0"], "--limit must be at least 1, not 0"),
        (["--limit", "1"], "--limit is for --dataset PATH"),
        (["--standard-metrics"], "--standard-metrics is for --dataset PATH"),
        ([*dataset, "--clip-model", "here"], "--clip-model is for --standard-metrics"),
        ([*dataset, "--baseline", "SDEdit"], "--baseline is not for --dataset"),
        (["--dataset", str(tmp_path / "none")], "none isn't there"),
    ):
        assert main(["bench", "--out", str(tmp_path / "out"), *more]) == 2
        assert message in capsys.readouterr().err
