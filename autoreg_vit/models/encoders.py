"""Encoders: timm VisionTransformers with the papers' initialisation, registered with timm.

They keep the parameter names of stock timm models, so their weights load where this package is not installed.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import build_sincos2d_pos_embed, to_2tuple
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .._compat import refit_positions
from ..errors import ModelError, ShapeError, UsageError, one_line, suggest
from .fitting import check_fit, loading, resample, unwrap
from .interface import as_timm
from .pretrained import register_weights, weights_options
from .saim_checkpoint import convert_saim_encoder

_logger = logging.getLogger(__name__)

__all__ = ['SinCosVisionTransformer']  # register_all adds the models

#: Arguments of each size. Patch 16 at 224 pixels; patch 4 at 32 for CIFAR (RandSAC A.1 and 5).
SIZES = {
    'vit_tiny': dict(img_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=3),
    'vit_small': dict(img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6),
    'vit_base': dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12),
    'vit_large': dict(img_size=224, patch_size=16, embed_dim=1024, depth=24, num_heads=16),
    'vit_tiny_patch4_32': dict(img_size=32, patch_size=4, embed_dim=192, depth=12, num_heads=3),
    'vit_small_patch4_32': dict(img_size=32, patch_size=4, embed_dim=384, depth=12, num_heads=6),
}
#: What the encoders of each method add.
METHODS = {
    # RandSAC B.2: no class token; the average of the encoder's normalised tokens is the feature.
    'randsac': dict(class_token=False, global_pool='avg', fc_norm=False),
    # SAIM's published code: the class token is the feature.
    'saim': dict(class_token=True, global_pool='token', fc_norm=False),
}
#: timm's own model of the same width, which an exported encoder names as its architecture.
STOCK_ARCHITECTURES = {192: 'vit_tiny_patch16_224', 384: 'vit_small_patch16_224', 768: 'vit_base_patch16_224',
                       1024: 'vit_large_patch16_224'}
#: What timm asserts of some arguments of VisionTransformer, most without naming the value.
_CHOICES = {
    'global_pool': ('', 'avg', 'avgmax', 'max', 'token', 'map', 'prr'),
    'pos_embed': ('learn', 'none', ''),
    'weight_init': ('', 'skip', 'reset', 'jax', 'jax_nlhb', 'moco'),
}


class SinCosVisionTransformer(VisionTransformer):
    """timm's VisionTransformer, initialised as both papers do: Xavier-uniform linear layers (RandSAC B.1) and
    two-dimensional sine-cosine position embeddings (RandSAC 4.1, SAIM "Image serialization").

    The position embedding is a trainable parameter here; pretraining freezes it. Arguments are those of
    VisionTransformer, by keyword.

    Raises:
        ShapeError: for sizes that are no whole numbers, an image that is not a whole number of patches, or a width that
            heads do not divide.
        ModelError: for values that timm does not know, or two that do not go together.
    """

    def __init__(self, **kwargs: Any) -> None:
        check_sizes(**{k: kwargs[k] for k in ('img_size', 'patch_size', 'embed_dim', 'num_heads') if k in kwargs})
        _check_values(kwargs)
        try:
            super().__init__(**kwargs)
        except UsageError:
            raise
        except (AssertionError, KeyError, TypeError, ValueError) as error:  # by the option: norm_layer, attn_layer, ...
            given = ', '.join(f'{k}={v!r}' for k, v in kwargs.items())
            raise ModelError(f'timm makes no VisionTransformer with {given} ({type(error).__name__}: '
                             f'{one_line(error)}).') from error
        self.init_args = kwargs

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        super().init_weights(*args, **kwargs)
        self.apply(init_xavier)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        if self.pos_embed is not None:
            with torch.no_grad():
                self.pos_embed[:, :prefix] = 0
                self.pos_embed[:, prefix:] = sincos_position_embedding(self.patch_embed.grid_size, self.embed_dim)

    def set_input_size(self, img_size: int | tuple[int, int] | None = None,
                       patch_size: int | tuple[int, int] | None = None) -> None:
        positions, grid = self.pos_embed, self.patch_embed.grid_size
        super().set_input_size(img_size=pair(img_size), patch_size=pair(patch_size))
        refit_positions(self, positions, grid)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {'reg_token'}  # timm has it from 1.0.28 on

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        # timm has register tokens here from 1.0.28 on, norm_pre from 1.0.31; before, both learned as the last layers.
        return {**super().group_matcher(coarse), 'stem': r'^(?:cls_token|reg_token|pos_embed|patch_embed|norm_pre)'}


def sincos_position_embedding(grid: tuple[int, int], dim: int) -> torch.Tensor:
    """Fixed position embeddings of the tokens of a grid in raster order, [N, dim]."""
    if dim % 4:
        raise ShapeError(f'Sine-cosine position embeddings need a width that 4 divides, got {dim}.')
    return build_sincos2d_pos_embed(list(grid), dim=dim, interleave_sin_cos=False)


def init_xavier(module: nn.Module) -> None:
    """Xavier-uniform linear layers with zero bias, as RandSAC B.1 and SAIM's published code have it."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_sizes(
        img_size: int | tuple[int, int] = 224, patch_size: int | tuple[int, int] = 16, embed_dim: int = 768,
        num_heads: int = 12) -> None:
    """Raise ShapeError for sizes that timm would round down or fail on later."""
    image, patch = _pixels('img_size', img_size), _pixels('patch_size', patch_size)
    _check_whole(embed_dim=embed_dim, num_heads=num_heads)
    if any(p < 1 or s < p or s % p for s, p in zip(image, patch)):
        near = ' x '.join(str(max(round(s / max(p, 1)), 1) * max(p, 1)) for s, p in zip(image, patch))
        raise ShapeError(
            f'An image of {image[0]} x {image[1]} pixels is not a whole number of patches of {patch[0]} x {patch[1]}: '
            f'use an image of {near} or another patch_size.')
    if embed_dim < 1:
        raise ShapeError(f'embed_dim is the width of an encoder or a decoder, at least 1, got {embed_dim}.')
    if num_heads < 1 or embed_dim % num_heads:
        fits = [h for h in range(1, embed_dim + 1) if embed_dim % h == 0 and embed_dim // h in (32, 64)]
        raise ShapeError(
            f'{num_heads} heads do not divide a width of {embed_dim}: use {" or ".join(map(str, fits)) or 1} heads.')


def pair(value: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """One number twice, as timm takes height and width; two as they are, and None for none."""
    return None if value is None else to_2tuple(value)


def _pixels(name: str, value: Any) -> tuple[int, int]:
    """Height and width from one number or two."""
    pair = to_2tuple(value)
    if len(pair) != 2 or not all(isinstance(v, Integral) for v in pair):
        raise ShapeError(f'{name} is a whole number of pixels, or two for height and width, got {value!r}.')
    return pair


def _check_whole(**values: Any) -> None:
    """Raise ShapeError for a value that is no whole number."""
    for name, value in values.items():
        if not isinstance(value, Integral):
            raise ShapeError(f'{name} must be a whole number, got {value!r}.')


def _check_values(options: dict[str, Any]) -> None:
    """Raise ModelError or ShapeError for arguments of VisionTransformer that timm would fail on without naming them, or
    take and fail on in the first forward pass."""
    least = {'depth': 1, 'in_chans': 1, 'reg_tokens': 0}
    _check_whole(**{name: options[name] for name in least if name in options})
    for name, bound in least.items():
        if options.get(name, bound) < bound:
            raise ModelError(f'{name} must be at least {bound}, got {options[name]}.')
    for name, value in options.items():
        if name.endswith('_rate') and not (isinstance(value, Real) and 0 <= float(value) <= 1):
            raise ModelError(f'{name} is a probability between 0 and 1, got {value!r}.')
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ModelError(f'{name} is one of {", ".join(map(repr, _CHOICES[name]))}, got {value!r}.')
    if options.get('global_pool', 'token') == 'token' and not options.get('class_token', True):
        raise ModelError("global_pool='token' reads the class token, which class_token=False, RandSAC's default, "
                         "leaves out: use class_token=True, or another global_pool, such as 'avg'.")


def method_options(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a method's encoders add to `options`: its defaults, of which the pooling of a class token gives way to an
    average where the options leave the class token out."""
    defaults = METHODS[method]
    if defaults['global_pool'] == 'token' and not options.get('class_token', defaults['class_token']):
        return {**defaults, 'global_pool': 'avg'}
    return defaults


def check_options(name: str, options: dict[str, Any], known: list[str]) -> None:
    """Raise ModelError for an option that neither this package nor timm knows, with the names nearest to it."""
    # What timm's factory and builder take before the model sees its arguments.
    builder = ['cache_dir', 'checkpoint_path', 'exportable', 'feature_cls', 'features_only', 'no_jit', 'out_indices',
               'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_model_args', 'pretrained_strict', 'scriptable']
    for option in options:
        if option not in known and option not in builder:
            raise ModelError(f'{name} has no option {option!r}. {suggest(option, [*known, *builder])}')


ENCODER_OPTIONS = [p for p in inspect.signature(VisionTransformer.__init__).parameters if p != 'self']


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: VisionTransformer) -> dict[str, torch.Tensor]:
    """Weights in this package's, timm's or SAIM's published layout, fitted to the model's patch and image size.

    Raises:
        CheckpointError: for weights of another model, naming what differs or the prefix that they stand under.
    """
    content = convert_saim_encoder(unwrap(state_dict), model)
    fitted, problem = resample(content, model)
    classifier = [key for key in fitted if key.startswith('head.')]
    weight = fitted.get('head.weight')
    if classifier and isinstance(model.head, nn.Identity):
        _logger.warning('The model has no classifier; the checkpoint\'s is left out: %s', ', '.join(classifier))
        fitted = {key: value for key, value in fitted.items() if key not in classifier}
    elif isinstance(weight, torch.Tensor):
        # timm goes by what the configuration says, and begins a new one without a word.
        as_timm(model).pretrained_cfg['num_classes'] = len(weight)
        if len(weight) != model.num_classes:
            _logger.warning('The checkpoint\'s classifier of %d classes is left out; the model\'s, of %d, is new.',
                            len(weight), model.num_classes)
    check_fit(fitted, content, model, problem, aside=('head.',))
    return fitted


def default_cfg(size: str, **kwargs: Any) -> dict[str, Any]:
    """timm's pretrained configuration of a size, without weights."""
    pixels = SIZES[size]['img_size']
    return {
        'url': '', 'num_classes': 0, 'input_size': (3, pixels, pixels), 'pool_size': None, 'fixed_input_size': True,
        'crop_pct': 0.9 if pixels == 224 else 1.0, 'interpolation': 'bicubic', 'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD, 'first_conv': 'patch_embed.proj', 'classifier': 'head', **kwargs,
    }


default_cfgs = register_weights({f'{size}_{method}': default_cfg(size) for method in METHODS for size in SIZES})


def python_numbers(options: dict[str, Any]) -> dict[str, Any]:
    """Options with Python's own numbers in place of NumPy's, which JSON does not take."""
    def plain(value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value

    return {name: plain(value) for name, value in options.items()}


def _create_encoder(variant: str, pretrained: bool = False, **kwargs: Any) -> SinCosVisionTransformer:
    kwargs = python_numbers(kwargs)
    check_options(variant, kwargs, ENCODER_OPTIONS)
    kwargs = {**weights_options(variant, default_cfgs[variant], pretrained, kwargs), **kwargs}
    size, method = variant.rsplit('_', 1)
    kwargs = {**SIZES[size], **method_options(method, kwargs), **kwargs}
    out_indices = _feature_indices(kwargs.pop('out_indices', None), kwargs['depth'])
    with loading(variant, pretrained, kwargs):
        return build_model_with_cfg(
            SinCosVisionTransformer, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=out_indices, feature_cls='getter'), **kwargs)


def _feature_indices(indices: int | Sequence[int] | None, depth: Any) -> int | Sequence[int]:
    """Blocks whose maps `features_only=True` gives, by number or as a count of the last ones: three by default, as in
    timm's own models of this family."""
    if not isinstance(depth, Integral):  # an error of the encoder
        return 1
    depth = int(depth)
    if indices is None:
        return min(3, max(depth, 1))
    numbers = [-indices] if isinstance(indices, (int, Integral)) else list(indices)
    if not all(isinstance(i, (int, Integral)) and -depth <= i < depth for i in numbers) or indices == 0:
        raise ModelError(f'out_indices are numbers of blocks, from 0 to {depth - 1}, or how many of the last, from 1 '
                         f'to {depth}; got {indices!r}.')
    return indices


def register_all(make: Callable[..., nn.Module], models: dict[str, str]) -> None:
    """Register each name with timm, and in the module of `make`, as a function that is described so and makes the model
    by `make(name, pretrained, **kwargs)`."""
    def entrypoint(name: str, description: str) -> Callable[..., nn.Module]:
        def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
            return make(name, pretrained, **kwargs)

        create.__name__ = create.__qualname__ = name
        create.__module__, create.__doc__ = make.__module__, description
        return register_model(create)

    vars(sys.modules[make.__module__]).update({name: entrypoint(name, text) for name, text in models.items()})


register_all(_create_encoder, {
    'vit_tiny_randsac': 'ViT-Ti/16 at 224, RandSAC.',
    'vit_small_randsac': 'ViT-S/16 at 224, RandSAC.',
    'vit_base_randsac': 'ViT-B/16 at 224, RandSAC.',
    'vit_large_randsac': 'ViT-L/16 at 224, RandSAC.',
    'vit_tiny_patch4_32_randsac': 'ViT-Ti/4 at 32, RandSAC (A.1).',
    'vit_small_patch4_32_randsac': 'ViT-S/4 at 32, RandSAC (5, low-data pretraining).',
    'vit_tiny_saim': 'ViT-Ti/16 at 224, SAIM.',
    'vit_small_saim': 'ViT-S/16 at 224, SAIM.',
    'vit_base_saim': 'ViT-B/16 at 224, SAIM.',
    'vit_large_saim': 'ViT-L/16 at 224, SAIM.',
    'vit_tiny_patch4_32_saim': 'ViT-Ti/4 at 32, SAIM.',
    'vit_small_patch4_32_saim': 'ViT-S/4 at 32, SAIM.',
})
