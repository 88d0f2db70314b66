"""What a picture says of how it was made, read back by ourselves and by exiftool."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from s2edit_pipeline.picture_files import read_picture
from s2edit_pipeline.picture_marks import DRAWN, EDITED, Origin, origin_here, origin_of, with_origin
from s2edit_pipeline.picture_saving import save_picture

PICTURE = Image.new("RGB", (32, 24), "teal")
CAMERA = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:e="IPTC" '
    'e:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture" dc:format="image/jpeg">'
    "<dc:creator><rdf:Seq><rdf:li>Ada &amp; Bob</rdf:li></rdf:Seq></dc:creator></rdf:Description></rdf:RDF></x:xmpmeta>"
).replace("IPTC", "http://iptc.org/std/Iptc4xmpExt/2008-02-29/")


def marked(origin: Origin, path: Path, xmp: str | None = None) -> Path:
    source = read_picture(PICTURE)
    if xmp is not None:
        source = type(source)(**{**vars(source), "xmp": xmp.encode()})
    return save_picture(with_origin(source, origin), path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_a_saved_picture_says_how_it_was_made(suffix: str, tmp_path: Path) -> None:
    origin = Origin(EDITED, "S2EditPipeline with a model", "1.2", 'a photo of a <smiling> & "happy" lady, ぞう')
    assert origin_of(read_picture(marked(origin, tmp_path / f"a{suffix}")).xmp) == origin


def test_what_the_camera_said_stays(tmp_path: Path) -> None:
    xmp = read_picture(marked(Origin(EDITED, "tool"), tmp_path / "a.png", CAMERA)).xmp
    assert xmp is not None and b"Ada &amp; Bob" in xmp and b'dc:format="image/jpeg"' in xmp
    assert b"digitalCapture" not in xmp and origin_of(xmp) == Origin(EDITED, "tool")
    assert xmp.count(b"DigitalSourceType=") == 1


def test_a_second_edit_replaces_the_first_ones_mark(tmp_path: Path) -> None:
    first = read_picture(marked(Origin(EDITED, "tool", "1", "one"), tmp_path / "a.png"))
    second = with_origin(first, Origin(EDITED, "tool", "2"))
    assert origin_of(second.xmp) == Origin(EDITED, "tool", "2") and b"one" not in (second.xmp or b"")


def test_what_a_model_drew_whole_stays_so_when_edited(tmp_path: Path) -> None:
    drawn = read_picture(marked(origin_here("m", "a lady", drawn=True), tmp_path / "a.png"))
    assert origin_of(with_origin(drawn, origin_here("m", None)).xmp).source_type == DRAWN


@pytest.mark.parametrize(
    "xmp",
    [
        "<x:xmpmeta",
        "",
        '<!DOCTYPE a [<!ENTITY b "bbbbbbbbbb"><!ENTITY c "&b;&b;&b;&b;&b;&b;">]><a>&c;</a>',
        "<a>no rdf here</a>",
    ],
)
def test_xmp_that_cannot_be_read_is_replaced(xmp: str, tmp_path: Path) -> None:
    assert origin_of(xmp.encode()) == Origin()
    assert origin_of(read_picture(marked(Origin(EDITED), tmp_path / "a.png", xmp)).xmp) == Origin(EDITED)


def test_the_prompt_can_be_left_out() -> None:
    assert origin_here("a/model", None).prompt is None and origin_here("a/model", "words").prompt == "words"
    assert origin_here("a/model", None).system == "S2EditPipeline with a/model"
    assert origin_here("", None).source_type == EDITED


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="needs exiftool")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_exiftool_reads_it(suffix: str, tmp_path: Path) -> None:
    origin = Origin(EDITED, "S2EditPipeline with a model", "1.2", "a photo of a smiling lady")
    path = marked(origin, tmp_path / f"a{suffix}", CAMERA)
    said = json.loads(subprocess.run(["exiftool", "-j", "-XMP:all", path], capture_output=True, check=True).stdout)[0]
    assert said["DigitalSourceType"] == EDITED and said["Creator"] == "Ada & Bob"
    if "AISystemUsed" in said:  # exiftool 13.40 and later name it
        assert said["AISystemUsed"] == origin.system and said["AIPromptInformation"] == origin.prompt
