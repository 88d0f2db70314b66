"""What a type checker tells users of the package."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib.resources import files
from typing import get_overloads

import pytest

from s2edit_pipeline import S2EditPipeline

SCRIPT = """\
from s2edit_pipeline import IdentityAdapter, S2EditPipeline, load_avatars

pipe = load_avatars()
identity = pipe.fit_identity("a.png", "a photo of a lady", "lady", seed=0)
inversion = pipe.invert(b"", "a photo of a lady", "direct", 4, seed=None)
out = pipe("a photo of a [I] lady", image="a.png", source_prompt="a photo of a lady", identity=identity)
out.images[0].save("b.png")
out.save("b.png")
mask: bool = out.edit_masks is not None
pair = pipe("a lady", return_dict=False)
first, *rest = pair
whatever = pipe("a lady", seed=[1, 2], return_dict=bool(rest))
reveal_type(pipe)
reveal_type(identity)
reveal_type(inversion)
reveal_type(out)
reveal_type(pair)
reveal_type(whatever)
reveal_type(pipe.load_identity(identity))
reveal_type(pipe.describe("a.png").subject)
"""
WRONG = """\
from s2edit_pipeline import load_avatars

pipe = load_avatars()
pipe("a lady", nunber_of_steps=3).images
pipe("a lady", guidance_scale="high")
pipe.invert("a.png")
pipe.fit_identity("a.png", seed="zero")
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What mypy says of both scripts; other packages are left unread."""
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("types")
    (folder / "right.py").write_text(SCRIPT)
    (folder / "wrong.py").write_text(WRONG)
    (folder / "mypy.ini").write_text(
        "[mypy]\nfollow_imports = skip\n[mypy-s2edit_pipeline.*]\nfollow_imports = silent\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "right.py", "wrong.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.splitlines()


def test_the_package_says_that_it_is_typed() -> None:
    assert files("s2edit_pipeline").joinpath("py.typed").is_file()


def test_calls_have_the_types_that_they_return(said: list[str]) -> None:
    right = [line for line in said if line.startswith("right.py:")]
    assert not [line for line in right if " error: " in line]
    shown = [line.split('"')[1].replace("s2edit_pipeline.", "") for line in right if "Revealed type" in line]
    assert shown == [
        "pipeline.S2EditPipeline", "identity_adapter.IdentityAdapter", "inversion_record.Inversion",
        "edit_output.S2EditPipelineOutput", "tuple[Any, ...]", "edit_output.S2EditPipelineOutput | tuple[Any, ...]",
        "str", "str",
    ]  # fmt: skip


def test_wrong_arguments_are_found_before_anything_runs(said: list[str]) -> None:
    lines = {int(line.split(":")[1]) for line in said if line.startswith("wrong.py:") and " error: " in line}
    assert lines >= {5, 6, 7}


def test_the_call_is_typed_with_all_its_parameters() -> None:
    first, *others = get_overloads(S2EditPipeline.__call__)
    typed, made = (inspect.signature(call).parameters for call in (first, S2EditPipeline.__call__))
    assert [(one.name, one.kind) for one in typed.values()] == [(one.name, one.kind) for one in made.values()]
    changed = {name for name in made if made[name].annotation != typed[name].annotation}
    assert changed == {"return_dict"} and len(others) == 2
