"""Several threads on one pipeline: which calls run side by side, which wait their turn, and how one is stopped.

Calls that use the same weights run side by side. What changes weights (a fit, loading, another identity for one call)
has the model to itself. Whoever came first goes first, so that nobody waits for ever.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import nn


class Interrupted(Exception):
    """A call was stopped between two steps; never seen by users."""


@dataclass
class CallState:
    """What diffusers' callbacks read of a pipeline about the call that they are in; None where it says nothing.

    Attributes:
        guidance_scale: of the steps to come; a callback may change it.
        guidance_rescale, clip_skip: as they were passed.
        num_timesteps: how many steps the call takes.
    """

    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    clip_skip: int | None = None
    num_timesteps: int | None = None


@dataclass(eq=False)
class Call:
    """One call at work.

    Attributes:
        stop: the caller's own stop sign, with ``is_set()`` as ``threading.Event`` has it, or None.
        interrupted: whether it was asked to stop.
        state: what callbacks read of it.
    """

    stop: Any = None
    interrupted: bool = False
    state: CallState = field(default_factory=CallState)

    @property
    def should_stop(self) -> bool:
        if self.stop is not None and self.stop.is_set():
            self.interrupted = True
        return self.interrupted

    def check(self) -> None:
        """Raises:
        Interrupted: the call was asked to stop.
        """
        if self.should_stop:
            raise Interrupted


def in_a_call(what: str) -> RuntimeError:
    """The error of doing ``what`` in the middle of a call."""
    return RuntimeError(
        f"{what} changes the model, and this thread is in the middle of a call that uses it. Do it after the call, not "
        "in its callback."
    )


def check_stop_sign(stop: Any) -> None:
    """Raises:
    TypeError: ``stop`` is no stop sign.
    """
    if stop is not None and not callable(getattr(stop, "is_set", None)):
        raise TypeError(f"stop must be a threading.Event, whose set() stops the call, not {type(stop).__name__}.")


_CALL: ContextVar[tuple[Call, ...]] = ContextVar("s2edit_call", default=())
"""The calls that this thread is in, the innermost last."""


class Turns:
    """Who is at work on one model."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[object] = []
        self._key: Hashable = None
        self._owners: list[int] = []
        self._ended = threading.local()
        self.calls: list[Call] = []

    @contextmanager
    def shared(self, key: Hashable, enter: Callable[[], None], leave: Callable[[], None]) -> Iterator[None]:
        """Work side by side with others of the same ``key``; ``enter`` is called before the first, ``leave`` after the
        last, while nobody else is at work. A thread that is at work already may come in again.

        Raises:
            RuntimeError: this thread is at work with another key, and would wait for itself.
        """
        with self._changed:
            is_alone = threading.get_ident() in self._owners and isinstance(self._key, _Alone)
        if is_alone:  # a call in the course of exclusive work
            enter()
        else:
            self._begin(key, enter)
        try:
            yield
        finally:
            leave() if is_alone else self._end(leave)

    @contextmanager
    def exclusive(self, what: str) -> Iterator[None]:
        """Work alone. A thread that is alone already may come in again.

        Args:
            what: it does, for the message.

        Raises:
            RuntimeError: this thread is in the middle of a call that shares the model.
        """
        me = threading.get_ident()
        with self._changed:
            inside = me in self._owners
        if inside and isinstance(self._key, _Alone):
            yield
            return
        if inside:
            raise in_a_call(what)
        self._begin(_Alone(), _nothing)
        try:
            yield
        finally:
            self._end(_nothing)

    def _begin(self, key: Hashable, enter: Callable[[], None]) -> None:
        me, ticket = threading.get_ident(), object()
        with self._changed:
            if me in self._owners:
                if key != self._key:
                    raise RuntimeError(
                        "This thread is in the middle of a call with other identities; start the second call after it, "
                        "not in its callback."
                    )
                self._owners.append(me)
                return
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is ticket and (not self._owners or self._key == key))
                if not self._owners:
                    enter()
                    self._key = key
                self._owners.append(me)
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def _end(self, leave: Callable[[], None]) -> None:
        with self._changed:
            self._owners.remove(threading.get_ident())
            try:
                if not self._owners:
                    self._key = None  # it may hold on to the model
                    leave()
            finally:
                self._changed.notify_all()

    def is_idle(self) -> bool:
        """Whether nobody is at work, or waits.

        Raises:
            RuntimeError: this thread itself is at work.
        """
        with self._changed:
            if threading.get_ident() in self._owners:
                raise RuntimeError(
                    "This thread is in the middle of a call with a model of which the other pipeline shares a part; "
                    "start the second call after it, not in its callback."
                )
            return not self._owners and not self._waiting

    @contextmanager
    def unchanged(self) -> Iterator[Hashable]:
        """Within the context nobody's turn begins or ends; gives the key of those at work, None where nobody is."""
        with self._changed:
            yield self._key if self._owners else None

    @contextmanager
    def call(self, stop: Any = None) -> Iterator[Call]:
        """A call of this thread, which can be stopped alone."""
        one = Call(stop)
        self.calls.append(one)
        token = _CALL.set((*_CALL.get(), one))
        try:
            yield one
        finally:
            _CALL.reset(token)
            self.calls.remove(one)
            self._ended.state = one.state

    def current(self) -> Call | None:
        """The call that this thread is in, or None."""
        return next((one for one in reversed(_CALL.get()) if one in self.calls), None)

    @property
    def state(self) -> CallState:
        """Of the call that this thread is in, or of its last one."""
        call = self.current()
        state: CallState = getattr(self._ended, "state", CallState()) if call is None else call.state
        return state


class _Alone:
    """A key that no other is equal to."""


def _nothing() -> None:
    pass


_TURNS: weakref.WeakKeyDictionary[nn.Module, Turns] = weakref.WeakKeyDictionary()
_TURNS_LOCK = threading.Lock()


def turns_of(modules: Iterable[nn.Module]) -> Turns:
    """The turns at ``modules``: pipelines that share any of them, as ``from_pipe`` makes them, take turns as well.

    Raises:
        RuntimeError: they bring two models' turns together, and this thread is in the middle of a call at one of these.
    """
    every = [getattr(module, "_orig_mod", module) for module in modules]
    while True:
        with _TURNS_LOCK:
            known = list(dict.fromkeys(_TURNS[module] for module in every if module in _TURNS))
            turns, *others = known or [Turns()]
            if all(other.is_idle() for other in others):
                for module in [*every, *(module for module, its in _TURNS.items() if its in others)]:
                    _TURNS[module] = turns
                return turns
        time.sleep(0.01)  # the others' calls are let come to their end
