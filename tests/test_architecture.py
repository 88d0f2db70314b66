"""How the package is built: imports go one way, functions and modules are short, no stage names a kind of model."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import s2edit_pipeline

PACKAGE = Path(s2edit_pipeline.__file__).parent
TREES = {path: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
FLAT = {path.stem: tree for path, tree in TREES.items() if path.parent == PACKAGE and path.stem != "__init__"}

PUBLIC_CALLS = {
    "__call__", "fit_identity", "invert", "preview_mask", "load_identity", "__init__", "save_pretrained",
    "push_to_hub", "from_pretrained",
}  # fmt: skip
MOST_PARAMETERS, MOST_LINES = 8, 450

KINDS = ("unet", "sdxl", "is_xl", "alphas_cumprod", "stablediffusion")
"""What only a kind of model has, as it is written in identifiers, in small letters."""


def imports_of(tree: ast.Module) -> set[str]:
    """The flat modules that one imports."""
    return {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module}


@pytest.mark.parametrize("name", FLAT)
def test_imports_go_one_way(name: str) -> None:
    """No module is, through others, its own import."""
    below: set[str] = set()
    ahead = sorted(imports_of(FLAT[name]) & FLAT.keys())
    while ahead:
        module = ahead.pop()
        if module not in below:
            below.add(module)
            ahead += sorted(imports_of(FLAT[module]) & FLAT.keys())
    assert name not in below


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Its parameters' names, the object itself aside."""
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


@pytest.mark.parametrize("path", TREES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_functions_take_few_parameters(path: Path) -> None:
    functions = [node for node in ast.walk(TREES[path]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {f.name: len(parameters(f)) for f in functions if len(parameters(f)) > MOST_PARAMETERS}
    assert long.keys() <= PUBLIC_CALLS, f"{path.name}: {long}; put what belongs together into a record"


@pytest.mark.parametrize("path", TREES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_are_short(path: Path) -> None:
    """Without the list of all modules that ``pipeline.py`` has to name."""
    lines = path.read_text("utf-8").splitlines()
    named = [line for line in lines if path.name == "pipeline.py" and line.startswith("from .")]
    assert len(lines) - len(named) <= MOST_LINES


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of whatever ``tree`` calls by a name: variables, attributes, arguments, definitions, imports, and
    strings that are nothing but a name, as ``getattr`` takes them."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr
        elif isinstance(node, ast.arg):
            yield line, node.arg
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node.value.lineno, node.arg
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield line, node.name
        elif isinstance(node, ast.alias):
            yield line, node.asname or node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield line, node.value


def of_the_components(tree: ast.Module) -> set[int]:
    """The lines of ``pipeline.py`` and ``pipeline_components.py`` that must name kinds of models: diffusers reads the
    components from there."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.ClassDef):
            parts = [*node.bases, *(part for part in node.body if isinstance(part, ast.Assign))]
        elif isinstance(node, ast.FunctionDef):
            parts = [node] if node.name == "__init__" else []
        elif isinstance(node, ast.ImportFrom):
            parts = [node] if node.level == 0 or (node.module or "").startswith("family_") else []
        for part in parts:
            lines |= set(range(part.lineno, (part.end_lineno or part.lineno) + 1))
    return lines


EXCEPTED = {
    "cli": {"unet"},  # which of the embedded models to train
    "identity_schema": {"unet"},  # a component's name in the files of an identity
    "noise_schedule": {"alphas_cumprod"},  # what every scheduler of a diffusion has, whatever model it drives
}


@pytest.mark.parametrize("name", [name for name in FLAT if not name.startswith("family_")])
def test_no_stage_names_a_kind_of_model(name: str) -> None:
    """What differs between them is a ``ModelFamily``'s, in its own file."""
    excepted = of_the_components(FLAT[name]) if name in ("pipeline", "pipeline_components") else set()
    kinds = [
        f"line {line}: {identifier}"
        for line, identifier in identifiers(FLAT[name])
        if line not in excepted
        and identifier not in EXCEPTED.get(name, ())
        and any(kind in identifier.lower() for kind in KINDS)
    ]
    assert not kinds
