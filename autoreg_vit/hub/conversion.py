"""`autoreg-vit convert`: published checkpoints of SAIM and MAE as folders that timm loads.

MAE's layout is that of timm's ViT (`cls_token`, `pos_embed`, `patch_embed.proj`, `blocks.N`, `norm`), with the decoder
beside it (`mask_token`, `decoder_*`); fine-tuned by average pooling it has `fc_norm` in place of `norm`. SAIM's layout
is described in `models.saim_checkpoint`.
"""

import argparse
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..artifacts import replaced, sha256_of, write_sums, write_synced, writing
from ..engine.checkpoints import load_file, load_into
from ..engine.progress import say
from ..errors import CheckpointError, ConfigError
from ..models.designs import create_pretraining_model
from ..models.encoders import METHODS, SIZES, SinCosVisionTransformer
from ..models.fitting import flat, inside, prefixes, unwrap
from ..models.interface import encoder_of
from ..models.pretraining import AutoregressiveViT
from ..models.saim_checkpoint import encoder_name, is_saim_layout, pretraining_name, rename
from ..settings.weights import ConvertConfig
from .folders import export_encoder, export_pretraining

REPORT = 'conversion.json'
EXPECTED = ('expected a checkpoint of SAIM (blocks.N.attn.q, .k, .v) or of MAE (blocks.N.attn.qkv) as they are '
            "published, {'model': tensors by name}")


class Part(NamedTuple):
    """An encoder or pretraining model with the weights of a checkpoint, and what became of each tensor there: its new
    name, or None where it was left out."""
    model: SinCosVisionTransformer | AutoregressiveViT
    names: dict[str, str | None]

    def report(self) -> dict[str, Any]:
        """Every key of the checkpoint and every one of the model's: kept, renamed, dropped or missing."""
        given = set(self.names.values())
        return {
            'kept': sorted(old for old, new in self.names.items() if new == old),
            'renamed': {old: new for old, new in sorted(self.names.items()) if new not in (None, old)},
            'dropped': sorted(old for old, new in self.names.items() if new is None),
            'missing': sorted(key for key in self.model.state_dict() if key not in given),
        }


def convert(config: ConvertConfig) -> Path:
    """Write a published checkpoint as folders that timm loads, and report what became of every tensor.

    Returns:
        The folder, with `encoder/` and, for a pretraining checkpoint of SAIM, `pretrain/`.

    Raises:
        CheckpointError: for a file that cannot be read safely, is incomplete, or is no such checkpoint.
        ConfigError: for heads that do not divide the width, or a folder that holds something else.
    """
    source, root = Path(config.source), Path(config.folder)
    state_dict, outside = read_checkpoint(source, config.prefix)
    method = 'SAIM' if is_saim_layout(state_dict) else 'MAE'
    sizes = encoder_sizes(state_dict, source, config.num_heads)
    parts = {'encoder': encoder_part(state_dict, source, sizes, method)}
    if method == 'SAIM' and any(key.startswith('query_blocks.') for key in state_dict):
        parts['pretrain'] = pretraining_part(state_dict, source, sizes)
    for kind in parts:
        if (root / kind).exists() and not (root / kind / REPORT).is_file():
            raise ConfigError(f'{root / kind} exists and is no converted checkpoint: name another folder.')

    classes = parts['encoder'].model.num_classes
    patch, image = (' x '.join(map(str, sizes[key])) for key in ('patch_size', 'img_size'))
    say(f'{source}: {method}{", fine-tuned" if classes else ""}, a ViT of width {sizes["embed_dim"]}, {sizes["depth"]} '
        f'blocks, {sizes["num_heads"]} heads, patches of {patch} in images of {image}')
    with writing(root), replaced(*(root / kind for kind in parts)) as folders:
        for folder, (kind, part) in zip(folders, parts.items()):
            write_folder(part, folder, kind, source, method, outside)
    if outside:
        say(f'{len(outside)} tensors do not begin with {config.prefix!r} and are left out: {_groups(outside)}')
    for kind, part in parts.items():
        report = part.report()
        say(f'{root / kind}: {", ".join(f"{len(names)} {what}" for what, names in report.items())}'
            + (f'; dropped: {_groups(report["dropped"])}' if report['dropped'] else ''))
    say(f'{REPORT} in each folder names every tensor.')
    return root


def read_checkpoint(path: Path, prefix: str = '') -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of a published checkpoint, as timm takes them: a moving average where there is one, without what
    torch.compile and DistributedDataParallel put before names. Nothing but tensors and plain values is loaded, since a
    pickle can run code.

    Args:
        prefix: Of the names of the tensors to take, and to take off them. Entries that hold others count as prefixes.

    Returns:
        The tensors, and the names of those that do not begin with the prefix.

    Raises:
        CheckpointError: for a file that is missing, damaged or something else, or tensors under another prefix.
    """
    if not path.is_file():
        raise CheckpointError(f'There is no file {path}: name a published checkpoint, a .pth or .safetensors file.')
    if path.suffix == '.safetensors':
        try:
            content = load_safetensors(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f'Cannot read {path} ({error}): it is damaged or no safetensors file.') from error
    else:
        # Training scripts save their arguments beside the weights, a plain Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = load_file(path)
    if isinstance(content, dict):
        if entries := inside(content)[1]:
            say(f'{path}: weights of the entry {" in ".join(map(repr, reversed(entries)))}')
        content = unwrap(content)
        found = prefixes(content)
        if found and prefix not in found:
            remedy = f'give --prefix {found[0]}, which takes them off.' if found[0] else 'leave --prefix out.'
            raise CheckpointError(f'{path} has its tensors under {" and ".join(map(repr, found))}: {remedy}')
        content = flat(content) if prefix else content
    if not isinstance(content, dict) or not content or not all(
            isinstance(k, str) and torch.is_tensor(v) for k, v in content.items() if str(k).startswith(prefix)):
        raise CheckpointError(f'{path} holds no tensors by name: {EXPECTED}.')
    outside = sorted(k for k, v in content.items() if not k.startswith(prefix) and torch.is_tensor(v))
    return {k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)}, outside


def encoder_sizes(state_dict: dict[str, torch.Tensor], source: Path, num_heads: int | None) -> dict[str, Any]:
    """Arguments of the encoder, from the shapes of its tensors; raises CheckpointError for tensors of something else,
    and ConfigError for heads that do not divide the width."""
    blocks = _numbers(state_dict, 'blocks')
    patch, positions = state_dict.get('patch_embed.proj.weight'), state_dict.get('pos_embed')
    hidden = state_dict.get('blocks.0.mlp.fc1.weight')
    whole = set(blocks) == set(range(len(set(blocks)))) and blocks and 'cls_token' in state_dict
    if not whole or hidden is None or patch is None or patch.ndim != 4 or positions is None or positions.ndim != 3:
        raise CheckpointError(f'{source} is no Vision Transformer with a class token: {EXPECTED}.')
    width, channels, *patch_size = patch.shape
    grid = math.isqrt(positions.shape[1] - 1)
    if grid * grid != positions.shape[1] - 1:
        raise CheckpointError(f'{source} has {positions.shape[1]} positions: expected a class token and a square of '
                              'patches.')
    heads = num_heads or (16 if width == 1280 else max(width // 64, 1))
    if width % heads:
        raise ConfigError(f'{heads} heads do not divide the width {width} of {source}: give another --num-heads.')
    return {
        'img_size': [grid * p for p in patch_size], 'patch_size': list(patch_size), 'in_chans': channels,
        'embed_dim': width, 'depth': 1 + max(blocks), 'num_heads': heads, 'mlp_ratio': hidden.shape[0] / width,
    }


def encoder_part(state_dict: dict[str, torch.Tensor], source: Path, sizes: dict[str, Any], method: str) -> Part:
    """The encoder of a checkpoint, with its classifier where it was fine-tuned."""
    classes = len(state_dict['head.weight']) if 'head.weight' in state_dict else 0
    # Both methods have a class token, which is the feature; MAE's fine-tuning averages the other tokens instead.
    pooled: dict[str, Any] = {'global_pool': 'avg', 'fc_norm': True} if 'fc_norm.weight' in state_dict else {}
    encoder = SinCosVisionTransformer(**sizes, **{**METHODS['saim'], **pooled}, num_classes=classes)
    if method == 'SAIM':
        names = {key: encoder_name(key) for key in state_dict}
        converted = rename(state_dict, encoder_name, str(source))
    else:
        names = {key: None if key.startswith(('decoder_', 'mask_token')) else key for key in state_dict}
        converted = {key: value for key, value in state_dict.items() if names[key] is not None}
    load_into(encoder, converted, str(source), _remedy(sizes))
    return Part(encoder, names)


def pretraining_part(state_dict: dict[str, torch.Tensor], source: Path, sizes: dict[str, Any]) -> Part:
    """SAIM's whole model."""
    queries = 1 + max(_numbers(state_dict, 'query_blocks'))
    kernel = state_dict.get('gaussian_blur.weight')
    # The kernel shows its size; its sigma is that of the published command.
    blur = False if kernel is None else (kernel.shape[-1], 1.0)
    size = next((size for size, args in SIZES.items() if args['embed_dim'] == sizes['embed_dim']
                 and [args['patch_size']] * 2 == sizes['patch_size']), 'vit_base')
    model = create_pretraining_model(f'saim_{size}', **sizes, decoder_depth=queries, blur=blur)
    load_into(model, rename(state_dict, pretraining_name, str(source)), str(source), _remedy(sizes))
    return Part(model, {key: pretraining_name(key) for key in state_dict})


def write_folder(part: Part, folder: Path, kind: str, source: Path, method: str, outside: list[str]) -> None:
    """Write one folder: weights, config, card, report, which names those `outside` the prefix too, and checksums."""
    # As both evaluate: 224 of 256 pixels, and larger images whole.
    size = encoder_of(part.model).patch_embed.img_size
    cfg: dict[str, Any] = dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD,
                               crop_pct=0.875 if min(size) <= 224 else 1.0)
    if isinstance(part.model, AutoregressiveViT):
        export_pretraining(part.model, folder, **cfg)
    else:
        export_encoder(part.model, folder, **cfg)
    origin = {'source': source.name, 'sha256': sha256_of(source), 'method': method}
    report = {**origin, **part.report(), **({'outside': outside} if outside else {})}
    write_synced(folder / REPORT, json.dumps(report, indent=1) + '\n')
    header = {'library_name': 'timm', 'pipeline_tag': 'image-feature-extraction', 'tags': ['timm', method.lower()]}
    whole = ', encoder and decoder; `import autoreg_vit` before loading it' if kind == 'pretrain' else ''
    write_synced(
        folder / 'README.md',
        f'---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {method}, converted from {source.name}\n\n'
        f'Weights of a published checkpoint in timm\'s layout{whole}: '
        "`timm.create_model('local-dir:FOLDER', pretrained=True)`.\n\n"
        f'SHA-256 of the source: `{origin["sha256"]}`. What became of each of its tensors is in `{REPORT}`. '
        'Normalisation is taken to be ImageNet\'s, and the crop that of both papers\' evaluation, which no tensor '
        'shows. The terms of use are those of the source.\n')
    write_sums(folder)


def _numbers(state_dict: dict[str, torch.Tensor], blocks: str) -> list[int]:
    """The number of the block that each tensor of such blocks is of."""
    found = (re.match(rf'{blocks}\.(\d+)\.', key) for key in state_dict)
    return [int(match[1]) for match in found if match]


def _remedy(sizes: dict[str, Any]) -> str:
    return (f'It was read as a ViT of width {sizes["embed_dim"]} and {sizes["depth"]} blocks; only checkpoints of SAIM '
            'and MAE in their published layouts can be converted.')


def _groups(names: list[str]) -> str:
    """Names by what stands before their first dot, each with how many there are."""
    counts = Counter(name.partition('.')[0] for name in names)
    return ', '.join(f'{name} ({count})' if count > 1 else name for name, count in counts.items())


