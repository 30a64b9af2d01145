"""Features computed once and kept: the fast probe, which sweeps learning rates on them, and nearest neighbours."""

import hashlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from ..artifacts import save_tensors, verify_checksum, writing
from ..data.labelled import LabelledImages
from ..engine.run import Run
from .features import Features, gather_features

CACHE = 'features.safetensors'


def cached_features(
        run: Run, encoder: nn.Module, images: LabelledImages, *, precision: str, workers: int,
) -> tuple[Features | None, Features | None]:
    """Features of the training images without augmentation and of the test images, on the main process. They are kept
    in the run's folder and read from there when its command is repeated with the same weights."""
    path, key = run.folder / CACHE, fingerprint(encoder)
    kept: tuple[Features, Features] | None = None  # on the main process

    def are_kept() -> bool:
        nonlocal kept
        kept = _read(path, key)
        return kept is not None

    if run.group.on_main(are_kept):
        run.say(f'The features were read from {path}.')
        return kept or (None, None)
    train, test = (gather_features(encoder, part, precision=precision, workers=workers, group=run.group)
                   for part in (images.plain, images.test))
    if train is not None and test is not None:
        keep_features(path, key, train, test)
    return train, test


def keep_features(path: Path, key: str, train_set: Features, test: Features) -> None:
    """Write features as `cached_features` finds them, to CACHE in a run's folder; `key`: the encoder's fingerprint."""
    tensors = {f'{name}.{field}': value for name, part in (('train', train_set), ('test', test))
               for field, value in part._asdict().items()}
    with writing(path):
        save_tensors(path, tensors, {'encoder': key})


def _read(path: Path, key: str) -> tuple[Features, Features] | None:
    if not path.exists():
        return None
    verify_checksum(path)
    try:
        with safe_open(path, 'pt') as file:
            if (file.metadata() or {}).get('encoder') != key:
                return None
            train, test = (Features(*(file.get_tensor(f'{part}.{field}') for field in Features._fields))
                           for part in ('train', 'test'))
            return train, test
    except SafetensorError:
        return None  # cut short: computed anew


def fingerprint(encoder: nn.Module) -> str:
    """A hash of the encoder's weights."""
    digest = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
