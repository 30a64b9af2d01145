"""Image files of many modes and depths, written by hand where Pillow does not write them."""

import struct
from pathlib import Path

import numpy as np
from PIL import Image


def write_grey(path: Path, kind: str, values: np.ndarray) -> np.ndarray:
    """Write a picture of grey values, uint16 [H, W] up to 65535, as `kind` says, and give what 8 bits hold of it."""
    high = (values >> 8).astype(np.uint8)  # what 8 bits hold
    near = np.rint(values / 257).astype(np.uint8)  # of 16 bits in proportion
    match kind:
        case 'grey' | 'palette':
            image = Image.fromarray(high)
            if kind == 'palette':
                image = image.convert('RGB').quantize(256, method=Image.Quantize.MEDIANCUT)
                high = np.asarray(image.convert('L'))
            image.save(path.with_suffix('.png'))
        case 'one bit':
            high = np.where(high > 127, 255, 0).astype(np.uint8)
            Image.fromarray(high).convert('1').save(path.with_suffix('.png'))
        case 'alpha' | 'colour' | 'colour and alpha' | 'gif' | 'webp' | 'bmp':
            mode = {'alpha': 'LA', 'colour and alpha': 'RGBA', 'gif': 'L'}.get(kind, 'RGB')
            suffix = '.' + kind if kind in ('gif', 'webp', 'bmp') else '.png'
            Image.fromarray(high).convert(mode).save(path.with_suffix(suffix), **{'lossless': True} if kind == 'webp'
                                                     else {})
        case 'ink':  # CMYK
            ink = np.zeros((*high.shape, 4), np.uint8)
            ink[..., 3] = 255 - high
            Image.fromarray(ink, 'CMYK').save(path.with_suffix('.tif'))
        case '16 bits':
            Image.fromarray(values).save(path.with_suffix('.png'))
            return near
        case '16 bits, big-endian':
            Image.frombytes('I;16B', values.shape[::-1], values.astype('>u2').tobytes()).save(path.with_suffix('.tif'))
            return near
        case '12 bits':
            write_12_bits(path.with_suffix('.tif'), values >> 4)
            return np.rint((values >> 4) * (255 / 4095)).astype(np.uint8)
        case '16 bits, PGM' | '16 bits, PPM':
            channels = 1 if kind.endswith('PGM') else 3
            header = f'P{4 + (channels + 1) // 2} {values.shape[1]} {values.shape[0]} 65535\n'.encode()
            pixels = np.repeat(values[..., None], channels, 2).astype('>u2').tobytes()
            path.with_suffix('.pgm' if channels == 1 else '.ppm').write_bytes(header + pixels)
            return near
        case '10 bits, PGM':
            header = f'P5 {values.shape[1]} {values.shape[0]} 1023\n'.encode()
            path.with_suffix('.pgm').write_bytes(header + (values >> 6).astype('>u2').tobytes())
            return np.rint((values >> 6) * (255 / 1023)).astype(np.uint8)
        case 'float':
            Image.fromarray((values / 65535).astype(np.float32)).save(path.with_suffix('.tif'))
            return near
    return high


GREY_KINDS = ('grey', 'palette', 'one bit', 'alpha', 'colour', 'colour and alpha', 'gif', 'webp', 'bmp', 'ink',
              '16 bits', '16 bits, big-endian', '12 bits', '16 bits, PGM', '16 bits, PPM', '10 bits, PGM', 'float')


def write_12_bits(path: Path, values: np.ndarray) -> None:
    """A grey TIFF of 12 bits a pixel, packed, of uint16 [H, W] with an even width."""
    height, width = values.shape
    even, odd = values[:, ::2].astype(np.int64), values[:, 1::2].astype(np.int64)
    packed = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], 2).astype(np.uint8).tobytes()
    # Width, height, bits, no compression, black is 0, strip, samples, rows of a strip, bytes of it.
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, height),
            (279, len(packed))]
    directory = struct.pack('<H', len(tags)) + b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(struct.pack('<2sHI', b'II', 42, 8 + len(packed)) + packed + directory + bytes(4))


def write_turned(path: Path, upright: Image.Image, orientation: int) -> None:
    """Store a picture so that its EXIF orientation turns it upright."""
    turn = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}
    stored = upright.transpose(turn[orientation]) if orientation in turn else upright.copy()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif, **({'quality': 95} if path.suffix == '.jpg' else {}))
