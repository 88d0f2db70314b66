"""S2Edit for diffusers: edit a real picture by words without losing who or what is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention_source import KeepAttention
    from .avatars import load_avatars
    from .describe_stage import Description
    from .edit_output import S2EditPipelineOutput
    from .fit_settings import ReferenceAttribute
    from .identity_adapter import IdentityAdapter
    from .inversion_record import Inversion
    from .pipeline import S2EditPipeline
    from .prompt_changes import change_words

__version__ = "0.1.0"
__all__ = [
    "Description",
    "IdentityAdapter",
    "Inversion",
    "KeepAttention",
    "ReferenceAttribute",
    "S2EditPipeline",
    "S2EditPipelineOutput",
    "change_words",
    "load_avatars",
]

_WHERE = {
    "Description": "describe_stage",
    "IdentityAdapter": "identity_adapter",
    "Inversion": "inversion_record",
    "KeepAttention": "attention_source",
    "ReferenceAttribute": "fit_settings",
    "S2EditPipeline": "pipeline",
    "S2EditPipelineOutput": "edit_output",
    "change_words": "prompt_changes",
    "load_avatars": "avatars",
}


def __getattr__(name: str) -> Any:  # diffusers and transformers take seconds to import: only when asked for
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
