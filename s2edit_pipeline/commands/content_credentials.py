"""Content Credentials (C2PA 2.1): a signed manifest in a saved picture that says what was done to it, by what.

Needs ``pip install "s2edit-pipeline[c2pa]"``. A certificate of one's own is what others trust. A self-made one shows
only that the file hasn't changed since, and says that it is self-made.
"""

from __future__ import annotations

import datetime
import json
import mimetypes
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..picture_marks import DRAWN, EDITED, Origin

SELF_MADE = "S2EditPipeline, self-made certificate for tests"
"""The name in a certificate that nobody vouches for."""


_PARENT = "the picture before"


@dataclass(frozen=True)
class Certificate:
    """What a manifest is signed with, PEM: ``chain``, the signer's own certificate first, and its ``key`` (PKCS 8,
    an elliptic curve's, P-256)."""

    chain: str
    key: str


@dataclass(frozen=True)
class Credentials:
    """What a picture's manifest says.

    Attributes:
        state: "Trusted", "Valid" (nothing was changed since it was signed) or "Invalid".
        signer: the name in the certificate.
        actions: what was done, such as "c2pa.edited".
        source_type: of the last action, an address of IPTC's vocabulary.
        tool: what did it.
        problems: what is wrong with it, by C2PA's names.
    """

    state: str
    signer: str | None
    actions: tuple[str, ...]
    source_type: str | None
    tool: str | None
    problems: tuple[str, ...]


def sign_picture(path: str | os.PathLike[str], origin: Origin, certificate: Certificate, before: Any = None) -> None:
    """Put a signed manifest into the picture at ``path``; the file is replaced when it is whole.

    Args:
        origin: how the picture was made.
        before: the path of the picture that was edited, which the manifest names with whatever manifest it has.

    Raises:
        ImportError: c2pa-python isn't there.
        ValueError: the picture's format can't hold one, or the certificate can't be used.
    """
    c2pa = _c2pa()
    path = Path(path)
    is_edit = origin.source_type != DRAWN or before is not None
    action: dict[str, Any] = {
        "action": "c2pa.edited" if is_edit else "c2pa.created",
        "softwareAgent": {"name": origin.system or "S2EditPipeline"},
        "digitalSourceType": origin.source_type or EDITED,
    }
    if origin.prompt is not None:
        action["description"] = origin.prompt
    actions = [action]
    if is_edit:
        actions.insert(0, {"action": "c2pa.opened", "parameters": {"ingredientIds": [_PARENT]}})
    manifest = {
        "claim_generator_info": [{"name": "S2EditPipeline", "version": origin.version or "0"}],
        "title": path.name,
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": actions}}],
    }
    signed = path.with_name(f".{path.stem}-signed{path.suffix}")
    try:
        info = c2pa.C2paSignerInfo(b"es256", certificate.chain.encode(), certificate.key.encode(), None)
        with c2pa.Signer.from_info(info) as signer, c2pa.Builder(json.dumps(manifest)) as builder:
            if is_edit:
                _add_parent(builder, Path(before or path))
            builder.sign_file(str(path), str(signed), signer)
        os.replace(signed, path)
    except c2pa.C2paError as error:
        raise ValueError(f"{path} can't be signed: {error}. Save as JPEG, PNG, WebP or TIFF.") from error
    finally:
        signed.unlink(missing_ok=True)


def _add_parent(builder: Any, before: Path) -> None:
    ingredient = {"title": before.name, "relationship": "parentOf", "instance_id": _PARENT}
    kind = mimetypes.guess_type(before.name)[0] or "image/png"
    with open(before, "rb") as file:
        builder.add_ingredient(json.dumps(ingredient), kind, file)


def credentials_of(path: str | os.PathLike[str]) -> Credentials | None:
    """What the manifest of the picture at ``path`` says; None where it has none.

    Raises:
        ImportError: c2pa-python isn't there.
    """
    c2pa = _c2pa()
    try:
        with c2pa.Reader(str(path)) as reader:
            said, state = json.loads(reader.json()), reader.get_validation_state()
    except c2pa.C2paError as error:
        if "ManifestNotFound" in type(error).__name__ + str(error) or "no JUMBF" in str(error):
            return None
        raise ValueError(f"The Content Credentials of {path} can't be read: {error}.") from error
    active = said["manifests"][said["active_manifest"]]
    actions = [
        action
        for assertion in active.get("assertions", [])
        if assertion["label"].startswith("c2pa.actions")
        for action in assertion["data"]["actions"]
    ]
    last: dict[str, Any] = actions[-1] if actions else {}
    agent = last.get("softwareAgent")
    signature = active.get("signature_info", {})
    failures = said.get("validation_results", {}).get("activeManifest", {}).get("failure", [])
    return Credentials(
        state=str(state),
        signer=signature.get("common_name") or signature.get("issuer"),
        actions=tuple(action["action"] for action in actions),
        source_type=last.get("digitalSourceType"),
        tool=agent.get("name") if isinstance(agent, dict) else agent,
        problems=tuple(failure["code"] for failure in failures),
    )


def check_installed() -> None:
    """Raises:
    ImportError: c2pa-python isn't there.
    """
    _c2pa()


def read_certificate(chain: str | os.PathLike[str], key: str | os.PathLike[str]) -> Certificate:
    """Of two PEM files."""
    return Certificate(Path(chain).read_text("ascii"), Path(key).read_text("ascii"))


def self_made_certificate() -> Certificate:
    """A certificate for tests, signed by an authority that is made with it and forgotten: C2PA takes none that signs
    itself."""
    try:
        x509: Any = import_module("cryptography.x509")
        oid: Any = import_module("cryptography.x509.oid")
        hashes: Any = import_module("cryptography.hazmat.primitives.hashes")
        serialization: Any = import_module("cryptography.hazmat.primitives.serialization")
        ec: Any = import_module("cryptography.hazmat.primitives.asymmetric.ec")
    except ImportError:
        raise ImportError('A self-made certificate needs: pip install "s2edit-pipeline[c2pa]".') from None
    now = datetime.datetime.now(datetime.UTC)

    def name(of: str) -> Any:
        return x509.Name(
            [
                x509.NameAttribute(oid.NameOID.ORGANIZATION_NAME, "S2EditPipeline"),
                x509.NameAttribute(oid.NameOID.COMMON_NAME, of),
            ]
        )

    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = f"{SELF_MADE} (authority)"

    def certificate(subject: str, its_key: Any, *, is_authority: bool) -> Any:
        usage = {
            "digital_signature": not is_authority, "content_commitment": False, "key_encipherment": False,
            "data_encipherment": False, "key_agreement": False, "key_cert_sign": is_authority,
            "crl_sign": is_authority, "encipher_only": False, "decipher_only": False,
        }  # fmt: skip
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name(authority))
            .public_key(its_key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=365))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**usage), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(its_key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
            )
        )
        if not is_authority:
            purpose = x509.ExtendedKeyUsage([oid.ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(purpose, critical=True)
        return builder.sign(authority_key, hashes.SHA256())

    pem = serialization.Encoding.PEM
    chain = [certificate(SELF_MADE, key, is_authority=False), certificate(authority, authority_key, is_authority=True)]
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Certificate("".join(one.public_bytes(pem).decode() for one in chain), private.decode())


def _c2pa() -> Any:
    try:
        return import_module("c2pa")
    except ImportError:
        raise ImportError('Content Credentials need one more package: pip install "s2edit-pipeline[c2pa]".') from None
