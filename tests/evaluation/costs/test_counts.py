"""Counting U-Net evaluations: against calls counted by hand."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from s2edit_pipeline.evaluation.costs.counts import count_unet


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip


def test_rows_forward_and_backward(unet):
    words = torch.randn(3, 5, 8)
    with count_unet(unet) as counts:
        with torch.no_grad():
            unet(torch.randn(3, 4, 8, 8), 5, encoder_hidden_states=words)
            unet(torch.randn(1, 4, 8, 8), 5, encoder_hidden_states=words[:1], return_dict=False)
        assert (counts.evaluations, counts.backward_evaluations, counts.cost) == (4, 0, 4)
        # a gradient of the words alone is a backward pass through the whole model too
        unet.requires_grad_(False)
        null = words[:2].clone().requires_grad_()
        unet(torch.randn(2, 4, 8, 8), 5, encoder_hidden_states=null).sample.sum().backward()
        assert (counts.evaluations, counts.backward_evaluations, counts.cost) == (6, 2, 10)


def test_nothing_is_left_behind(unet):
    with pytest.raises(RuntimeError, match="stop"), count_unet(unet):
        raise RuntimeError("stop")
    assert not unet._forward_hooks
