"""A fitted identity: its token, its weights, its mask; saved, loaded, laid over a model and lifted off again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, snapshot_download
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, FORMAT_VERSION)
"""1 had the reference attribute's row in the identity's own token file."""
CONFIG_FILE = "identity.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
TOKEN_FILE = "learned_embeds.safetensors"
REFERENCE_TOKEN_FILE = "reference_embeds.safetensors"
FULL_FILE = "weight_differences.safetensors"
WEIGHT_FILES = (TOKEN_FILE, REFERENCE_TOKEN_FILE, LORA_FILE, FULL_FILE)
MASK_FILE = "mask.png"
REFERENCE_MASK_FILE = "reference_mask.png"
CARD_FILE = "README.md"
METHODS = ("full", "lora", "token")
ROW_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""Text encoder -> its row's key in the file of a token that has several rows, as SDXL embeddings are published."""


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
        weights: for "lora" diffusers' LoRA state dict (``unet.….lora_A.weight``, ``text_encoder.…``), for "full"
            the differences to the base model (``unet.…``, ``text_encoder.…``), for "token" nothing.
        lora_metadata: PEFT's rank, alpha and targets of each component, as diffusers writes them.
        mask: (h, w) float32 in [0, 1], ``M_obj`` at the latents' size, or None where spatial control was off.
        base_model: what the base model calls itself.
        base_fingerprint: a few numbers of each of its components, see :func:`fingerprint`.
        settings: what it was fitted with.
        measures: what was measured while fitting: losses and cosine at both ends, seconds.
        reference: the attribute of a reference picture that was fitted with it, or None.
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
        """Parameter name -> what is added to it in ``component`` ("unet" or "text_encoder"), float32.

        LoRA (Hu et al. 2021): ``W' = W + (alpha / r) B A``.
        """
        prefix = component + "."
        mine = {name.removeprefix(prefix): t for name, t in self.weights.items() if name.startswith(prefix)}
        if self.method != "lora":
            return {name: t.float() for name, t in mine.items()}
        scale = self.lora_metadata[f"{component}.lora_alpha"] / self.lora_metadata[f"{component}.r"] if mine else 1.0
        differences = {}
        for name, down in mine.items():
            if name.endswith(".lora_A.weight"):
                layer = name.removesuffix(".lora_A.weight")
                up = mine[f"{layer}.lora_B.weight"]
                differences[f"{layer}.weight"] = scale * (up.float() @ down.float())
        return differences

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the identity to the folder ``save_directory``: safetensors, JSON, a mask PNG and a card.

        The folder is made beside its place and moved there whole, so a failure leaves what was there. A folder
        that holds anything but an identity is never replaced.

        Raises:
            ValueError: ``save_directory`` is a file, or a folder with other things in it.
        """
        target = Path(save_directory).resolve()  # "." can't be renamed, its place can
        if target.exists() and not target.is_dir():
            raise ValueError(f"{target} is a file; give a folder for the identity.")
        if target.is_dir() and any(target.iterdir()) and not (target / CONFIG_FILE).exists():
            raise ValueError(f"{target} holds other files and no {CONFIG_FILE}; give a new folder, or an identity's.")
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            self._write(made)
            made.chmod(0o755)
            if target.is_dir() and any(target.iterdir()):
                old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
                try:
                    os.rename(target, old / "identity")
                    os.rename(made, target)
                finally:
                    if not target.exists():
                        os.rename(old / "identity", target)
                    shutil.rmtree(old)
            else:
                os.rename(made, target)  # onto an empty folder too
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        # one file for each token: diffusers' load_textual_inversion takes files of one token alone
        for file, (token, (rows, _)) in zip((TOKEN_FILE, REFERENCE_TOKEN_FILE), self.learned.items(), strict=False):
            _write_rows(folder / file, token, rows)
        held = {name: t.contiguous() for name, t in self.weights.items()}
        if self.method == "lora":
            save_file(held, str(folder / LORA_FILE), {"lora_adapter_metadata": json.dumps(dict(self.lora_metadata))})
        elif self.method == "full":
            save_file(held, str(folder / FULL_FILE))
        for file, mask in zip((MASK_FILE, REFERENCE_MASK_FILE), (m for _, m in self.learned.values()), strict=False):
            if mask is not None:
                Image.fromarray((mask.numpy() * 255).round().astype(np.uint8)).save(folder / file)
        reference = None
        if self.reference is not None:
            reference = {name: getattr(self.reference, name) for name in ("token", "subject", "source_prompt")}
        config = {
            "format_version": FORMAT_VERSION,
            "token": self.token,
            "subject": self.subject,
            "source_prompt": self.source_prompt,
            "method": self.method,
            "reference": reference,
            "base_model": self.base_model,
            "base_fingerprint": dict(self.base_fingerprint),
            "settings": dict(self.settings),
            "measures": dict(self.measures),
        }
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        (folder / CARD_FILE).write_text(self._card(), "utf-8")

    def _card(self) -> str:
        # the Hub takes nothing but a repository's name here
        base = f"base_model: {self.base_model}\n" if re.fullmatch(r"[\w.-]+/[\w.-]+", self.base_model) else ""
        return (
            f"---\nlibrary_name: diffusers\n{base}tags:\n- s2edit\n- image-editing\n"
            f"instance_prompt: {json.dumps(self.source_prompt)}\n---\n\n"
            f'# An identity for S2EditPipeline\n\nToken `{self.token}` before the noun "{self.subject}", fitted to one '
            f'picture described as "{self.source_prompt}" (method `{self.method}`).\n\n'
            "```python\nfrom s2edit_pipeline import IdentityAdapter\n\n"
            'identity = IdentityAdapter.from_pretrained("this folder or repository")\n```\n\n'
            "Publish the identity of a person only with that person's consent.\n"
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
            ValueError: the folder holds no identity, or one that is damaged or of a newer format; the message says
                which file and what was expected.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            name = str(pretrained_model_name_or_path)
            if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
                raise ValueError(f"{name} is not a folder; give an identity's folder or a Hub repository's name.")
            folder = Path(
                snapshot_download(
                    name,
                    revision=revision,
                    token=token,
                    cache_dir=None if cache_dir is None else str(cache_dir),
                    local_files_only=local_files_only,
                    allow_patterns=[CONFIG_FILE, *WEIGHT_FILES, MASK_FILE, REFERENCE_MASK_FILE],
                )
            )
        return cls._read(folder)

    @classmethod
    def _read(cls, folder: Path) -> IdentityAdapter:
        if not (folder / CONFIG_FILE).is_file():
            raise ValueError(f"{folder} holds no {CONFIG_FILE}: it is not an identity that save_pretrained wrote.")
        try:
            config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
            version = config["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / CONFIG_FILE} is damaged ({error!r}); save the identity again.") from error
        if version not in READABLE_VERSIONS:
            raise ValueError(
                f"{folder / CONFIG_FILE} has format version {version!r} and this release reads "
                f"{' and '.join(map(str, READABLE_VERSIONS))}: "
                "pip install --upgrade s2edit-pipeline."
            )
        missing = {"token", "subject", "source_prompt", "method"} - set(config)
        if missing or config["method"] not in METHODS:
            raise ValueError(f"{folder / CONFIG_FILE} lacks {sorted(missing)} or has an unknown method; save it again.")
        try:
            rows = _read_rows(folder / TOKEN_FILE, config["token"])
            weights: dict[str, torch.Tensor] = {}
            metadata: dict[str, Any] = {}
            if config["method"] == "lora":
                with safe_open(str(folder / LORA_FILE), framework="pt") as opened:
                    metadata = json.loads((opened.metadata() or {})["lora_adapter_metadata"])
                    weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            elif config["method"] == "full":
                weights = load_file(str(folder / FULL_FILE))
            reference = None
            if config.get("reference") is not None:
                said = {name: config["reference"][name] for name in ("token", "subject", "source_prompt")}
                reference = LearnedAttribute(
                    **said,
                    rows=_read_rows(folder / (TOKEN_FILE if version == 1 else REFERENCE_TOKEN_FILE), said["token"]),
                    mask=_read_mask(folder / REFERENCE_MASK_FILE),
                )
            mask = _read_mask(folder / MASK_FILE)
        except Exception as error:
            raise ValueError(f"The identity in {folder} is damaged: {error!r}. Fetch or save it again.") from error
        return cls(
            token=config["token"],
            subject=config["subject"],
            source_prompt=config["source_prompt"],
            method=config["method"],
            rows=rows,
            weights=weights,
            lora_metadata=metadata,
            mask=mask,
            base_model=config.get("base_model", ""),
            base_fingerprint=config.get("base_fingerprint", {}),
            settings=config.get("settings", {}),
            measures=config.get("measures", {}),
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
    ) -> str:
        """Upload the identity to the Hub repository ``repo_id``; returns the commit's address."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder))
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, create_pr=create_pr
            )
        return str(commit.commit_url)


def _write_rows(file: Path, token: str, rows: Mapping[str, torch.Tensor]) -> None:
    """One row under the token's name, as Stable Diffusion's learned words are published; several under ROW_KEYS, as
    SDXL's are."""
    keys = {name: token for name in rows} if len(rows) == 1 else ROW_KEYS
    save_file({keys[name]: row.contiguous() for name, row in rows.items()}, str(file))


def _read_rows(file: Path, token: str) -> dict[str, torch.Tensor]:
    held = load_file(str(file))
    keys = ROW_KEYS if set(ROW_KEYS.values()) <= held.keys() else {"text_encoder": token}
    return {name: held[key].float().reshape(-1) for name, key in keys.items()}


def _read_mask(file: Path) -> torch.Tensor | None:
    """(h, w) float32 in [0, 1], or None where there is no file."""
    if not file.exists():
        return None
    with Image.open(file) as picture:
        return torch.from_numpy(np.asarray(picture.convert("L")) / np.float32(255))


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
    ValueError: the identity was fitted to a base model with other weights than ``components`` have below ``loaded``.
    """
    for name, wanted in adapter.base_fingerprint.items():
        found = fingerprint(components[name], loaded.originals(name))
        if len(wanted) != len(found) or not np.allclose(wanted, found, rtol=0.02, atol=1e-3):
            raise ValueError(
                f"The identity {adapter.token!r} was fitted to {adapter.base_model or 'another base model'!r}, whose "
                f"{name} has other weights than this pipeline's. Load that model, or fit the identity again here."
            )


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter ``name``, also where PEFT has since wrapped its layer."""
    layer, _, leaf = name.rpartition(".")
    owner = module.get_submodule(layer)
    return getattr(getattr(owner, "base_layer", owner), leaf)


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
            ValueError: it doesn't fit them (names or shapes); nothing is changed then.
        """
        for component, module in components.items():
            for name, difference in adapter.weight_differences(component).items():
                try:
                    held = _parameter(module, name)
                except AttributeError:
                    raise ValueError(
                        f"The identity changes {component}.{name}, which this model doesn't have."
                    ) from None
                if held.shape != difference.shape:
                    raise ValueError(
                        f"The identity's {component}.{name} is {tuple(difference.shape)}; "
                        f"the model's is {tuple(held.shape)}."
                    )
        self._lift(components)
        self.adapters[adapter.token] = (adapter, scale)
        self._lay(components)

    def remove(self, token: str, components: Mapping[str, nn.Module]) -> None:
        """Lift one identity off; the others stay."""
        self._lift(components)
        del self.adapters[token]
        self._lay(components)

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
                for name, difference in adapter.weight_differences(component).items():
                    parameter = _parameter(module, name)
                    self._originals.setdefault((component, name), parameter.data)
                    changed = parameter.data.float() + scale * difference.to(parameter.device)
                    parameter.data = changed.to(parameter.dtype)
