import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from s2edit_pipeline.avatars import MODEL_FOLDER, latent_dataset
from s2edit_pipeline.avatars.autoencoder_training import to_tensor
from s2edit_pipeline.avatars.dataset import load_pictures
from s2edit_pipeline.avatars.latent_dataset import load_latents
from s2edit_pipeline.avatars.world import sample


@pytest.fixture
def vae(monkeypatch):
    monkeypatch.setattr(latent_dataset, "CHUNK", 3)
    return AutoencoderKL.from_pretrained(str(MODEL_FOLDER / "vae"))


def test_latents_are_the_encoders_means_of_the_drawn_pictures(vae, tmp_path):
    people = load_latents(vae, 6, tmp_path)
    both = people + load_latents(vae, 3, tmp_path, kind="creature")
    assert both.subjects == [sample("person", i, "varied") for i in range(6)] + [
        sample("creature", i, "varied") for i in range(3)
    ]
    drawn = load_pictures(6, "varied", masks=True) + load_pictures(3, "varied", kind="creature", masks=True)
    with torch.no_grad():
        expected = vae.encode(to_tensor(drawn.images)).latent_dist.mode()
    assert both.latents.dtype == torch.float16
    assert ((both.latents - expected).abs() <= 1e-3 * expected.abs() + 1e-4).all()
    assert np.array_equal(both.masks, drawn.masks)


def test_what_is_encoded_is_not_encoded_again(vae, tmp_path):
    first = load_latents(vae, 3, tmp_path)
    again = load_latents(None, 3, tmp_path)
    assert torch.equal(first.latents, again.latents) and np.array_equal(first.masks, again.masks)
    assert len(list(tmp_path.iterdir())) == 1


def test_half_a_file_is_refused(vae, tmp_path):
    with pytest.raises(ValueError, match="4 pictures don't fill files of 3; ask for 6"):
        load_latents(vae, 4, tmp_path)
