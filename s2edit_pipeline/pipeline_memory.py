"""Out of memory: what was taken is given back, and the message names what to lower."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

FIT_ADVICE = (
    "Lower batch_size=, pass gradient_checkpointing=True, or method='token', which tunes no weights; or load the model "
    "in half precision, from_pretrained(..., dtype=torch.bfloat16)."
)
EDIT_ADVICE = (
    "Pass fewer prompts at once, or keep_attention=KeepAttention(max_bytes=0); call pipe.vae.enable_tiling() for large "
    "pictures, or pipe.enable_model_cpu_offload(); or work smaller, height= and width=."
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is PyTorch's, on any device: on a CPU it has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Within the context, an error of memory comes with ``advice``, and holds on to nothing.

    Raises:
        torch.OutOfMemoryError: in the place of PyTorch's own, which may be of another type.
    """
    try:
        yield
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        what = str(error).partition(" If reserved")[0].strip()
        traceback.clear_frames(error.__traceback__)  # they hold the tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise torch.OutOfMemoryError(f"{what} Nothing was changed. {advice}")
