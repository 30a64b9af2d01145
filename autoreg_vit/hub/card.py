"""The model card of exported weights: where they come from, what they are worth, and what they are not for."""

import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..engine.log import logged
from ..errors import ConfigError
from ..evaluation.metrics import METRICS
from ..models.pretrained import ROOTS
from ..settings.base import in_order
from ..settings.pretraining import PretrainConfig

PAPERS = {'randsac': ('RandSAC', 'https://arxiv.org/abs/2203.12054'),
          'saim': ('SAIM', 'https://arxiv.org/abs/2212.01610')}


class Weights(NamedTuple):
    """What a card says of the files."""
    kind: str  # 'encoder' or 'pretrain'
    folder: Path  # where they will lie, named 'architecture.tag'
    parameters: int
    dtype: str  # what they are stored in
    deviation: float  # of outputs from those of the run's own weights, as `golden.deviation` gives it
    trained: str  # SHA-256 of model.safetensors as it is with the run's own weights, float32
    repository: str | None  # on the Hub
    sums: dict[str, str]  # SHA-256 of config.json and model.safetensors by name


class Source(NamedTuple):
    """What a card says of the run."""
    config: PretrainConfig
    lines: list[dict[str, Any]]  # of its log, up to the weights
    finished: bool  # whether it took all its steps
    data: str  # what the images are
    data_id: tuple[str, ...]  # their names on the Hub
    hardware: str | None
    commit: str | None  # of the code, where it is known
    limits: str | None  # a paragraph of its own
    license: str | None  # of the weights, as the Hub spells it, where it is stated
    results: list[dict[str, Any]]  # contents of results.json files


def read_results(path: Path) -> dict[str, Any]:
    """A results.json; raises ConfigError for a file that is missing or holds no measures."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise ConfigError(f'Cannot read the results {path}: {error}') from error
    if not isinstance(content, dict) or not METRICS.keys() & content.keys():
        raise ConfigError(f'{path} holds no results: expected the results.json that probe, finetune, segment or '
                          'detect leaves in a run\'s folder, with a score such as top1, miou or box_ap.')
    return content


def card(weights: Weights, source: Source, model_config: dict[str, Any]) -> str:
    """The text of README.md; `model_config` is the content of config.json."""
    method, url = PAPERS[source.config.model.partition('_')[0]]
    header: dict[str, Any] = {'library_name': 'timm', 'pipeline_tag': 'image-feature-extraction'}
    if source.license:
        header['license'] = source.license
    header['tags'] = ['timm', 'autoreg-vit', method.lower(), 'self-supervised', 'autoregressive', weights.kind]
    if source.data_id:
        header['datasets'] = list(source.data_id)
    what = ('Vision Transformer encoder' if weights.kind == 'encoder' else
            'Pretraining model, Vision Transformer encoder and decoder,')
    own = f'These weights: {source.license}.' if source.license else 'None is stated for these weights.'
    sections = [
        f'# {weights.folder.name}',
        f'{what} of {weights.parameters / 1e6:.2f} million parameters, pretrained without labels by [{method}]({url}) '
        f'on {source.data}, with the package autoreg-vit.',
        '## Use', _use(weights, model_config),
        '## Training', _training(source),
        '## Measured', _measured(source),
        '## Storage', _storage(weights),
        '## Limits', _limits(source, model_config),
        '## Licence', f'{own} The code that trained them: apache-2.0. The images have terms of their own.',
        '## Files', _files(weights),
    ]
    return f'---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n' + '\n\n'.join(sections) + '\n'


def training_hours(lines: list[dict[str, Any]]) -> float:
    """Time spent in training steps: pauses, evaluations and interruptions are left out."""
    seconds, images = 0.0, 0
    for line in _steps(lines):
        if line.get('images_per_second'):
            seconds += (line['images'] - images) / line['images_per_second']
            images = line['images']
    return seconds / 3600


def command(config: PretrainConfig, processes: int) -> str:
    """The command of a run, every setting that is not a default on it; folders are left to the reader."""
    words = ['autoreg-vit'] if processes == 1 else f'torchrun --nproc-per-node {processes} -m autoreg_vit'.split()
    words.append('pretrain')
    for _, item in in_order(type(config)):
        value, flag = getattr(config, item.name), '--' + item.name.replace('_', '-')
        if item.name == 'output_dir' or value == item.default:
            continue
        if isinstance(value, bool):
            words.append(flag if value else '--no-' + flag[2:])
        else:
            value = 'FOLDER' if item.name == 'data_dir' else value
            words += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return ' '.join(map(shlex.quote, words))


def _use(weights: Weights, config: dict[str, Any]) -> str:
    place = f'hf-hub:{weights.repository}' if weights.repository else 'local-dir:FOLDER'
    cfg = config['pretrained_cfg']
    if weights.kind == 'encoder':
        others = 'and channel counts work as in timm (`img_size`, `in_chans`)'
        lines = ['import timm', '', f"encoder = timm.create_model('{place}', pretrained=True).eval()",
                 f'features = encoder(images)  # [B, {config["num_features"]}]']
    else:
        others = 'work as in timm (`img_size`)'
        lines = ['import timm', 'import autoreg_vit  # registers the architecture', '',
                 f"model = timm.create_model('{place}', pretrained=True).eval()",
                 'out = model(images)  # out.loss, out.pred, out.target, out.ranks; model.encoder is the encoder']
    text = '```python\n' + '\n'.join(lines) + '\n```\n\n'
    if weights.folder.resolve().parent in ROOTS:
        text += (f"With autoreg-vit, which contains these weights: `timm.create_model('{weights.folder.name}', "
                 'pretrained=True)` after `import autoreg_vit`.\n\n')
    channels, height, width = cfg['input_size']
    return text + (
        f'Images are float tensors [B, {channels}, {height}, {width}], normalised by mean '
        f'{_numbers(cfg["mean"])} and standard deviation {_numbers(cfg["std"])} of values between 0 and 1. Other sizes '
        f'{others}. A folder of safetensors needs timm 1.0.26 or later.')


def _training(source: Source) -> str:
    config, first = source.config, source.lines[0]
    last = [{'images': 0, 'epoch': 0}, *_steps(source.lines)][-1]
    epochs = (_plural(config.epochs, 'epoch') if source.finished else
              f'{last["epoch"]:g} of {config.epochs} epochs (the run is not finished)')
    hours = training_hours(source.lines)
    design = ', '.join(f'{k} {_plain(v)}' for k, v in config.model_options().items())
    crops = 'method\'s default' if config.crop_scale is None else ' to '.join(map(str, config.crop_scale))
    count = first.get('train_images')
    rows = {
        'data': source.data + (f', {count:,} images' if count else '') + '; no labels',
        'model': f'`{config.model}`' + (f' ({design}; else its defaults)' if design else ''),
        'schedule': f'{epochs}, {last["images"]:,} images seen; linear warm-up over '
                    f'{_plural(config.warmup_epochs, "epoch")}, then a cosine to 0',
        'optimizer': f'{config.opt}, {config.batch_size * config.accumulate} images a step, learning rate '
                     f'{config.lr:g} for 256 images, betas {_plain(config.betas)}, weight decay '
                     f'{config.weight_decay:g}',
        'augmentation': f'random crops of {crops} of the area, flips with probability {config.hflip:g}',
        'seed': config.seed,
        'hardware': f'{source.hardware}; {_plural(first.get("processes", 1), "process", "processes")}'
                    + (f' of {_plural(first["threads"], "thread")}' if first['device'] == 'cpu' else '')
                    + f', {logged(source.lines, "precision")}',
        'time': (f'{hours:.1f} hours' if hours >= 1 else f'{60 * hours:.1f} minutes') + ' of training steps',
        'software': f'autoreg-vit {logged(source.lines, "version")}, commit {source.commit or "not recorded"}, torch '
                    f'{logged(source.lines, "torch")}, timm {logged(source.lines, "timm")}',
    }
    table = '\n'.join(['| | |', '| --- | --- |', *(f'| {k} | {v} |' for k, v in rows.items())])
    return (f'{table}\n\nThe full command; `config.yaml` holds every setting and `log.jsonl` the whole log:\n\n```\n'
            f'{command(config, first.get("processes", 1))}\n```')


def _measured(source: Source) -> str:
    config = source.config
    losses = [line['loss'] for line in _steps(source.lines)]
    evaluations = [line for line in source.lines if line['event'] == 'evaluation']
    parts = []
    if losses:
        unit = 'of patches normalised to variance 1' if config.norm_pix in (None, True) else 'of normalised pixels'
        parts.append(f'Loss, the mean squared error {unit}: {losses[0]:.4f} in the first line of the log, '
                     f'{losses[-1]:.4f} in the last.{_greatest_rise(source.lines)}')
    if evaluations:
        images = (f'the split {config.eval_split}' if config.eval_split else
                  'a fifth of the training images, held out from the classifiers but not from pretraining')
        rows = [f'| {line["images"]:,} | {line["linear"]:.1f} % | {line["knn"]:.1f} % |' for line in evaluations]
        parts.append(
            f'Accuracy of frozen features on {images}, at most {config.eval_images:,} images; logistic regression '
            'and 20 nearest neighbours, fitted on as many other images. The first row is the untrained encoder.\n\n'
            + '\n'.join(['| images seen | linear | kNN |', '| --- | --- | --- |', *rows]))
    if source.results:
        names = [name for name in METRICS if any(name in result for result in source.results)]
        head = ['protocol', 'training images', 'test images', *(METRICS[name].label for name in names)]
        cells = {'train_images': ',', 'test_images': ',', **dict.fromkeys(names, '.2f')}
        table = [[_protocol(result), *(f'{result[n]:{form}}' if n in result else '' for n, form in cells.items())]
                 for result in source.results]
        parts.append('By the commands of autoreg-vit, one run each, in percent:\n\n' + '\n'.join(
            f'| {" | ".join(row)} |' for row in [head, ['---'] * len(head), *table]))
    return '\n\n'.join(parts) or 'Nothing.'


def _steps(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that have a loss."""
    return [line for line in lines if line['event'] in ('step', 'epoch')]


def _greatest_rise(lines: list[dict[str, Any]]) -> str:
    """A sentence about where the loss rose most above its least value so far, if by more than a hundredth of it."""
    steps = _steps(lines)
    least = low = high = steps[0]
    for line in steps:
        if line['loss'] < least['loss']:
            least = line
        if line['loss'] / least['loss'] > high['loss'] / low['loss']:
            low, high = least, line
    if high['loss'] <= 1.01 * low['loss']:
        return ''
    later = (line for line in steps if line['images'] > high['images'])
    back = next((line for line in later if line['loss'] <= 1.01 * low['loss']), None)
    end = (f'it was within 1 % of the former again at {_place(back)}.' if back else
           'it did not come back to within 1 % of the former.')
    return (f' Its greatest rise on the way was from {low["loss"]:.4f} ({_place(low)}) to {high["loss"]:.4f} '
            f'({_place(high)}); {end}')


def _place(line: dict[str, Any]) -> str:
    return f'epoch {line["epoch"]:g}' + (f', step {line["step"]:,}' if 'step' in line else '')


def _protocol(result: dict[str, Any]) -> str:
    pool = {'token': ' of the class token', 'avg': ' of the mean of tokens'}.get(str(result.get('global_pool')), '')
    classes = f', {result["num_classes"]} classes' if 'num_classes' in result else ''
    untrained = '' if result.get('pretrained', True) else ', untrained encoder'
    epochs = f', {result["epochs"]} epochs' if 'epochs' in result else ''
    optimizer = f', {result["optimizer"]}' if 'optimizer' in result else ''
    if 'fast' in result:
        kind = f'linear probe{pool}' + (' on cached features' if result['fast'] else f'{optimizer}{epochs}')
    elif 'top1' in result:
        kind = f'fine-tuning{epochs}'
    else:
        kind = 'segmentation' if 'miou' in result else 'detection'
    return kind + classes + untrained


def _storage(weights: Weights) -> str:
    again = 'Recorded outputs are in `golden.json`.'
    if weights.dtype == 'float32':
        return f'Weights are float32, as trained. {again}'
    return (f'Weights are stored as {weights.dtype} and load as float32. Outputs for two synthetic images differ from '
            f'those of the float32 weights by {100 * weights.deviation:.2g} % (root mean square, relative). As float32 '
            f'the file has the SHA-256 `{weights.trained}`. {again}')


def _limits(source: Source, config: dict[str, Any]) -> str:
    _, height, width = config['pretrained_cfg']['input_size']
    return (f'- Features are learned from images of {height} x {width} pixels of one source, {source.data}, and carry '
            'its selection and biases; elsewhere they are untested.\n'
            '- Pretraining is by images alone: classify with a classifier of your own on top (`num_classes`), or by '
            'fine-tuning.\n'
            '- One run with one seed; what another seed gives was not measured.'
            + (f'\n- {source.limits}' if source.limits else ''))


def _files(weights: Weights) -> str:
    rows = [f'| `{name}` | `{digest}` |' for name, digest in sorted(weights.sums.items())]
    return '\n'.join(['| | SHA-256 |', '| --- | --- |', *rows, '', '`sha256sum --check SHA256SUMS` checks all files.'])


def _plural(count: float, one: str, many: str | None = None) -> str:
    return f'{count} {one if count == 1 else many or one + "s"}'


def _plain(value: Any) -> str:
    return ' '.join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _numbers(values: list[float]) -> str:
    return '(' + ', '.join(f'{v:g}' for v in values) + ')'


def default_data(config: PretrainConfig) -> tuple[str, tuple[str, ...]]:
    """What the images are called where nobody says, and their names on the Hub."""
    dataset = config.dataset or 'folder'
    kind, _, name = dataset.partition('/')
    if kind in ('torch', 'hfds', 'hfids') and name:
        return name, (name,)
    return {'folder': 'images of a folder', 'digits': 'scikit-learn\'s digits'}.get(kind, dataset), ()

