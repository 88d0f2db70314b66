"""Marks of origin: that a picture was made with a trained model, said in its XMP as IPTC's standard has it.

IPTC Photo Metadata Standard 2025.1: "Digital Source Type" of the NewsCodes vocabulary, "AI System Used", "AI System
Version Used" and "AI Prompt Information".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from types import MappingProxyType
from xml.dom import minidom
from xml.parsers.expat import ExpatError

from diffusers.utils import logging

from .picture_files import SourcePicture

logger = logging.get_logger(__name__)

SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
EDITED, DRAWN = f"{SOURCE_TYPES}compositeWithTrainedAlgorithmicMedia", f"{SOURCE_TYPES}trainedAlgorithmicMedia"
"""A picture that a model has changed in part; one that it has made whole."""

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_PROPERTIES = MappingProxyType(
    {
        "source_type": "DigitalSourceType",
        "system": "AISystemUsed",
        "version": "AISystemVersionUsed",
        "prompt": "AIPromptInformation",
    }
)
_EMPTY = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    f'<rdf:RDF xmlns:rdf="{_RDF}"></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)


@dataclass(frozen=True)
class Origin:
    """What a picture says of how it was made; None where it doesn't say.

    Attributes:
        source_type: an address of IPTC's vocabulary of digital source types.
        system: the tool and its model.
        version: the tool's.
        prompt: the words that it was made by.
    """

    source_type: str | None = None
    system: str | None = None
    version: str | None = None
    prompt: str | None = None


def origin_here(base_model: str, prompt: str | None, *, drawn: bool = False) -> Origin:
    """The mark of a picture that this package has made.

    Args:
        base_model: what the model calls itself, or "".
        prompt: None leaves it out.
        drawn: made whole, from noise; else a picture was edited.
    """
    try:
        version = metadata.version("s2edit-pipeline")
    except metadata.PackageNotFoundError:  # loaded as a custom pipeline alone
        version = None
    system = "S2EditPipeline" + (f" with {base_model}" if base_model else "")
    return Origin(DRAWN if drawn else EDITED, system, version, prompt)


def with_origin(picture: SourcePicture, origin: Origin) -> SourcePicture:
    """``picture`` with ``origin`` in its XMP; whatever else is there stays.

    A picture that says it was drawn whole by a model keeps saying so after an edit. XMP that can't be read is replaced,
    with a warning.
    """
    before = origin_of(picture.xmp)
    if before.source_type == DRAWN:
        origin = replace(origin, source_type=DRAWN)
    document = _parsed(picture.xmp)
    if document is None:
        if picture.xmp:
            logger.warning("The picture's XMP can't be read; it is replaced by a new one.")
        document = minidom.parseString(_EMPTY)
    for description in _descriptions(document):
        for name in _PROPERTIES.values():
            if description.hasAttributeNS(_IPTC, name):
                description.removeAttributeNS(_IPTC, name)
            for child in _children(description, _IPTC, name):
                description.removeChild(child)
    values = {name: value for field, name in _PROPERTIES.items() if (value := getattr(origin, field)) is not None}
    _rdf(document).appendChild(_description(document, values))
    packet = "".join(node.toxml() for node in document.childNodes)
    return replace(picture, xmp=packet.encode())


def origin_of(xmp: bytes | None) -> Origin:
    """What an XMP packet says; nothing where there is none, or none that can be read."""
    document = _parsed(xmp)
    found: dict[str, str] = {}
    for description in _descriptions(document) if document is not None else ():
        for field, name in _PROPERTIES.items():
            value = description.getAttributeNS(_IPTC, name)
            for child in _children(description, _IPTC, name):
                value = child.getAttributeNS(_RDF, "resource") or _text(child)
            if value:
                found[field] = value
    return Origin(**found)


def _parsed(xmp: bytes | None) -> minidom.Document | None:
    if not xmp or b"<!DOCTYPE" in xmp or b"<!ENTITY" in xmp:  # XMP has neither, but bombs do
        return None
    try:
        document = minidom.parseString(xmp.strip(b"\x00 \r\n\t"))
    except (ExpatError, ValueError):
        return None
    return document if document.getElementsByTagNameNS(_RDF, "RDF") else None


def _rdf(document: minidom.Document) -> minidom.Element:
    return document.getElementsByTagNameNS(_RDF, "RDF")[0]


def _children(parent: minidom.Element, namespace: str, name: str) -> list[minidom.Element]:
    elements = [child for child in parent.childNodes if isinstance(child, minidom.Element)]
    return [child for child in elements if (child.namespaceURI, child.localName) == (namespace, name)]


def _descriptions(document: minidom.Document) -> list[minidom.Element]:
    return _children(_rdf(document), _RDF, "Description")


def _description(document: minidom.Document, values: Mapping[str, str]) -> minidom.Element:
    description = document.createElementNS(_RDF, "rdf:Description")
    description.setAttribute("xmlns:rdf", _RDF)
    description.setAttribute("xmlns:Iptc4xmpExt", _IPTC)
    description.setAttributeNS(_RDF, "rdf:about", "")
    for name, value in values.items():
        if name == "AIPromptInformation":  # the one that IPTC lets have several languages
            description.appendChild(_alternatives(document, name, value))
        else:
            description.setAttributeNS(_IPTC, f"Iptc4xmpExt:{name}", value)
    return description


def _alternatives(document: minidom.Document, name: str, value: str) -> minidom.Element:
    item = document.createElementNS(_RDF, "rdf:li")
    item.setAttribute("xml:lang", "x-default")
    item.appendChild(document.createTextNode("".join(c for c in value if c >= " " or c in "\t\n")))
    bag = document.createElementNS(_RDF, "rdf:Alt")
    bag.appendChild(item)
    element = document.createElementNS(_IPTC, f"Iptc4xmpExt:{name}")
    element.appendChild(bag)
    return element


def _text(node: minidom.Node) -> str:
    if node.nodeType == node.TEXT_NODE:
        return str(node.data)  # type: ignore[attr-defined]
    return "".join(map(_text, node.childNodes)).strip()
