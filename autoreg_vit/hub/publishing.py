"""`autoreg-vit export`: a pretraining run's weights as folders to publish, each with a model card and checksums."""

import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi
from torch import nn

from ..artifacts import CONFIG, SUMS, WEIGHTS, replaced, sha256_of, write_config, write_sums, write_synced, writing
from ..engine.checkpoints import load_checkpoint, load_into
from ..engine.log import logged, read_log
from ..engine.progress import say
from ..engine.run import CHECKPOINT
from ..errors import CheckpointError, ConfigError, UsageError, one_line
from ..models.pretrained import DEFAULT, check_files, load_folder
from ..models.pretraining import AutoregressiveViT
from ..settings.base import make_config, read_settings, save_config, with_added
from ..settings.pretraining import PretrainConfig
from ..settings.weights import ExportConfig
from .card import Source, Weights, card, default_data, read_results
from .folders import export_encoder, export_pretraining
from .golden import deviation, record

GOLDEN = 'golden.json'
#: Greatest deviation of outputs (`golden.deviation`) that float16 may make unasked. Of a ViT-Tiny after one epoch of
#: CIFAR-10 it moved features by 0.04 %, predictions by 0.07 % and the loss by 5e-7 (256 test images).
HALF_LIMIT = 0.005


def export(config: ExportConfig) -> list[Path]:
    """Write the weights of a run as folders that timm loads, with a card, the run's settings and log, recorded outputs
    and checksums; upload them where asked to. Of an unfinished run, the weights are those of its last checkpoint.

    Returns:
        The folders: `FOLDER/ENCODER.TAG`, and `FOLDER/MODEL.TAG` of the whole model.

    Raises:
        ConfigError: for a folder without a pretraining run, a name that cannot be a tag, or results without measures.
        CheckpointError: for weights that are damaged, or that cannot be written.
        UsageError: where the Hub cannot be reached or refuses.
    """
    run = Path(config.run)
    tag = re.sub(r'[^\w-]+', '_', run.resolve().name, flags=re.ASCII) if config.tag is None else config.tag
    if not re.fullmatch(r'[\w-]+', tag, flags=re.ASCII):
        raise ConfigError(f'A tag is letters, digits, - and _, as in cifar10_280ep; got {tag!r}.')
    model, source = read_run(run, config)
    (method, size), root = source.config.model.split('_', 1), Path(config.folder)
    targets = {'encoder': root / f'{size}_{method}.{tag}'}
    if config.pretrain:
        targets['pretrain'] = root / f'{method}_{size}.{tag}'
    for target in targets.values():
        if target.exists() and not (target / SUMS).is_file():
            raise ConfigError(f'{target} exists and is no folder of exported weights: name another --tag or folder.')
    hub = Hub(config.push_to_hub, config.private, list(targets)) if config.push_to_hub else None

    with writing(root), replaced(*targets.values()) as folders:
        for folder, (kind, target) in zip(folders, targets.items()):
            write_folder(model, folder, kind, target, source, config, hub.repositories[kind] if hub else None)
    for kind, target in targets.items():
        say(str(target))
        if hub:
            hub.upload(kind, target)
            say(f'  uploaded to {hub.repositories[kind]}')
    return list(targets.values())


def read_run(run: Path, config: ExportConfig) -> tuple[AutoregressiveViT, Source]:
    """The whole model of a run, and what its card says of the run."""
    if not (run / 'config.yaml').is_file() or not (run / 'pretrain' / CONFIG).is_file():
        raise ConfigError(f'{run} holds no pretraining run with weights: expected config.yaml and pretrain/, as '
                          'autoreg-vit pretrain writes them at its first checkpoint.')
    settings = make_config(PretrainConfig, with_added(read_settings(run / 'config.yaml'), PretrainConfig), {})
    # Runs of before a tag was refused: they too began from random weights.
    settings.model = settings.model.partition('.')[0]
    lines = read_log(run / 'log.jsonl')
    if not lines or lines[0].get('event') != 'start':
        raise ConfigError(f'{run / "log.jsonl"} is missing, or does not begin with the start of a run.')
    check_files(run / 'pretrain')
    try:
        model = cast(AutoregressiveViT, load_folder(run / 'pretrain'))
    except Exception as error:  # by the kind of damage: CheckpointError, OSError, KeyError, RuntimeError, ...
        kind = '' if isinstance(error, UsageError) else f'{type(error).__name__}: '
        raise CheckpointError(f'Cannot load {run / "pretrain"} ({kind}{one_line(error, 300)}).'
                              ) from error
    finished = lines[-1]['event'] == 'finish' or max(line.get('epoch', 0) for line in lines) >= settings.epochs
    if not finished:
        state = load_checkpoint(run / CHECKPOINT, say)
        if state is None:
            raise ConfigError(f'{run} is not finished and has no {CHECKPOINT}, which says how far its weights are.')
        load_into(model, state['model'], str(run / CHECKPOINT))
        images = state['step'] * settings.batch_size * settings.accumulate
        lines = [line for line in lines if line.get('images', 0) <= images]
    data, data_id = default_data(settings)
    return model, Source(
        settings, lines, finished, config.data or data, config.data_id or data_id,
        config.hardware or logged(lines, 'hardware') or logged(lines, 'device'),
        config.commit or logged(lines, 'commit'), config.limits, config.license,
        [read_results(Path(path)) for path in config.results])


def write_folder(
        model: AutoregressiveViT, folder: Path, kind: str, target: Path, source: Source, config: ExportConfig,
        repository: str | None,
) -> None:
    """Write the weights of one kind, 'encoder' or 'pretrain', of the whole model to `folder`, which will lie at
    `target`; with `config.half` None, float16 is for outputs that stay within HALF_LIMIT."""
    part: nn.Module = model.encoder if kind == 'encoder' else model
    trained = record(part)
    cfg: dict[str, Any] = {k: model.pretrained_cfg[k] for k in ('mean', 'std', 'crop_pct', 'interpolation')}
    if config.license:
        cfg['license'] = config.license

    def store(dtype: torch.dtype) -> tuple[torch.dtype, dict[str, Any], float]:
        if kind == 'encoder':
            export_encoder(model.encoder, folder, dtype=dtype, **cfg)
        else:
            export_pretraining(model, folder, dtype=dtype, **cfg)
        golden = record(load_folder(folder))
        return dtype, golden, deviation(golden, trained)

    dtype, golden, change = store(torch.float32)
    trained_sum = sha256_of(folder / WEIGHTS)
    if config.half is not False:
        dtype, golden, change = store(torch.float16)
        if config.half is None and change > HALF_LIMIT:
            dtype, golden, change = store(torch.float32)
    if not change < float('inf'):
        raise CheckpointError(f'Outputs of {target.name} are not finite when stored as {dtype}: leave --half out.')
    write_synced(folder / GOLDEN, json.dumps({
        'about': 'outputs for images [2, C, H, W] whose value number i is sin(0.7 i); in float32, on a CPU',
        'outputs': golden}) + '\n')
    # Of the machine it ran on, a run's settings keep no folder.
    save_config(dataclasses.replace(source.config, data_dir=None, output_dir=None), folder / 'config.yaml')
    write_synced(folder / 'log.jsonl', ''.join(json.dumps(line) + '\n' for line in source.lines))
    model_config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    if config.default_tag:
        model_config[DEFAULT] = True
        write_config(folder / CONFIG, model_config)
    sums = {name: sha256_of(folder / name) for name in (CONFIG, WEIGHTS)}
    weights = Weights(kind, target, sum(p.numel() for p in part.parameters()),
                      str(dtype).removeprefix('torch.'), change, trained_sum, repository, sums)
    write_synced(folder / 'README.md', card(weights, source, model_config))
    write_sums(folder)


class Hub:
    """The repositories of an upload, made before anything is written: OWNER/NAME of encoders, OWNER/NAME-pretrain of
    whole models. Raises UsageError where the Hub cannot be reached or refuses, with the remedy."""

    def __init__(self, repository: str, private: bool, kinds: list[str]):
        self.api = HfApi()
        self.repositories = {kind: repository + ('-pretrain' if kind == 'pretrain' else '') for kind in kinds}
        for name in self.repositories.values():
            with self._reaching(name):
                self.api.create_repo(name, private=private, exist_ok=True)

    def upload(self, kind: str, folder: Path) -> None:
        """Upload a folder as one commit."""
        name = self.repositories[kind]
        with self._reaching(name):
            self.api.upload_folder(repo_id=name, folder_path=folder, commit_message=f'Upload {folder.name}')

    @staticmethod
    @contextmanager
    def _reaching(name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the library's own, those of its HTTP client, OSError: by version and cause
            status = getattr(getattr(error, 'response', None), 'status_code', None)
            kind = type(error).__name__
            if kind in ('OfflineModeIsEnabled', 'ConnectError', 'ConnectTimeout', 'ConnectionError'):
                remedy = 'The Hub cannot be reached: unset HF_HUB_OFFLINE, or connect to the network.'
            elif status == 401 or kind == 'LocalTokenNotFoundError':
                remedy = 'Log in with a token that may write: hf auth login, or set HF_TOKEN.'
            elif status == 403:
                remedy = 'This token may not write there: name a repository of your own, or use a token that may.'
            else:
                remedy = 'Expected OWNER/NAME.' if kind == 'HFValidationError' else 'Try again later.'
            reason = one_line(error, 200)
            raise UsageError(
                f'Cannot upload to {name!r} on the Hugging Face Hub. {remedy} ({kind}: {reason})') from error

