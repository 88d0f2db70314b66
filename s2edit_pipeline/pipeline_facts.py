"""What diffusers' callbacks read of a pipeline and set on it; each thread sees its own call's."""

from __future__ import annotations

from typing import Any

from .pipeline_turns import Turns


class CallFacts:
    """The pipeline's state as callbacks know it. Between calls there is none."""

    _turns: Turns

    def _fact(self, name: str) -> Any:
        call = self._turns.current()
        return None if call is None else call.facts.get(name)

    @property
    def interrupt(self) -> bool:
        """Whether this thread's call was asked to stop. Setting it, ``pipe.interrupt = True``, stops the call whose
        callback does it, or from outside every call that is at work; what there is comes back, and says so. To stop
        one call among several hand it ``stop=threading.Event()``."""
        call = self._turns.current()
        return call is not None and call.should_stop

    @interrupt.setter
    def interrupt(self, stop: bool) -> None:
        call = self._turns.current()
        for one in [call] if call is not None else list(self._turns.calls):
            one.interrupted = bool(stop)

    _interrupt = interrupt  # diffusers' own name for it

    @property
    def guidance_scale(self) -> float | None:
        """Of this thread's call. A callback changes the steps to come by ``pipe._guidance_scale = ...``."""
        scale: float | None = self._fact("guidance_scale")
        return scale

    @property
    def _guidance_scale(self) -> float | None:
        return self.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, scale: float) -> None:
        call = self._turns.current()
        if call is not None:
            call.facts["guidance_scale"] = scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether this thread's call is guided now."""
        return (self.guidance_scale or 1.0) > 1.0

    @property
    def num_timesteps(self) -> int | None:
        """The steps of this thread's call."""
        steps: int | None = self._fact("num_timesteps")
        return steps

    @property
    def guidance_rescale(self) -> float | None:
        """Of this thread's call."""
        rescale: float | None = self._fact("guidance_rescale")
        return rescale

    @property
    def clip_skip(self) -> int | None:
        """Of this thread's call."""
        skip: int | None = self._fact("clip_skip")
        return skip
