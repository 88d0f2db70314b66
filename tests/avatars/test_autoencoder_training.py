import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity as skimage_ssim

from s2edit_pipeline.avatars import autoencoder_training
from s2edit_pipeline.avatars.autoencoder_training import (
    LATENT_CHANNELS,
    PATCH,
    AutoencoderSettings,
    build_autoencoder,
    fit_linear_code,
    install_linear_encoder,
    mean_psnr,
    reconstruct,
    structural_similarity,
    to_tensor,
    train_autoencoder,
    trained_parameters,
)
from s2edit_pipeline.avatars.dataset import PictureSet
from s2edit_pipeline.avatars.world import IMAGE_SIZE

CELLS = IMAGE_SIZE // PATCH


def _patches(images):
    """(N, cells, cells, 192) float64 in [-1, 1], written out from the definition: (y, x, rgb)."""
    out = np.empty((len(images), CELLS, CELLS, 3 * PATCH**2))
    for row in range(CELLS):
        for column in range(CELLS):
            cell = images[:, PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)]
            out[:, row, column] = cell.reshape(len(images), -1) / 127.5 - 1.0
    return out


@pytest.fixture(scope="module")
def code(pictures):
    return fit_linear_code(pictures.images)


@pytest.fixture(scope="module")
def latents(pictures, code):
    """The code of the pictures, (8, channels, cells, cells), as a sum in float64."""
    centred = _patches(pictures.images) - code.mean.double().numpy()
    return torch.from_numpy(np.einsum("nyxp,pc->ncyx", centred, code.analysis.double().numpy()))


# ---------------------------------------------------------------------------- pictures and their distance


def test_tensors_are_in_minus_one_to_one():
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    x = to_tensor(images)
    assert x.shape == (2, 3, 4, 4)
    assert x[1, 2, 3, 0].item() == pytest.approx(images[1, 3, 0, 2] / 255 * 2 - 1, abs=1e-6)


def test_psnr_is_the_mean_of_the_pictures_own():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)
    expected = []
    for one, other in zip(a, b, strict=True):
        squares = [(int(p) - int(q)) ** 2 for p, q in zip(one.flat, other.flat, strict=True)]
        expected.append(10 * np.log10(255 * 255 / (sum(squares) / len(squares))))
    assert mean_psnr(a, b) == pytest.approx(np.mean(expected), abs=1e-9)


def test_crops_lie_on_the_grid_three_times_in_four_and_every_second_has_other_colours():
    # red is 64 + x, green 64 + y, blue 100: a crop says where it is from
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    picture = np.stack([64 + x, 64 + y, np.full_like(x, 100)], -1).astype(np.uint8)
    number, side = 1500, 16
    batch = autoencoder_training._batch(picture[None], number, side, np.random.default_rng(0)).double()
    plain = aligned = 0
    for crop in batch:
        values = (crop + 1) * 127.5
        slopes = torch.stack([values[:, 0, 1] - values[:, 0, 0], values[:, 1, 0] - values[:, 0, 0]], 1)
        if torch.allclose(values, values.round(), atol=1e-3) and torch.allclose(
            slopes, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]).double(), atol=1e-3
        ):
            plain += 1
            left, top = round(values[0, 0, 0].item()) - 64, round(values[1, 0, 0].item()) - 64
            aligned += left % PATCH == 0 and top % PATCH == 0
        else:
            # each channel is one of the picture's times 0.8 to 1, plus up to 0.2 of the half range
            horizontal, vertical = sorted(slopes[:, 0].tolist()), sorted(slopes[:, 1].tolist())
            for slope in (horizontal, vertical):
                assert slope[:2] == pytest.approx([0, 0], abs=1e-3) and 0.79 < slope[2] < 1.001
            flat = crop[(slopes == 0).all(1) | (slopes.abs() < 1e-3).all(1)][0, 0, 0].item()
            gained = [gain * (100 / 127.5 - 1) for gain in (0.8, 1.0)]
            assert min(gained) - 0.2 <= flat <= max(gained) + 0.2
    assert plain / number == pytest.approx(0.5, abs=4 * (0.25 / number) ** 0.5)
    expected = 0.75 + 0.25 / 64
    assert aligned / plain == pytest.approx(expected, abs=4 * (expected * (1 - expected) / plain) ** 0.5)


# ---------------------------------------------------------------------------- the linear code


def test_the_code_is_the_leading_principal_components(pictures, code):
    patches = _patches(pictures.images).reshape(-1, 3 * PATCH**2)
    mean = patches.mean(0)
    _, singular, components = np.linalg.svd(patches - mean, full_matrices=False)
    leading = components[:LATENT_CHANNELS]
    variance = singular[:LATENT_CHANNELS] ** 2 / (len(patches) - 1)
    assert np.abs(code.mean.numpy() - mean).max() < 1e-6
    analysis, synthesis = code.analysis.double().numpy(), code.synthesis.double().numpy()
    # the same subspace, whatever the components' signs
    assert np.abs(analysis @ synthesis - leading.T @ leading).max() < 1e-4
    # half whitened, mean variance 1
    z = (patches - mean) @ analysis
    assert z.var(0, ddof=1) == pytest.approx(np.sqrt(variance) / np.sqrt(variance).mean(), rel=1e-3)
    assert np.abs(np.corrcoef(z.T) - np.eye(LATENT_CHANNELS)).max() < 1e-3


def test_encoding_is_the_sum_over_a_patch(pictures, code, latents):
    assert (code.encode(to_tensor(pictures.images)) - latents).abs().max() < 1e-4


def test_decoding_is_the_projection(pictures, code, latents):
    patches = _patches(pictures.images)
    mean = code.mean.double().numpy()
    wanted = (patches - mean) @ (code.analysis.double() @ code.synthesis.double()).numpy() + mean
    pixels = code.decode(latents.float()).permute(0, 2, 3, 1).numpy()
    got = _patches((pixels + 1) * 127.5)
    assert np.abs(got - wanted).max() < 1e-4


def test_a_full_code_gives_the_picture_back(pictures):
    x = to_tensor(pictures.images)
    full = fit_linear_code(pictures.images, channels=3 * PATCH**2 // 2)
    low = fit_linear_code(pictures.images)
    errors = [(c.decode(c.encode(x)) - x).square().mean().item() for c in (low, full)]
    assert errors[1] < 0.1 * errors[0]


def test_the_encoder_is_the_linear_code(pictures, code, latents):
    torch.manual_seed(3)
    vae = build_autoencoder()
    decoder = copy.deepcopy(vae.decoder.state_dict())
    install_linear_encoder(vae, code)
    with torch.no_grad():
        posterior = vae.encode(to_tensor(pictures.images)).latent_dist
    error = (posterior.mode() - latents).square().mean((0, 2, 3)).sqrt() / latents.std((0, 2, 3))
    assert error.max() < 0.005
    assert posterior.std.max() < 1e-6
    assert all(torch.equal(weight, vae.decoder.state_dict()[name]) for name, weight in decoder.items())


# ---------------------------------------------------------------------------- training


def _train(pictures, folder, *, start_from=None, stop_at=None, **more):
    """Three steps of two pictures, the last of them whole."""
    settings = replace(AutoencoderSettings(num_steps=3, whole_picture_steps=1, batch_size=2), **more)
    validation = PictureSet(pictures.subjects[:2], pictures.images[:2], None)
    return train_autoencoder(pictures, validation, folder, settings, start_from=start_from, stop_at=stop_at)


def test_the_first_step_follows_the_gradient_of_its_loss(pictures, code, tmp_path):
    _train(pictures, tmp_path, stop_at=1, seed=5)
    state = torch.load(tmp_path / "autoencoder.ckpt", weights_only=True)

    torch.manual_seed(5)
    vae = build_autoencoder().double()
    before = [p.detach().clone() for p in trained_parameters(vae)]
    x = autoencoder_training._batch(pictures.images, 2, 64, np.random.default_rng((5, 0)))
    z = code.encode(x)
    z = z + 0.03 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    error = vae.decode(z.double()).sample - x.double()
    similarity = structural_similarity(error + x.double() + 1, x.double() + 1)
    loss = (error**2).mean() + 0.2 * error.abs().mean() + 0.1 * (1 - similarity)
    gradients = torch.autograd.grad(loss, trained_parameters(vae))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    first = json.loads((tmp_path / "autoencoder.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-4)
    # the optimizer's first moment holds a tenth of the gradient, clipped to norm 1
    moments = [entry["exp_avg"].double() for entry in state["optimizer"]["state"].values()]
    wanted = torch.cat([g.flatten() for g in gradients]) / norm.clamp(min=1) / 10
    assert (torch.cat([m.flatten() for m in moments]) - wanted).norm() < 1e-3 * wanted.norm()
    # the first of a hundred steps of warm-up: AdamW moves each weight by the learning rate
    vae.load_state_dict(state["model"])
    moved = max((p - b).abs().max().item() for p, b in zip(trained_parameters(vae), before, strict=True))
    assert moved == pytest.approx(2e-3 / 100, rel=0.02)


def test_structural_similarity_is_scikit_images(pictures):
    rng = np.random.default_rng(0)
    a = pictures.images[:3].astype(float)
    b = np.clip(a + rng.normal(0, 9, a.shape), 0, 255)
    wanted = np.mean([skimage_ssim(p, q, channel_axis=-1, data_range=255) for p, q in zip(a, b, strict=True)])
    x, y = (torch.from_numpy(i).permute(0, 3, 1, 2) / 127.5 for i in (a, b))
    assert structural_similarity(x, y).item() == pytest.approx(wanted, abs=1e-9)
    assert structural_similarity(x, x).item() == pytest.approx(1)


def test_it_starts_from_the_decoder_that_it_is_given(pictures, tmp_path):
    trained = _train(pictures, tmp_path / "first", num_steps=5, whole_picture_steps=0)
    trained.save_pretrained(tmp_path / "vae")
    untouched = _train(pictures, tmp_path / "second", num_steps=0, start_from=tmp_path / "vae")
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight, untouched.state_dict()[name]), name


def test_a_few_steps_make_it_better(pictures, tmp_path):
    before = _train(pictures, tmp_path / "none", num_steps=0)
    after = _train(pictures, tmp_path, num_steps=10, whole_picture_steps=0)
    shown = pictures.images[:2]
    scores = [mean_psnr(shown, reconstruct(vae, shown)) for vae in (before, after)]
    assert scores[1] > scores[0] + 2
    records = [json.loads(line) for line in (tmp_path / "autoencoder.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 10 and records[-1]["psnr"] == pytest.approx(scores[1], abs=1e-3)
    encoders = [vae.encoder.state_dict() for vae in (before, after)]
    assert all(torch.equal(weight, encoders[1][name]) for name, weight in encoders[0].items())


def test_going_on_gives_the_same_as_going_through(pictures, tmp_path):
    whole = _train(pictures, tmp_path / "whole")
    _train(pictures, tmp_path / "parts", stop_at=1)
    parts = _train(pictures, tmp_path / "parts")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, parts.state_dict()[name]), name
    for part in ("model", "average", "optimizer"):
        states = [torch.load(tmp_path / f / "autoencoder.ckpt", weights_only=True)[part] for f in ("whole", "parts")]
        torch.testing.assert_close(*states, rtol=0, atol=0)
