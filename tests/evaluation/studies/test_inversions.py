"""The same model as epsilon- and as v-prediction."""

from __future__ import annotations

import torch

from s2edit_pipeline import load_avatars
from s2edit_pipeline.evaluation.studies.inversions import measure_inversions, seen_as
from s2edit_pipeline.noise_schedule import NoiseSchedule


def test_seen_as_the_other_prediction_is_the_same_model() -> None:
    pipe = load_avatars()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, pipe.unet.config.in_channels, 16, 16, generator=generator)
    context = torch.randn(1, 48, pipe.unet.config.cross_attention_dim, generator=generator)
    t, scheduler = 400, pipe.scheduler
    alpha_bar = float(scheduler.alphas_cumprod[t])
    with torch.no_grad():
        v = pipe.unet(x, t, encoder_hidden_states=context).sample
        with seen_as(pipe, "epsilon"):
            assert pipe.scheduler.config.prediction_type == "epsilon"
            epsilon = pipe.unet(x, t, encoder_hidden_states=context).sample
    levels = torch.tensor([1.0, float(alpha_bar)], dtype=torch.float64)
    a, s = levels.sqrt(), (1 - levels).sqrt()
    of_v, of_epsilon = (NoiseSchedule(a, s, torch.tensor([0]), kind) for kind in ("v_prediction", "epsilon"))
    for mine, theirs in zip(of_v.split(v, x, 1), of_epsilon.split(epsilon, x, 1), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=2e-4)
    assert pipe.scheduler is scheduler and not pipe.unet._forward_hooks


def test_direct_returns_the_autoencoders_picture_and_ddim_does_not() -> None:
    report = measure_inversions(
        load_avatars(), people=[0], methods=("direct", "ddim"), prediction_types=("epsilon",), num_inference_steps=8
    )
    direct, ddim = report.rows
    assert abs(direct.psnr - direct.autoencoder_psnr) < 0.01
    assert ddim.psnr < direct.psnr - 3
    assert report.table().count("epsilon") == 2
