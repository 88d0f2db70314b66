"""A fitted identity: its token, its weights, its mask; saved, loaded, laid over a model and lifted off again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from torch import nn

from .atomic_folder import atomic_folder
from .identity_card import identity_card
from .identity_files import (
    CARD_FILE,
    CONFIG_FILE,
    MASK_FILES,
    WEIGHT_FILES,
    IdentityFiles,
    fetch_identity,
    read_identity,
    write_identity,
)
from .lora_format import lora_metadata, name_within, pattern_name
from .low_rank import compress
from .picture_inputs import load_picture
from .prompt_words import insert_token

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
        rows: text encoder's name ("text_encoder", and with SDXL "text_encoder_2") -> (D,) float32, the token's row of
            its embedding table.
        weights: for "lora" diffusers' LoRA state dict (``unet.….lora_A.weight``, ``text_encoder.text_model.…``) in
            float16, for "full" the differences to the base model (``unet.…``, ``text_encoder.…``) or,
            :meth:`compressed`, low-rank factors of them, for "token" nothing.
        lora_metadata: PEFT's rank, alpha and targets of each component, as diffusers writes them.
        mask: (h, w) float32 in [0, 1], ``M_obj`` at the latents' size, or None where spatial control was off.
        base_model: what the base model calls itself.
        base_fingerprint: a few numbers of each of its components, see :func:`fingerprint`.
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
    base_fingerprint: Mapping[str, list[float]] = field(default_factory=dict)
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
        """Tells this fit from any other, whatever it is called now: a hash of the learned rows."""
        rows = [row.float().contiguous().cpu().numpy().tobytes() for _, row in sorted(self.rows.items())]
        return hashlib.sha256(b"".join(rows)).hexdigest()[:16]

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
            raise ValueError(f"The identity and its reference attribute can't both be {renamed.token!r}.")
        return renamed

    def weight_differences(self, component: str) -> dict[str, torch.Tensor]:
        """Parameter name -> what is added to it in ``component`` ("unet" or a text encoder), float32.

        LoRA (Hu et al. 2021): ``W' = W + (alpha / r) B A``, a convolution's ``W`` as the matrix (out, in * kh * kw).
        """
        differences = {}
        for name, tensor, up in self._changed(component):
            if up is None:
                differences[name] = tensor.float()
            else:
                product = up.float().flatten(1) @ tensor.float().flatten(1)
                scale = self._lora_scale(component, name.removesuffix(".weight"))
                differences[name] = (scale * product).reshape(len(up), *tensor.shape[1:])
        return differences

    def changed_shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape of what :meth:`weight_differences` gives, without making it."""
        return {
            name: tuple(tensor.shape) if up is None else (len(up), *tensor.shape[1:])
            for name, tensor, up in self._changed(component)
        }

    def _changed(self, component: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
        """(parameter name, difference, None), or of a LoRA (parameter name, A, B)."""
        prefix = component + "."
        mine = {name.removeprefix(prefix): t for name, t in self.weights.items() if name.startswith(prefix)}
        for name, tensor in mine.items():
            if name.endswith(".lora_A.weight"):
                layer = name.removesuffix(".lora_A.weight")
                yield f"{layer}.weight", tensor, mine[f"{layer}.lora_B.weight"]
            elif not name.endswith(".lora_B.weight"):
                yield name, tensor, None

    def _lora_scale(self, component: str, layer: str) -> float:
        said, layer = self.lora_metadata, pattern_name(layer)
        rank = said.get(f"{component}.rank_pattern", {}).get(layer, said[f"{component}.r"])
        alpha = said.get(f"{component}.alpha_pattern", {}).get(layer, said[f"{component}.lora_alpha"])
        return float(alpha / rank)

    def compressed(self, kept_energy: float = KEPT_ENERGY, max_bytes: int | None = None) -> IdentityAdapter:
        """A full fine-tuning as low-rank factors, which diffusers reads as a LoRA; see ``low_rank.compress``. Of
        another method, or compressed already: itself.

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
        found = compress(self.weights, kept_energy, max_bytes)
        weights = dict(found.plain)
        ranks: dict[str, dict[str, int]] = {}
        for path, (down, up) in found.factors.items():
            weights |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
            component, _, layer = path.partition(".")
            ranks.setdefault(component, {})[pattern_name(layer)] = len(down)
        metadata: dict[str, Any] = {}
        for component, each in ranks.items():
            ((usual, _),) = Counter(each.values()).most_common(1)
            other = {layer: rank for layer, rank in each.items() if rank != usual}
            said = lora_metadata(usual, list(each)) | {"rank_pattern": other, "alpha_pattern": other}
            metadata |= {f"{component}.{name}": value for name, value in said.items()}
        measures = {**self.measures, "kept_energy": round(found.kept_energy, 6)}
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
        found = [p.name for p in target.iterdir()] if target.is_dir() else []
        foreign = found if CONFIG_FILE not in found else [name for name in found if not _is_ours(name)]
        if foreign:
            raise ValueError(
                f"{target} holds other files ({sorted(foreign)[0]}), which saving there would take away; "
                "give a new folder, or an identity's."
            )
        saved = self if exact else self.compressed(kept_energy, max_bytes)
        with atomic_folder(target) as folder:
            saved._write(folder, previews or {}, license)

    def _write(self, folder: Path, previews: Mapping[str, Any], license: str, repository: str | None = None) -> None:
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
        lora = {name: t for name, t in self.weights.items() if _is_lora(name)}
        files = IdentityFiles(
            config=config,
            rows=tuple(rows for rows, _ in self.learned.values()),
            masks=tuple(mask for _, mask in self.learned.values()),
            lora=lora,
            lora_metadata=self.lora_metadata,
            differences={name: t for name, t in self.weights.items() if name not in lora},
        )
        pictures = {f"preview_{i}.png": load_picture(p, "previews") for i, p in enumerate(previews.values(), 1)}
        card = self._card(dict(zip(previews, pictures, strict=True)), license, repository)
        write_identity(folder, files, card, pictures)

    def _card(self, previews: Mapping[str, str], license: str, repository: str | None = None) -> str:
        measured = {name.replace("_", " "): f"{value:.4g}" for name, value in self.measures.items()}
        tokens = {self.token: self.subject}
        if self.reference is not None:
            tokens[self.reference.token] = self.reference.subject
        return identity_card(
            tokens=tokens,
            source_prompt=self.source_prompt,
            example=insert_token(self.source_prompt, self.subject, self.token),
            method=self.method,
            base_model=self.base_model,
            facts=measured | {"fitted with": ", ".join(f"{n} {v}" for n, v in self.library_versions.items())},
            masks={
                token: file
                for file, (token, (_, mask)) in zip(MASK_FILES, self.learned.items(), strict=False)
                if mask is not None
            },
            previews=previews,
            reads_as_lora=any(map(_is_lora, self.weights)),
            has_two_text_encoders=len(self.rows) > 1,
            license=license,
            repository=repository,
        )

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
        said = dict(files.config)
        reference = said.pop("reference")
        if reference is not None:
            reference = LearnedAttribute(**reference, rows=files.rows[1], mask=files.masks[1])
        return cls(
            **said,
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
        address. What isn't said here is as in :meth:`save_pretrained`."""
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


def _is_lora(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def _is_ours(file: str) -> bool:
    known = (CONFIG_FILE, CARD_FILE, *WEIGHT_FILES, *MASK_FILES)
    return file in known or re.fullmatch(r"preview_\d+\.png", file) is not None


def fingerprint(module: nn.Module, originals: Mapping[str, torch.Tensor] | None = None) -> list[float]:
    """Eight numbers that tell base models apart whatever dtype they are loaded in: the number of weights, and the
    first weight of seven tensors spread over the module. Learned words and adapters attached to it don't count.

    Args:
        originals: parameter name -> its base value, of the parameters that are changed now.
    """
    base = {
        name.replace(".base_layer.", "."): parameter.detach()
        for name, parameter in module.named_parameters()
        if ".lora_" not in name and not name.endswith("token_embedding.weight")
    }
    base |= originals or {}
    named = sorted(base.items())
    chosen = [named[i * (len(named) - 1) // 6][1] for i in range(7)]
    return [float(sum(p.numel() for _, p in named)), *(float(p.flatten()[0]) for p in chosen)]


def check_base(adapter: IdentityAdapter, components: Mapping[str, nn.Module], loaded: LoadedIdentities) -> None:
    """Raises:
    ValueError: the identity was fitted to a base model with other components, or with other weights than
        ``components`` have below ``loaded``; or these are offloaded.
    """
    _check_present(components)
    base = adapter.base_model or "another base model"
    if not adapter.base_fingerprint:
        raise ValueError(
            f"The identity {adapter.token!r} doesn't say which weights it was fitted to: its base_fingerprint is "
            "empty. Fit it again, pipe.fit_identity(...), which writes it down."
        )
    if adapter.base_fingerprint.keys() != components.keys():
        raise ValueError(
            f"The identity {adapter.token!r} was fitted to {base!r}, of {' and '.join(adapter.base_fingerprint)}; this "
            f"pipeline has {' and '.join(components)}. Load that model, or fit the identity again here."
        )
    for name, wanted in adapter.base_fingerprint.items():
        found = fingerprint(components[name], loaded.originals(name))
        if len(wanted) != len(found) or not np.allclose(wanted, found, rtol=0.02, atol=1e-3):
            raise ValueError(
                f"The identity {adapter.token!r} was fitted to {base!r}, whose {name} has other weights than this "
                "pipeline's. Load that model, or fit the identity again here."
            )


def _check_present(components: Mapping[str, nn.Module]) -> None:
    for name, module in components.items():
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError(
                f"The weights of the {name} are offloaded and can't be changed. Call pipe.remove_all_hooks() first, "
                "and enable offloading again afterwards."
            )


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter ``name``, also where PEFT has since wrapped its layer."""
    layer, _, leaf = name.rpartition(".")
    owner = module.get_submodule(layer)
    return getattr(getattr(owner, "base_layer", owner), leaf)


def _changes(adapter: IdentityAdapter, component: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameter name of ``module`` -> what is added to it."""
    return {name_within(module, name): d for name, d in adapter.weight_differences(component).items()}


class LoadedIdentities:
    """The identities laid over a pipeline's components now; the base weights are kept to be put back bit by bit."""

    def __init__(self) -> None:
        self.adapters: dict[str, tuple[IdentityAdapter, float]] = {}
        self._originals: dict[tuple[str, str], torch.Tensor] = {}

    def originals(self, component: str) -> dict[str, torch.Tensor]:
        """Parameter name -> base value, of what is changed in ``component`` now."""
        return {name: original for (part, name), original in self._originals.items() if part == component}

    def add(self, adapter: IdentityAdapter, scale: float, components: Mapping[str, nn.Module]) -> None:
        """Lay ``adapter`` over ``components``.

        Raises:
            ValueError: it doesn't fit them (components, names or shapes); nothing is changed then.
        """
        foreign = {name.split(".")[0] for name in adapter.weights} - components.keys()
        if foreign:
            raise ValueError(f"The identity changes {', '.join(sorted(foreign))}, which this model doesn't have.")
        for component, module in components.items():
            # shapes first: a small file's factors can multiply out to more than the machine holds
            for saved_name, shape in adapter.changed_shapes(component).items():
                name = name_within(module, saved_name)
                try:
                    held = _parameter(module, name)
                except AttributeError:
                    held = None
                if not isinstance(held, nn.Parameter):
                    raise ValueError(f"The identity changes {component}.{name}, which this model doesn't have.")
                if held.shape != shape:
                    raise ValueError(
                        f"The identity's {component}.{name} is {shape}; the model's is {tuple(held.shape)}."
                    )
        self._replace({**self.adapters, adapter.token: (adapter, scale)}, components)

    def remove(self, token: str, components: Mapping[str, nn.Module]) -> None:
        """Lift one identity off; the others stay.

        Raises:
            ValueError: the weights are offloaded.
        """
        _check_present(components)
        self._replace({name: held for name, held in self.adapters.items() if name != token}, components)

    def _replace(self, adapters: dict[str, tuple[IdentityAdapter, float]], components: Mapping[str, nn.Module]) -> None:
        """Lay ``adapters`` in place of those that are there; after an exception these are there again."""
        held, self.adapters = self.adapters, adapters
        try:
            self._lift(components)
            self._lay(components)
        except BaseException:
            self._lift(components)
            self.adapters = held
            self._lay(components)
            raise

    @torch.no_grad()
    def _lift(self, components: Mapping[str, nn.Module]) -> None:
        for (component, name), original in self._originals.items():
            parameter = _parameter(components[component], name)
            parameter.data = original.to(parameter)
        self._originals.clear()

    @torch.no_grad()
    def _lay(self, components: Mapping[str, nn.Module]) -> None:
        for adapter, scale in self.adapters.values():
            for component, module in components.items():
                for name, difference in _changes(adapter, component, module).items():
                    parameter = _parameter(module, name)
                    self._originals.setdefault((component, name), parameter.data)
                    changed = parameter.data.float() + scale * difference.to(parameter.device)
                    parameter.data = changed.to(parameter.dtype)
