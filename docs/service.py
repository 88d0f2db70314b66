"""A service of one's own around one shared pipeline: background fits, edits on request, progress, cancel, limits.

Run it with ``uvicorn service:app``; it needs ``pip install fastapi uvicorn python-multipart``.
"""

import asyncio
import io
import json
import queue
import threading
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, HTTPException, UploadFile
from fastapi.responses import Response, StreamingResponse

from s2edit_pipeline import load_avatars

Upload = Annotated[UploadFile, File()]
MOST_BYTES, MOST_WAITING, MOST_KEPT = 20 << 20, 32, 200

app = FastAPI(title="Edits that keep who is in the picture")
pipe = load_avatars()  # or S2EditPipeline.from_pretrained(...).to("cuda")
pipe.set_progress_bar_config(disable=True)
workers = ThreadPoolExecutor(max_workers=2)  # threads share the pipeline; a fit has it to itself


@dataclass
class Job:
    """A fit or an edit: what it says on its way, and its result."""

    events: "queue.Queue[dict[str, Any]]" = field(default_factory=queue.Queue)
    stop: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    result: Any = None
    error: str | None = None


jobs: "OrderedDict[str, Job]" = OrderedDict()
jobs_lock = threading.Lock()


def start(work: Callable[[Job], Any]) -> dict[str, str]:
    """Queue ``work``; its name is what the client asks with."""
    job, name = Job(), uuid.uuid4().hex
    with jobs_lock:
        if sum(not one.done.is_set() for one in jobs.values()) >= MOST_WAITING:
            raise HTTPException(429, "Too much is waiting. Try again in a minute.", {"Retry-After": "60"})
        jobs[name] = job
        for old in [key for key, one in jobs.items() if one.done.is_set()][: max(0, len(jobs) - MOST_KEPT)]:
            del jobs[old]

    def run() -> None:
        try:
            if job.stop.is_set():
                raise ValueError("It was stopped before it began.")
            job.result = work(job)
        except (ValueError, TypeError) as error:  # the client's
            job.error = str(error)
        except Exception as error:
            job.error = f"{type(error).__name__}: {error}"
        finally:
            job.done.set()
            job.events.put({"done": True, "error": job.error})

    workers.submit(run)
    return {"job": name}


def job_of(name: str) -> Job:
    if name not in jobs:
        raise HTTPException(404, f"There is no job {name}.")
    return jobs[name]


def read(picture: UploadFile) -> bytes:
    data = picture.file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise HTTPException(413, f"A picture may have {MOST_BYTES >> 20} MB.")
    return data


@app.post("/identities")
def fit(
    picture: Upload, prompt: Annotated[str, Form()], subject: Annotated[str, Form()], steps: Annotated[int, Form()] = 20
) -> dict[str, str]:
    """Learn who is in a picture, in the background."""
    data = read(picture)

    def work(job: Job) -> Any:
        def tell(p: Any, step: int, total: int, measures: dict[str, float]) -> None:
            job.events.put({"step": step + 1, "of": total, **measures})

        count = min(steps, 100)
        return pipe.fit_identity(data, prompt, subject, num_steps=count, stop=job.stop, callback_on_step_end=tell)

    return start(work)


@app.post("/edits")
def edit(
    picture: Upload,
    source_prompt: Annotated[str, Form()],
    to: Annotated[str, Form()],
    identity: Annotated[str | None, Form()] = None,
    steps: Annotated[int, Form()] = 25,
) -> dict[str, str]:
    """Edit a picture by words; ``identity`` is the job that learned who is in it."""
    data = read(picture)
    known = None if identity is None else job_of(identity).result
    if identity is not None and known is None:
        raise HTTPException(409, "This identity is not learned yet.")

    def work(job: Job) -> bytes:
        def tell(p: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            job.events.put({"step": step + 1, "of": steps})
            return tensors

        out = pipe(
            to, image=data, source_prompt=source_prompt, identity=known, num_inference_steps=steps, stop=job.stop,
            callback_on_step_end=tell,
        )  # fmt: skip
        if out.interrupted:
            raise ValueError("The edit was stopped.")
        file = io.BytesIO()
        out.images[0].save(file, "PNG")
        return file.getvalue()

    return start(work)


@app.get("/jobs/{name}/events")
async def events(name: str) -> StreamingResponse:
    """What the job says, as server-sent events, to its end."""
    job = job_of(name)

    async def say() -> AsyncIterator[str]:
        while True:
            said = await asyncio.to_thread(job.events.get)
            yield f"data: {json.dumps(said)}\n\n"
            if said.get("done"):
                return

    return StreamingResponse(say(), media_type="text/event-stream")


@app.delete("/jobs/{name}")
def cancel(name: str) -> dict[str, bool]:
    """Stop the job after its step."""
    job_of(name).stop.set()
    return {"stopping": True}


@app.get("/jobs/{name}/result")
def result(name: str) -> Response:
    """The edited picture, or who was learned."""
    job = job_of(name)
    if not job.done.is_set():
        raise HTTPException(409, "Not done yet; follow /jobs/{name}/events.")
    if job.error is not None:
        raise HTTPException(422, job.error)
    if isinstance(job.result, bytes):
        return Response(job.result, media_type="image/png")
    return Response(
        json.dumps({"token": job.result.token, "subject": job.result.subject}), media_type="application/json"
    )
