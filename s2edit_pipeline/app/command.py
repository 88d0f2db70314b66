"""``s2edit app``: the page on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..commands.shared import FAILED, add_model, load_model

MAX_FILE_SIZE = "50mb"
"""Of an upload."""

MAX_WAITING = 32
"""Visitors' calls that wait; one more is told to come back later."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--share", action="store_true", help="an address for everybody, through Gradio's servers")
    parser.add_argument("--mcp", action="store_true", help="also serve the tools to agents (MCP)")
    add_model(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        import gradio  # noqa: F401
    except ImportError:
        print('s2edit app needs Gradio: pip install "s2edit-pipeline[app]".', file=sys.stderr)
        return FAILED
    if args.port is not None and not 0 < args.port < 1 << 16:
        raise ValueError(f"--port must be from 1 to 65535, not {args.port}.")
    page = make_page(load_model(args), examples=example_pictures() if args.model is None else None)
    page.launch(server_name=args.host, server_port=args.port, share=args.share, mcp_server=args.mcp, **launch_options())
    return 0


def make_page(pipe: Any, examples: list[Path] | None = None, can_push: bool = True) -> Any:
    """The page with its queue and, for agents, its tools."""
    from .page import build_page

    pipe.set_progress_bar_config(disable=True)
    return build_page(pipe, examples, can_push=can_push).queue(max_size=MAX_WAITING, default_concurrency_limit=2)


def launch_options() -> dict[str, Any]:
    """Of Gradio's ``launch``: limits and looks."""
    from .page import CSS

    return {"max_file_size": MAX_FILE_SIZE, "show_error": True, "css": CSS, "footer_links": ["api", "settings"]}


def example_pictures() -> list[Path]:
    """The avatars that the package carries to try the page with."""
    return sorted((Path(__file__).parent / "examples").glob("*.png"))
