"""Figures written to PNG, and pictures in lines and columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image


@contextmanager
def save_figure(path: str | Path, size: tuple[float, float], dpi: int = 100) -> Iterator[Any]:
    """An empty matplotlib figure of ``size`` inches, written to ``path`` at the end of the context.

    Raises:
        ImportError: matplotlib isn't there: ``pip install "s2edit-pipeline[evaluation]"``.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "s2edit-pipeline[evaluation]".') from error
    figure = Figure(figsize=size, layout="constrained")
    yield figure
    figure.savefig(str(path), dpi=dpi)


def save_sheet(
    path: str | Path, lines: Sequence[Sequence[Image.Image | None]], titles: Sequence[str], labels: Sequence[str]
) -> None:
    """Lines of pictures under the columns' ``titles``, each line after its label; None leaves a place empty."""
    with save_figure(path, (0.6 + 1.3 * len(titles), 0.5 + 1.3 * len(lines))) as figure:
        axes = figure.subplots(len(lines), len(titles), squeeze=False)
        for row, pictures, label in zip(axes, lines, labels, strict=True):
            for axis, picture in zip(row, pictures, strict=True):
                axis.set(xticks=[], yticks=[], frame_on=False)
                if picture is not None:
                    axis.imshow(picture.convert("RGB"))
            row[0].set_ylabel(label, fontsize=7)
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title.replace(" (", "\n("), fontsize=7, wrap=True)  # a variant and its arguments
