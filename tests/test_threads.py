"""Several threads on one pipeline: each call is its own."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from s2edit_pipeline import IdentityAdapter, S2EditPipeline

SOURCE = "a photo of a sad lady"
TARGETS = ("a photo of a smiling [I] lady", "a photo of a sad [I] lady with glasses")


def fit(pipe: S2EditPipeline, picture: Image.Image, mask: Any, seed: int, **more: Any) -> IdentityAdapter:
    generator = torch.Generator().manual_seed(seed)
    return pipe.fit_identity(
        picture, SOURCE, "lady", mask=mask, num_steps=2, learning_rate=0.05, generator=generator, **more
    )


def edit(pipe: S2EditPipeline, picture: Image.Image, target: str, **more: Any) -> np.ndarray:
    return pipe(target, picture, SOURCE, num_inference_steps=2, output_type="np", **more).images


def snapshot(pipe: S2EditPipeline) -> tuple[Any, ...]:
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    weights = {f"{part}.{n}": v.clone() for part, module in parts.items() for n, v in module.state_dict().items()}
    modules = [id(module) for part in parts.values() for module in part.modules()]
    return weights, modules, [id(p) for p in pipe.unet.attn_processors.values()], pipe.tokenizer, pipe.identities


def assert_as_found(pipe: S2EditPipeline, before: tuple[Any, ...]) -> None:
    weights, *others = snapshot(pipe)
    assert others == list(before[1:])
    assert weights.keys() == before[0].keys() and all(torch.equal(v, before[0][n]) for n, v in weights.items())


@pytest.mark.parametrize("count", [16, pytest.param(200, marks=pytest.mark.slow)])
def test_eight_threads_get_what_one_gets(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray, count: int
) -> None:
    """Edits with four identities, edits with none, fits and drawings, mixed; one call is stopped half way."""
    identities = [fit(pipe, picture, half_mask, seed) for seed in range(4)]
    calls: list[tuple[str, Any]] = []
    for i in range(count):
        if i in (count // 3, count // 2):
            calls.append(("fit", i))
        elif i % 10 == 9:
            calls.append(("draw", i % 3))
        elif i % 5 == 4:
            calls.append(("plain", TARGETS[i % 2].replace("[I] ", "")))
        else:
            calls.append(("edit", (i % 4, i % 2)))

    def run(call: tuple[str, Any]) -> np.ndarray:
        kind, about = call
        if kind == "fit":
            return fit(pipe, picture, half_mask, 100 + about).rows["text_encoder"].numpy()
        if kind == "draw":
            generator = torch.Generator().manual_seed(about)
            return pipe("a photo of a lady", num_inference_steps=2, generator=generator, output_type="np").images
        if kind == "plain":
            return edit(pipe, picture, about)
        return edit(pipe, picture, TARGETS[about[1]], identity=identities[about[0]])

    alone = {repr(call): run(call) for call in dict((repr(c), c) for c in calls).values()}
    before = snapshot(pipe)
    stop, stopped = threading.Event(), []

    def stopped_half_way(step: int) -> None:
        if step == 1:
            stop.set()

    def run_stopped() -> None:
        stopped.append(
            pipe(
                TARGETS[0], picture, SOURCE, identity=identities[0], num_inference_steps=4, output_type="np", stop=stop,
                callback_on_step_end=lambda p, i, t, k: stopped_half_way(i) or k,
            )
        )  # fmt: skip

    with ThreadPoolExecutor(8) as pool:
        extra = pool.submit(run_stopped)
        results = list(pool.map(run, calls))
        extra.result()
    for call, result in zip(calls, results, strict=True):
        np.testing.assert_array_equal(result, alone[repr(call)], err_msg=repr(call))
    assert stopped[0].interrupted
    assert_as_found(pipe, before)


def test_stopping_one_call_stops_no_other(pipe: S2EditPipeline, picture: Image.Image) -> None:
    target, both = TARGETS[0].replace("[I] ", ""), threading.Barrier(2, timeout=60)
    whole = edit(pipe, picture, target)

    def run(stops: bool) -> Any:
        def callback(pipe: S2EditPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == 0:
                both.wait()  # both are in the middle of their calls
                pipe.interrupt = stops
                both.wait()
            return tensors

        return pipe(target, picture, SOURCE, num_inference_steps=2, output_type="np", callback_on_step_end=callback)

    with ThreadPoolExecutor(2) as pool:
        stopped, other = pool.map(run, (True, False))
    assert stopped.interrupted and not other.interrupted
    np.testing.assert_array_equal(other.images, whole)
    assert np.abs(stopped.images - whole).max() > 0
    assert pipe.interrupt is False


def test_from_outside_every_call_at_work_is_stopped(pipe: S2EditPipeline, picture: Image.Image) -> None:
    started, go_on = threading.Event(), threading.Event()

    def wait(pipe: S2EditPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        started.set()
        assert go_on.wait(60)
        return tensors

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            lambda: pipe(
                TARGETS[0].replace("[I] ", ""), picture, SOURCE, num_inference_steps=4, callback_on_step_end=wait
            )
        )
        assert started.wait(60)
        pipe.interrupt = True
        go_on.set()
        assert future.result().interrupted


def test_an_inversion_is_stopped_too(pipe: S2EditPipeline, picture: Image.Image) -> None:
    seen: list[int] = []

    def callback(pipe: S2EditPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        pipe.interrupt = step == 1
        return tensors

    inversion = pipe.invert(picture, SOURCE, num_inference_steps=6, callback_on_step_end=callback)
    assert seen == [0, 1] and inversion.interrupted
    with pytest.raises(ValueError, match=r"stopped before its end; invert again"):
        pipe("a photo of a smiling lady", picture, SOURCE, inversion=inversion)
    stop = threading.Event()
    stop.set()
    result = pipe("a photo of a smiling lady", picture, SOURCE, num_inference_steps=6, stop=stop, output_type="np")
    assert result.interrupted and result.edit_masks == [None]


def test_loading_waits_for_edits_and_is_refused_inside_one(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray
) -> None:
    identity = fit(pipe, picture, half_mask, 0)
    errors: list[str] = []

    def load_inside(pipe: S2EditPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        try:
            pipe.load_identity(identity)
        except RuntimeError as error:
            errors.append(str(error))
        return tensors

    pipe(
        TARGETS[0].replace("[I] ", ""), picture, SOURCE, num_inference_steps=2, callback_on_step_end=load_inside
    )  # fmt: skip
    assert len(errors) == 2 and "after the call, not in its callback" in errors[0]
    assert pipe.identities == ()


def meanwhile(pipe: S2EditPipeline, call: Any, other: Any, *, joins: bool) -> tuple[Any, Any]:
    """The results of ``call(callback_on_step_end=...)`` and of ``other()``, which another thread begins in the middle
    of it, and which ``joins`` it or waits until it is over."""
    futures: list[Future[Any]] = []

    def callback(pipe: S2EditPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            futures.append(pool.submit(other))
            if joins:
                futures[0].result(timeout=60)
            else:
                assert not wait(futures, timeout=0.3).done
        return tensors

    with ThreadPoolExecutor(1) as pool:
        return call(callback_on_step_end=callback), futures[0].result(timeout=60)


def test_a_call_joins_another_that_brought_the_same_identity(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray
) -> None:
    identity = fit(pipe, picture, half_mask, 0)
    alone = edit(pipe, picture, TARGETS[0], identity=identity)

    def call(**callback: Any) -> np.ndarray:
        return edit(pipe, picture, TARGETS[0], identity=identity, **callback)

    for result in meanwhile(pipe, call, call, joins=True):
        np.testing.assert_array_equal(result, alone)
    assert pipe.identities == ()


def test_another_mask_or_pipeline_waits_for_its_turn(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray
) -> None:
    """The same fit: with another mask it is another picture, and in another pipeline it isn't laid on yet."""
    identity = fit(pipe, picture, half_mask, 0)
    moved = replace(identity, mask=1 - identity.mask)
    sibling = S2EditPipeline.from_pipe(pipe)
    sibling.set_progress_bar_config(disable=True)
    alone = [edit(pipe, picture, TARGETS[0], identity=one) for one in (identity, moved)]
    assert np.abs(alone[0] - alone[1]).max() > 0
    for at, one, reference in ((pipe, moved, alone[1]), (sibling, identity, alone[0])):
        results = meanwhile(
            pipe,
            lambda **callback: edit(pipe, picture, TARGETS[0], identity=identity, **callback),
            lambda at=at, one=one: edit(at, picture, TARGETS[0], identity=one),
            joins=False,
        )
        np.testing.assert_array_equal(results[0], alone[0])
        np.testing.assert_array_equal(results[1], reference)


def test_a_fit_and_a_mask_wait_for_a_call_that_brought_an_identity(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray
) -> None:
    """It isn't loaded: they needn't be refused."""
    identity = fit(pipe, picture, half_mask, 0)

    def call(**callback: Any) -> np.ndarray:
        return edit(pipe, picture, TARGETS[0], identity=identity, **callback)

    _, again = meanwhile(pipe, call, lambda: fit(pipe, picture, half_mask, 0), joins=False)
    assert again.digest == identity.digest
    alone = pipe.preview_mask(picture, SOURCE, "lady")
    _, mask = meanwhile(pipe, call, lambda: pipe.preview_mask(picture, SOURCE, "lady"), joins=False)
    assert mask.tobytes() == alone.tobytes()
    pipe.load_identity(identity)
    with pytest.raises(ValueError, match=r"Identities are loaded \(\[I\]\). A new identity is fitted to the bare"):
        fit(pipe, picture, half_mask, 0)


@pytest.mark.parametrize("shares", ["all", "the text encoder"])
def test_two_pipelines_that_share_modules_take_turns(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray, shares: str
) -> None:
    """As ``from_pipe`` makes them. An identity lies over the text encoder too."""
    own = {} if shares == "all" else {"unet": copy.deepcopy(pipe.unet)}
    other = S2EditPipeline.from_pipe(pipe, **own)
    other.set_progress_bar_config(disable=True)
    identities = [fit(pipe, picture, half_mask, seed) for seed in range(2)]
    alone = [edit(pipe, picture, TARGETS[0], identity=identity) for identity in identities]
    jobs = [((pipe, other)[i % 2], i // 2 % 2) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda job: edit(job[0], picture, TARGETS[0], identity=identities[job[1]]), jobs))
    for (_, which), result in zip(jobs, results, strict=True):
        np.testing.assert_array_equal(result, alone[which])


def test_a_pipeline_of_two_others_parts_joins_their_turns(pipe: S2EditPipeline, picture: Image.Image) -> None:
    other = copy.deepcopy(pipe)
    both = S2EditPipeline.from_pipe(pipe, unet=other.unet)
    entered, go_on, order = threading.Event(), threading.Event(), []

    def wait_inside(p: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        entered.set()
        assert go_on.wait(30)
        order.append("step")
        return tensors

    def alone() -> None:
        both.unload_identity()  # needs the model to itself
        order.append("alone")

    with ThreadPoolExecutor(2) as pool:
        words = TARGETS[0].replace("[I] ", "")
        first = pool.submit(edit, other, picture, words, callback_on_step_end=wait_inside)
        assert entered.wait(30)
        second = pool.submit(alone)
        assert not wait([second], timeout=0.3).done
        go_on.set()
        first.result(30), second.result(30)
    assert order == ["step", "step", "alone"]

    def call_the_other(p: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        third = S2EditPipeline.from_pipe(pipe, unet=fresh.unet)
        with pytest.raises(RuntimeError, match="start the second call after it"):
            third.unload_identity()
        return tensors

    fresh = copy.deepcopy(pipe)
    edit(fresh, picture, TARGETS[0].replace("[I] ", ""))  # has turns of its own by now
    edit(pipe, picture, TARGETS[0].replace("[I] ", ""), callback_on_step_end=call_the_other)


def test_tokenizers_serve_one_thread_at_a_time(
    pipe: S2EditPipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fast tokenizer keeps its padding from call to call, and drawings pad where edits don't."""
    inside: list[int] = []
    most = []
    tokenizer = type(pipe.tokenizer)
    call = tokenizer.__call__

    def tracked(self: Any, *arguments: Any, **options: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.002)
        try:
            return call(self, *arguments, **options)
        finally:
            inside.pop()

    monkeypatch.setattr(tokenizer, "__call__", tracked)

    def run(i: int) -> None:
        if i % 2:
            edit(pipe, picture, "a photo of a happy lady")
        else:
            pipe("a photo of a lady", num_inference_steps=1, output_type="np")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(8)))
    assert len(most) > 8 and max(most) == 1


def test_identities_of_two_pipelines_of_one_model_do_not_overwrite_each_other(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray
) -> None:
    first, second = (fit(pipe, picture, half_mask, seed) for seed in range(2))
    other = S2EditPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    pipe.load_identity(first)
    wanted = edit(pipe, picture, TARGETS[0])
    for call in (lambda: other.load_identity(second), lambda: fit(other, picture, half_mask, 2)):
        with pytest.raises(ValueError, match=r"Another pipeline that shares the .* has an identity loaded"):
            call()
    np.testing.assert_array_equal(edit(pipe, picture, TARGETS[0]), wanted)
    pipe.unload_identity()
    assert other.load_identity(second) == "[I]"
    other.unload_identity()


def test_no_callback_changes_the_model(pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray) -> None:
    """Also where the call has the model to itself: a fit, null-text inversion."""
    identity, errors = fit(pipe, picture, half_mask, 0), []

    def load(*_: Any) -> dict[str, Any]:
        for change in (lambda: pipe.load_identity(identity), pipe.unload_identity):
            with pytest.raises(RuntimeError, match="after the call, not in its callback") as error:
                change()
            errors.append(error)
        return {}

    fit(pipe, picture, half_mask, 1, callback_on_step_end=load)
    pipe.invert(picture, SOURCE, "null_text", 2, callback_on_step_end=load)
    assert len(errors) == 2 * (2 + 4) and pipe.identities == ()


def test_a_finished_call_holds_on_to_no_model(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray
) -> None:
    identity = fit(pipe, picture, half_mask, 0)
    mine = S2EditPipeline(**copy.deepcopy(pipe.components))
    mine.set_progress_bar_config(disable=True)
    edit(mine, picture, TARGETS[0], identity=identity)
    unet = weakref.ref(mine.unet)
    del mine
    gc.collect()
    assert unet() is None


def test_a_copy_of_the_pipeline_works_and_is_another(pipe: S2EditPipeline, picture: Image.Image) -> None:
    target = TARGETS[0].replace("[I] ", "")
    np.testing.assert_array_equal(edit(copy.deepcopy(pipe), picture, target), edit(pipe, picture, target))


def test_a_stop_sign_is_an_event(pipe: S2EditPipeline, picture: Image.Image) -> None:
    with pytest.raises(TypeError, match=r"stop must be a threading.Event"):
        pipe("a photo of a lady", picture, SOURCE, stop=True)
