"""``s2edit demo``: a person that the model has never seen is fitted, saved, loaded and edited, in one sheet."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from .evaluation.metrics.counterfactual import CounterfactualEdit

DEFAULT_PERSON = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="s2edit-demo", help="folder for sheet, pictures and identity (%(default)s)")
    parser.add_argument(
        "--person", type=int, default=DEFAULT_PERSON, help="number of the held-out subject (%(default)s)"
    )
    parser.add_argument("--kind", choices=("person", "creature"), default="person", help="of subject (%(default)s)")
    parser.add_argument("--image", help="a picture of yours, with --prompt, --subject and --edit")
    parser.add_argument("--prompt", help="what your picture shows: 'a photo of a lady with glasses'")
    parser.add_argument("--subject", help="the noun in it whose identity is kept: 'lady'")
    parser.add_argument("--edit", action="append", default=[], help="a target prompt; give as many as you like")
    parser.add_argument("--mask", help="your own mask of the subject, white inside; found by itself otherwise")
    parser.add_argument("--model", help="a Stable Diffusion folder or Hub name; the embedded model otherwise")
    parser.add_argument("--method", default="lora", choices=("lora", "full", "token"), help="(%(default)s)")
    parser.add_argument("--fit-steps", type=int, help="the method's own by default")
    parser.add_argument("--inversion", default="direct", help="see docs/inversions.md (%(default)s)")
    parser.add_argument("--device", help="where to work (default: a CUDA device if there is one)")
    parser.add_argument("--steps", type=int, default=50, help="inference steps (%(default)s)")
    parser.add_argument("--guidance", type=float, help="guidance scale (the model's own by default)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status, 2 for arguments that don't go together."""
    started = time.perf_counter()
    if args.image and not (args.prompt and args.subject and args.edit):
        print("--image needs --prompt, --subject and at least one --edit.", file=sys.stderr)
        return 2
    if not args.image and (args.prompt or args.subject or args.edit or args.mask):
        print("--prompt, --subject, --edit and --mask describe a picture of yours: give --image too.", file=sys.stderr)
        return 2
    _run(args, started)
    return 0


def _run(args: argparse.Namespace, started: float) -> None:
    import torch
    from diffusers.utils import logging

    from . import pipeline  # noqa: F401  (it makes the inversions known)
    from .commands.shared import check_folder_place, checked_device, open_model
    from .identity_adapter import IdentityAdapter
    from .inversion_record import inversion_method
    from .picture_inputs import load_picture
    from .prompt_words import insert_token

    def clock() -> float:
        return time.perf_counter() - started

    method = inversion_method(args.inversion)
    graded: list[CounterfactualEdit | None]
    if args.image:
        picture, prompt, subject = load_picture(args.image), args.prompt, args.subject
        targets, names, graded = list(args.edit), list(args.edit), [None] * len(args.edit)
    else:
        from .avatars.captions import describe
        from .avatars.world import render, sample
        from .evaluation.metrics.counterfactual import demo_edits

        avatar = sample(args.kind, args.person, "held_out")
        picture, prompt, subject = render(avatar), describe(avatar).text, avatar.noun
        edits = demo_edits(avatar)
        targets, names, graded = [e.target_prompt for e in edits], [e.name for e in edits], list(edits)

    # before anything is loaded or fitted
    prompts = [insert_token(target, subject, "[I]") for target in targets]
    mask = load_picture(args.mask, "mask") if args.mask else None

    check_folder_place("--out", args.out)
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, not {args.steps}.")
    device = checked_device(args.device) if args.device else "cuda" if torch.cuda.is_available() else "cpu"
    pipe = open_model(args.model).to(device)
    logging.set_verbosity_error()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    print(f'"{prompt}"\n{clock():6.1f} s  model loaded')

    shown_mask = mask.convert("L") if mask else pipe.preview_mask(picture, prompt, subject)
    share = sum(shown_mask.histogram()[128:]) / (shown_mask.width * shown_mask.height)
    print(f"{clock():6.1f} s  mask found: {share:.0%} of the picture")
    pipe.set_progress_bar_config(desc="fitting", leave=False)
    identity = pipe.fit_identity(
        picture,
        prompt,
        subject,
        method=args.method,
        mask=args.mask,
        num_steps=args.fit_steps,
        seed=args.seed,
    )
    identity.save_pretrained(out / "identity")
    size = sum(f.stat().st_size for f in (out / "identity").iterdir())
    m = identity.measures
    print(
        f"{clock():6.1f} s  identity fitted ({identity.settings['num_steps']} steps), saved ({size / 1e6:.2f} MB) and "
        f"loaded back; cos(e_P, e_[I]) {m['cosine_first']:+.3f} -> {m['cosine_last']:+.3f}"
    )
    pipe.load_identity(IdentityAdapter.from_pretrained(out / "identity"))
    pipe.set_progress_bar_config(desc="inverting", leave=False)
    inversion = pipe.invert(
        picture, prompt, args.inversion, args.steps, guidance_scale=args.guidance if method.binds_guidance else None
    )
    print(f"{clock():6.1f} s  picture inverted ({args.inversion}, {args.steps} steps)")

    pipe.set_progress_bar_config(desc="editing", leave=False)
    report: dict[str, Any] = {"prompt": prompt, "identity": dict(m), "edits": []}
    rows: list[tuple[str, Image.Image, Image.Image | None, Image.Image | None]] = []
    reconstruction = None
    for name, target, asked, edit in zip(names, targets, prompts, graded, strict=True):
        before = time.perf_counter()
        result: Any = pipe(
            asked,
            image=picture,
            source_prompt=prompt,
            inversion=inversion,
            guidance_scale=args.guidance,
        )
        took = time.perf_counter() - before
        reconstruction, edited = result.source, result.images[0]
        words = re.sub(r"[^\w]+", "-", name).strip("-")[:60]
        file = out / f"{len(rows) + 1}-{words}.png"
        edited.save(file)
        record: dict[str, Any] = {"name": name, "prompt": target, "seconds": round(took, 2), "at": round(clock(), 1)}
        line = f"{clock():6.1f} s  {name}: {took:.1f} s"
        truth = None
        if edit is not None:
            from .evaluation.metrics.counterfactual import grade

            score, truth = grade(edit, edited), edit.truth()
            record |= asdict(score)
            line += (
                f", PSNR to the truth {score.whole:.1f} dB; inside the edit {score.inside:.1f} "
                f"(unedited {score.unedited_inside:.1f}), outside {score.outside:.1f}"
            )
        print(f"{line}; {file}")
        report["edits"].append(record)
        rows.append((name, edited, truth, result.edit_masks[0]))
    assert reconstruction is not None
    sheet = _sheet(prompt, picture, shown_mask, reconstruction, rows)
    sheet.save(out / "sheet.png")
    report["seconds"] = round(clock(), 1)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    print(f"{clock():6.1f} s  {out / 'sheet.png'}")


def _sheet(
    prompt: str,
    source: Image.Image,
    mask: Image.Image,
    reconstruction: Image.Image,
    rows: list[tuple[str, Image.Image, Image.Image | None, Image.Image | None]],
) -> Image.Image:
    """One picture: source, mask and reconstruction above; below, a column for each edit: it, the truth, its region."""
    from .picture_sheet import picture_sheet

    lines: list[list[tuple[str, Image.Image | None]]] = [
        [("source", source), ("mask of [I]", mask), ("reconstruction", reconstruction)],
        [(name, edited) for name, edited, _, _ in rows],
    ]
    if any(truth is not None for _, _, truth, _ in rows):
        lines.append([("the truth", truth) for _, _, truth, _ in rows])
    lines.append([("may change", region) for _, _, _, region in rows])
    return picture_sheet(lines, 192, prompt)
