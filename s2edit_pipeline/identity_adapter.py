"""A fitted identity: its token, its weights, its mask; saved, loaded and shared."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import HfApi
from torch.utils.weak import WeakIdKeyDictionary

from .identity_card import identity_card
from .identity_compression import compress
from .identity_files import IdentityFiles, fetch_identity, read_identity, write_identity
from .identity_folder import atomic_folder
from .identity_lora_names import is_lora, lora_metadata, pattern_name
from .identity_schema import CARD_FILE, CONFIG_FILE, MASK_FILES, WEIGHT_FILES
from .picture_inputs import load_picture

KEPT_ENERGY = 0.99
MOST_BYTES = 4_800_000
"""Of a full fine-tuning's low-rank differences: with token, mask and card 5 MB."""
SMALLEST_SHARE = 50
"""And no more than this part of the differences themselves, so that a small model's identity is small too."""


def _library_versions() -> dict[str, str]:
    versions = {}
    for name in ("s2edit-pipeline", "torch", "diffusers", "transformers", "peft"):
        with suppress(importlib.metadata.PackageNotFoundError):  # this one may be a folder that diffusers loaded
            versions[name] = importlib.metadata.version(name)
    return versions


class LoraFactors(NamedTuple):
    """A layer's LoRA: ``scale * up @ down`` is added to its weight.

    Attributes:
        down: A, (r, in) or of a convolution (r, in, kh, kw).
        up: B, (out, r) or (out, r, 1, 1).
        scale: alpha / r.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float


@dataclass(frozen=True)
class LearnedAttribute:
    """The second token of a composition, ``[A]``: what a reference picture has and no word says.

    Attributes:
        token: the learned token as prompts spell it, such as "[A]".
        subject: the noun that it stands before.
        source_prompt: the words that the reference picture was described by, without the token.
        rows: as the identity's.
        mask: (h, w) float32 in [0, 1], where it is in the reference picture, or None.
    """

    token: str
    subject: str
    source_prompt: str
    rows: Mapping[str, torch.Tensor]
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class IdentityAdapter:
    """What :meth:`S2EditPipeline.fit_identity` returns.

    Attributes:
        token: the learned token as prompts spell it, such as "[I]".
        subject: the noun that it stands before.
        source_prompt: P, the words the picture was described by, without the token.
        method: "full", "lora" or "token".
        rows: text encoder's name ("text_encoder", with SDXL "text_encoder_2" too) -> (D,) float32, the token's row of
            its embedding table.
        weights: for "lora" diffusers' LoRA state dict (``unet.….lora_A.weight``, ``text_encoder.text_model.…``) in
            float16, for "full" the differences to the base model (``unet.…``, ``text_encoder.…``) or,
            :meth:`compressed`, low-rank factors of them, for "token" nothing.
        lora_metadata: PEFT's rank, alpha and targets of each component, as diffusers writes them.
        mask: (h, w) float32 in [0, 1], ``M_obj`` at the latents' size, or None where spatial control was off.
        base_model: what the base model calls itself.
        base_fingerprint: each of its components' fingerprint, see ``identity_fingerprint.fingerprint``.
        settings: what it was fitted with.
        measures: what was measured while fitting: losses and cosine at both ends, seconds.
        reference: the attribute of a reference picture that was fitted with it, or None.
        library_versions: what it was fitted with, by package.
    """

    token: str
    subject: str
    source_prompt: str
    method: str
    rows: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    lora_metadata: Mapping[str, Any] = field(default_factory=dict)
    mask: torch.Tensor | None = None
    base_model: str = ""
    base_fingerprint: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)
    reference: LearnedAttribute | None = None
    library_versions: Mapping[str, str] = field(default_factory=_library_versions)

    def __repr__(self) -> str:
        return (
            f"IdentityAdapter(token={self.token!r}, subject={self.subject!r}, source_prompt={self.source_prompt!r}, "
            f"method={self.method!r}, base_model={self.base_model!r})"
        )

    @property
    def learned(self) -> dict[str, tuple[Mapping[str, torch.Tensor], torch.Tensor | None]]:
        """Token -> (rows, mask): the identity's own, and the reference attribute's where there is one."""
        tokens = {self.token: (self.rows, self.mask)}
        if self.reference is not None:
            tokens[self.reference.token] = (self.reference.rows, self.reference.mask)
        return tokens

    @property
    def digest(self) -> str:
        """Tells this fit from any other, whatever it is called: a hash of its rows, weights, masks and reference. It
        outlives saving and loading as it is; :meth:`compressed` it is another."""
        masks = [mask for _, mask in self.learned.values()]
        return _hash([self.fit_digest, *(None if m is None else (255 * m).round().byte() for m in masks)])

    @property
    def fit_digest(self) -> str:
        """As :attr:`digest` without the masks: the same wherever in the picture the identity is put."""
        named = [item for rows, _ in self.learned.values() for item in sorted(rows.items())]
        named += sorted(self.weights.items())
        versions = [(tensor, -1 if tensor.is_inference() else tensor._version) for _, tensor in named]
        known = _FIT_DIGESTS.get(self)
        if known is None or not _are_same(known[0], versions):
            scales = {name: value for name, value in self.lora_metadata.items() if _is_of_scale(name)}
            text = json.dumps(scales, sort_keys=True)
            _FIT_DIGESTS[self] = known = (versions, _hash([text, *(part for item in named for part in item)]))
        return str(known[1])

    @property
    def interrupted(self) -> bool:
        """Whether the fit was cut short before its last step."""
        return bool(self.settings.get("interrupted", False))

    def renamed(self, token: str | None = None, reference_token: str | None = None) -> IdentityAdapter:
        """The same identity under another token, its reference attribute's likewise; None leaves one as it is.

        Raises:
            ValueError: both would be the same, or there is no reference attribute to rename.
        """
        renamed = self if token is None else replace(self, token=token)
        if reference_token is not None:
            if self.reference is None:
                raise ValueError(f"reference_token={reference_token!r}: this identity was fitted without a reference.")
            renamed = replace(renamed, reference=replace(self.reference, token=reference_token))
        if renamed.reference is not None and renamed.reference.token == renamed.token:
            raise ValueError(
                f"The identity and its reference attribute can't both be {renamed.token!r}; give the attribute another "
                "token: load_identity(..., reference_token='[A]')."
            )
        return renamed

    def lora_factors(self, component: str) -> dict[str, LoraFactors]:
        """Layer of ``component`` ("unet", "text_encoder_2", …) -> its LoRA, where it has one."""
        prefix, end = component + ".", ".lora_A.weight"
        return {
            name[len(prefix) : -len(end)]: LoraFactors(
                down, self.weights[name.replace(".lora_A.", ".lora_B.")], self._lora_scale(component, name)
            )
            for name, down in self.weights.items()
            if name.startswith(prefix) and name.endswith(end)
        }

    def plain_differences(self, component: str) -> dict[str, torch.Tensor]:
        """Parameter name of ``component`` -> what is added to it, of what is no LoRA."""
        prefix = component + "."
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.weights.items()
            if name.startswith(prefix) and not is_lora(name)
        }

    def weight_differences(self, component: str) -> dict[str, torch.Tensor]:
        """Parameter name -> what is added to it in ``component``, float32, the LoRA's multiplied out:
        ``W' = W + (alpha / r) B A`` (Hu et al. 2021), a convolution's ``W`` as the matrix (out, in * kh * kw)."""
        differences = {name: tensor.float() for name, tensor in self.plain_differences(component).items()}
        for layer, (down, up, scale) in self.lora_factors(component).items():
            product = up.float().flatten(1) @ down.float().flatten(1)
            differences[f"{layer}.weight"] = (scale * product).reshape(len(up), *down.shape[1:])
        return differences

    def _lora_scale(self, component: str, name: str) -> float:
        fields, layer = self.lora_metadata, pattern_name(name.removeprefix(f"{component}.").split(".lora_A.")[0])
        rank = fields.get(f"{component}.rank_pattern", {}).get(layer, fields[f"{component}.r"])
        alpha = fields.get(f"{component}.alpha_pattern", {}).get(layer, fields[f"{component}.lora_alpha"])
        return float(alpha / rank)

    def compressed(self, kept_energy: float = KEPT_ENERGY, max_bytes: int | None = None) -> IdentityAdapter:
        """A full fine-tuning as low-rank factors, which diffusers reads as a LoRA; see
        ``identity_compression.compress``. Of another method, or compressed already: itself.

        Args:
            kept_energy: share of the differences' sum of squares to keep, in (0, 1].
            max_bytes: at most; None is 4.8 MB, or a fiftieth of the differences where that is less.

        Returns:
            The identity; ``measures["kept_energy"]`` says what share was kept.
        """
        if not 0 < kept_energy <= 1:
            raise ValueError(f"kept_energy must be above 0 and at most 1, not {kept_energy!r}.")
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, not {max_bytes!r}.")
        if self.method != "full" or "kept_energy" in self.measures:
            return self
        if max_bytes is None:
            max_bytes = min(MOST_BYTES, sum(4 * t.numel() for t in self.weights.values()) // SMALLEST_SHARE)
        kept = compress(self.weights, kept_energy, max_bytes)
        weights = dict(kept.plain)
        ranks: dict[str, dict[str, int]] = {}
        for path, (down, up) in kept.factors.items():
            weights |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
            component, _, layer = path.partition(".")
            ranks.setdefault(component, {})[pattern_name(layer)] = len(down)
        metadata: dict[str, Any] = {}
        for component, each in ranks.items():
            ((usual, _),) = Counter(each.values()).most_common(1)
            other = {layer: rank for layer, rank in each.items() if rank != usual}
            fields = lora_metadata(usual, list(each)) | {"rank_pattern": other, "alpha_pattern": other}
            metadata |= {f"{component}.{name}": value for name, value in fields.items()}
        measures = {**self.measures, "kept_energy": round(kept.kept_energy, 6)}
        return replace(self, weights=weights, lora_metadata=metadata, measures=measures)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        exact: bool = False,
        kept_energy: float = KEPT_ENERGY,
        max_bytes: int | None = None,
        previews: Mapping[str, Any] | None = None,
        license: str = "other",
    ) -> None:
        """Write the identity to the folder ``save_directory``: safetensors, JSON, a mask PNG and a card.

        The folder is made beside its place and takes it in one step: whenever the process is killed, what is there is
        the old identity or the new one, whole. A folder that holds anything but an identity is never replaced.

        Args:
            exact: keep a full fine-tuning's differences to the last bit, gigabytes with a large model; otherwise
                they are :meth:`compressed` with ``kept_energy`` and ``max_bytes``.
            previews: prompt -> picture, for the card.
            license: the Hub's name of a licence, for the card.

        Raises:
            ValueError: ``save_directory`` is a file, or a folder with other things in it.
        """
        target = Path(save_directory).resolve()  # "." can't be renamed, its place can
        if target.exists() and not target.is_dir():
            raise ValueError(f"{target} is a file; give a folder for the identity.")
        present = [p.name for p in target.iterdir()] if target.is_dir() else []
        foreign = present if CONFIG_FILE not in present else [name for name in present if not _is_ours(name)]
        if foreign:
            raise ValueError(
                f"{target} holds other files ({sorted(foreign)[0]}), which saving there would take away; "
                "give a new folder, or an identity's."
            )
        saved = self if exact else self.compressed(kept_energy, max_bytes)
        with atomic_folder(target) as folder:
            saved._write(folder, previews or {}, license, name=target.name)

    def _write(
        self,
        folder: Path,
        previews: Mapping[str, Any],
        license: str,
        repository: str | None = None,
        name: str = "",
    ) -> None:
        reference = None
        if self.reference is not None:
            reference = {name: getattr(self.reference, name) for name in ("token", "subject", "source_prompt")}
        config = {
            "token": self.token,
            "subject": self.subject,
            "source_prompt": self.source_prompt,
            "method": self.method,
            "reference": reference,
            "base_model": self.base_model,
            "base_fingerprint": dict(self.base_fingerprint),
            "settings": dict(self.settings),
            "measures": dict(self.measures),
            "library_versions": dict(self.library_versions),
        }
        lora = {name: t for name, t in self.weights.items() if is_lora(name)}
        files = IdentityFiles(
            config=config,
            rows=tuple(rows for rows, _ in self.learned.values()),
            masks=tuple(mask for _, mask in self.learned.values()),
            lora=lora,
            lora_metadata=self.lora_metadata,
            differences={name: t for name, t in self.weights.items() if name not in lora},
        )
        pictures = {f"preview_{i}.png": load_picture(p, "previews") for i, p in enumerate(previews.values(), 1)}
        card = identity_card(self, dict(zip(previews, pictures, strict=True)), license, repository, name)
        write_identity(folder, files, card, pictures)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> IdentityAdapter:
        """Load an identity from a folder or a Hub repository.

        Raises:
            ValueError: the folder holds no identity, or one that is damaged, of a newer format or has what an identity
                may not have; the message says which file and what was expected.
        """
        folder = fetch_identity(
            pretrained_model_name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        files = read_identity(folder)
        fields = dict(files.config)
        reference = fields.pop("reference")
        if reference is not None:
            reference = LearnedAttribute(**reference, rows=files.rows[1], mask=files.masks[1])
        return cls(
            **fields,
            rows=files.rows[0],
            weights={**files.lora, **files.differences},
            lora_metadata=files.lora_metadata,
            mask=files.masks[0],
            reference=reference,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "An identity for S2EditPipeline",
        create_pr: bool = False,
        exact: bool = False,
        kept_energy: float = KEPT_ENERGY,
        max_bytes: int | None = None,
        previews: Mapping[str, Any] | None = None,
        license: str = "other",
    ) -> str:
        """Upload the identity to the Hub repository ``repo_id``, in place of one that is there; returns the commit's
        address. The other arguments are as in :meth:`save_pretrained`."""
        saved = self if exact else self.compressed(kept_energy, max_bytes)
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            saved._write(Path(folder), previews or {}, license, repo_id)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                create_pr=create_pr,
                delete_patterns=[*WEIGHT_FILES, *MASK_FILES, "preview_*.png"],
            )
        return str(commit.commit_url)


_FIT_DIGESTS = WeakIdKeyDictionary()
"""Identity -> (its tensors and their versions, the hash of their contents)."""


def _hash(parts: Iterable[torch.Tensor | str | None]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            digest.update(part.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
        else:
            digest.update(f"{part} ".encode())
    return digest.hexdigest()[:16]


def _are_same(known: list[tuple[torch.Tensor, int]], present: list[tuple[torch.Tensor, int]]) -> bool:
    """The very tensors, none of them changed in place since."""
    same = (a is b and version == now for (a, version), (b, now) in zip(known, present, strict=False))
    return len(known) == len(present) and all(same)


def _is_of_scale(name: str) -> bool:
    return name.endswith((".r", ".lora_alpha", ".rank_pattern", ".alpha_pattern"))


def _is_ours(file: str) -> bool:
    known = (CONFIG_FILE, CARD_FILE, *WEIGHT_FILES, *MASK_FILES)
    return file in known or re.fullmatch(r"preview_\d+\.png", file) is not None
