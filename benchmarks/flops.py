"""The FLOPs of a training step."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from autoreg_vit import ops
from autoreg_vit.models import create_pretraining_model
from autoreg_vit.settings.pretraining import PretrainConfig

from .ablations_mae import MaeConfig, build_mae


def training_gflops(config: PretrainConfig) -> float:
    """GFLOPs of an image's forward and backward pass: those of matrix products, counted on the CPU with attention over
    all keys."""
    model = create_pretraining_model(config.model, **config.model_options())
    images = torch.zeros(2, model.encoder.patch_embed.proj.in_channels, *model.encoder.patch_embed.img_size)
    if isinstance(config, MaeConfig):
        model = build_mae(model, config.mask_ratio)
        model.set_attn_implementation('eager')  # the fused one is not counted on a CPU
    ops.set_implementation('eager')
    try:
        with FlopCounterMode(display=False) as counter:
            model(images).loss.backward()
    finally:
        ops.set_implementation('auto')
    return counter.get_total_flops() / len(images) / 1e9
