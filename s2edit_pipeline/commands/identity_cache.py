"""Identities kept from one run to the next, beside what they were fitted to: a second edit needs no second fit."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..identity_adapter import IdentityAdapter
    from ..pipeline import S2EditPipeline


def cache_folder() -> Path:
    """``$S2EDIT_CACHE``, or ``s2edit`` in the user's folder of caches."""
    own = os.environ.get("S2EDIT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "s2edit"


def identity_folder(picture_digest: str, facts: Mapping[str, Any]) -> Path:
    """Where the identity of this picture, fitted by these ``facts`` (model, words, settings), is kept."""
    key = json.dumps({"picture": picture_digest, **facts}, sort_keys=True)
    return cache_folder() / "identities" / hashlib.sha256(key.encode()).hexdigest()[:32]


def load_kept(pipe: S2EditPipeline, folder: Path) -> IdentityAdapter | None:
    """The identity in ``folder``, tried on the pipeline; None where there is none, or none that it takes: a model of
    the same name may be another by now."""
    from ..identity_adapter import IdentityAdapter

    if not folder.is_dir():
        return None
    try:
        identity = IdentityAdapter.from_pretrained(str(folder))
        pipe.load_identity(identity)
        pipe.unload_identity(identity.token)
    except (ValueError, OSError):
        return None
    return identity
