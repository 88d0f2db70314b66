"""The bare folder is a diffusers ``custom_pipeline``: loaded in a fresh process, with the package not installed."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.utils import dynamic_modules_utils
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

import s2edit_pipeline
from s2edit_pipeline.pipeline import S2EditPipeline

PACKAGE = Path(s2edit_pipeline.__file__).parent
CORE = {"torch", "diffusers", "transformers", "huggingface_hub", "safetensors", "peft", "accelerate", "numpy", "PIL"}

NOT_INSTALLED = """
import sys
sys.meta_path.insert(0, type("Absent", (), {"find_spec": staticmethod(  # as if it had never been installed
    lambda name, path=None, target=None: (_ for _ in ()).throw(ModuleNotFoundError(name))
    if name.split(".")[0] == "s2edit_pipeline" else None)})())
"""
FITS_AND_EDITS = """
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


TAKES_COMPONENTS = """
from diffusers import DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel
model, folder = sys.argv[1:]
def load(**passed):
    return DiffusionPipeline.from_pretrained(model, custom_pipeline=folder, trust_remote_code=True, **passed)
whole = load()
assert type(whole.safety_checker).__name__ == "StableDiffusionSafetyChecker", whole.safety_checker
assert whole.feature_extractor is not None
unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
pipe = load(safety_checker=None, unet=unet, text_encoder=text_encoder)
assert pipe.unet is unet and pipe.text_encoder is text_encoder and pipe.safety_checker is None
assert pipe.vae is not None and pipe.vae is not whole.vae and pipe.feature_extractor is not None
assert pipe("a lady", num_inference_steps=1).images
for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
    part = load(**{name: None, "safety_checker": None})
    assert getattr(part, name) is None, name
    try:
        part("a lady", num_inference_steps=1)
    except ValueError as error:
        assert f"The pipeline has no {name}; load it whole, or pass {name}= to from_pretrained" in str(error), error
    else:
        raise AssertionError(name)
print("taken")
"""


def last_line(script: str, folder: Path, *arguments: str) -> str:
    """What ``script``, run in a fresh process in which the package isn't installed, prints last."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", NOT_INSTALLED + script, *arguments]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout.split("\n")[-2]


def test_a_fresh_process_loads_fits_and_edits(pipe: S2EditPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    line = last_line(FITS_AND_EDITS, tmp_path, str(tmp_path / "model"), str(PACKAGE), str(tmp_path / "ada"))
    assert line == "[I] (32, 32)"  # and no module of the installed package


def test_a_fresh_process_takes_the_components_that_are_passed(pipe: S2EditPipeline, tmp_path: Path) -> None:
    """None too; diffusers' loader prefers the folder's for a component that has a default."""
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(
            text_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
            vision_config={
                "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 8, "patch_size": 4,
            },
            projection_dim=8,
        )
    )  # fmt: skip
    extractor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    parts = {**pipe.components, "safety_checker": checker, "feature_extractor": extractor}
    StableDiffusionPipeline(**parts).save_pretrained(tmp_path / "model")
    assert last_line(TAKES_COMPONENTS, tmp_path, str(tmp_path / "model"), str(PACKAGE)) == "taken"


class Elsewhere:
    """What an object of the other copy's class looks like from here."""

    def __init__(self, original: object) -> None:
        self._original = original

    def __getattr__(self, name: str) -> object:
        return getattr(self._original, name)


def test_identities_cross_between_the_two_copies_of_the_classes(pipe: S2EditPipeline, tmp_path: Path) -> None:
    """A process may hold ``s2edit_pipeline.X`` and ``diffusers_modules…X``: no isinstance between them."""
    picture = Image.new("RGB", (32, 32), "teal")
    identity = pipe.fit_identity(picture, "a sad lady", "lady", num_steps=1, mask=Image.new("L", (32, 32), 255))
    assert pipe.load_identity(Elsewhere(identity)) == "[I]"
    inversion = pipe.invert(picture, "a sad lady", num_inference_steps=2)
    assert pipe("a happy [I] lady", picture, inversion=Elsewhere(inversion)).images


def flat_modules() -> dict[str, ast.Module]:
    skipped = {"__init__", "__main__", "cli", "demo", "publishing", "app"}
    return {p.stem: ast.parse(p.read_text("utf-8")) for p in PACKAGE.glob("*.py") if p.stem not in skipped}


def test_pipeline_names_every_module_that_its_modules_need() -> None:
    """diffusers copies only what pipeline.py itself names."""
    imports = {
        name: {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module}
        for name, tree in flat_modules().items()
    }
    ahead, needed = ["pipeline"], {"pipeline"}
    while ahead:
        for module in imports[ahead.pop()] - needed:
            needed.add(module)
            ahead.append(module)
    assert needed - {"pipeline"} == imports["pipeline"]
    # and there is no flat module that nobody needs
    assert needed == imports.keys()


def test_flat_modules_use_the_core_packages_alone() -> None:
    for name, tree in flat_modules().items():
        for node in ast.walk(tree):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            for module in modules:
                top = module.split(".")[0]
                assert top in CORE or top in sys.stdlib_module_names, f"{name} imports {module}"


@pytest.mark.parametrize("name", sorted(flat_modules()))
def test_the_loader_looks_for_no_package_that_nobody_imports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes each line that looks like an import for one, and says that what it can't import is missing."""
    modules: list[str] = []
    monkeypatch.setattr(dynamic_modules_utils.importlib, "import_module", modules.append)
    dynamic_modules_utils.check_imports(PACKAGE / f"{name}.py")
    assert set(modules) <= CORE | sys.stdlib_module_names


@pytest.mark.parametrize("name", sorted(flat_modules()))
def test_no_docstring_line_looks_like_an_import(name: str) -> None:
    """diffusers' loader reads pipeline.py by regular expression."""
    text = (PACKAGE / f"{name}.py").read_text("utf-8")
    matches = re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE)
    imports = [n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and n.level == 1]
    assert sorted(matches) == sorted(module for module in imports if module)
    assert None not in imports  # "from . import x", which it doesn't see
