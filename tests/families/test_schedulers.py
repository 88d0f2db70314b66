"""Every scheduler of diffusers: it serves and stays as it was, or is named with the way out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import SchedulerMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image

from s2edit_pipeline import S2EditPipeline

SERVE = (
    "DDIMScheduler DDIMInverseScheduler DDIMParallelScheduler DDPMScheduler DDPMParallelScheduler PNDMScheduler "
    "LMSDiscreteScheduler EulerDiscreteScheduler EulerAncestralDiscreteScheduler HeunDiscreteScheduler "
    "DPMSolverMultistepScheduler DPMSolverMultistepInverseScheduler DPMSolverSinglestepScheduler "
    "DEISMultistepScheduler UniPCMultistepScheduler KDPM2DiscreteScheduler KDPM2AncestralDiscreteScheduler "
    "LCMScheduler TCDScheduler SASolverScheduler"
).split()
CANNOT = (
    "FlowMatchEulerDiscreteScheduler FlowMatchHeunDiscreteScheduler EDMEulerScheduler EDMDPMSolverMultistepScheduler "
    "CMStochasticIterativeScheduler ScoreSdeVeScheduler IPNDMScheduler DDPMWuerstchenScheduler"
).split()


def settings_of(scheduler: Any) -> Any:
    """All that a call could change in it."""
    values = {n: v.tolist() if isinstance(v, torch.Tensor) else v for n, v in vars(scheduler).items()}
    return {n: v for n, v in values.items() if isinstance(v, (int, float, str, list, tuple, type(None)))}


@pytest.mark.parametrize("name", SERVE)
def test_schedulers_that_serve(
    make_family: Callable[..., S2EditPipeline], wide_picture: Image.Image, name: str
) -> None:
    """The scheduler only says what the noise levels are: from one training schedule, one result."""
    pipe = make_family("sd1")
    config = {**pipe.scheduler.config, "timestep_spacing": "leading"}
    arguments: dict[str, Any] = {"source_prompt": "a sad lady", "num_inference_steps": 2, "output_type": "latent"}
    expected = pipe("a happy lady", wide_picture, **arguments).images
    pipe.scheduler = getattr(diffusers, name).from_config(config)
    before = settings_of(pipe.scheduler)
    identity = pipe.fit_identity(wide_picture, "a sad lady", "lady", num_steps=1, method="token", batch_size=1)
    assert bool(torch.isfinite(identity.rows["text_encoder"]).all())
    edited = pipe("a happy lady", wide_picture, **arguments).images
    assert repr(settings_of(pipe.scheduler)) == repr(before)  # there are NaNs among them
    torch.testing.assert_close(edited, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CANNOT)
def test_schedulers_that_cannot(
    make_family: Callable[..., S2EditPipeline], wide_picture: Image.Image, name: str
) -> None:
    """To draw, the stock pipeline's own serve too."""
    pipe = make_family("sd1")
    pipe.scheduler = getattr(diffusers, name)()
    message = rf"{name} has .*pipe.scheduler = DDIMScheduler.from_pretrained"
    with pytest.raises(ValueError, match=message):
        pipe("a lady", wide_picture, "a sad lady", num_inference_steps=1)
    if name in KarrasDiffusionSchedulers.__members__:
        assert pipe("a lady", num_inference_steps=1).images
    else:
        with pytest.raises(ValueError, match=message):
            pipe("a lady", num_inference_steps=1)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type='continuous'"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ("DDIMScheduler", {"prediction_type": "sample"}, "prediction_type='sample'"),
    ],
)
def test_settings_that_cannot(
    make_family: Callable[..., S2EditPipeline],
    wide_picture: Image.Image,
    name: str,
    settings: dict[str, Any],
    message: str,
) -> None:
    pipe = make_family("sd1")
    pipe.scheduler = getattr(diffusers, name)(**settings)
    with pytest.raises(ValueError, match=message):
        pipe("a lady", wide_picture, "a sad lady", num_inference_steps=1)


def test_both_lists_name_real_schedulers() -> None:
    for name in (*SERVE, *CANNOT):
        kind = getattr(diffusers, name)
        assert inspect.isclass(kind) and issubclass(kind, SchedulerMixin), name
