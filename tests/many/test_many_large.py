"""Several workers with Ray, and a manifest of a million rows; both in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.cli import make_parser
from s2edit_pipeline.many.results import Results
from s2edit_pipeline.many.work import Desk

from .test_many import EDIT, FIT, assert_nothing_is_left, assert_same_fits, edits, fits, results, write_csv

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("model")
    for i in range(24):
        picture.rotate(15 * i).save(f"{i}.png")
    return tmp_path


def command(*argv: str) -> list[str]:
    run = "import sys; from s2edit_pipeline.cli import main; sys.exit(main())"
    return [sys.executable, "-c", run, *argv, "--device", "cpu"]


def workers_of(process: subprocess.Popen[Any]) -> Iterator[psutil.Process]:
    began = psutil.Process(process.pid).create_time()
    for one in psutil.process_iter(["cmdline", "create_time"]):
        words = " ".join(one.info["cmdline"] or [])
        if "ray::" in words and "MapWorker" in words and one.info["create_time"] >= began:
            yield one


def done_in(out: str) -> int:
    return sum(1 for path in Path(out, "results").rglob("*") if len(path.stem) == 32)


def wait_until(is_so: Any, process: subprocess.Popen[Any], seconds: float = 900) -> None:
    ends = time.monotonic() + seconds
    while not is_so():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["fit-many", "edit-many"])
def test_two_workers_one_killed_and_the_driver_once(name: str, folder: Path) -> None:
    """The results are one process's, each there once."""
    pytest.importorskip("ray.data")
    rows, settings = (fits(24), FIT) if name == "fit-many" else (edits(24), EDIT)
    write_csv("m.csv", [*rows, {**rows[0], "image": "nowhere.png"}])
    first = subprocess.run(
        command(name, "m.csv", "--out", "whole", "--model", "model", *settings), capture_output=True, text=True
    )
    assert first.returncode == 1, first.stderr  # a row is set aside
    argv = command(name, "m.csv", "--out", "out", "--model", "model", *settings, "--workers", "2", "--json")

    driver = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(lambda: done_in("out") >= 3, driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = done_in("out")
    assert before < 24
    time.sleep(5)  # its workers notice

    driver = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(lambda: done_in("out") >= before + 4, driver)
    next(workers_of(driver)).send_signal(signal.SIGKILL)
    stdout, stderr = driver.communicate(timeout=900)
    assert driver.returncode == 1, stderr
    report = json.loads(stdout)
    assert (report["rows"], report["done"], report["set_aside"]) == (25, 24, 1)
    assert done_in("out") == 24 and [path.name for path in results("out")] == [path.name for path in results("whole")]
    if name == "fit-many":
        kept = [line for line in Path("out/results.jsonl").read_text().splitlines() if "done" in line]
        for out in ("out", "whole"):
            Path(out, "results.jsonl").write_text("\n".join(kept) + "\n")
        assert_same_fits("out", "whole")
    else:
        for one, other in zip(results("out")[:24], results("whole")[:24], strict=True):
            assert one.read_bytes() == other.read_bytes()
    assert_nothing_is_left("out")


def test_a_million_rows_of_which_fifty_are_open_begin_soon_in_little_memory(folder: Path) -> None:
    with open("m.csv", "w", encoding="utf-8") as file:
        file.write("image,source_prompt,prompt,edit_mask\n")
        words = "a photo of a sad lady with a beard,a photo of a smiling lady with a beard"
        file.writelines(f"{i % 24}.png,{words},{'' if i % 20_000 == 7 else i}\n" for i in range(1_000_000))
    argv = ["edit-many", "m.csv", "--out", "out", "--model", "model", *EDIT]
    # the open rows are alike but for their number of steps
    text = Path("m.csv").read_text().splitlines()
    text[0] += ",cross_replace_steps"
    for i in range(50):
        text[1 + 20_000 * i + 7] += f",{i / 50}"
    Path("m.csv").write_text("\n".join(text) + "\n")
    desk = Desk(make_parser(argv[:1]).parse_args(argv))
    desk.results.open("edit-many")
    for shard in range(16**3):
        os.makedirs(f"out/results/{shard:03x}")
    for row in desk.manifest:
        if "edit_mask" in row.cells:
            os.close(os.open(desk.results.path(desk.located(row)[2]), os.O_CREAT))

    started = time.perf_counter()
    process = subprocess.Popen(command(*argv, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seconds, largest = [0.0], [0]

    def watch() -> None:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                largest[0] = max(largest[0], watched.memory_info().rss)
            except psutil.Error:
                return
            if not seconds[0] and any(Path("out/begun").glob("*")):
                seconds[0] = time.perf_counter() - started
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    stdout, stderr = process.communicate(timeout=900)
    watcher.join()
    assert process.returncode == 0, stderr
    report = json.loads(stdout)
    assert (report["rows"], report["done_before"], report["done_now"]) == (1_000_000, 999_950, 50)
    print(f"\nthe first open row began after {seconds[0]:.1f} s; {largest[0] / 2**20:.0f} MiB at most; {report}")
    assert 0 < seconds[0] <= 60
    assert largest[0] <= 1e9
    assert Results(folder / "out").failed_file.exists() is False
