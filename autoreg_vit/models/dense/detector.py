"""Mask R-CNN on a plain ViT, as Li et al. 2021 ("Benchmarking Detection Transfer Learning with Vision Transformers")
build it and SAIM uses it ("Object detection and instance segmentation on COCO")."""

from pathlib import Path
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms.v2.functional import resize

from ...artifacts import load_network, save_network
from ...errors import ModelError, ShapeError
from ..interface import create_encoder
from .neck import DenseNetwork, DetectionBackbone, FeaturePyramid
from .windowed import use_windows

#: Norms of the pyramid network and of the heads' convolutions: Li et al. 2021 synchronise a batch norm over all
#: processes; a layer norm (Li et al. 2022, "Exploring Plain Vision Transformer Backbones") sees each image alone.
NORMS = {'batch': nn.BatchNorm2d, 'layer': LayerNorm2d}
Target = dict[str, torch.Tensor]

#: What `attention` may be.
ATTENTION = ('windowed', 'global')


class ViTMaskRCNN(DenseNetwork, MaskRCNN):
    """torchvision's Mask R-CNN on a timm ViT in the setting of Li et al. 2021: four maps of the ViT, a feature pyramid
    network on them, two convolutions in the region proposal network, four convolutions and one linear layer in the box
    head, four convolutions in the mask head, each followed by a norm but for the region proposals.

    In training it takes images [C, H, W] between 0 and 1, none larger than the canvas, and targets as torchvision
    defines them, and gives torchvision's five losses. In evaluation it takes images of any size, fits each into the
    canvas, and gives boxes, labels (from 1 on), scores and masks [n, 1, H, W] in pixels of the image as it came.

    It differs from the paper in that blocks have no relative position bias, which is added there for detection, beside
    the pretrained positions, interpolated; and in that windows at the grid's edge hold fewer tokens instead of padded
    ones. Under autocast features and predictions are handed on in float32: bfloat16 holds coordinates beyond 512 to 4
    pixels.

    Args:
        encoder: A timm VisionTransformer made with `dynamic_img_size=True`; changed in place.
        classes: How many, without the background.
        size: Height and width of the canvas in pixels, multiples of 32.
        mean, std: Of each channel, by which images are normalised.
        attention: 'windowed', global in the last block of each quarter of the depth alone; or 'global' in all.
        window: Rows and columns of a window, in tokens; the paper's 14 are the grid of pretraining at 224 pixels.
        norm: One of `NORMS`.
        width: Channels of the pyramid network and of the heads' convolutions.
        anchor_sizes: Sides of the square anchors of strides 4, 8, 16, 32 and 64, in pixels.
        rois: Regions of a training image that the box head sees.

    Raises:
        ModelError: for an unknown attention or norm, or an encoder that the neck or windows do not fit.
        ShapeError: for a canvas that is not a multiple of 32 pixels.
    """
    config: dict[str, Any]
    encoder_path = 'backbone.pyramid.encoder'

    def __init__(
            self, encoder: VisionTransformer, classes: int, size: tuple[int, int], *, mean: tuple[float, ...],
            std: tuple[float, ...], attention: str = 'windowed', window: int = 14, norm: str = 'batch',
            width: int = 256, anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512), rois: int = 512):
        for name, value, known in (('attention', attention, ATTENTION), ('norm', norm, tuple(NORMS))):
            if value not in known:
                raise ModelError(f'{name} is {" or ".join(map(repr, known))}, got {value!r}.')
        if len(anchor_sizes) != 5:
            raise ModelError(f'anchor_sizes are five numbers of pixels, one for each level, got {anchor_sizes}.')
        if any(s % 32 or s < 32 for s in size):
            raise ShapeError(f'The canvas must be a multiple of 32 pixels, the coarsest map\'s stride, got {size[0]} x '
                             f'{size[1]}.')
        pyramid = FeaturePyramid(encoder, size)
        if attention == 'windowed':
            use_windows(encoder, window, tuple(pyramid.blocks))
        norm_layer, convolutions = NORMS[norm], [width] * 4
        anchors = AnchorGenerator(tuple((side,) for side in anchor_sizes), ((0.5, 1.0, 2.0),) * 5)
        super().__init__(
            DetectionBackbone(pyramid, width, norm_layer),
            rpn_anchor_generator=anchors,
            rpn_head=RPNHead(width, anchors.num_anchors_per_location()[0], conv_depth=2),
            rpn_post_nms_top_n_train=1000,
            box_head=FastRCNNConvFCHead((width, 7, 7), convolutions, [1024], norm_layer),
            box_predictor=FastRCNNPredictor(1024, classes + 1),
            mask_head=MaskRCNNHeads(width, convolutions, 1, norm_layer),
            mask_predictor=MaskRCNNPredictor(width, width, classes + 1),
            box_batch_size_per_image=rois,
        )
        self.transform = Canvas(size, mean, std)
        for module in (self.backbone, self.rpn.head, self.roi_heads.box_predictor, self.roi_heads.mask_predictor):
            module.register_forward_hook(_in_float32)


class Canvas(GeneralizedRCNNTransform):
    """Normalises images and puts each into the upper left of a canvas of one size, zero elsewhere. In evaluation images
    are resized to fit, with anti-aliasing, as in training `LargeScaleJitter` has done before."""

    def __init__(self, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__(min(size), max(size), list(mean), list(std))
        self.size = size

    def resize(self, image: torch.Tensor, target: Target | None = None) -> tuple[torch.Tensor, Target | None]:
        if self.training:
            return image, target
        scale = min(most / s for most, s in zip(self.size, image.shape[-2:]))
        fitting = [min(max(round(s * scale), 1), most) for most, s in zip(self.size, image.shape[-2:])]
        return resize(image, fitting, antialias=True), target

    def batch_images(self, images: list[torch.Tensor], size_divisible: int = 32) -> torch.Tensor:
        height, width = (max(image.shape[dim] for image in images) for dim in (1, 2))
        if height > self.size[0] or width > self.size[1]:
            raise ShapeError(f'A training image of up to {height} x {width} pixels does not fit the canvas of '
                             f'{self.size[0]} x {self.size[1]}: crop or resize it and its boxes and masks.')
        batch = images[0].new_zeros(len(images), images[0].shape[0], *self.size)
        for canvas, image in zip(batch, images):
            canvas[:, :image.shape[1], :image.shape[2]] = image
        return batch


def _in_float32(module: nn.Module, inputs: tuple, output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.float()
    if isinstance(output, dict):
        return type(output)((name, _in_float32(module, inputs, value)) for name, value in output.items())
    return type(output)(_in_float32(module, inputs, value) for value in output)


def save_detector(
        model: ViTMaskRCNN, folder: str | Path, encoder: dict[str, Any], options: dict[str, Any],
        categories: dict[int, str]) -> None:
    """Write a detector as a folder that `load_detector` reads.

    Args:
        encoder: What makes the encoder again: timm's `architecture` and its `model_args`.
        options: Keyword arguments of `ViTMaskRCNN`, size, mean and std among them.
        categories: Names of the classes by their ids in the data, in the order of labels.
    """
    save_network(model, folder, {
        **encoder, 'options': options,
        'categories': [{'id': identity, 'name': name} for identity, name in categories.items()]})


def load_detector(folder: str | Path) -> ViTMaskRCNN:
    """A detector that `autoreg-vit detect` has trained, in evaluation mode: a list of images [C, H, W] between 0 and 1,
    of any size, to boxes, labels, scores and masks of each. `config` is the folder's config.json; label i is the i-th
    of `config['categories']`, from 1 on.

    Raises:
        CheckpointError: for a folder that is none, or damaged.
    """
    def build(config: dict[str, Any]) -> ViTMaskRCNN:
        options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config['options'].items()}
        encoder = create_encoder(config['architecture'], **config['model_args'])
        return ViTMaskRCNN(encoder, len(config['categories']), **options)

    return load_network(folder, build, 'detector', 'detect')
