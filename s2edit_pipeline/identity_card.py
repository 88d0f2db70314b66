"""The card that is saved with an identity: valid Hub front matter, what it is, how to load it, consent.

The template is here, not in a file of its own, because diffusers copies modules alone; ``model_card/identity.md``
shows it.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from string import Template
from typing import Any

from huggingface_hub import ModelCardData

from .identity_lora_names import is_lora
from .identity_schema import MASK_FILES
from .prompt_changes import change_words
from .prompt_words import insert_token, split_words

TEMPLATE = Template("""\
---
$front_matter
---

# $title

An identity for S2EditPipeline: the token `$token` before the noun "$subject", fitted to **one** picture that was
described as

> $source_prompt

$pictures
## Use

```text
$import_line

pipe = $loading
pipe.load_identity($place)
image = "picture.png"  # the one that it was fitted to
edited = pipe($example, image=image, source_prompt=$quoted_source_prompt).images[0]
```

$plain_diffusers

## What it is

| | |
|---|---|
| fitted to | `$base_model` |
| method | `$method` |
$rows

Only safetensors, JSON, PNG and Markdown, each checked by size and SHA-256 when it is loaded. Nothing in it is run.

## Intended use, consent and misuse

Editing pictures of this subject, by people whom the subject has allowed to. An identity holds what distinguishes a
person: treat it as you would treat the photograph. Publish it only with that person's consent, and take it down when
they withdraw it. Not for likenesses meant to deceive, defame, harass or sexualise; not as evidence of anything. Say
that an edited picture is edited.

## Limits

It knows one picture, from one side and in one light. It works with the base model that it was fitted to and with no
other, and brings that model's limits and biases along. The longer a fit, the more the picture resists its edits.

## Credit

*S²Edit: Text-Guided Image Editing with Precise Semantic and Spatial Control* (2025).
""")

SECOND_ENCODER_NOTE = """\
Once for each text encoder, with the keys `clip_l` and `clip_g`. Then tell the second one where prompts end, or it takes
the learned word for the end: set `text_encoder_2.config.eos_token_id` and `text_encoder_2.text_model.eos_token_id` to
`tokenizer_2.eos_token_id`."""
"""What plain SDXL needs besides."""

EMBEDDED = {
    "weights": ("the embedded avatars", "load_avatars()"),
    "flow_weights": ("the embedded flow avatars", 'load_avatars("flow")'),
}
"""The embedded models: folder in ``avatars`` -> what the model is called, and the call that loads it."""


def identity_card(
    identity: Any,
    previews: Mapping[str, str] | None = None,
    license: str = "other",
    repository: str | None = None,
    folder: str = "",
) -> str:
    """The card's text.

    Args:
        identity: an ``IdentityAdapter``.
        previews: prompt -> its picture's file.
        license: as the Hub names licences.
        repository: its name on the Hub, if known.
        folder: otherwise the name of the folder that it is saved as.
    """
    previews = previews or {}
    tokens = {identity.token: identity.subject}
    if identity.reference is not None:
        tokens[identity.reference.token] = identity.reference.subject
    example = _example(identity, previews)
    masks = {
        name: file
        for file, (name, (_, mask)) in zip(MASK_FILES, identity.learned.items(), strict=False)
        if mask is not None
    }
    facts = {name.replace("_", " "): f"{value:.4g}" for name, value in identity.measures.items()}
    facts["fitted with"] = ", ".join(f"{name} {version}" for name, version in identity.library_versions.items())
    reads_as_lora, base_model = any(map(is_lora, identity.weights)), identity.base_model
    token, subject = next(iter(tokens.items()))
    loading = dict(EMBEDDED.values()).get(base_model, f"S2EditPipeline.from_pretrained({_quoted(base_model)})")
    source_prompt, example = (" ".join(text.split()) for text in (identity.source_prompt, example))
    pictures = [f"![{prompt}]({file})\n\n*{prompt}*" for prompt, file in previews.items()]
    pictures += [  # a cell of the latents a pixel: shown larger
        f'<img src="{file}" width="256" alt="where {html.escape(name)} looks">\n\n*Where `{name}` looks*'
        for name, file in masks.items()
    ]
    rows = {f"token `{name}`": f'before "{noun}"' for name, noun in list(tokens.items())[1:]} | facts
    return TEMPLATE.substitute(
        front_matter=_front_matter(source_prompt, base_model, previews, reads_as_lora, license),
        # here, not in the template: diffusers' loader takes a line that begins so for an import of ours, and says that
        # the package is missing
        import_line=f"from s2edit_pipeline import {re.split('[.(]', loading)[0]}",
        loading=loading,
        place=_quoted(repository or folder),
        title=repository or f"The identity {token}",
        token=token,
        subject=subject,
        source_prompt=source_prompt,
        quoted_source_prompt=_quoted(source_prompt),
        pictures="".join(f"{picture}\n\n" for picture in pictures),
        base_model=base_model or "the base model that it was fitted to",
        example=_quoted(example),
        plain_diffusers=_plain_diffusers(identity, reads_as_lora=reads_as_lora),
        method=identity.method,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    )


def _example(identity: Any, previews: Mapping[str, str]) -> str:
    """A target prompt: one that there is a picture of, or the source with something put on."""
    shown = next((prompt for prompt in previews if identity.token in split_words(prompt, [identity.token])), None)
    if shown is not None:
        return shown
    source = identity.source_prompt
    for thing in ("hat", "glasses"):
        with suppress(ValueError):  # it is there already
            return insert_token(
                change_words(source, add=[thing], subject=identity.subject), identity.subject, identity.token
            )
    return insert_token(source, identity.subject, identity.token) + ", smiling"


def _plain_diffusers(identity: Any, *, reads_as_lora: bool) -> str:
    """What diffusers' own pipelines make of it."""
    lora = ["`load_lora_weights`"] if reads_as_lora else []
    if "transformer" in identity.base_fingerprint:
        reads = f"reads its weights, {lora[0]}, and not its token" if lora else "doesn't read it"
        return f"Plain diffusers {reads}: its pipelines of such models load no learned words into all text encoders."
    loads = f"Plain diffusers reads it too, without the mask: {' and '.join([*lora, '`load_textual_inversion`'])}."
    return f"{loads} {SECOND_ENCODER_NOTE}" if len(identity.rows) > 1 else loads


def _front_matter(
    source_prompt: str, base_model: str, previews: Mapping[str, str], reads_as_lora: bool, license: str
) -> str:
    """The YAML that the Hub reads, without its fences."""
    # the Hub takes nothing but a repository's name here
    is_on_the_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) is not None
    tags = ["s2edit", "image-editing", "personalization", "diffusers", "textual_inversion"]
    data = ModelCardData(
        library_name="diffusers",
        license=license,
        pipeline_tag="image-to-image",
        base_model=base_model if is_on_the_hub else None,
        base_model_relation="adapter" if is_on_the_hub else None,
        tags=[*tags, *(["lora"] if reads_as_lora else [])],
        instance_prompt=source_prompt,
        widget=[{"text": prompt, "output": {"url": file}} for prompt, file in previews.items()] or None,
    )
    return str(data.to_yaml(line_break="\n"))


def _quoted(text: str) -> str:
    """As JSON, whose strings are YAML's and Python's too, whatever is in them."""
    return json.dumps(text, ensure_ascii=False)
