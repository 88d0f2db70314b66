"""The page in a real browser: the way through, and the unhappy ways."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.picture_files import read_picture
from s2edit_pipeline.picture_marks import EDITED, origin_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]

from s2edit_pipeline.app.command import launch_options, make_page  # noqa: E402
from s2edit_pipeline.app.space import assemble_space  # noqa: E402

PROMPT = "a photo of a sad lady with a beard"
SECONDS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def address(pipe: S2EditPipeline) -> Iterator[str]:
    page = make_page(pipe)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **launch_options())
    yield address
    page.close()


def visit(browser: Any, address: str, picture: Path | None, width: int = 1280) -> Any:
    tab = browser.new_page(viewport={"width": width, "height": 900}, accept_downloads=True)
    tab.set_default_timeout(SECONDS)
    tab.goto(address)
    tab.wait_for_selector("#picture")
    if picture is not None:
        tab.set_input_files("#picture input[type=file]", str(picture))
        tab.wait_for_selector("#picture img")
        tab.fill("#prompt textarea, #prompt input", PROMPT)
        tab.fill("#subject textarea, #subject input", "lady")
    return tab


def press(tab: Any, button: str, place: str, words: str) -> str:
    tab.click(f"#{button}")
    tab.wait_for_function(
        "([place, words]) => document.querySelector(place).innerText.includes(words)", arg=[f"#{place}", words]
    )
    return str(tab.inner_text(f"#{place}"))


def said(tab: Any) -> str:
    """The error that the page shows."""
    tab.wait_for_selector(".toast-body.error")
    return str(tab.inner_text(".toast-body.error"))


@pytest.fixture
def ada(picture: Image.Image, tmp_path: Path) -> Path:
    file = tmp_path / "ada.png"
    picture.save(file)
    return file


def test_from_upload_to_download(browser: Any, address: str, ada: Path, tmp_path: Path) -> None:
    tab = visit(browser, address, ada)
    assert "[I] is this lady" in press(tab, "fit", "progress", "Learned")
    tab.fill("#targets textarea", "a photo of a smiling lady with a beard")
    tab.get_by_label("glasses", exact=True).first.check()
    assert "glasses" in press(tab, "edit", "status", '"a photo')
    assert tab.locator("#gallery img").count() == 2
    with tab.expect_download() as download:
        tab.locator("#download a").first.click()
    download.value.save_as(tmp_path / "edited.png")
    edited = read_picture(tmp_path / "edited.png")
    assert edited.size == Image.open(ada).size and origin_of(edited.xmp).source_type == EDITED
    assert not np.array_equal(np.asarray(edited.rgb), np.asarray(Image.open(ada)))
    tab.close()


def test_the_unhappy_ways(browser: Any, address: str, ada: Path, tmp_path: Path) -> None:
    tab = visit(browser, address, None)
    tab.click("#fit")
    assert "Say what the picture shows" in said(tab)
    tab.close()

    tab = visit(browser, address, ada)
    tab.fill("#subject textarea, #subject input", "horse")
    tab.click("#fit")
    assert "horse" in said(tab)
    tab.close()

    tab = visit(browser, address, ada)
    tab.click("#edit")
    assert "what to change" in said(tab)
    tab.close()

    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR\0\1\0\0\0\1\0\0\x08\2\0\0\0" + b"\0" * 40)
    tab = visit(browser, address, None)
    tab.set_input_files("#picture input[type=file]", str(bomb))
    assert said(tab)
    tab.close()


def test_a_fit_is_stopped(browser: Any, address: str, ada: Path) -> None:
    tab = visit(browser, address, ada)
    tab.click("#fit")
    tab.wait_for_function("document.querySelector('#progress').innerText.includes('step')")
    tab.click("#stop-fit")
    tab.wait_for_function("document.querySelector('#progress').innerText.includes('Learned')")
    tab.close()


def test_two_tabs_at_once_do_not_mix(browser: Any, address: str, ada: Path, tmp_path: Path) -> None:
    turned = tmp_path / "turned.png"
    Image.open(ada).rotate(180).save(turned)
    tabs = [visit(browser, address, file) for file in (ada, turned)]
    for tab in tabs:
        tab.fill("#targets textarea", "a photo of a smiling lady with a beard")
        tab.click("#edit")
    pictures = []
    for i, tab in enumerate(tabs):
        tab.wait_for_function("document.querySelector('#status').innerText.includes('\"a photo')")
        with tab.expect_download() as download:
            tab.locator("#download a").first.click()
        download.value.save_as(tmp_path / f"{i}.png")
        pictures.append(np.asarray(Image.open(tmp_path / f"{i}.png").convert("RGB"), float))
        tab.close()
    own, other = np.asarray(Image.open(ada), float), np.asarray(Image.open(turned), float)
    assert np.abs(pictures[0] - own).mean() < np.abs(pictures[0] - other).mean()
    assert np.abs(pictures[1] - other).mean() < np.abs(pictures[1] - own).mean()


def test_a_phones_width_holds_it_all(browser: Any, address: str, ada: Path) -> None:
    tab = visit(browser, address, ada, width=390)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.close()


def test_the_spaces_folder_shows_the_page_and_edits(browser: Any, tmp_path: Path) -> None:
    """By the package that is in it, on the embedded model."""
    folder = assemble_space(tmp_path / "space")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PORT": str(port), "PYTHONSAFEPATH": ""}
    environment.pop("PYTHONPATH", None)
    with subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment) as space:
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(120):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(address).close()
                    break
                time.sleep(0.5)
            tab = visit(browser, address, folder / "s2edit_pipeline" / "app" / "examples" / "bob.png")
            tab.fill("#prompt textarea, #prompt input", "a photo of an angry man with a moustache")
            tab.fill("#subject textarea, #subject input", "man")
            tab.fill("#targets textarea", "a photo of a smiling man with a moustache")
            press(tab, "edit", "status", '"a photo')
            tab.close()
        finally:
            space.terminate()


def test_an_mcp_client_lists_the_tools_and_calls_one(pipe: S2EditPipeline, ada: Path) -> None:
    mcp = pytest.importorskip("mcp")
    from mcp.client.streamable_http import streamablehttp_client

    page = make_page(pipe)
    options = {**launch_options(), "allowed_paths": [str(ada.parent)]}
    _, address, _ = page.launch(
        prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", mcp_server=True, **options
    )

    async def use() -> tuple[dict[str, str], Any]:
        async with (
            streamablehttp_client(f"{address}gradio_api/mcp/") as (read, write, _),
            mcp.ClientSession(read, write) as client,
        ):
            await client.initialize()
            tools = {tool.name: tool.description or "" for tool in (await client.list_tools()).tools}
            encoded = "data:image/png;base64," + base64.b64encode(ada.read_bytes()).decode()
            arguments = {"picture": encoded, "description": PROMPT, "wanted": PROMPT.replace("sad", "smiling")}
            name = next(name for name in tools if name.endswith("edit_picture"))
            return tools, await client.call_tool(name, {**arguments, "subject": "lady", "learn": False})

    try:
        tools, result = asyncio.run(use())
    finally:
        page.close()
    assert {name.rpartition("edit_picture")[1] or "describe_picture" for name in tools} == {
        "edit_picture",
        "describe_picture",
    }
    assert all("picture" in description for description in tools.values())
    assert not result.isError, result.content
    (image, *_) = [part for part in result.content if part.type == "image"]
    edited = Image.open(io.BytesIO(base64.b64decode(image.data)))
    assert edited.size == Image.open(ada).size
