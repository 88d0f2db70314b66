"""Peaks of tracked allocations: counted right, and an edit's beside stock sampling's."""

from __future__ import annotations

import torch

from s2edit_pipeline import load_avatars
from s2edit_pipeline.evaluation.costs.memory import (
    FITS,
    MemoryReport,
    measure_edit_memory,
    measure_fit_memory,
    tracked_allocations,
)  # fmt: skip

CPU = torch.device("cpu")


def test_the_peak_is_what_lives_at_once() -> None:
    weight = torch.ones(1000)  # was there before: not counted
    with tracked_allocations(CPU) as peak:
        a = weight * 2  # 4,000 bytes
        view = a[:500].view(5, 100)  # no memory of its own
        del a
        b = weight + 1  # 8,000: the view holds on to the first
        del view, b
        weight.mul_(1)  # in place
        c = [weight + i for i in range(2)]  # 8,000 again
    assert peak() == 8000
    del c
    with tracked_allocations(CPU) as peak:
        d = torch.zeros(10, dtype=torch.float64)
        assert peak() == 80 == d.nbytes


def test_an_edit_takes_hardly_more_than_stock_sampling() -> None:
    pipe = load_avatars()
    pipe.set_progress_bar_config(disable=True)
    rows = measure_edit_memory(pipe, num_inference_steps=2)
    assert len(rows) == 6
    for n, (lean, keeping, free) in zip((1, 3), (rows[:3], rows[3:]), strict=True):
        # activations grow with the batch: megabytes, and no less than the skip connections' share of it
        assert lean.stock == keeping.stock == free.stock > 4e6 * n
        assert lean.attention == free.attention == 0 < keeping.attention and lean.ratio <= 1.2 and free.ratio <= 1.2, (
            rows
        )
        assert lean.edit <= keeping.edit <= lean.edit + 1.1 * keeping.attention
    shown = MemoryReport(tuple(rows), ()).table().splitlines()
    sizes = (rows[1].edit, rows[1].attention, rows[1].stock)
    assert shown[3].startswith(f"| {rows[1].name} | " + " | ".join(f"{size / 1e6:.1f}" for size in sizes))


def test_a_lora_fit_takes_two_fifths_of_a_full_one() -> None:
    pipe = load_avatars()
    pipe.set_progress_bar_config(disable=True)
    names = ["full", "the defaults, lora", "the defaults, checkpointed"]
    rows = measure_fit_memory(pipe, {name: FITS[name] for name in names})
    full, lora, checkpointed = (row.peak for row in rows)
    tables = pipe.text_encoder.get_input_embeddings().weight
    trained = sum(p.numel() for m in (pipe.unet, pipe.text_encoder) for p in m.parameters()) - tables.numel()
    assert full > 4 * 4 * trained  # the copy, its gradients, AdamW's two moments
    assert checkpointed < 0.8 * lora and lora <= 0.4 * full, (checkpointed, lora, full)
    assert MemoryReport((), tuple(rows)).table().splitlines()[-2].endswith(f"| {lora / 1e6:.1f} | {lora / full:.2f} |")
