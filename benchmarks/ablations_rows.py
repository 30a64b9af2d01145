"""The rows of `ablations.py`: what each is, which figures of which paper it repeats, the claims they test, and the
scales at which they run. Data alone; nothing here computes.

The papers' figures are percent of top-1. RandSAC's Tables 1 to 8 (CIFAR-10): ViT-Tiny with patches of 4, 800 epochs on
raw pixels (1 to 7), 1600 on normalised ones (8), probed linearly (LIN) and fine-tuned (FT). RandSAC's Table 9:
ViT-Small, 1600 epochs. SAIM's Table 3: ViT-Base, ImageNet-1K, 300 epochs, fine-tuned.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Cite(NamedTuple):
    """A figure of a paper: its table, the row or column it stands in, and accuracies in percent."""
    table: str
    label: str
    linear: float | None = None
    finetune: float | None = None


class Row(NamedTuple):
    """A design. `settings` are what differs from `BASES[base]`, by the names of PretrainConfig; a text in capitals
    stands for a size that the scale gives. `length` multiplies the scale's epochs. `against` is the row that one of
    neither paper is compared with."""
    name: str
    base: str
    settings: dict[str, Any]
    cites: tuple[Cite, ...] = ()
    length: float = 1.0
    against: str | None = None


class Claim(NamedTuple):
    """What a paper says of its rows: the first of each pair is better than the second."""
    text: str
    table: str
    pairs: tuple[tuple[str, str], ...]
    main: bool = False


BASES: dict[str, dict[str, Any]] = {
    # RandSAC Tables 1 to 7: masked transformer (4.1), raw pixels (Table 12).
    'plain': {'model': 'randsac', 'memory': 'last', 'norm_pix': False},
    # RandSAC Table 8: 11 -> 5 blobs, trainable skip connections, normalised pixels (Table 12).
    'randsac': {'model': 'randsac'},
    # SAIM Table 3: query stream of the encoder's depth, normalised pixels, no blur until its last rows.
    'saim': {'model': 'saim', 'blur': (0.0,)},
    # Outside reference: masked autoencoder with the decoder of RandSAC's Table 8 (RandSAC 5), 75 % masked.
    'mae': {'model': 'randsac'},
    # The encoder as it is initialised.
    'untrained': {'model': 'randsac'},
}


def _blobs(*segments: int) -> dict[str, Any]:
    return {'serialization': 'blobs', 'segments': segments}


def _shuffled(count: int) -> dict[str, Any]:
    return {**_blobs(count), 'shuffle': True}


#: SAIM's order and blur with RandSAC's decoder (SAIM names a lightweight one as its open problem).
_LIGHT = {'serialization': 'random', 'decoder': 'masked', 'decoder_depth': 'DECODER', 'memory': 'mix',
          'blur': (9.0, 1.0)}

#: Most informative first.
ROWS: tuple[Row, ...] = (
    Row('random', 'plain', {'serialization': 'random'}, (
        Cite('RandSAC 2', 'patch-random', 75.53, 87.52), Cite('RandSAC 3', 'P = 4', 75.53, 87.52),
        Cite('RandSAC 4', 'M = 1', 75.53, 87.52), Cite('RandSAC 5', 'patch-random', 75.53, 87.52))),
    Row('raster', 'plain', {'serialization': 'raster'}, (
        Cite('RandSAC 1', 'patch-raster', 55.53, 78.67), Cite('RandSAC 2', 'patch-raster', 55.53, 78.67))),
    Row('blobs-7', 'plain', _blobs(7), (
        Cite('RandSAC 5', 'blob-random', 82.52, 91.53), Cite('RandSAC 6', 'K = 7', 82.52, 91.14),
        Cite('RandSAC 7', '7', 82.52, 91.14))),
    Row('squares-16', 'plain', {'serialization': 'squares', 'segments': (16,)}, (
        Cite('RandSAC 4', 'M = 2', 81.38, 91.38), Cite('RandSAC 5', 'square-random', 81.38, 91.38))),
    Row('untrained', 'untrained', {}),
    Row('randsac', 'randsac', {}, (
        Cite('RandSAC 8', 'Transformer-skip', 89.5, 94.4), Cite('RandSAC 9', 'RandSAC', 93.9, 96.9))),
    Row('mae', 'mae', {}, (Cite('RandSAC 9', 'MAE', 87.3, 95.9),)),
    Row('saim', 'saim', {'blur': (9.0, 1.0)}, (Cite('SAIM 3', 'blur 9, 1', None, 83.64),)),
    Row('saim-light', 'saim', _LIGHT, against='saim'),
    Row('randsac-quarter', 'randsac', {'encode_ratio': 0.25}, against='randsac'),
    Row('masked', 'randsac', {'memory': 'last'}, (Cite('RandSAC 8', 'Transformer', 88.0, 93.6),)),
    Row('two-stream', 'randsac', {'decoder': 'parallel', 'shared': True, 'depth': 'TWO-STREAM'}, (
        Cite('RandSAC 8', 'Two-stream', 84.4, 91.5),)),
    Row('shuffled-7', 'plain', _shuffled(7), (Cite('RandSAC 6', 'shuffled, K = 7', 76.69, 89.22),)),
    Row('saim-random', 'saim', {}, (Cite('SAIM 3', 'stochastic, depth 12', None, 83.40),)),
    Row('saim-raster', 'saim', {'serialization': 'raster'}, (Cite('SAIM 3', 'raster, depth 12', None, 82.76),)),
    Row('saim-shared', 'saim', {'shared': True, 'memory': 'output'}, (Cite('SAIM 3', 'shared weights', None, 83.02),)),
    Row('saim-one', 'saim', {'decoder_depth': 1}, (Cite('SAIM 3', 'depth 1', None, 82.76),)),
    Row('blobs-11-5', 'plain', _blobs(11, 5), (Cite('RandSAC 7', '11 -> 5', 83.20, 91.38),)),
    Row('blobs-11', 'plain', _blobs(11), (
        Cite('RandSAC 6', 'K = 11', 82.02, 91.24), Cite('RandSAC 7', '11', 82.02, 91.24))),
    # What makes the autoregressive side cheaper.
    Row('saim-light-quarter', 'saim', {**_LIGHT, 'encode_ratio': 0.25}, against='saim-light'),
    Row('saim-quarter', 'saim', {'blur': (9.0, 1.0), 'encode_ratio': 0.25}, against='saim'),
    Row('randsac-half', 'randsac', {'encode_ratio': 0.5}, against='randsac'),
    Row('randsac-one-layer', 'randsac', {'decoder_depth': 1}, against='randsac'),
    # Other rows that neither paper has.
    Row('squares-16-norm', 'randsac', {'serialization': 'squares', 'segments': (16,)}, against='randsac'),
    Row('xtra', 'randsac', {'serialization': 'squares', 'segments': (16,), 'segment_order': 'raster'},
        against='squares-16-norm'),
    Row('squares-16-unread', 'randsac', {'serialization': 'squares', 'segments': (16,), 'encode_last': False},
        against='squares-16-norm'),
    Row('aim', 'randsac', {'serialization': 'prefix_raster', 'first_segment': 'given', 'decoder': 'none',
                           'head': 'mlp'}, against='randsac'),
    Row('aim-decoder', 'randsac', {'serialization': 'prefix_raster', 'first_segment': 'given'}, against='randsac'),
    Row('mix-uniform', 'randsac', {'mix_init': 'uniform'}, against='randsac'),
    Row('first-none', 'randsac', {'first_segment': 'none'}, against='randsac'),
    Row('first-given', 'randsac', {'first_segment': 'given'}, against='randsac'),
    # Whether the first claim hangs on raw pixels, or on the length of training.
    Row('random-norm', 'randsac', {'serialization': 'random', 'memory': 'last'}, against='masked'),
    Row('raster-norm', 'randsac', {'serialization': 'raster', 'memory': 'last'}, against='random-norm'),
    Row('random-x4', 'plain', {'serialization': 'random'}, (), 4, against='random'),
    Row('raster-x4', 'plain', {'serialization': 'raster'}, (), 4, against='random-x4'),
    # The same designs trained for longer and shorter: where the order turns.
    *(Row(f'{name}-x{length:g}', base, settings, (), length)
      for length in (2, 4, 0.5)
      for name, base, settings in (
          ('mae', 'mae', {}), ('randsac', 'randsac', {}), ('saim-light', 'saim', _LIGHT),
          ('saim', 'saim', {'blur': (9.0, 1.0)}), ('randsac-quarter', 'randsac', {'encode_ratio': 0.25}),
          ('saim-light-quarter', 'saim', {**_LIGHT, 'encode_ratio': 0.25}))),
    # MAE at the FLOPs of the longest run of RandSAC.
    Row('mae-x8', 'mae', {}, (), 8),
    # The rest of the papers' tables.
    Row('saim-igpt', 'saim', {'serialization': 'raster', 'decoder': 'none'}, (
        Cite('SAIM 3', 'raster, no decoder', None, 82.70),)),
    Row('saim-half', 'saim', {'decoder_depth': 'HALF'}, (Cite('SAIM 3', 'depth 6', None, 83.01),)),
    Row('saim-blur-3', 'saim', {'blur': (3.0, 1.0)}, (Cite('SAIM 3', 'blur 3, 1', None, 83.52),)),
    Row('saim-blur-wide', 'saim', {'blur': (9.0, 1.5)}, (Cite('SAIM 3', 'blur 9, 1.5', None, 83.45),)),
    Row('blobs-5', 'plain', _blobs(5), (
        Cite('RandSAC 6', 'K = 5', 81.82, 90.88), Cite('RandSAC 7', '5', 81.82, 90.88))),
    Row('blobs-3', 'plain', _blobs(3), (
        Cite('RandSAC 6', 'K = 3', 80.87, 90.77), Cite('RandSAC 7', '3', 80.97, 90.77))),
    Row('blobs-7-3', 'plain', _blobs(7, 3), (Cite('RandSAC 7', '7 -> 3', 82.71, 91.20),)),
    Row('blobs-16-4', 'plain', _blobs(16, 4), (Cite('RandSAC 7', '16 -> 4', 82.61, 91.15),)),
    Row('blobs-16', 'plain', _blobs(16), (Cite('RandSAC 7', '16', 80.97, 90.57),)),
    Row('blobs-4', 'plain', _blobs(4), (Cite('RandSAC 7', '4', 81.09, 90.63),)),
    Row('squares-4', 'plain', {'serialization': 'squares', 'segments': (4,)}, (
        Cite('RandSAC 4', 'M = 4', 79.38, 90.23),)),
    Row('shuffled-3', 'plain', _shuffled(3), (Cite('RandSAC 6', 'shuffled, K = 3', 76.73, 89.63),)),
    Row('shuffled-11', 'plain', _shuffled(11), (Cite('RandSAC 6', 'shuffled, K = 11', 76.99, 89.15),)),
    Row('shuffled-5', 'plain', _shuffled(5), (Cite('RandSAC 6', 'shuffled, K = 5', 77.73, 89.75),)),
    Row('shuffled-9', 'plain', _shuffled(9), (Cite('RandSAC 6', 'shuffled, K = 9', 78.59, 90.00),)),
    Row('blobs-9', 'plain', _blobs(9), (Cite('RandSAC 6', 'K = 9', 81.88, 91.53),)),
    Row('patch-8', 'plain', {'serialization': 'random', 'patch_size': 8}, (Cite('RandSAC 3', 'P = 8', 75.34, 83.10),)),
    Row('patch-16', 'plain', {'serialization': 'random', 'patch_size': 16}, (
        Cite('RandSAC 3', 'P = 16', 60.77, 69.23),)),
    Row('patch-2', 'plain', {'serialization': 'random', 'patch_size': 2}, (Cite('RandSAC 3', 'P = 2', 69.63, 87.18),)),
    Row('pixels', 'plain', {'serialization': 'raster', 'patch_size': 1}, (
        Cite('RandSAC 1', 'pixel-raster', 41.70, 59.35),)),
    Row('patch-1', 'plain', {'serialization': 'random', 'patch_size': 1}, (
        Cite('RandSAC 3', 'P = 1', 59.79, 79.70),)),
)

#: Designs of the cost-quality figure, by the name of the row that is trained at several lengths.
CURVES = {'mae': 'MAE', 'randsac': 'RandSAC', 'saim-light': 'light-decoder SAIM', 'saim': 'SAIM',
          'randsac-quarter': 'quarter-encoded RandSAC', 'saim-light-quarter': 'quarter-encoded light-decoder SAIM'}

CLAIMS: tuple[Claim, ...] = (
    Claim('random over raster', 'RandSAC 2', (('random', 'raster'),), main=True),
    Claim('segments over tokens', 'RandSAC 5', (('squares-16', 'random'), ('blobs-7', 'random')), main=True),
    Claim('coherent over shuffled', 'RandSAC 6',
          tuple((f'blobs-{k}', f'shuffled-{k}') for k in (3, 5, 7, 9, 11))),
    Claim('hierarchy over flat', 'RandSAC 7', tuple(
        (f'blobs-{fine}-{coarse}', f'blobs-{flat}') for fine, coarse in ((11, 5), (7, 3), (16, 4))
        for flat in (fine, coarse))),
    Claim('skip over last-layer memory', 'RandSAC 8', (('randsac', 'masked'),)),
    Claim('last-layer memory over two-stream', 'RandSAC 8', (('masked', 'two-stream'),)),
    Claim('patches over pixels', 'RandSAC 1', (('raster', 'pixels'),)),
    Claim('RandSAC over MAE', 'RandSAC 9', (('randsac', 'mae'),)),
    Claim('stochastic over raster', 'SAIM 3', (('saim-random', 'saim-raster'),)),
    Claim('separate over shared decoder', 'SAIM 3', (('saim-random', 'saim-shared'),)),
    Claim('deeper over shallower decoder', 'SAIM 3', (('saim-random', 'saim-half'), ('saim-half', 'saim-one'))),
    Claim('blur over none', 'SAIM 3', tuple(
        (name, 'saim-random') for name in ('saim', 'saim-blur-3', 'saim-blur-wide'))),
)


@dataclass(frozen=True)
class Scale:
    """Data, model, schedule and seeds of a run of the table.

    Args:
        note: What a reader of the results must know.
        train_images: Images to train on, drawn from the training split; None for all that are not held out.
        held_out: Images held out of the training split, on which everything is chosen.
        epochs: Passes over them, or by base.
        sizes: What the texts in capitals stand for; masked decoders have DECODER layers.
        pretrain: Further settings of PretrainConfig.
        model: Sizes of the encoder where they are not those of ViT-Tiny.
        probe: Further settings of ProbeConfig.
        seeds: Of rows of the main claims; others have one.
        costly: Rows that cost more than so many times the row 'randsac' run when named alone.
    """
    note: str
    train_images: int | None
    held_out: int
    epochs: int | dict[str, int]
    sizes: dict[str, int]
    pretrain: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)
    seeds: int = 1
    costly: float = float('inf')


_GPU = {'batch_size': 512, 'lr': 1e-3, 'weight_decay': 0.05, 'betas': (0.9, 0.999), 'warmup_epochs': 10,
        'crop_scale': (0.2, 1.0), 'cuda_graph': True, 'cache_on_device': True}
_TINY = {'DECODER': 3, 'HALF': 6, 'TWO-STREAM': 16}

SCALES: dict[str, Scale] = {
    'smoke': Scale(
        note='Ten steps on digits: shows that every row runs, and nothing else.',
        train_images=160, held_out=80, epochs=1, sizes={'DECODER': 1, 'HALF': 2, 'TWO-STREAM': 5},
        model={'embed_dim': 32, 'depth': 4, 'num_heads': 2},
        pretrain={'batch_size': 16, 'lr': 8e-3, 'crop_scale': (0.2, 1.0), 'hflip': 0.0},
        probe={'epochs': 3, 'learning_rates': (0.1, 1.0)}),
    'cpu': Scale(
        note='An encoder 128 wide and 6 blocks deep with a decoder of 2 layers, a few minutes a row: differences below '
             'the noise that is given are no differences.',
        train_images=16384, held_out=10000, epochs=2, sizes={'DECODER': 2, 'HALF': 3, 'TWO-STREAM': 9},
        model={'embed_dim': 128, 'depth': 6, 'num_heads': 4},
        pretrain={'batch_size': 32, 'lr': 8e-3, 'betas': (0.9, 0.95), 'warmup_epochs': 0.2, 'crop_scale': (0.2, 1.0)},
        probe={'train_images': 10000, 'epochs': 30}, seeds=3, costly=3),
    'gpu': Scale(
        note='ViT-Tiny, 100 epochs where the papers train 800 and more.',
        train_images=None, held_out=5000, epochs=100, sizes=_TINY, pretrain=_GPU, probe={'epochs': 50}, costly=3),
    'paper': Scale(
        note='RandSAC Table 12 on all rows; SAIM has no CIFAR-10 setting of its own, and its rows are trained so too.',
        train_images=None, held_out=5000, epochs={'plain': 800, 'randsac': 1600, 'saim': 800, 'mae': 1600,
                                                  'untrained': 1}, sizes=_TINY, pretrain={**_GPU, 'compile': True}),
}
