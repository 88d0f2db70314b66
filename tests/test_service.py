"""The service that the docs show, with many clients at once."""

from __future__ import annotations

import gc
import importlib.util
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from s2edit_pipeline import S2EditPipeline

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

SOURCE, TARGETS = "a photo of a sad lady", ("a photo of a smiling [I] lady", "a photo of a sad [I] lady with glasses")


@pytest.fixture
def client(
    pipe: S2EditPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[TestClient, S2EditPipeline]]:
    monkeypatch.setattr("s2edit_pipeline.load_avatars", lambda: pipe)
    spec = importlib.util.spec_from_file_location("service", Path(__file__).parent.parent / "docs" / "service.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with TestClient(module.app) as client:
        yield client, pipe


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def follow(client: TestClient, job: str) -> list[dict[str, Any]]:
    with client.stream("GET", f"/jobs/{job}/events") as response:
        return [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line.startswith("data: ")]


def test_twenty_edits_by_eight_clients(client: tuple[TestClient, S2EditPipeline], picture: Image.Image) -> None:
    service, pipe = client
    files = {"picture": png(picture)}
    asked = service.post("/identities", files=files, data={"prompt": SOURCE, "subject": "lady", "steps": 2})
    who = asked.json()["job"]
    said = follow(service, who)
    assert [one.get("step") for one in said] == [1, 2, None] and said[-1] == {"done": True, "error": None}
    assert service.get(f"/jobs/{who}/result").json() == {"token": "[I]", "subject": "lady"}

    def edit(i: int) -> np.ndarray:
        data = {"source_prompt": SOURCE, "to": TARGETS[i % 2], "identity": who, "steps": 2}
        job = service.post("/edits", files=files, data=data).json()["job"]
        assert follow(service, job)[-1] == {"done": True, "error": None}
        return np.asarray(Image.open(io.BytesIO(service.get(f"/jobs/{job}/result").content)))

    alone = [edit(i) for i in range(2)]
    assert (alone[0] != alone[1]).any()
    with ThreadPoolExecutor(8) as clients:
        for i, result in enumerate(clients.map(edit, range(20))):
            np.testing.assert_array_equal(result, alone[i % 2])
    assert pipe.identities == ()


@pytest.mark.slow
def test_memory_is_steady(client: tuple[TestClient, S2EditPipeline], picture: Image.Image) -> None:
    """After a warm-up a hundred edits by eight clients take no more memory than before."""
    service, _ = client
    data = {"source_prompt": SOURCE, "to": "a photo of a smiling lady", "steps": 2}

    def edit(_: int) -> int:
        job = service.post("/edits", files={"picture": png(picture)}, data=data).json()["job"]
        assert follow(service, job)[-1] == {"done": True, "error": None}
        return service.get(f"/jobs/{job}/result").status_code

    def megabytes() -> float:
        gc.collect()
        return psutil.Process().memory_info().rss / 2**20

    with ThreadPoolExecutor(8) as clients:
        assert set(clients.map(edit, range(100))) == {200}
        before = megabytes()
        assert set(clients.map(edit, range(100))) == {200}
    grown = megabytes() - before
    print(f"{grown:+.1f} MB after 100 edits, of {before:.0f} MB")
    assert grown < 20


def test_what_goes_wrong_is_said(client: tuple[TestClient, S2EditPipeline], picture: Image.Image) -> None:
    service, _ = client
    data = {"source_prompt": SOURCE, "to": "a photo of a smiling [I] lady", "steps": 2}
    job = service.post("/edits", files={"picture": png(picture)}, data=data).json()["job"]
    assert "looks like a learned token" in follow(service, job)[-1]["error"]
    assert service.get(f"/jobs/{job}/result").status_code == 422
    job = service.post("/edits", files={"picture": b"no picture"}, data={**data, "to": "a lady"}).json()["job"]
    assert follow(service, job)[-1]["error"]
    assert service.get("/jobs/none/result").status_code == 404
    assert service.post("/edits", files={"picture": b"0" * ((20 << 20) + 1)}, data=data).status_code == 413


def test_a_job_is_cancelled(client: tuple[TestClient, S2EditPipeline], picture: Image.Image) -> None:
    service, _ = client
    data = {"source_prompt": SOURCE, "to": "a photo of a smiling lady", "steps": 900}
    job = service.post("/edits", files={"picture": png(picture)}, data=data).json()["job"]
    assert service.delete(f"/jobs/{job}").json() == {"stopping": True}
    said = follow(service, job)
    assert "was stopped" in said[-1]["error"] and len(said) < 900
    assert service.get(f"/jobs/{job}/result").status_code == 422
