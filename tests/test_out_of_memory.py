"""Out of memory in the middle of a call: the memory is given back, the pipeline is as found, the mend is named."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from PIL import Image

from s2edit_pipeline import S2EditPipeline

from .conftest import PROMPT

ON_A_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but unallocated ...")
ON_A_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize("error", [ON_A_GPU, ON_A_CPU], ids=["GPU", "CPU"])
@pytest.mark.parametrize("call", ["fit", "edit", "invert"])
def test_the_memory_comes_back_and_the_mend_is_named(
    error: Exception, call: str, pipe: S2EditPipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[weakref.ref[torch.Tensor]] = []
    denoise = type(pipe.family).denoise

    def run_out(*arguments: Any, **options: Any) -> torch.Tensor:
        if len(taken) < 5:
            output = denoise(*arguments, **options)
            taken.append(weakref.ref(output))
            return output
        held = torch.zeros(1000)
        taken.append(weakref.ref(held))
        raise error

    weights = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    monkeypatch.setattr(type(pipe.family), "denoise", run_out)
    wanted = "batch_size" if call == "fit" else "keep_attention"
    with pytest.raises(torch.OutOfMemoryError, match=f"memory.*{wanted}") as caught:
        if call == "fit":
            pipe.fit_identity(picture, PROMPT, "lady", num_steps=3)
        elif call == "edit":
            pipe(PROMPT.replace("smiling", "sad"), picture, PROMPT, num_inference_steps=4)
        else:
            pipe.invert(picture, PROMPT, num_inference_steps=8)
    assert "If reserved" not in str(caught.value)
    assert len(taken) == 6 and all(one() is None for one in taken)
    monkeypatch.undo()
    assert pipe.identities == () and not getattr(pipe.unet, "peft_config", None)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.unet.state_dict().items())
    pipe(PROMPT.replace("smiling", "sad"), picture, PROMPT, num_inference_steps=2)


def test_other_errors_stay_as_they_are(
    pipe: S2EditPipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("a kernel is missing")

    monkeypatch.setattr(type(pipe.family), "denoise", fail)
    with pytest.raises(RuntimeError, match=r"^a kernel is missing$"):
        pipe.invert(picture, PROMPT, num_inference_steps=2)
