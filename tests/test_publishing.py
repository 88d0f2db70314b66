"""What ``s2edit publish`` assembles, and what it refuses; pushing is in test_hub.py."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from hatchling.builders.wheel import WheelBuilder
from huggingface_hub import ModelCard

import s2edit_pipeline
from s2edit_pipeline.avatars import MODEL_FOLDER
from s2edit_pipeline.cli import main
from s2edit_pipeline.publishing import assemble, publish

PACKAGE = Path(s2edit_pipeline.__file__).parent


def test_the_folder_holds_the_code_the_card_and_the_licence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["publish", "--out", str(tmp_path / "repository")]) == 0
    assert str(tmp_path / "repository") in capsys.readouterr().out
    files = {p.name: p.read_bytes() for p in (tmp_path / "repository").iterdir()}
    assert {"pipeline.py", "identity_adapter.py", "README.md", "LICENSE"} <= set(files)
    siblings = {name for name in files if name.endswith(".py")} - {"pipeline.py"}
    assert not {"__init__.py", "cli.py", "publishing.py", "demo.py"} & set(files)
    for name, data in files.items():
        if name.endswith(".py"):
            assert ast.dump(ast.parse(data)) == ast.dump(ast.parse((PACKAGE / name).read_bytes()))
            followed = get_relative_imports(tmp_path / "repository" / name)  # by diffusers' loader
            assert {f"{module}.py" for module in followed} == (siblings if name == "pipeline.py" else set())
    assert b"Apache License" in files["LICENSE"]
    assert ModelCard.load(tmp_path / "repository" / "README.md").data.library_name == "diffusers"


def test_the_avatars_come_with_our_class_in_their_index(tmp_path: Path) -> None:
    folder = assemble(tmp_path, avatars=True, repo_id="me/avatars")
    index = json.loads((folder / "model_index.json").read_text())
    wanted = json.loads((MODEL_FOLDER / "model_index.json").read_text())
    assert index.pop("_class_name") == ["pipeline", "S2EditPipeline"] and wanted.pop("_class_name")
    assert index == wanted
    for file in MODEL_FOLDER.rglob("*.safetensors"):
        assert (folder / file.relative_to(MODEL_FOLDER)).read_bytes() == file.read_bytes()
    card = ModelCard.load(folder / "README.md")
    assert 'custom_pipeline="me/avatars"' in card.text and "<this repository>" not in card.text
    assert card.data.base_model is None
    assert ModelCard.load(assemble(tmp_path / "bare") / "README.md").data.base_model


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--repo-id to push, or --out"),
        (["--repo-id", "me/a", "--out", "here"], "--repo-id to push, or --out"),
        (["--repo-id", "me/s2edit.v1"], "holds a dot.*'me/s2edit-v1'"),
        (["--repo-id", "me/a/b"], "s2edit publish: .*me/a/b"),
        (["--out", "."], "is there already"),
    ],
)
def test_what_cannot_be_published_is_said(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").write_text("else")
    assert main(["publish", *options]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == ["something"]


def test_a_name_with_a_dot_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(ValueError, match="diffusers can't load code from such a repository"):
        publish("me/s2edit.pipeline")


def test_an_installed_wheel_publishes_the_same_files(tmp_path: Path) -> None:
    """Built by the project's own backend, as pip would, and run from where it was unpacked."""
    (built,) = WheelBuilder(str(PACKAGE.parent)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as wheel:
        wheel.extractall(tmp_path / "site")
    script = """
import s2edit_pipeline, sys
from s2edit_pipeline.cli import main
print(s2edit_pipeline.__file__)
sys.exit(main(["publish", "--out", sys.argv[1]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "installed")],
        cwd=tmp_path / "site",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and str(tmp_path / "site") in done.stdout, done.stderr
    assemble(tmp_path / "here")
    here, installed = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("here", "installed"))
    assert here == installed
