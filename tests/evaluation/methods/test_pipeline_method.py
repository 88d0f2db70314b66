"""The pipeline as a system of the benchmark: against the same calls made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.evaluation.costs.counts import count_unet
from s2edit_pipeline.evaluation.methods.pipeline_arguments import PIPELINE_METHODS
from s2edit_pipeline.evaluation.methods.registry import METHODS, MethodSpec
from s2edit_pipeline.prompt_words import insert_token

SOURCE, TARGET = "a photo of a smiling lady with glasses", "a photo of a sad lady with glasses"
STEPS = 3


@pytest.mark.parametrize("name", ["S2Edit", "S2Edit, the paper's", "edit-friendly + P2P"])
def test_a_setting_is_its_call(pipe: S2EditPipeline, picture: Image.Image, name: str) -> None:
    base = PIPELINE_METHODS[name]
    fit = None if base.fit is None else {"num_steps": 1}
    changes = {"guidance_scale": 6.0}
    method = MethodSpec("mine", name, {"fit": fit, "edit": changes}).make(pipe, STEPS)
    assert method.name == "mine"
    with count_unet(pipe.unet) as counts:
        prepared = method.prepare(picture, SOURCE, "lady", seed=5)
    assert counts.evaluations >= STEPS
    (got,) = prepared([TARGET])
    identity, target = None, TARGET
    if base.fit is not None:
        identity = pipe.fit_identity(
            picture, SOURCE, "lady", generator=torch.Generator().manual_seed(5), num_steps=1, **base.fit
        )
        target = insert_token(target, "lady", "[I]")
    seeded = [torch.Generator().manual_seed(5) for _ in range(2)]
    bound = changes if base.inversion == "null_text" else {}
    noise = {"generator": seeded[0]} if base.inversion == "edit_friendly" else {}
    inversion = pipe.invert(picture, SOURCE, base.inversion, STEPS, identity=identity, **noise, **bound)
    arguments = {"keep_pixels": False, **base.edit, **changes}
    result = pipe(target, picture, SOURCE, identity, inversion, **arguments)
    assert np.array_equal(got, result.images[0])
    # in one call the source's row joins the targets' batch, which rounds otherwise
    result = pipe(target, picture, SOURCE, identity, base.inversion, STEPS, generator=seeded[1], **arguments)
    assert np.abs(np.asarray(got, int) - np.asarray(result.images[0], int)).max() <= 1
    assert pipe.identities == ()
    maps = prepared.attention_maps(TARGET)
    assert "lady" in maps and ("[I]" in maps) == (identity is not None)


def test_the_reference_rows_edit_nothing(pipe: S2EditPipeline, picture: Image.Image) -> None:
    for name in ("unedited", "autoencoder alone"):
        prepared = METHODS[name].make(name, pipe, STEPS).prepare(picture, SOURCE, "lady", 0)
        first, second = prepared([TARGET, "anything"])
        assert np.array_equal(first, second)
        if name == "unedited":
            assert np.array_equal(first, picture)
    with torch.no_grad():
        x = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        back = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample[0].permute(1, 2, 0).clamp(-1, 1)
    assert np.abs(127.5 * (back.numpy() + 1) - np.asarray(first)).max() < 1
