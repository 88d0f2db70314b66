"""The examples that people copy run as they are written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from s2edit_pipeline import S2EditPipeline, describe_judge, fit_settings
from s2edit_pipeline.cli import make_parser
from s2edit_pipeline.family_base import registered_families
from s2edit_pipeline.fit_settings import Recipe

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("document", "written"),
    [
        ("README.md", ["ada/identity.json", "ada-smiles.png", "what-changed.png"]),
        ("docs/identities.md", ["ada/identity.json", "ada/preview_1.png", "ada-and-bob.png"]),
        ("docs/avatars.md", ["the-truth.png"]),
        ("docs/describing.md", ["smiling-dog.png"]),
        ("docs/composition.md", ["ada-and-bobs-turban/identity.json", "ada-with-bobs-turban.png"]),
        ("docs/benchmark-rivals.md", ["faces/bob.txt"]),
        ("docs/threads.md", []),
    ],
)
def test_python_examples_run(
    document: str,
    written: list[str],
    pipe: S2EditPipeline,
    picture: Image.Image,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where they name a model of the Hub, a tiny one of its kind stands for it, on the CPU."""
    from_pretrained = S2EditPipeline.from_pretrained.__func__  # type: ignore[attr-defined]

    def stand_in(cls: type[S2EditPipeline], name: str, **options: Any) -> S2EditPipeline:
        return pipe if name.count("/") == 1 and not Path(name).exists() else from_pretrained(cls, name, **options)

    monkeypatch.setattr(S2EditPipeline, "from_pretrained", classmethod(stand_in))
    monkeypatch.setattr(pipe, "to", lambda *_: pipe)
    picture.save(tmp_path / "ada.jpg")
    short = Recipe(3, 1e-3, 5e-3, 4, "uniform", "constant")  # as written, but shorter
    monkeypatch.setattr(fit_settings, "RECIPES", {"lora": short})
    for name, value in {"NOUN_LEVELS": (0.8,), "NOISES": 1, "ROUNDS": 1}.items():
        monkeypatch.setattr(describe_judge, name, value)
    monkeypatch.setattr(describe_judge.DenoisingJudge.best, "__defaults__", ((0.5,),))
    examples = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text("utf-8"), flags=re.DOTALL)
    assert examples
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, document, "exec"), names)
    assert all((tmp_path / name).exists() for name in written)


def shell_commands(document: Path) -> list[list[str]]:
    """The words of each ``s2edit`` command that a document shows, comments and line breaks taken out."""
    examples = re.findall(r"```bash\n(.*?)```", document.read_text("utf-8"), flags=re.DOTALL)
    lines = "\n".join(examples).replace("\\\n", " ").split("\n")
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part, comments=True) for part in parts if part.startswith("s2edit ")]


DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize(
    ("document", "words"), [(path.name, words) for path in DOCUMENTS for words in shell_commands(path)]
)
def test_shell_examples_are_commands_that_there_are(document: str, words: list[str]) -> None:
    make_parser(words[1]).parse_args(words[1:])  # leaves with an error otherwise


def test_the_examples_without_installing_run(
    pipe: S2EditPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package's own folder stands for the path and for the Hub's repository, a tiny model for the base."""
    (text,) = [
        block
        for block in re.findall(r"```text\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), flags=re.DOTALL)
        if "custom_pipeline" in block
    ]
    pipe.save_pretrained(tmp_path / "base")
    code = str(ROOT / "s2edit_pipeline")
    for line in text.strip().splitlines():
        runnable = re.sub(r'custom_pipeline="[^"]+"', "custom_pipeline=code", line)
        assert runnable != line
        names: dict[str, Any] = {"DiffusionPipeline": DiffusionPipeline, "base": tmp_path / "base", "code": code}
        exec(compile(runnable, "README.md", "exec"), names)
        assert type(names["pipe"]).__name__ == "S2EditPipeline" and names["pipe"].unet is not None


def test_the_readme_names_every_kind_of_model_that_is_served() -> None:
    (answer,) = re.findall(r"\*\*Which models\?\*\*(.*?)\n\n", (ROOT / "README.md").read_text("utf-8"), flags=re.DOTALL)
    names = " ".join(answer.split())
    families = [one.name for one in registered_families() if one.__module__.startswith("s2edit_pipeline.")]
    assert len(families) >= 6
    assert not [name for name in families if name not in names]


def test_links_and_pictures_exist() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text("utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} points at {target}"
