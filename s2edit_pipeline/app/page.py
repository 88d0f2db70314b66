"""The web page: Gradio components around a :class:`~s2edit_pipeline.app.session.Session` for each visitor."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from .session import Knobs, Missing, Session
from .tools import add_tools

if TYPE_CHECKING:
    from pathlib import Path

    from ..pipeline import S2EditPipeline

CHIPS = ("smiling", "glasses", "a hat", "a beard", "blond hair", "a red sweater")
"""Words offered to be added where the model's own aren't known."""

CSS = """
.s2-title {margin-bottom: 0}
@media (max-width: 600px) {.gradio-container {padding: 8px !important}}
"""

_DONE = object()


def build_page(
    pipe: S2EditPipeline, examples: list[Path] | None = None, chips: tuple[str, ...] = CHIPS, can_push: bool = True
) -> gr.Blocks:
    """The page for ``pipe``.

    Args:
        examples: pictures to try it with.
        chips: words that a click adds.
        can_push: whether identities may be shared on the Hub from here.
    """
    with gr.Blocks(title="S2Edit", analytics_enabled=False) as page:
        session = gr.State(None)
        gr.Markdown("# S2Edit\nEdit a picture by words, and keep who is in it.", elem_classes="s2-title")
        with gr.Row():
            with gr.Column(min_width=320):
                picture = gr.Image(
                    label="1 · Your picture", type="filepath", sources=["upload", "clipboard"], height=320,
                    elem_id="picture",
                )  # fmt: skip
                if examples:
                    gr.Examples([str(path) for path in examples], inputs=picture, label="Or one of these")
                prompt = gr.Textbox(
                    label="2 · What it shows", placeholder="a photo of a lady with glasses", elem_id="prompt"
                )
                subject = gr.Textbox(label="Who is kept (a word of it)", placeholder="lady", elem_id="subject")
                describe = gr.Button("Find the words", elem_id="describe")
                with gr.Accordion("3 · Where they are", open=False):
                    gr.Markdown("Look at the mask, and paint over it where it is wrong: white is kept.")
                    mask = gr.ImageEditor(
                        label="Mask", type="pil", image_mode="L", sources=(), transforms=(), layers=False,
                        brush=gr.Brush(colors=["#ffffff", "#000000"], color_mode="fixed"), elem_id="mask",
                    )  # fmt: skip
                    with gr.Row():
                        find_mask = gr.Button("Show the mask", elem_id="find-mask")
                        use_mask = gr.Button("Use what I painted", elem_id="use-mask")
                steps = gr.Slider(5, 60, value=20, step=1, label="How long to learn (steps)")
                with gr.Row():
                    fit = gr.Button("4 · Learn who this is", variant="primary", elem_id="fit")
                    stop_fit = gr.Button("Stop", elem_id="stop-fit")
                progress = gr.Markdown("", elem_id="progress")
                loss = gr.LinePlot(None, x="step", y="loss", height=160, visible=False, elem_id="loss")
                identity_box = _identity_box(session, can_push)
            with gr.Column(min_width=320):
                lines = gr.Textbox(
                    label="5 · What it is to show (one edit a line)", lines=3, elem_id="targets",
                    placeholder="a photo of a smiling lady with glasses",
                )  # fmt: skip
                add = gr.CheckboxGroup(list(chips), label="Or add", elem_id="add")
                with gr.Accordion("How", open=False):
                    strength = gr.Slider(0.1, 1, value=1, step=0.05, label="How much may change")
                    guidance = gr.Slider(0, 10, value=0, step=0.5, label="How strongly the words pull (0: as usual)")
                    reach = gr.Slider(0.1, 0.9, value=0.6, step=0.05, label="How far the edit may reach")
                    shape = gr.Slider(0, 1, value=0.4, step=0.05, label="How long shapes are kept")
                    edit_steps = gr.Slider(5, 50, value=25, step=1, label="How carefully (steps)")
                with gr.Row():
                    edit = gr.Button("6 · Edit", variant="primary", elem_id="edit")
                    stop_edit = gr.Button("Stop", elem_id="stop-edit")
                status = gr.Markdown("", elem_id="status")
                slider = gr.ImageSlider(label="Before and after", type="pil", height=400, elem_id="slider")
                gallery = gr.Gallery(label="All edits", columns=4, height=220, object_fit="contain", elem_id="gallery")
                download = gr.File(label="Download", file_count="multiple", elem_id="download")
                with gr.Accordion("Where it could change", open=False):
                    regions = gr.Gallery(label="White may change", columns=4, height=160, elem_id="regions")

        page.load(lambda: Session(pipe), outputs=session, api_visibility="private")
        wire = functools.partial(_wire, session=session)
        wire(picture.change, _open, [picture], [prompt, subject, mask, gallery, slider, status])
        wire(describe.click, _describe, [picture, prompt], [prompt, subject, progress])
        wire(find_mask.click, _find_mask, [prompt, subject], [mask, progress])
        wire(use_mask.click, _use_mask, [mask], [progress])
        wire(fit.click, _fit, [prompt, subject, steps], [progress, loss, identity_box])
        wire(
            edit.click,
            _edit,
            [prompt, subject, lines, add, strength, guidance, reach, shape, edit_steps],
            [status, slider, gallery, download, regions],
        )
        add_tools(pipe)
        for button in (stop_fit, stop_edit):
            button.click(_stop, [session], [progress], queue=False, api_visibility="private")
    return page


def _wire(event: Any, handler: Callable[..., Any], inputs: list[Any], outputs: list[Any], session: Any) -> None:
    """``handler(session, *inputs)`` at ``event``; its errors are shown in the page."""
    event(_shown(handler), [session, *inputs], outputs, api_visibility="private", trigger_mode="once")


def _shown(handler: Callable[..., Any]) -> Callable[..., Any]:
    """``handler`` with errors that a visitor can read."""

    def run(*arguments: Any) -> Iterator[Any]:
        try:
            result = handler(*arguments)
            if hasattr(result, "__next__"):
                yield from result
            else:
                yield result
        except Missing as error:
            raise gr.Error(str(error), title="Not yet", print_exception=False) from error
        except (ValueError, TypeError, OSError, FloatingPointError, MemoryError) as error:
            raise gr.Error(str(error), title="That didn't work", print_exception=False) from error

    return run


# ---------------------------------------------------------------------------- what the buttons do


def _open(session: Session, file: str | None) -> tuple[Any, ...]:
    if file is None:
        return gr.skip(), gr.skip(), None, [], None, ""
    session.open(file)
    return "", "", None, [], None, ""


def _describe(session: Session, file: str | None, prompt: str) -> tuple[str, str, str]:
    if session.source is None:
        session.open(file)
    words, subject = session.describe()
    return words, subject, "Words found. Change them if they are wrong."


def _find_mask(session: Session, prompt: str, subject: str) -> tuple[Any, str]:
    session.say(prompt, subject)
    mask = session.find_mask()
    return mask, "This is what is kept. Paint over it where it is wrong."


def _use_mask(session: Session, painted: Any) -> tuple[str]:
    image = None if painted is None else painted.get("composite")
    if image is None:
        raise Missing("Show the mask first, and paint over it.")
    session.paint_mask(image)
    return ("Your mask is used.",)


def _fit(session: Session, prompt: str, subject: str, steps: int) -> Iterator[tuple[Any, Any, Any]]:
    session.say(prompt, subject)
    rows: list[tuple[int, float]] = []

    def work(tell: Callable[[Any], None]) -> Any:
        return session.fit(int(steps), lambda step, total, m: tell((step + 1, total, m["reconstruction_loss"])))

    yield "Looking …", gr.skip(), gr.skip()
    for said in _told(work):
        if isinstance(said, tuple):
            step, total, value = said
            rows.append((step, value))
            yield f"Learning: step {step} of {total}, loss {value:.3f}", _plot(rows), gr.skip()
        else:
            cut = " It was stopped early." if said.interrupted else ""
            yield f"Learned: {said.token} is this {said.subject}.{cut}", _plot(rows), _named(said)


def _edit(
    session: Session, prompt: str, subject: str, lines: str, add: list[str], *sliders: float
) -> Iterator[tuple[Any, ...]]:
    session.say(prompt, subject)
    targets = session.targets(lines or "", add or [], [])
    strength, guidance, reach, shape, steps = sliders
    knobs = Knobs(strength, guidance or None, reach, shape, int(steps))
    yield "Inverting …", gr.skip(), gr.skip(), gr.skip(), gr.skip()
    for said in _told(lambda tell: session.edit(targets, knobs, lambda step: tell(step + 1))):
        if isinstance(said, int):
            yield f"Editing: step {said} of {int(steps)}", gr.skip(), gr.skip(), gr.skip(), gr.skip()
        elif not said:
            yield "Stopped.", gr.skip(), gr.skip(), gr.skip(), gr.skip()
        else:
            assert session.source is not None
            last = said[-1]
            shown = [(one.picture, one.prompt) for one in session.edits]
            regions = [(one.region, one.prompt) for one in said if one.region is not None]
            files = [str(one.file) for one in session.edits]
            yield f'"{last.prompt}"', (session.source.rgb, last.picture.convert("RGB")), shown, files, regions


def _stop(session: Session | None) -> str:
    if session is not None:
        session.stop()
    return "Stopping after this step …"


def _told(work: Callable[[Callable[[Any], None]], Any]) -> Iterator[Any]:
    """What ``work(tell)`` tells while it goes on in a thread of its own, and at last what it returns."""
    said: queue.Queue[Any] = queue.Queue()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            said.put(work(said.put))
        except BaseException as error:
            failed.append(error)
        said.put(_DONE)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while (one := said.get()) is not _DONE:
        yield one
    thread.join()
    if failed:
        raise failed[0]


def _plot(rows: list[tuple[int, float]]) -> Any:
    import pandas as pd

    return gr.update(value=pd.DataFrame(rows, columns=["step", "loss"]), visible=True)


# ---------------------------------------------------------------------------- identities


def _named(identity: Any) -> str:
    return f"**{identity.token}**, a {identity.subject}"


def _identity_box(session: Any, can_push: bool) -> Any:
    """The panel of identities; returns the line that names the present one."""
    with gr.Accordion("Identities", open=False):
        name = gr.Markdown("Nobody is learned yet.", elem_id="identity")
        with gr.Row():
            token = gr.Textbox(label="Another name", placeholder="[ada]", scale=2)
            rename = gr.Button("Rename")
        save = gr.Button("Save as a zip", elem_id="save-identity")
        saved = gr.File(label="Identity", elem_id="identity-file")
        archive = gr.File(label="Load a zip", file_types=[".zip"], type="filepath", elem_id="identity-upload")
        repository = gr.Textbox(label="Or a Hub name", placeholder="me/ada")
        load = gr.Button("Load")
        wire = functools.partial(_wire, session=session)
        wire(rename.click, lambda s, t: _named(s.rename_identity(t)), [token], [name])
        wire(save.click, lambda s: str(s.save_identity()), [], [saved])
        wire(load.click, lambda s, file, hub: _named(s.load_identity(hub, file)), [archive, repository], [name])
        if can_push:
            target = gr.Textbox(label="Share on the Hub as", placeholder="me/ada")
            key = gr.Textbox(label="Your Hub token", type="password")
            consent = gr.Checkbox(label="Whom it shows has agreed to its being shared.")
            push = gr.Button("Share")
            wire(
                push.click,
                lambda s, repo_id, agreed, secret: f"Shared: {s.push_identity(repo_id, agreed, secret)}",
                [target, consent, key],
                [name],
            )
    return name
