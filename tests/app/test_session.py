"""A visitor's work with the page, without the page."""

from __future__ import annotations

import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.app.session import MOST_PROMPTS, Knobs, Missing, Session
from s2edit_pipeline.picture_files import read_picture
from s2edit_pipeline.picture_marks import EDITED, origin_of

PROMPT, TARGET = "a photo of a sad lady with a beard", "a photo of a smiling lady with a beard"
QUICK = Knobs(steps=2)


def visit(pipe: S2EditPipeline, picture: Image.Image, folder: Path) -> Session:
    file = folder / "ada.png"
    picture.save(file)
    session = Session(pipe)
    session.open(str(file))
    session.say(PROMPT, "lady")
    return session


def learn(session: Session, seed: int = 0) -> list[tuple[int, int]]:
    steps: list[tuple[int, int]] = []
    session.fit(2, lambda step, total, measures: steps.append((step, total)), seed)
    return steps


def edit(session: Session, *targets: str) -> list[np.ndarray]:
    return [np.asarray(one.picture) for one in session.edit(list(targets), QUICK, lambda step: None)]


def test_from_a_picture_to_edits(pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path) -> None:
    session = visit(pipe, picture, tmp_path)
    mask = session.find_mask()
    assert mask.mode == "L" and mask.size == picture.size
    session.paint_mask(Image.new("L", (8, 8), "white"))
    assert learn(session) == [(0, 2), (1, 2)]
    assert session.identity is not None and float(session.identity.mask.min()) == 1  # the painted one was used
    steps: list[int] = []
    targets = session.targets(TARGET + "\n\n", ["glasses"], ["beard"])
    assert targets == [TARGET, "a photo of a sad lady with a beard and glasses", "a photo of a sad lady"]
    made = session.edit(targets, QUICK, steps.append)
    assert steps == [0, 1] and [one.prompt for one in made] == targets
    for one in made:
        saved = read_picture(one.file)
        assert saved.size == picture.size and origin_of(saved.xmp).source_type == EDITED
    assert pipe.identities == ()


def test_a_short_target_is_completed_while_the_words_found_stand(
    pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path
) -> None:
    worded = S2EditPipeline(
        **pipe.components, vocabulary="a photo of [sad|smiling] {man|lady} [with a beard|with a hat]"
    )
    worded.set_progress_bar_config(disable=True)
    session = visit(worded, picture, tmp_path)
    session.describe()
    found = session.prompt.split(" with ")[1]
    assert session.targets("a photo of a smiling lady", [], []) == [f"a photo of a smiling lady with {found}"]
    session.say("a photo of a lady with a dog", "lady")  # the visitor's own words are taken as they are
    assert session.targets("a photo of a smiling lady", [], []) == ["a photo of a smiling lady"]


def test_a_further_edit_inverts_no_more(
    pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = visit(pipe, picture, tmp_path)
    calls, invert = [], pipe.invert
    monkeypatch.setattr(pipe, "invert", lambda *a, **k: calls.append(1) or invert(*a, **k))
    first = edit(session, TARGET)[0]
    again = edit(session, TARGET)[0]
    assert len(calls) == 1 and np.array_equal(first, again)
    learn(session)
    assert not np.array_equal(edit(session, TARGET)[0], first) and len(calls) == 2


def test_two_visitors_at_once_do_not_mix(pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path) -> None:
    sessions = []
    for i, shown in enumerate((picture, picture.rotate(180))):
        (tmp_path / f"{i}").mkdir()
        sessions.append(visit(pipe, shown, tmp_path / f"{i}"))
        learn(sessions[-1], seed=i)
    alone = [edit(session, TARGET)[0] for session in sessions]
    assert not np.array_equal(*alone)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: edit(sessions[i % 2], TARGET)[0], range(8)))
    for i, result in enumerate(results):
        np.testing.assert_array_equal(result, alone[i % 2])


def test_a_visitor_stops_a_fit_and_an_edit(pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path) -> None:
    session = visit(pipe, picture, tmp_path)
    identity = session.fit(50, lambda step, total, measures: session.stop() if step == 1 else None)
    assert identity.interrupted and identity.settings["num_steps"] == 2
    stopper = threading.Timer(0.05, session.stop)
    stopper.start()
    assert session.edit([TARGET], Knobs(steps=900), lambda step: None) == []
    stopper.join()
    assert len(edit(session, TARGET)) == 1  # and goes on


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda s: s.find_mask(), "Choose a picture|Say what"),
        (lambda s: s.open(None), "Choose a picture first"),
        (lambda s: s.say("a lady", " "), "Say what the picture shows"),
        (lambda s: s.save_identity(), "Learn who"),
        (lambda s: s.rename_identity("[ada]"), "Learn who"),
        (lambda s: s.push_identity("me/ada", True, None), "Learn who"),
        (lambda s: s.load_identity("", None), "Choose an identity"),
    ],
)
def test_what_has_to_be_done_first_is_said(work: Any, said: str, pipe: S2EditPipeline) -> None:
    with pytest.raises(Missing, match=said):
        work(Session(pipe))


def test_wrong_words_and_too_much_are_refused(pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path) -> None:
    session = visit(pipe, picture, tmp_path)
    with pytest.raises(Missing, match="what to change"):
        session.targets(" \n", [], [])
    with pytest.raises(ValueError, match=f"at most {MOST_PROMPTS}"):
        session.targets("\n".join(f"a lady {i}" for i in range(9)), [], [])
    with pytest.raises(ValueError, match="is empty"):
        session.paint_mask(Image.new("L", (8, 8)))
    session.say(PROMPT, "horse")
    with pytest.raises(ValueError, match="horse"):
        session.find_mask()
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"no\.png"):
        session.open(str(tmp_path / "no.png"))


def test_an_identity_goes_and_comes(pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path) -> None:
    session = visit(pipe, picture, tmp_path)
    learn(session)
    session.rename_identity("[ada]")
    wanted = edit(session, TARGET)[0]
    archive = session.save_identity()
    (tmp_path / "other").mkdir()
    stranger = visit(pipe, picture, tmp_path / "other")
    assert stranger.load_identity(None, str(archive)).token == "[ada]"
    np.testing.assert_array_equal(edit(stranger, TARGET)[0], wanted)
    with pytest.raises(Missing, match="has agreed"):
        session.push_identity("me/ada", False, None)


def test_a_zip_that_is_no_identity(pipe: S2EditPipeline, tmp_path: Path) -> None:
    session = Session(pipe)
    (tmp_path / "no.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="no zip file"):
        session.load_identity(None, str(tmp_path / "no.zip"))
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as file:
        for i in range(30):
            file.writestr(f"{i}", "x")
    with pytest.raises(ValueError, match="too large"):
        session.load_identity(None, str(tmp_path / "many.zip"))
    outside = tmp_path / "outside.zip"
    with zipfile.ZipFile(outside, "w") as file:
        file.writestr("../../escaped.txt", "x")
    with pytest.raises(ValueError, match=r"identity\.json"):
        session.load_identity(None, str(outside))
    assert not list(tmp_path.rglob("escaped.txt")) and not (session.folder.parent / "escaped.txt").exists()


def test_a_visitors_files_go_with_the_visit(pipe: S2EditPipeline) -> None:
    session = Session(pipe)
    folder = session.folder
    assert folder.is_dir()
    del session
    assert not folder.exists()
