"""Weights fitted to a model: taken out of what wraps them, resampled by timm to its patch and grid, and compared with
it by name and shape, so that what does not fit is one error that says why."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from timm.models import resolve_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import nn

from .._compat import adapts_any_channels
from ..errors import CheckpointError, UsageError, one_line
from .interface import as_timm, encoder_of

#: Entries in which training scripts keep weights, in the order in which timm looks for them.
_ENTRIES = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
#: What torch.compile and DistributedDataParallel put before every name.
_WRAPPERS = re.compile(r'^(?:_orig_mod\.|module\.)+')
#: Tensors that every Vision Transformer has, by which it is found under a prefix.
_ANCHORS = ('patch_embed.proj.weight', 'blocks.0.norm1.weight')


def unwrap(content: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors by name of a checkpoint as timm takes them: a moving average where there is one, without the prefixes
    of torch.compile and DistributedDataParallel. Entries that are no tensors stay as they are.

    Raises:
        CheckpointError: for two tensors of one name.
    """
    plain = {}
    for name, value in inside(content)[0].items():
        key = _WRAPPERS.sub('', name)
        if key in plain:
            raise CheckpointError(f'The checkpoint has {key} twice, with and without the prefix '
                                  f'{name.removesuffix(key) or "module."!r}: keep one of them.')
        plain[key] = value
    return plain


def inside(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """What stands in the entries of a checkpoint that hold its weights, and the names of these entries."""
    names: list[str] = []
    while True:
        held = [entry for entry in _ENTRIES if isinstance(content.get(entry), Mapping)]
        if not held:
            return content, names
        content = content[held[0]]
        names.append(held[0])


def flat(content: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Entries that hold others as one mapping: 'teacher.norm.weight' of {'teacher': {'norm.weight': ...}}."""
    names = {}
    for name, value in content.items():
        names.update(flat(value, f'{prefix}{name}.') if isinstance(value, Mapping) else {f'{prefix}{name}': value})
    return names


def resample(content: dict[str, Any], encoder: VisionTransformer) -> tuple[dict[str, Any], Exception | None]:
    """An encoder's weights at the patch and grid of `encoder`, by timm, and the error where it cannot."""
    try:
        return vit_checkpoint_filter_fn(content, encoder), None
    except Exception as error:  # RuntimeError, KeyError, AttributeError, ... by what does not fit
        return content, error


def check_fit(
        fitted: dict[str, Any], content: dict[str, Any], model: nn.Module, problem: Exception | None = None,
        aside: tuple[str, ...] = ()) -> None:
    """Raise CheckpointError unless weights have the model's tensors, and no others, in its shapes, but for channels
    that timm adapts. By itself timm only warns where it adapts a classifier. `fitted` is `content` resampled, unless
    there was a `problem` with it; names that begin as one of `aside` are left out of the comparison."""
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(aside)}
    given = {k: v for k, v in fitted.items() if not k.startswith(aside)}
    if own.keys() != given.keys():
        _check_prefix(content, model)
        missing, unexpected = (_few(keys) for keys in (own.keys() - given.keys(), given.keys() - own.keys()))
        raise CheckpointError(f'The checkpoint is of another architecture. Missing: {missing}. Unexpected: '
                              f'{unexpected}. {_remedy(content, model)}')
    if problem is not None:
        raise CheckpointError(f'The weights cannot be resampled to the model ({type(problem).__name__}: '
                              f'{one_line(problem, 200)}). {_remedy(content, model)}') from problem
    for name, tensor in own.items():
        shape, expected = getattr(given[name], 'shape', ()), tensor.shape
        if name.endswith('patch_embed.proj.weight'):
            _check_channels(shape, expected, model, name)
            if not hasattr(model, 'encoder'):  # a whole model's decoder predicts the channels that it was trained with
                expected = (expected[0], *shape[1:2], *expected[2:])
        if shape != expected:
            raise CheckpointError(f'{name} is {list(shape)} in the weights and {list(tensor.shape)} in the model. '
                                  f'{_remedy(content, model)}')


@contextmanager
def loading(architecture: str, pretrained: bool, options: dict[str, Any]) -> Iterator[None]:
    """Turn whatever else goes wrong inside, where weights are loaded, into CheckpointError; `options` are arguments of
    `timm.create_model`, which say where the weights are."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # by the kind of damage: RuntimeError, UnpicklingError, SafetensorError, KeyError, ...
        if not pretrained:
            raise
        cfg = resolve_pretrained_cfg(architecture, options.get('pretrained_cfg'), options.get('pretrained_cfg_overlay'))
        raise CheckpointError(f'Cannot load {cfg.file or cfg.hf_hub_id or cfg.url or "the weights"} into '
                              f'{architecture!r} ({type(error).__name__}: {one_line(error, 300)}).'
                              ) from error


def prefixes(content: Mapping[str, Any]) -> list[str]:
    """Under what a Vision Transformer stands in a checkpoint: 'backbone.' and so on, sorted. Entries that hold others
    count as prefixes, as 'teacher.' of {'teacher': {...}}; '' where it stands there plainly."""
    names = set(flat(content))
    found = [{n.removesuffix(anchor) for n in names if n == anchor or n.endswith('.' + anchor)} for anchor in _ANCHORS]
    return sorted(found[0] & found[1])


def _check_prefix(content: dict[str, Any], model: nn.Module) -> None:
    """Raise CheckpointError where the model's tensors stand under a prefix, with the tensors to give in their place."""
    found = prefixes(content)
    if hasattr(model, 'encoder'):
        found = [p.removesuffix('encoder.') for p in found if p.endswith('encoder.')]
    if not found or '' in found:
        return
    # The first parts of the prefix may be entries of the file, the others are in their tensors' names.
    tensors, prefix = 'tensors', found[0]
    entry = prefix.partition('.')[0]
    while isinstance(content.get(entry), Mapping):
        tensors, content, prefix = f'{tensors}[{entry!r}]', content[entry], prefix.removeprefix(f'{entry}.')
        entry = prefix.partition('.')[0]
    raise CheckpointError(
        f'The checkpoint has its tensors under {" and ".join(map(repr, found))}: give those of one, as '
        f'pretrained_cfg_overlay=dict(state_dict={{k[{len(prefix)}:]: v for k, v in {tensors}.items() if '
        f'k.startswith({prefix!r})}}), where tensors are what torch.load or safetensors reads.')


def _check_channels(shape: tuple[int, ...], own: tuple[int, ...], model: nn.Module, name: str) -> None:
    """Raise CheckpointError for a patch embedding that timm would not adapt to the model's channels but leave out, or
    fail on: it takes the channels that the configuration says, and before timm 1.0.31 three alone."""
    cfg, any_count = as_timm(model).pretrained_cfg, adapts_any_channels()
    adapts, said = cfg.get('first_conv') is not None, (cfg.get('input_size') or (3,))[0]
    if shape == own:
        if adapts and not any_count and own[1] not in (1, 3):
            raise CheckpointError(f'timm before 1.0.31 cannot load weights of {own[1]} channels this way: update timm.')
        return
    alike = len(shape) == 4 and (shape[0], *shape[2:]) == (own[0], *own[2:])
    if hasattr(model, 'encoder') or not alike:
        return  # not of channels alone: the caller compares shapes
    if not (adapts and shape[1] == said and (any_count or said == 3)):
        raise CheckpointError(f'{name} is of {shape[1]} channels in the weights and {own[1]} in the model, and cannot '
                              f'be adapted: create the model with in_chans={shape[1]}.')


def _remedy(content: dict[str, Any], model: nn.Module) -> str:
    """The options that weights show to be others than the model's."""
    whole = hasattr(model, 'encoder')
    theirs = _shown(content, 'encoder.' if whole else '')
    ours = _shown(encoder_of(model).state_dict())
    if not theirs:
        kind = ' but an encoder\'s, which encoders load' if whole and _shown(content) else ''
        return f'They are not the weights of such a model in the layout of this package, timm or SAIM{kind}.'
    if not whole:  # these timm fits
        del theirs['in_chans'], theirs['patch_size']
    options = ', '.join(f'{k}={v!r}' for k, v in theirs.items() if ours[k] != v)
    options = f'{options}, and what else' if options else 'the options that'
    return f'Create the model with {options} they were trained with.'


def _shown(tensors: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Arguments of VisionTransformer that its tensors show; none where there is no such model."""
    tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix) and torch.is_tensor(v)}
    patch, hidden, register = map(tensors.get, ('patch_embed.proj.weight', 'blocks.0.mlp.fc1.weight', 'reg_token'))
    if patch is None or patch.ndim != 4 or hidden is None or hidden.ndim != 2:
        return {}
    return {
        'embed_dim': patch.shape[0], 'depth': len({k.split('.')[1] for k in tensors if k.startswith('blocks.')}),
        'mlp_ratio': hidden.shape[0] / hidden.shape[1], 'class_token': 'cls_token' in tensors,
        'reg_tokens': 0 if register is None else register.shape[1], 'in_chans': patch.shape[1],
        'patch_size': tuple(patch.shape[2:]),
    }


def _few(names: Iterable[str], most: int = 8) -> str:
    """Names in a line: several of one block as that block, and no more than `most`."""
    blocks: dict[str, list[str]] = {}
    for name in sorted(names):
        block = re.match(r'.*?blocks\.\d+\.', name)
        blocks.setdefault(block[0] + '*' if block else name, []).append(name)
    named = [of[0] if len(of) == 1 else block for block, of in blocks.items()]
    return ', '.join(named[:most]) + (f' and {len(named) - most} more' if len(named) > most else '') or 'none'
