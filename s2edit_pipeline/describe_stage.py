"""From a picture to words: a prompt that says what it shows, and the noun of its subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .describe_captioner import DEFAULT_CAPTIONER, caption_of
from .describe_completion import Heard, completed, heard_in, template_of
from .describe_judge import ROUNDS, Choices, DenoisingJudge, choose_all, choose_noun
from .describe_vocabulary import Template, Wording, read_vocabulary
from .edit_settings import EditRequest
from .identity_prompts import check_prompt
from .inversion_record import is_finished
from .object_search import Size, check_crop, place
from .picture_files import read_picture
from .pipeline_work import Work
from .prompt_parts import subject_noun


@dataclass(frozen=True)
class Description:
    """What a picture shows.

    Attributes:
        prompt: "a photo of a smiling lady with glasses"; a source prompt for edits.
        subject: the noun in it, "lady".
        scores: how sure: phrase of a vocabulary -> by what share the model's denoising error grows under the second
            best; of a captioner, its whole prompt -> by what share it grows without these words.
        account: the same in parts, from which :meth:`complete` works.
    """

    prompt: str
    subject: str
    scores: Mapping[str, float]
    account: Account | None = field(default=None, repr=False, compare=False)

    def complete(self, target: str) -> str:
        """``target``, a short target prompt, with all that the description says and ``target`` is silent about: what a
        target leaves out would change too."""
        return target if self.account is None else self.account.beside(target)


@dataclass(frozen=True)
class DescribeRequest:
    """One call's description, its arguments as they came.

    Attributes:
        image: the picture.
        prompt: words that are known of it already, or None.
        vocabulary: captions with choices, see ``describe_vocabulary``; None is the model's own.
        captioner: an image-to-text model, see ``describe_captioner.caption_of``; None: the vocabulary, or where there
            is none, ``DEFAULT_CAPTIONER``.
        size: (height, width) to work at; None is the model's own.
        crop: (left, top, right, bottom) of the part that is described; None and "auto": all of it.

    Raises:
        ValueError: both a vocabulary and a captioner.
    """

    image: Any
    prompt: str | None = None
    vocabulary: str | Sequence[str] | None = None
    captioner: Any = None
    size: Size = (None, None)
    crop: Any = None

    def __post_init__(self) -> None:
        if self.vocabulary is not None and self.captioner is not None:
            raise ValueError("vocabulary= and captioner= are two ways to describe a picture; pass one of them.")
        if self.prompt is not None:
            check_prompt(self.prompt, "prompt")


@dataclass(frozen=True)
class Account:
    """A description in parts: the template, what each group of it says (None: nothing), how sure that is, and the whole
    as a prompt."""

    template: Template
    chosen: Sequence[Wording | None]
    scores: Mapping[str, float]
    prompt: str

    @property
    def subject(self) -> str:
        return self.template.saying(self.template.subject, self.chosen[self.template.subject])

    def beside(self, prompt: str, source: Mapping[int, Heard] | None = None) -> str:
        """``prompt`` completed, see ``describe_completion.completed``."""
        return completed(prompt, self.template, self.chosen, source)


def describe_picture(work: Work, request: DescribeRequest) -> Description:
    """Describe as ``request`` says.

    Raises:
        TypeError, ValueError: an input that can't be used.
    """
    account = account_of(work, request)
    prompt = account.prompt if request.prompt is None else account.beside(request.prompt)
    subject = account.subject if request.prompt is None else subject_noun(request.prompt) or account.subject
    return Description(prompt, subject, account.scores, account)


def account_of(work: Work, request: DescribeRequest) -> Account:
    """What the picture shows beside what the request's prompt says.

    Raises:
        TypeError, ValueError: an input that can't be used.
    """
    family = work.family
    canvas = place(work, read_picture(request.image), check_crop(request.crop), request.size).canvas
    vocabulary = request.vocabulary
    if vocabulary is None and request.captioner is None:
        vocabulary = own_vocabulary(family.pipe)
    templates = None if vocabulary is None else read_vocabulary(vocabulary)
    caption = None
    if templates is None:
        captioner = DEFAULT_CAPTIONER if request.captioner is None else request.captioner
        caption = caption_of(canvas, captioner, family.device)
    judge = DenoisingJudge(family, family.encode_picture(canvas))
    if templates is None:
        assert caption is not None
        return _of_caption(judge, caption)
    noun = None if request.prompt is None else subject_noun(request.prompt)
    choices = choose_noun(judge, templates, [] if noun is None else [noun])
    heard = {} if request.prompt is None else heard_in(request.prompt, choices.template)
    with work.progress_bar(total=ROUNDS * (len(choices.template.groups) - 1)) as bar:
        choose_all(judge, choices, {g: one.wordings for g, one in heard.items() if one.wordings}, bar.update)
    return Account(choices.template, choices.chosen, _scores(choices), choices.caption())


def own_vocabulary(pipe: Any) -> str | None:
    """The vocabulary that the model brings, a caption a line, or None."""
    vocabulary: str | None = getattr(pipe, "config", {}).get("_vocabulary")
    return vocabulary


def _scores(choices: Choices) -> dict[str, float]:
    return {text: choices.scores.get(g, 0.0) for g, text in enumerate(choices.said()) if text}


def _of_caption(judge: DenoisingJudge, caption: str) -> Account:
    """Raises:
    ValueError: the caption names nothing.
    """
    if subject_noun(caption) is None:
        raise ValueError(
            f"The caption {caption!r} names nothing; say yourself what the picture shows, and its subject."
        )
    template, chosen = template_of(caption)
    best, share = judge.best([caption, ""])
    return Account(template, chosen, {caption: share if best == 0 else -share}, caption)


# ---------------------------------------------------------------------------- words for the other stages


def words_for_fit(work: Work, request: DescribeRequest, subject: str | None, *, complete: bool) -> tuple[str, str]:
    """A fit's prompt and subject: as they came, where they are None the picture's description, and with ``complete``
    completed by it.

    Raises:
        TypeError, ValueError: an input that can't be used; a subject without a prompt.
    """
    prompt = request.prompt
    if prompt is None and subject is not None:
        raise ValueError(f"subject={subject!r} is a word of the prompt: pass prompt= too, or neither of them.")
    if prompt is None or complete:
        about = describe_picture(work, request)
        return about.prompt, about.subject if subject is None else subject
    subject = subject_noun(prompt) if subject is None else subject
    if subject is None:
        raise ValueError(f"prompt={prompt!r} names nothing; pass subject=, the noun in it that is to be kept.")
    return prompt, subject


def words_for_edit(work: Work, request: EditRequest, source: str | None, targets: list[str]) -> tuple[str, list[str]]:
    """An edit's source prompt and target prompts, completed by the picture's description where ``request`` asks for it,
    and where ``source`` is None, in whose place the description then stands.

    What the caller's own source prompt says and a target doesn't was taken away. Where the words come from the picture,
    or from an identity, a target that is silent about them leaves them as they are.

    Raises:
        TypeError, ValueError: an input that can't be used; there is no picture to describe.
    """
    complete = source is None if request.complete_prompt is None else request.complete_prompt
    if source is not None and not complete:
        return source, targets
    if request.image is None:
        raise ValueError("complete_prompt=True looks at the picture: pass image= beside the inversion.")
    account = account_of(work, DescribeRequest(request.image, source, size=request.size, crop=request.crop))
    said = {} if request.source_prompt is None or source is None else heard_in(source, account.template)
    completed_source = account.prompt if source is None else account.beside(source)
    if is_finished(request.inversion) and completed_source != source:
        raise ValueError(
            f"complete_prompt=True makes of the source prompt {completed_source!r}, and the inversion was made under "
            f"{source!r}; invert under those words, or leave inversion= out."
        )
    return completed_source, [account.beside(text, said) for text in targets] if complete else targets
