"""Signed manifests: read back, verified, and tampering found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("c2pa")

from s2edit_pipeline.commands.content_credentials import (
    SELF_MADE,
    Certificate,
    credentials_of,
    self_made_certificate,
    sign_picture,
)
from s2edit_pipeline.picture_files import read_picture
from s2edit_pipeline.picture_marks import EDITED, origin_here, origin_of, with_origin
from s2edit_pipeline.picture_saving import save_picture


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    return self_made_certificate()


def picture(folder: Path, suffix: str) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    source = with_origin(read_picture(Image.fromarray(noise)), origin_here("a model", "a smiling lady"))
    return save_picture(source, folder / f"ada{suffix}")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_a_manifest_is_read_back_and_verified(suffix: str, certificate: Certificate, tmp_path: Path) -> None:
    path = picture(tmp_path, suffix)
    assert credentials_of(path) is None
    before = read_picture(path)
    sign_picture(path, origin_of(before.xmp), certificate)
    said = credentials_of(path)
    assert said is not None and said.state in ("Valid", "Trusted")
    assert said.actions == ("c2pa.opened", "c2pa.edited") and said.source_type == EDITED
    assert said.tool == "S2EditPipeline with a model" and said.signer is not None and SELF_MADE in said.signer
    after = read_picture(path)
    assert np.array_equal(np.asarray(after.rgb), np.asarray(before.rgb))
    assert origin_of(after.xmp) == origin_of(before.xmp)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_tampering_is_found(suffix: str, certificate: Certificate, tmp_path: Path) -> None:
    path = picture(tmp_path, suffix)
    sign_picture(path, origin_of(read_picture(path).xmp), certificate)
    data = bytearray(path.read_bytes())
    data[-40] ^= 0xFF  # in the pixels
    path.write_bytes(data)
    said = credentials_of(path)
    assert said is not None and said.state == "Invalid" and "assertion.dataHash.mismatch" in said.problems


def test_a_second_edit_names_the_first(certificate: Certificate, tmp_path: Path) -> None:
    first = picture(tmp_path, ".png")
    sign_picture(first, origin_here("a model", "one"), certificate)
    second = save_picture(read_picture(first), tmp_path / "second.png")
    sign_picture(second, origin_here("a model", "two"), certificate, before=first)
    said = credentials_of(second)
    assert said is not None and said.state in ("Valid", "Trusted") and said.actions[-1] == "c2pa.edited"


def test_a_file_that_cannot_be_signed_stays_as_it_is(certificate: Certificate, tmp_path: Path) -> None:
    path = picture(tmp_path, ".png")
    data = path.read_bytes()
    with pytest.raises(ValueError, match="can't be signed"):
        sign_picture(path, origin_here("", None), Certificate(certificate.chain, "no key"))
    assert path.read_bytes() == data and list(tmp_path.iterdir()) == [path]
