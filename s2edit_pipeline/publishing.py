"""``s2edit publish``: the pipeline as a Hub repository that any diffusers script loads, without this package."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).parent
CLASS_NAME = ["pipeline", "S2EditPipeline"]
"""The form of ``_class_name`` that makes diffusers take the class from the repository's own ``pipeline.py``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repo-id", help="the Hub repository to push to, such as me/s2edit")
    parser.add_argument("--out", help="write the repository's files into this new or empty folder; nothing is pushed")
    parser.add_argument("--avatars", action="store_true", help="publish the embedded model with it")
    parser.add_argument("--space", action="store_true", help="publish the web page as a Space in the pipeline's place")
    parser.add_argument("--private", action="store_true", help="make the repository private if it is new")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing to main")
    parser.add_argument("--commit-message", default="S2EditPipeline", help="(default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Publish, or write the folder; returns the exit status, 2 for arguments that can't be used."""
    if bool(args.repo_id) == bool(args.out):
        print("s2edit publish: give --repo-id to push, or --out to look at the files first.", file=sys.stderr)
        return 2
    if args.space and (args.avatars or args.create_pr):
        print(
            "s2edit publish: a Space has the embedded model in it; leave --avatars and --create-pr out.",
            file=sys.stderr,
        )
        return 2
    if args.space:
        from .app.space import assemble_space, publish_space

        made = assemble_space(args.out) if args.out else publish_space(args.repo_id, private=args.private or None)
        print(f"The Space's files are in {made}" if args.out else made)
    elif args.out:
        print(f"The repository's files are in {assemble(args.out, avatars=args.avatars)}")
    else:
        print(
            publish(
                args.repo_id,
                avatars=args.avatars,
                private=args.private or None,
                create_pr=args.create_pr,
                commit_message=args.commit_message,
            )
        )
    return 0


def pipeline_modules() -> list[Path]:
    """``pipeline.py`` and the siblings that it names: what diffusers' loader copies."""
    code = ast.parse((PACKAGE / "pipeline.py").read_text("utf-8"))
    named = [node.module for node in ast.walk(code) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return [PACKAGE / "pipeline.py", *(PACKAGE / f"{name}.py" for name in sorted({n for n in named if n}))]


def unfollowed(code: str) -> str:
    """``code`` with its relative imports as ``from . name import …``, which to Python is the same.

    diffusers' loader finds relative imports by a regular expression, which a space after the dot escapes, and asks
    the Hub for a module once for every path of imports that leads to it: hundreds of requests. ``pipeline.py`` names
    every sibling, so what the siblings import need not be followed.
    """
    return re.sub(r"^(\s*from \.)(?=\w)", r"\1 ", code, flags=re.MULTILINE)


def assemble(folder: str | Path, *, avatars: bool = False, repo_id: str | None = None) -> Path:
    """Write the repository's files into ``folder``: code, card and licence, and the embedded model if asked for.

    Args:
        repo_id: written into the card's examples.

    Raises:
        ValueError: ``folder`` is a file or has something in it.
    """
    from huggingface_hub import ModelCard

    folder = new_folder(folder)
    pipeline, *siblings = pipeline_modules()
    shutil.copyfile(pipeline, folder / pipeline.name)
    for module in siblings:
        (folder / module.name).write_text(unfollowed(module.read_text("utf-8")), "utf-8")
    shutil.copyfile(_beside_the_code("LICENSE"), folder / "LICENSE")
    card = ModelCard.load(_beside_the_code("model_card/README.md"))
    if repo_id is not None:
        card.text = card.text.replace("<this repository>", repo_id)
    if avatars:
        from .avatars import MODEL_FOLDER

        shutil.copytree(MODEL_FOLDER, folder, dirs_exist_ok=True)
        index = json.loads((folder / "model_index.json").read_text("utf-8")) | {"_class_name": CLASS_NAME}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        card.data.base_model = None  # this repository is one
    (folder / "README.md").write_text(str(card), "utf-8")
    return folder


def new_folder(folder: str | Path) -> Path:
    """``folder``, made if need be.

    Raises:
        ValueError: it is a file or has something in it.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already; give a new or an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def publish(
    repo_id: str,
    *,
    avatars: bool = False,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "S2EditPipeline",
    create_pr: bool = False,
) -> str:
    """Push the pipeline to the Hub repository ``repo_id``, made if need be; returns the commit's address.

    Other files of the repository stay: a module of an earlier version that nothing names any more is never loaded.

    Raises:
        ValueError: the name is none that the Hub takes, or one that diffusers can't load code from.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    if "." in repo_id:
        raise ValueError(
            f"{repo_id!r} holds a dot, and diffusers can't load code from such a repository: the name becomes a "
            f"Python module's. Call it {repo_id.replace('.', '-')!r}."
        )
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        assemble(folder, avatars=avatars, repo_id=repo_id)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    return str(commit.commit_url)


def _beside_the_code(name: str) -> Path:
    """A file of the repository that isn't code: in a wheel it lies within the package, in a checkout above it."""
    found = PACKAGE / name
    return found if found.exists() else PACKAGE.parent / name
