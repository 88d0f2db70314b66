"""``s2edit fit-many``: an identity for each row."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .command import add_many, run_many
from .manifest import Column, text, whole_number


class Fits:
    """The work of a row: a fit, kept on its way, saved in the end."""

    command = "fit-many"
    columns: Mapping[str, Column] = {
        "id": Column(text),
        "image": Column(text, required=True),
        "prompt": Column(text),
        "subject": Column(text),
        "token": Column(text),
        "seed": Column(whole_number),
        "mask": Column(text),
    }

    def __init__(self, args: argparse.Namespace) -> None:
        self.settings = {
            "command": self.command, "model": args.model, "dtype": args.dtype, "method": args.method,
            "steps": args.steps,
        }  # fmt: skip
        self._seed = args.seed

    def full(self, cells: Mapping[str, Any]) -> dict[str, Any]:
        if "subject" in cells and "prompt" not in cells:
            raise ValueError(f"'subject': {cells['subject']!r} is a word of the prompt, and 'prompt' is empty.")
        token = cells.get("token", "[I]")
        if token.isalnum() or any(c.isspace() for c in token):
            raise ValueError(f"'token': must be one word in brackets, such as '[I]', not {token!r}.")
        return {"token": "[I]", "seed": self._seed, **cells}

    def suffix(self, cells: Mapping[str, Any]) -> str:
        return ""

    def do(self, pipe: Any, cells: Mapping[str, Any], begun: Path, target: Path) -> None:
        import torch

        from ..picture_files import read_picture

        identity = pipe.fit_identity(
            read_picture(cells["image"]).native,
            cells.get("prompt"),
            cells.get("subject"),
            cells["token"],
            method=self.settings["method"],
            mask=cells.get("mask"),
            num_steps=self.settings["steps"],
            generator=torch.Generator().manual_seed(cells["seed"]),
            checkpoint_folder=begun,
        )
        identity.save_pretrained(target)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_many(parser)
    fit = parser.add_argument_group("fit")
    fit.add_argument("--method", default="lora", choices=("lora", "full", "token"), help="(default: %(default)s)")
    fit.add_argument("--steps", type=int, help="of each fit (default: the method's own)")
    parser.set_defaults(run=run_many, make_work=Fits)
