"""Fits and edits by the manifest on a tiny model: each once, whatever happens on the way."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from s2edit_pipeline import IdentityAdapter, S2EditPipeline
from s2edit_pipeline.cli import main
from s2edit_pipeline.many import work
from s2edit_pipeline.many.results import Outcome, Results, digest_of, write_whole

PROMPT = "a photo of a sad lady with a beard"
TARGET = "a photo of a smiling lady with a beard"
FIT = ("--steps", "2")
EDIT = ("--inference-steps", "2")


@pytest.fixture
def folder(pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with three pictures; the embedded model is the tiny one."""
    monkeypatch.setattr("s2edit_pipeline.avatars.load_avatars", lambda **_: pipe)
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        picture.rotate(90 * i).save(f"{i}.png")
    return tmp_path


def write_csv(path: str, rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any], str]:
    """Status, the JSON that was printed, and stderr."""
    status = main([*argv, "--json"])
    shown = capsys.readouterr()
    return status, json.loads(shown.out), shown.err


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def results(out: str) -> list[Path]:
    return [Path(out) / line["result"] for line in lines(f"{out}/results.jsonl")]


def assert_same_fits(one: str, other: str) -> None:
    for a, b in zip(results(one), results(other), strict=True):
        first, second = IdentityAdapter.from_pretrained(a), IdentityAdapter.from_pretrained(b)
        assert first.fit_digest == second.fit_digest and first.weights.keys() == second.weights.keys()
        assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


def assert_nothing_is_left(out: str) -> None:
    assert not list(Path(out).rglob("*.unfinished*")) and not list(Path(out).glob("begun/*"))


def fits(count: int = 3) -> list[dict[str, Any]]:
    return [{"image": f"{i}.png", "prompt": PROMPT, "subject": "lady", "seed": i} for i in range(count)]


def edits(count: int = 3, **more: Any) -> list[dict[str, Any]]:
    return [{"image": f"{i}.png", "source_prompt": PROMPT, "prompt": TARGET, **more} for i in range(count)]


# ---------------------------------------------------------------------------- results


def test_a_fit_for_each_row_is_the_fit_by_itself(
    folder: Path, capsys: pytest.CaptureFixture[str], pipe: S2EditPipeline
) -> None:
    rows = [{"id": "ada", **row} for row in fits(2)]
    status, report, _ = run(capsys, "fit-many", write_csv("m.csv", rows), "--out", "out", *FIT)
    assert status == 0 and (report["rows"], report["done"], report["done_now"]) == (2, 2, 2)
    assert json.loads(Path("out/report.json").read_text()) == report
    assert [line["id"] for line in lines("out/results.jsonl")] == ["ada", "ada"]
    for i, made in enumerate(results("out")):
        alone = pipe.fit_identity(
            Image.open(f"{i}.png"), PROMPT, "lady", num_steps=2, generator=torch.Generator().manual_seed(i)
        )
        assert IdentityAdapter.from_pretrained(made).fit_digest == alone.fit_digest
    assert_nothing_is_left("out")


def test_an_edit_for_each_row_is_the_edit_by_itself(
    folder: Path, capsys: pytest.CaptureFixture[str], pipe: S2EditPipeline
) -> None:
    pipe.fit_identity(Image.open("0.png"), PROMPT, "lady", num_steps=2).save_pretrained("ada")
    rows = edits(1, identity="ada") + edits(2, strength=0.5, reweight='{"smiling": 2}')[1:]
    status, report, err = run(capsys, "edit-many", write_csv("m.csv", rows), "--out", "out", *EDIT)
    assert status == 0 and report["done_now"] == 2, err
    asked: list[dict[str, Any]] = [{"identity": "ada"}, {"strength": 0.5, "reweight": {"smiling": 2}}]
    for i, (made, more) in enumerate(zip(results("out"), asked, strict=True)):
        (alone,) = pipe(
            TARGET, image=Image.open(f"{i}.png"), source_prompt=PROMPT, num_inference_steps=2, **more
        ).images
        np.testing.assert_array_equal(np.asarray(Image.open(made)), np.asarray(alone))
    assert_nothing_is_left("out")


def test_nothing_is_done_twice(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, fit = [], S2EditPipeline.fit_identity

    def counted(pipe: S2EditPipeline, image: Any, *args: Any, **more: Any) -> IdentityAdapter:
        calls.append(args)
        return fit(pipe, image, *args, **more)

    monkeypatch.setattr(S2EditPipeline, "fit_identity", counted)
    rows = fits(2)
    status, report, _ = run(capsys, "fit-many", write_csv("m.csv", [*rows, rows[0]]), "--out", "out", *FIT)
    assert status == 0 and len(calls) == 2 and (report["done"], report["repeated"]) == (3, 1)
    status, report, _ = run(capsys, "fit-many", write_csv("m.csv", [fits(3)[2], *rows]), "--out", "out", *FIT)
    assert status == 0 and len(calls) == 3 and (report["done_before"], report["done_now"]) == (2, 1)
    run(capsys, "fit-many", "m.csv", "--out", "out", "--steps", "1")  # other settings are other results
    assert len(calls) == 6


# ---------------------------------------------------------------------------- set aside


def test_rows_that_fail_are_set_aside_and_tried_again_when_asked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": "bob", **edits(1)[0], "image": "later.png"}, *edits(1)]
    status, report, _ = run(capsys, "edit-many", write_csv("m.csv", rows), "--out", "out", *EDIT)
    assert status == 1 and (report["done"], report["set_aside"]) == (1, 1)
    (failed,) = lines("out/failed.jsonl")
    assert (failed["row"], failed["id"]) == (1, "bob") and "later.png" in failed["reason"]
    assert [line["status"] for line in lines("out/results.jsonl")] == ["set_aside", "done"]
    Image.open("0.png").save("later.png")
    status, report, _ = run(capsys, "edit-many", "m.csv", "--out", "out", *EDIT)
    assert status == 1 and report["done_now"] == 0 and lines("out/failed.jsonl") == [failed]
    status, report, _ = run(capsys, "edit-many", "m.csv", "--out", "out", *EDIT, "--retry-failed")
    assert status == 0 and report["done_now"] == 1 and lines("out/failed.jsonl") == []


def test_a_row_that_kills_its_process_is_set_aside(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv("m.csv", edits(2))
    assert run(capsys, "edit-many", "m.csv", "--out", "out", *EDIT)[0] == 0
    first = Results("out"), results("out")[0]
    first[1].unlink()
    for _ in range(work.MOST_DEATHS):
        first[0].begin(first[1].stem)
    status, report, _ = run(capsys, "edit-many", "m.csv", "--out", "out", *EDIT)
    assert status == 1 and report["set_aside"] == 1
    assert "killed 5 times" in lines("out/failed.jsonl")[0]["reason"]
    status, report, _ = run(capsys, "edit-many", "m.csv", "--out", "out", *EDIT, "--retry-failed")
    assert status == 0 and report["done"] == 2


def test_a_full_disk_ends_the_run_and_no_row_is_blamed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_csv("m.csv", edits(2))
    with monkeypatch.context() as patched:
        patched.setattr("s2edit_pipeline.many.edits.tempfile.mkstemp", full)
        status, facts, _ = run(capsys, "edit-many", "m.csv", "--out", "out", *EDIT)
    assert status == 1 and "No space left" in facts["error"] and not Path("out/failed.jsonl").exists()
    assert run(capsys, "edit-many", "m.csv", "--out", "out", *EDIT)[0] == 0


def test_half_a_line_of_a_killed_process_is_passed_over(tmp_path: Path) -> None:
    kept = Results(tmp_path)
    one, other = (Outcome(i, f"{i:032x}", f"results/000/{i:032x}", "failed", "why") for i in (1, 2))
    kept.set_aside(one, {})
    with open(kept.failed_file, "ab") as file:
        file.write(b'{"row": 7, "rea')
    kept.set_aside(other, {"id": "x"})
    kept.set_aside(one, {})
    assert [facts["row"] for facts in kept.failures()] == [1, 2, 1]
    kept.tidy_failures({bytes.fromhex(one.digest)})
    assert [facts["row"] for facts in kept.failures()] == [1]


# ---------------------------------------------------------------------------- killed


def killed_at_random(argv: Sequence[str], kills: int, seed: int, longest: float) -> int:
    """Run ``argv`` in forks that are killed at random moments until one ends by itself; how many were killed."""
    draw, done = random.Random(seed), 0
    while True:
        child = os.fork()
        if child == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                status = main(argv)
            except BaseException:
                status = 9
            finally:
                os._exit(status)
        if done < kills:
            time.sleep(draw.uniform(0.02, longest))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0
            return done
        done += 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
@pytest.mark.parametrize("command", ["fit-many", "edit-many"])
def test_killed_at_random_moments_each_row_is_there_once_as_undisturbed(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "MOST_DEATHS", 100)
    write_csv("m.csv", fits() if command == "fit-many" else edits())
    settings = FIT if command == "fit-many" else EDIT
    started = time.perf_counter()
    assert run(capsys, command, "m.csv", "--out", "whole", *settings)[0] == 0
    longest = (time.perf_counter() - started) / 2
    assert killed_at_random([command, "m.csv", "--out", "out", *settings], kills=3, seed=1, longest=longest) > 0
    files = [path for path in Path("out/results").rglob("*") if len(path.stem) == 32]
    assert sorted(files) == sorted(results("out")) and len(files) == 3
    if command == "fit-many":
        assert_same_fits("out", "whole")
    else:
        for one, other in zip(results("out"), results("whole"), strict=True):
            assert one.read_bytes() == other.read_bytes()
    assert_nothing_is_left("out")


def test_a_killed_fit_goes_on_within_the_row(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps before are not done again."""
    steps: list[int] = []

    class Killed(BaseException):
        pass

    def stepping(fit: Callable[..., Any]) -> Callable[..., Any]:
        def with_callback(pipe: S2EditPipeline, *args: Any, **more: Any) -> Any:
            def seen(p: Any, step: int, num_steps: int, measures: Any) -> None:
                steps.append(step)
                if steps == [0, 1]:
                    raise Killed

            return fit(pipe, *args, callback_on_step_end=seen, **more)

        return with_callback

    monkeypatch.setattr(S2EditPipeline, "fit_identity", stepping(S2EditPipeline.fit_identity))
    monkeypatch.setattr("s2edit_pipeline.fit_checkpoint.MOST_SHARE", 1e9)  # a checkpoint after every step
    write_csv("m.csv", fits(1))
    with pytest.raises(Killed):
        main(["fit-many", "m.csv", "--out", "out", "--steps", "3"])
    assert run(capsys, "fit-many", "m.csv", "--out", "out", "--steps", "3")[0] == 0
    assert steps == [0, 1, 1, 2] or steps == [0, 1, 2]
    assert_nothing_is_left("out")


def test_two_runs_in_one_folder_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv("m.csv", edits(1))
    kept = Results(folder / "out")
    kept.open("edit-many")
    with kept.alone():
        status, facts, _ = run(capsys, "edit-many", "m.csv", "--out", "out", *EDIT)
    assert status == 2 and "another run" in facts["error"]


def test_folders_of_other_things_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv("m.csv", edits(1))
    status, facts, _ = run(capsys, "edit-many", "m.csv", "--out", ".", *EDIT)
    assert status == 2 and "other things" in facts["error"]
    Results(folder / "out").open("fit-many")
    status, facts, _ = run(capsys, "edit-many", "m.csv", "--out", "out", *EDIT)
    assert status == 2 and "fit-many" in facts["error"]


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken() -> Any:
        yield "one"
        raise RuntimeError

    write_whole(tmp_path / "a", ["old"])
    with pytest.raises(RuntimeError):
        write_whole(tmp_path / "a", broken())
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old\n"


def test_a_digest_is_of_the_row_and_the_settings_and_not_of_its_name() -> None:
    cells = {"image": "a.png", "seed": 1}
    assert digest_of(cells, {"a": 1}) == digest_of({"seed": 1, "id": "x", "image": "a.png"}, {"a": 1})
    others = [digest_of({**cells, "seed": 2}, {"a": 1}), digest_of(cells, {"a": 2}), digest_of({"image": "a.png"}, {})]
    assert len({digest_of(cells, {"a": 1}), *others}) == 4
