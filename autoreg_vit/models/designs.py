"""The pretraining models that timm registers: each paper's design at each size of encoder, and their weights.

RandSAC: Hua et al., "Self-supervision through random segments with autoregressive coding". SAIM: Qi et al., "Exploring
stochastic autoregressive image modeling for visual representation".
"""

from typing import Any, cast

import timm
import torch
from timm.models import build_model_with_cfg

from ..errors import ModelError, suggest
from .decoders import MaskedDecoder
from .encoders import ENCODER_OPTIONS, SIZES, check_options, default_cfg, method_options, python_numbers, register_all
from .fitting import check_fit, loading, resample, unwrap
from .pretrained import check_tag, register_weights, weights_options
from .pretraining import PRETRAINING_OPTIONS, AutoregressiveViT, compose
from .saim_checkpoint import convert_saim_pretraining

__all__ = ['create_pretraining_model', 'pretraining_models']  # register_all adds the models


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: AutoregressiveViT) -> dict[str, torch.Tensor]:
    """Weights in this package's or SAIM's published layout, fitted to the model's patch and image size.

    Raises:
        CheckpointError: for tensors that are missing, foreign or of other sizes.
    """
    content, prefix = convert_saim_pretraining(unwrap(state_dict)), 'encoder.'
    encoder = {k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)}
    encoder, problem = resample(encoder, model.encoder)
    fitted = {k: v for k, v in content.items() if not k.startswith(prefix)}
    fitted.update({prefix + k: v for k, v in encoder.items()})
    if 'decoder.pos_embed' in fitted and isinstance(model.decoder, MaskedDecoder):
        fitted['decoder.pos_embed'] = model.decoder.pos_embed  # fixed: a function of the grid alone
    check_fit(fitted, content, model, problem)
    return fitted


# Decoders of the papers: CIFAR-10 (RandSAC A.1), low-data (5), ImageNet-100 (A.1: twice the heads), ImageNet-1K (5).
# vit_tiny at 224 takes CIFAR-10's and vit_large ImageNet-1K's: the papers have neither.
_DECODERS = {
    'vit_tiny': dict(decoder_depth=3),
    'vit_small': dict(decoder_depth=4, decoder_heads=12),
    'vit_base': dict(decoder_depth=4, decoder_dim=512, decoder_heads=16),
    'vit_large': dict(decoder_depth=4, decoder_dim=512, decoder_heads=16),
    'vit_tiny_patch4_32': dict(decoder_depth=3),
    'vit_small_patch4_32': dict(decoder_depth=6),
}
_DESIGNS: dict[str, dict[str, Any]] = {
    'randsac': dict(serialization='blobs', decoder='masked', first_segment='self', head='linear', norm_pix=True),
    'saim': dict(serialization='random', decoder='parallel', first_segment='none', head='mlp', norm_pix=True,
                 blur=(9, 1.0)),
}

default_cfgs = register_weights({
    f'{method}_{size}': default_cfg(size, first_conv='encoder.patch_embed.proj', classifier=None)
    for method in _DESIGNS for size in SIZES})


def _create_pretraining(variant: str, pretrained: bool = False, **kwargs: Any) -> AutoregressiveViT:
    # None is the model's default, as where timm.create_model drops it, but of the blur, where it is an answer.
    kwargs = python_numbers({k: v for k, v in kwargs.items() if v is not None or k == 'blur'})
    # What belongs to an encoder's classifier has no place here.
    classifier = ('num_classes', 'global_pool', 'fc_norm', 'final_norm', 'drop_rate')
    known = [option for option in PRETRAINING_OPTIONS + ENCODER_OPTIONS if option not in classifier]
    method, size = variant.split('_', 1)
    for option in kwargs:
        if option in classifier:
            raise ModelError(f'{option} is of a classifier, and {variant} has none: give it to {size}_{method}, its '
                             'encoder, once that is trained.')
    check_options(variant, kwargs, known)
    kwargs = {**weights_options(variant, default_cfgs[variant], pretrained, kwargs), **kwargs}
    if kwargs.get('features_only'):
        raise ModelError(f'{variant} is a pretraining model: take features from its encoder, or from '
                         f"timm.create_model('{size}_{method}', features_only=True).")
    options: dict[str, Any] = {**SIZES[size], **method_options(method, kwargs), **_DESIGNS[method]}
    # Defaults that belong to one decoder or serialization stay out of the way of another.
    if kwargs.get('decoder', options['decoder']) == 'masked':
        options = {**options, **_DECODERS[size]}
    if kwargs.get('serialization', options['serialization']) == 'blobs':
        options['segments'] = (11, 7, 3) if size in ('vit_base', 'vit_large') else (11, 5)
    options.update(kwargs)
    with loading(variant, pretrained, options):
        model = build_model_with_cfg(compose, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
                                     kwargs_filter=('num_classes',), **options)
    model.init_args = {k: v for k, v in options.items() if k in known}
    return model


def pretraining_models() -> list[str]:
    """Names of the registered pretraining models."""
    return list(default_cfgs)


def create_pretraining_model(name: str, **kwargs: Any) -> AutoregressiveViT:
    """`timm.create_model` for pretraining models, where `blur=None` is no blur; timm's own door drops it, which leaves
    the model's default. Of every other option None is the default, here and there.

    Raises:
        ModelError: for a name or tag that is not registered, naming the nearest ones.
    """
    base, _, tag = name.partition('.')
    if base not in default_cfgs:
        encoder = f' {name!r} is an encoder, which learns nothing by itself.' if timm.is_model(base) else ''
        raise ModelError(f'Unknown pretraining model {name!r}.{encoder} {suggest(base, pretraining_models())}')
    if tag:
        check_tag(base, tag, default_cfgs[base])
    if kwargs.get('blur', False) is None:
        kwargs['blur'] = False
    return cast(AutoregressiveViT, timm.create_model(name, **kwargs))


register_all(_create_pretraining, {
    'randsac_vit_tiny': 'RandSAC pretraining of ViT-Ti/16 at 224.',
    'randsac_vit_small': 'RandSAC pretraining of ViT-S/16 at 224 (ImageNet-100, A.1).',
    'randsac_vit_base': 'RandSAC pretraining of ViT-B/16 at 224 (ImageNet-1K, 5).',
    'randsac_vit_large': 'RandSAC pretraining of ViT-L/16 at 224.',
    'randsac_vit_tiny_patch4_32': 'RandSAC pretraining of ViT-Ti/4 at 32 (CIFAR-10, A.1).',
    'randsac_vit_small_patch4_32': 'RandSAC pretraining of ViT-S/4 at 32 (low-data pretraining, 5).',
    'saim_vit_tiny': 'SAIM pretraining of ViT-Ti/16 at 224.',
    'saim_vit_small': 'SAIM pretraining of ViT-S/16 at 224.',
    'saim_vit_base': 'SAIM pretraining of ViT-B/16 at 224 (ImageNet-1K).',
    'saim_vit_large': 'SAIM pretraining of ViT-L/16 at 224.',
    'saim_vit_tiny_patch4_32': 'SAIM pretraining of ViT-Ti/4 at 32.',
    'saim_vit_small_patch4_32': 'SAIM pretraining of ViT-S/4 at 32.',
})
