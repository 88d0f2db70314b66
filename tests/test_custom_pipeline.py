"""The bare folder is a diffusers ``custom_pipeline``: loaded in a fresh process, with the package not installed."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers.utils import dynamic_modules_utils
from PIL import Image

import s2edit_pipeline
from s2edit_pipeline.pipeline import S2EditPipeline

PACKAGE = Path(s2edit_pipeline.__file__).parent
CORE = {"torch", "diffusers", "transformers", "huggingface_hub", "safetensors", "peft", "numpy", "PIL"}

SCRIPT = """
import sys, torch
sys.meta_path.insert(0, type("Absent", (), {"find_spec": staticmethod(  # as if it had never been installed
    lambda name, path=None, target=None: (_ for _ in ()).throw(ModuleNotFoundError(name))
    if name.split(".")[0] == "s2edit_pipeline" else None)})())
from diffusers import DiffusionPipeline
from PIL import Image
model, folder, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(model, custom_pipeline=folder, trust_remote_code=True)
assert type(pipe).__name__ == "S2EditPipeline" and type(pipe).__module__.startswith("diffusers_modules"), type(pipe)
picture = Image.new("RGB", (32, 32), "teal")
prompt = "a photo of a sad lady"
identity = pipe.fit_identity(picture, prompt, "lady", num_steps=1, mask=Image.new("L", (32, 32), 255))
identity.save_pretrained(out)
token = pipe.load_identity(out)
result = pipe("a photo of a smiling [I] lady", image=picture, source_prompt=prompt, num_inference_steps=2)
print(token, result.images[0].size, *sorted(m for m in sys.modules if m.startswith("s2edit_pipeline")))
"""


def test_a_fresh_process_loads_fits_and_edits(pipe: S2EditPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    arguments = [str(tmp_path / "model"), str(PACKAGE), str(tmp_path / "ada")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-2] == "[I] (32, 32)"  # and no module of the installed package


class Elsewhere:
    """What an object of the other copy's class looks like from here."""

    def __init__(self, held: object) -> None:
        self._held = held

    def __getattr__(self, name: str) -> object:
        return getattr(self._held, name)


def test_identities_cross_between_the_two_copies_of_the_classes(pipe: S2EditPipeline, tmp_path: Path) -> None:
    """A process may hold ``s2edit_pipeline.X`` and ``diffusers_modules…X``: no isinstance between them."""
    picture = Image.new("RGB", (32, 32), "teal")
    identity = pipe.fit_identity(picture, "a sad lady", "lady", num_steps=1, mask=Image.new("L", (32, 32), 255))
    assert pipe.load_identity(Elsewhere(identity)) == "[I]"
    inversion = pipe.invert(picture, "a sad lady", num_inference_steps=2)
    assert pipe("a happy [I] lady", picture, inversion=Elsewhere(inversion)).images


def flat_modules() -> dict[str, ast.Module]:
    skipped = {"__init__", "cli", "demo", "publishing", "app"}
    return {p.stem: ast.parse(p.read_text("utf-8")) for p in PACKAGE.glob("*.py") if p.stem not in skipped}


def test_pipeline_names_every_module_that_its_modules_need() -> None:
    """diffusers copies only what pipeline.py itself names."""
    imports = {
        name: {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module}
        for name, tree in flat_modules().items()
    }
    needed, seen = ["pipeline"], {"pipeline"}
    while needed:
        for module in imports[needed.pop()] - seen:
            seen.add(module)
            needed.append(module)
    assert seen - {"pipeline"} == imports["pipeline"]
    # and they import one way: no module is, through others, its own import
    for name in imports:
        below, todo = set(), list(imports[name])
        while todo:
            module = todo.pop()
            if module not in below:
                below.add(module)
                todo += imports[module]
        assert name not in below


def test_flat_modules_use_the_core_packages_alone() -> None:
    for name, tree in flat_modules().items():
        for node in ast.walk(tree):
            found = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found = [node.module]
            for module in found:
                top = module.split(".")[0]
                assert top in CORE or top in sys.stdlib_module_names, f"{name} imports {module}"


@pytest.mark.parametrize("name", sorted(flat_modules()))
def test_the_loader_looks_for_no_package_that_nobody_imports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes each line that looks like an import for one, and says that what it can't import is missing."""
    asked: list[str] = []
    monkeypatch.setattr(dynamic_modules_utils.importlib, "import_module", asked.append)
    dynamic_modules_utils.check_imports(PACKAGE / f"{name}.py")
    assert set(asked) <= CORE | sys.stdlib_module_names


@pytest.mark.parametrize("name", sorted(flat_modules()))
def test_no_docstring_line_looks_like_an_import(name: str) -> None:
    """diffusers' loader reads pipeline.py by regular expression."""
    lines = (PACKAGE / f"{name}.py").read_text("utf-8")
    seen = re.findall(r"^\s*from\s+\.(\S+)\s+import", lines, flags=re.MULTILINE)
    real = [n.module for n in ast.walk(ast.parse(lines)) if isinstance(n, ast.ImportFrom) and n.level == 1]
    assert sorted(seen) == sorted(m for m in real if m)
