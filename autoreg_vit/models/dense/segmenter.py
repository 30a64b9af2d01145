"""Semantic segmentation: UPerNet on an encoder's maps, as BEiT sets it up and both papers take it over."""

from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

from ...artifacts import load_network, save_network
from ..interface import create_encoder
from .neck import DenseNetwork, FeaturePyramid, register_smp_encoder

#: Pixels of a mask that have no class.
IGNORED = -1


class Segmenter(DenseNetwork, nn.Module):
    """UPerNet, from segmentation-models-pytorch, on a FeaturePyramid. In training a second, small head reads the map of
    stride 16, and its loss is added; dropout stands before the last layer of each head (BEiT's setting).

    Args:
        encoder: A timm ViT made with `dynamic_img_size=True`; changed in place as `FeaturePyramid` does.
        classes: How many.
        img_size: Height and width in pixels of training crops, to which positions are interpolated.
        decoder_channels: Width of the head; by default the encoder's, as in BEiT.
        auxiliary: Weight of the second head's loss; 0 leaves it out.
        dropout: Part of the channels dropped before the last layers.

    Raises:
        ModelError: for an encoder that does not fit the neck.
        ShapeError: for an `img_size` that is not a whole number of patches.
    """
    config: dict[str, Any]
    encoder_path = 'network.encoder.pyramid.encoder'

    def __init__(
            self, encoder: VisionTransformer, classes: int, img_size: int | tuple[int, int] | None = None, *,
            decoder_channels: int | None = None, auxiliary: float = 0.4, dropout: float = 0.1):
        super().__init__()
        import segmentation_models_pytorch as smp

        pyramid = FeaturePyramid(encoder, img_size)
        width, channels = encoder.embed_dim, encoder.patch_embed.proj.in_channels
        register_smp_encoder('autoreg_vit', pyramid)
        # Its own upsampling aligns corners; here pixels keep their places.
        self.network = smp.UPerNet(
            'autoreg_vit', encoder_weights=None, in_channels=channels, classes=classes, upsampling=1,
            decoder_channels=width if decoder_channels is None else decoder_channels)
        del smp.encoders.encoders['autoreg_vit']  # which would keep the encoder when this network is gone
        self.network.segmentation_head.insert(0, nn.Dropout2d(dropout))
        self.weight = auxiliary
        self.auxiliary = None
        if auxiliary:
            self.auxiliary = nn.Sequential(
                nn.Conv2d(width, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU(), nn.Dropout2d(dropout),
                nn.Conv2d(256, classes, 1))

    def forward(self, images: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, classes, H, W] of normalised images [B, C, H, W] or, given masks, int64 [B, H, W] with `IGNORED`
        where there is no class, the loss."""
        features = self.network.encoder(images)
        logits = _enlarge(self.network.segmentation_head(self.network.decoder(features)), images, 4)
        if masks is None:
            return logits
        loss = pixel_loss(logits, masks)
        if self.auxiliary is not None:
            loss = loss + self.weight * pixel_loss(_enlarge(self.auxiliary(features[4]), images, 16), masks)
        return loss


def _enlarge(logits: torch.Tensor, images: torch.Tensor, stride: int) -> torch.Tensor:
    """Logits of a stride at the images' size, float32."""
    height, width = images.shape[-2:]
    return interpolate(logits.float(), scale_factor=stride, mode='bilinear')[..., :height, :width]


def pixel_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Cross entropy of logits [B, classes, H, W] and masks, int64 [B, H, W]: a mean over all pixels to which ignored
    ones add zero, as in the framework of BEiT's setting, so that the mean over processes and accumulated batches is
    that over all their pixels."""
    return cross_entropy(logits, masks, ignore_index=IGNORED, reduction='sum') / masks.numel()


def save_segmenter(model: Segmenter, folder: Path, source: dict[str, Any], **more: Any) -> None:
    """Write a segmenter as a folder that `load_segmenter` reads.

    Args:
        source: What makes the encoder again: timm's `architecture` and its `model_args`.
        **more: What else config.json holds: classes, a list of names; crop_size, stride, mean and std, with which to
            use the model.
    """
    encoder = model.network.encoder.pyramid.encoder
    save_network(model, folder, {
        **source, 'img_size': list(encoder.patch_embed.img_size),
        'decoder_channels': model.network.segmentation_head[1].in_channels, 'auxiliary': model.weight, **more,
    })


def load_segmenter(folder: str | Path) -> Segmenter:
    """A segmenter that `autoreg-vit segment` has trained, in evaluation mode: images [B, C, H, W] normalised by its
    `config['mean']` and `config['std']` to logits [B, classes, H, W]; `config` is the folder's config.json.

    Raises:
        CheckpointError: for a folder that is none, or damaged.
    """
    def build(config: dict[str, Any]) -> Segmenter:
        encoder = create_encoder(config['architecture'], **config['model_args'])
        return Segmenter(encoder, len(config['classes']), tuple(config['img_size']),
                         decoder_channels=config['decoder_channels'], auxiliary=config['auxiliary'])

    return load_network(folder, build, 'segmenter', 'segment')
