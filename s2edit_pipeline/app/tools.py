"""The page's tools for programs and agents: named endpoints of its API, and with ``--mcp`` tools of an MCP server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from .session import Knobs, Session

if TYPE_CHECKING:
    from ..pipeline import S2EditPipeline


def add_tools(pipe: S2EditPipeline) -> None:
    """Add the tools to the page that is being built; nothing of them is seen in it."""

    def describe_picture(picture: str) -> str:
        """Say what a picture shows, in words that can be changed for an edit.

        Args:
            picture: the picture.

        Returns:
            Its description, such as "a photo of a sad lady with glasses".
        """
        session = Session(pipe)
        session.open(picture)
        return session.describe()[0]

    def edit_picture(picture: str, description: str, wanted: str, subject: str, learn: bool = False) -> str:
        """Edit a picture by words: what the two descriptions don't differ in stays as it is.

        Args:
            picture: the picture.
            description: what it shows now, as describe_picture says it.
            wanted: the same words with those changed that are to change.
            subject: the word of the description for who is kept, such as "lady".
            learn: learn first who that is: slower, and truer to the person.

        Returns:
            The edited picture.
        """
        session = Session(pipe)
        session.open(picture)
        session.say(description, subject)
        if learn:
            session.fit(None, lambda step, total, measures: None)
        made = session.edit([wanted], Knobs(), lambda step: None)
        kept.append(session)  # its folder, until a few calls later
        del kept[:-MOST_KEPT]
        return str(made[0].file)

    kept: list[Any] = []
    with gr.Row(visible=False):
        picture = gr.Image(type="filepath", label="picture")
        words = [gr.Textbox(label=name) for name in ("description", "wanted", "subject")]
        learn = gr.Checkbox(label="learn")
        said, edited = gr.Textbox(label="description"), gr.Image(type="filepath", format="png", label="edited")
        describe, edit = gr.Button("describe"), gr.Button("edit")
    describe.click(describe_picture, [picture], [said], api_name="describe_picture")
    edit.click(edit_picture, [picture, *words, learn], [edited], api_name="edit_picture")


MOST_KEPT = 32
"""Edited files that are there to be fetched."""
