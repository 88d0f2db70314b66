"""S2Edit for diffusers: edit a real picture by words without losing who or what is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .avatars import load_avatars
    from .identity_adapter import IdentityAdapter
    from .identity_fitting import ReferenceAttribute
    from .latent_inversion import Inversion
    from .pipeline import S2EditPipeline
    from .pipeline_output import S2EditPipelineOutput
    from .source_attention import KeepAttention

__version__ = "0.1.0"
__all__ = [
    "IdentityAdapter",
    "Inversion",
    "KeepAttention",
    "ReferenceAttribute",
    "S2EditPipeline",
    "S2EditPipelineOutput",
    "load_avatars",
]

_WHERE = {
    "IdentityAdapter": "identity_adapter",
    "Inversion": "latent_inversion",
    "KeepAttention": "source_attention",
    "ReferenceAttribute": "identity_fitting",
    "S2EditPipeline": "pipeline",
    "S2EditPipelineOutput": "pipeline_output",
    "load_avatars": "avatars",
}


def __getattr__(name: str) -> Any:  # diffusers and transformers take seconds to import: only when asked for
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
