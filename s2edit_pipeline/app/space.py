"""A Hugging Face Space: a folder that shows the page, with the package in it."""

from __future__ import annotations

import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from ..publishing import PACKAGE, new_folder

_APP = '''\
"""The page of S2EditPipeline; $S2EDIT_MODEL is a diffusers folder or Hub name, the embedded avatars otherwise."""

import argparse
import os

from s2edit_pipeline.app.command import example_pictures, launch_options, make_page
from s2edit_pipeline.commands.shared import load_model

model = os.environ.get("S2EDIT_MODEL")
arguments = argparse.Namespace(model=model, device=os.environ.get("S2EDIT_DEVICE"), dtype=None, json=False)
page = make_page(load_model(arguments), examples=None if model else example_pictures(), can_push=False)

if __name__ == "__main__":
    page.launch(server_name="0.0.0.0", server_port=int(os.environ.get("PORT", "7860")), **launch_options())
'''

_CARD = """\
---
title: S2Edit
emoji: 🖼️
colorFrom: blue
colorTo: green
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
license: apache-2.0
short_description: Edit a picture by words, and keep who is in it
---

The page of S2EditPipeline. It works on the embedded model of drawn people and creatures, on a CPU. Set the variable
`S2EDIT_MODEL` to a diffusers model, such as `stable-diffusion-v1-5/stable-diffusion-v1-5`, on hardware with a GPU.
"""


def assemble_space(folder: str | Path) -> Path:
    """Write the Space's files into the new or empty ``folder``.

    Raises:
        ValueError: ``folder`` is a file or has something in it.
    """
    folder = new_folder(folder)
    ignored = shutil.ignore_patterns("__pycache__", "evaluation", "instruct*")
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=ignored)
    (folder / "app.py").write_text(_APP, "utf-8")
    (folder / "requirements.txt").write_text("\n".join(_requirements()) + "\n", "utf-8")
    (folder / "README.md").write_text(_CARD.format(gradio=_version("gradio", "6.0.0")), "utf-8")
    return folder


def publish_space(repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
    """Push the Space ``repo_id``, made if need be; returns the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as made:
        folder = assemble_space(Path(made) / "space")
        repo_id = api.create_repo(
            repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True
        ).repo_id
        commit = api.upload_folder(
            repo_id=repo_id, repo_type="space", folder_path=folder, commit_message="S2EditPipeline"
        )
    return str(commit.commit_url)


def _requirements() -> list[str]:
    """What the package needs without extras; Gradio is the Space's own."""
    return [one for one in metadata.requires("s2edit-pipeline") or [] if "extra ==" not in one]


def _version(package: str, otherwise: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return otherwise
