"""What diffusers' callbacks read of a pipeline and set on it; each thread sees its own call's, or its last one's."""

from __future__ import annotations

from .family_base import ModelFamily
from .pipeline_turns import Turns


class CallFacts:
    """The pipeline's state as callbacks know it. After a call it stands until this thread's next one."""

    _turns: Turns
    family: ModelFamily

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
        return self._turns.state.guidance_scale

    @property
    def _guidance_scale(self) -> float | None:
        return self.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, scale: float) -> None:
        call = self._turns.current()
        if call is not None:
            call.state.guidance_scale = scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the guidance scale of this thread's call asks for the unconditional branch: whether it is above 1, in
        a model that isn't told the scale itself."""
        return self.guidance_scale is not None and self.family.guides(self.guidance_scale)

    @property
    def num_timesteps(self) -> int | None:
        """The steps of this thread's call."""
        return self._turns.state.num_timesteps

    @property
    def guidance_rescale(self) -> float | None:
        """Of this thread's call."""
        return self._turns.state.guidance_rescale

    @property
    def clip_skip(self) -> int | None:
        """Of this thread's call."""
        return self._turns.state.clip_skip
