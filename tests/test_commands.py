"""The command line on a tiny model: what is asked for is done, what goes wrong is one line and a status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from s2edit_pipeline import IdentityAdapter, S2EditPipeline
from s2edit_pipeline.cli import COMMANDS, main
from s2edit_pipeline.commands import shared
from s2edit_pipeline.picture_files import read_picture
from s2edit_pipeline.picture_marks import EDITED, origin_of

PROMPT = "a photo of a sad lady with a beard"


@pytest.fixture
def folder(pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ``ada.png``; the embedded model is the tiny one, the cache is here."""
    monkeypatch.setattr("s2edit_pipeline.avatars.load_avatars", lambda **_: pipe)
    monkeypatch.setenv("S2EDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    picture.save("ada.png")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of ``s2edit``."""
    status = main(argv)
    shown = capsys.readouterr()
    return status, shown.out, shown.err


FIT = ("--prompt", PROMPT, "--steps", "2")
EDIT = ("edit", "ada.png", *FIT, "--inference-steps", "2")


def test_a_mask(folder: Path, capsys: pytest.CaptureFixture[str], picture: Image.Image) -> None:
    status, out, _ = run(capsys, "mask", "ada.png", "--prompt", PROMPT, "--out", "mask.png", "--json")
    facts = json.loads(out)
    assert status == 0 and facts["subject"] == "lady" and 0 <= facts["share"] <= 1
    assert Image.open("mask.png").size == picture.size and Image.open("mask.png").mode == "L"


def test_fit_show_and_edit_with_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "fit", "ada.png", "--out", "ada", "--token", "[ada]", *FIT, "--json")
    facts = json.loads(out)
    assert status == 0 and facts["steps"] == 2 and facts["token"] == "[ada]"
    assert facts["bytes"] == sum(file.stat().st_size for file in Path("ada").iterdir())
    status, out, _ = run(capsys, "identity", "show", "ada", "--json")
    assert status == 0 and (json.loads(out)["source_prompt"], json.loads(out)["method"]) == (PROMPT, "lora")
    arguments = ["edit", "ada.png", "--identity", "ada", "--inference-steps", "2", "--out", "smiles.png"]
    status, out, _ = run(capsys, *arguments, "--replace", "sad=smiling", "--json")
    assert status == 0
    assert json.loads(out)["results"] == [
        {"out": "smiles.png", "prompt": "a photo of a smiling [ada] lady with a beard"}
    ]
    assert not (folder / "cache").exists()


def test_an_edit_alone_fits_once_and_keeps_who_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one.png", "two.png"):
        assert run(capsys, *EDIT, "--add", "glasses", "--out", name)[0] == 0
    kept = list((folder / "cache" / "identities").iterdir())
    assert len(kept) == 1 and IdentityAdapter.from_pretrained(kept[0]).source_prompt == PROMPT
    np.testing.assert_array_equal(np.asarray(Image.open("one.png")), np.asarray(Image.open("two.png")))
    assert run(capsys, *EDIT, "--add", "glasses", "--out", "three.png", "--seed", "1")[0] == 0
    assert len(list((folder / "cache" / "identities").iterdir())) == 2
    assert run(capsys, *EDIT, "--add", "glasses", "--out", "four.png", "--seed", "2", "--no-cache")[0] == 0
    assert len(list((folder / "cache" / "identities").iterdir())) == 2


def test_several_edits_a_sheet_and_what_the_files_say(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = ("--to", "a photo of a smiling lady with a beard", "--to", "a photo of a sad lady with glasses")
    status, out, _ = run(capsys, *EDIT, *to, "--out", "edits", "--sheet", "sheet.png", "--json")
    results = json.loads(out)["results"]
    assert status == 0 and len(results) == 2 and Image.open("sheet.png").width > 100
    for result in results:
        origin = origin_of(read_picture(result["out"]).xmp)
        assert origin.source_type == EDITED and origin.prompt == result["prompt"] and "[I] lady" in result["prompt"]
    status, out, _ = run(capsys, "identity", "show", results[0]["out"])
    assert status == 0 and "compositeWithTrainedAlgorithmicMedia" in out
    assert run(capsys, *EDIT, "--add", "glasses", "--out", "new/quiet.png", "--no-prompt-in-metadata")[0] == 0
    assert origin_of(read_picture("new/quiet.png").xmp).prompt is None


def test_short_targets_are_completed_by_the_words_that_were_found(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, describe = [], S2EditPipeline.describe

    def look(pipe: S2EditPipeline, image: Any) -> Any:
        seen.append(image)
        return describe(pipe, image, vocabulary="a photo of a [sad|smiling] {lady} [with a beard]")

    monkeypatch.setattr(S2EditPipeline, "describe", look)
    arguments = ("--steps", "2", "--inference-steps", "2", "--out", "a.png", "--json")
    status, out, _ = run(capsys, "edit", "ada.png", "--to", "a photo of a smiling lady", *arguments)
    assert status == 0 and len(seen) == 1  # the picture is described once
    assert json.loads(out)["results"][0]["prompt"] == "a photo of a smiling [I] lady with a beard"


def test_an_edit_is_signed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("c2pa")
    status, _, err = run(capsys, *EDIT, "--add", "glasses", "--out", "signed.jpg", "--sign-for-tests")
    assert status == 0, err
    status, out, _ = run(capsys, "identity", "show", "signed.jpg", "--json")
    credentials = json.loads(out)["content_credentials"]
    assert status == 0 and credentials["state"] == "Valid" and credentials["actions"][-1] == "c2pa.edited"
    status, _, err = run(capsys, *EDIT, "--add", "glasses", "--out", "b.jpg", "--sign", "no.pem", "no.key")
    assert status == 2 and "no.pem" in err and not Path("b.jpg").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("mask", "none.png", "--prompt", PROMPT, "--out", "m.png"), "none.png"),
        (("mask", "ada.png", "--prompt", PROMPT, "--subject", "horse", "--out", "m.png"), "horse"),
        (("mask", "ada.png", "--subject", "lady", "--out", "m.png"), "give --prompt too"),
        ((*EDIT, "--out", "a.png"), "say what to change"),
        ((*EDIT, "--out", "a.png", "--replace", "sad"), "must be A=B"),
        ((*EDIT, "--out", "a.png", "--replace", "happy=sad"), "happy"),
        ((*EDIT, "--out", "a.xyz", "--add", "glasses"), "pictures are written as"),
        ((*EDIT, "--out", "a.png", "--add", "glasses", "--inference-steps", "0"), "at least 1"),
        ((*EDIT, "--out", "a.png", "--add", "glasses", "--device", "cuda"), "no CUDA device"),
        ((*EDIT, "--out", "a.png", "--to", "a", "--to", "b"), "give a folder"),
        ((*EDIT, "--out", "a.png", "--to", "a", "--add", "b"), "leave --replace, --add and --remove out"),
        (("identity", "push", "ada.png", "me/ada"), "ada.png"),
        (("identity", "show", "./nobody"), "nobody"),
        (("identity", "show", "nobody"), "'nobody' is no folder here"),
        (("identity", "show", "ada/identity.json"), "is a file; give the identity's folder, ada."),
        (("describe", "ada.png", "--device", "foo"), "'foo' is none that PyTorch knows"),
        (("describe", "ada.png", "--model", "nobody/nothing"), "no folder of that name here, and the Hub"),
        (("describe", "ada.png", "--model", "./nothing"), "there is no such folder"),
        (("describe", "ada.png", "--model", "ada"), "is an identity"),
        (("describe", "ada.png", "--model", "damaged"), "its model_index.json is damaged"),
        (("describe", "ada.png", "--model", "captioner"), "names no unet and no transformer"),
        (("describe", "ada.png", "--model", "plain"), "it holds no model_index.json"),
        (("describe", "ada.png", "--model", "ada.png"), "is a file; give a diffusers folder"),
        (("mask", "ada.png", "--prompt", PROMPT, "--out", "m.xyz"), "pictures are written as"),
        (("mask", "ada.png", "--prompt", PROMPT, "--out", "plain"), "is a folder; give a file in it"),
        (("mask", "ada.png", "--prompt", PROMPT, "--out", "ada.png/m.png"), "ada.png is a file; give a folder"),
        (("fit", "ada.png", *FIT, "--out", "ada.png"), "ada.png is a file; give a folder"),
        (("fit", "ada.png", *FIT, "--out", "new", "--mask", "none.png"), "--mask='none.png' is not a file"),
        (("fit", "ada.png", *FIT, "--out", "new", "--seed", "-1"), "seed must be from 0"),
        ((*EDIT, "--out", "a.png", "--add", "glasses", "--strength", "7"), "--strength must be above 0"),
        ((*EDIT, "--out", "a.png", "--add", "glasses", "--sheet", "a"), "--sheet a: pictures are written as"),
        ((*EDIT, "--out", "a.png", "--add", "glasses", "--edit-mask", "b"), "--edit-mask='b' is not a file"),
    ],
)
def test_bad_arguments_are_one_line(
    argv: tuple[str, ...], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, index in {"damaged": "{", "captioner": '{"vae": []}', "plain": None, "ada": None}.items():
        (folder / name).mkdir()
        if index is not None:
            (folder / name / "model_index.json").write_text(index)
    (folder / "ada" / "identity.json").write_text("{}")
    status, out, err = run(capsys, *argv)
    assert status == 2 and not out
    assert err.count("\n") == 1 and said in err and err.startswith(f"s2edit {argv[0]}")
    status, out, err = run(capsys, *argv, "--json")
    assert status == 2 and said in json.loads(out)["error"]
    assert not (folder / "a.png").exists() and not (folder / "m.png").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("demo", "--out", "ada.png"), "ada.png is a file; give a folder"),
        (("demo", "--steps", "0"), "--steps must be at least 1"),
        (("demo", "--model", "./nothing"), "there is no such folder"),
        (("demo", "--device", "foo"), "none that PyTorch knows"),
        (("bench", "--steps", "0"), "--steps must be at least 1"),
        (("bench", "--quick", "--out", "ada.png"), "ada.png is a file; give a folder"),
        (("bench", "--dataset", "nowhere"), "nowhere"),
        (("measure", "steps", "--people", "0"), "--people must be at least 1"),
        (("measure", "scaling", "--plot", "a.xyz"), "pictures are written as"),
        (("measure", "costs", "--model", "./nothing"), "there is no such folder"),
        (("publish",), "give --repo-id to push"),
        (("publish", "--repo-id", "a b"), "Repo id must use"),
        (("train-avatars", "--out", "ada.png"), "ada.png is a file; give a folder"),
        (("train-avatars", "--out", "nothing", "--curves", "c.png"), "No such file"),
        (("train-instruct", "--out", "ada.png"), "ada.png is a file; give a folder"),
    ],
)
def test_so_are_those_of_the_other_commands(
    argv: tuple[str, ...], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "") and said in err
    assert err.count("\n") == 1 and err.startswith(f"s2edit {argv[0]}")


def test_a_bench_of_which_nothing_could_be_made_has_failed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no drawing here")

    monkeypatch.setattr("s2edit_pipeline.evaluation.benchmark.drawn_edits.render_array", fail)
    few = ("--people", "1", "--creatures", "0", "--edits", "1", "--methods", "unedited")
    status, _, err = run(capsys, "bench", "--out", "bench", *few)
    assert status == 1 and "nothing could be made; the first error: RuntimeError: no drawing here" in err


def test_the_module_is_the_command() -> None:
    shown = subprocess.run([sys.executable, "-m", "s2edit_pipeline", "--version"], capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.startswith("s2edit ")


def test_what_fails_at_work_is_told_apart(
    folder: Path, pipe: S2EditPipeline, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a kernel\n is missing")

    monkeypatch.setattr(type(pipe), "preview_mask", fail)
    arguments = ("mask", "ada.png", "--prompt", PROMPT, "--out", "m.png")
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "") and "RuntimeError: a kernel is missing" in err and err.count("\n") == 1
    monkeypatch.setenv(shared.SHOW_TRACEBACK, "1")
    assert "Traceback" in run(capsys, *arguments)[2]

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.delenv(shared.SHOW_TRACEBACK)
    monkeypatch.setattr(type(pipe), "preview_mask", interrupt)
    assert run(capsys, *arguments)[::2] == (1, "s2edit mask: stopped\n")


def test_sharing_a_person_wants_consent(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[str] = []
    monkeypatch.setattr(IdentityAdapter, "push_to_hub", lambda self, repo_id, **_: pushed.append(repo_id) or "there")
    assert run(capsys, "fit", "ada.png", "--out", "ada", *FIT)[0] == 0
    status, _, err = run(capsys, "identity", "push", "ada", "me/ada")
    assert status == 2 and "--yes-i-have-consent" in err and not pushed
    status, out, _ = run(capsys, "identity", "push", "ada", "me/ada", "--yes-i-have-consent")
    assert (status, out, pushed) == (0, "there\n", ["me/ada"])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_in_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0 and f"example: s2edit {name}" in shown


def test_the_shell_completes_it(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "--edit-mask" in script and "describe" in script
