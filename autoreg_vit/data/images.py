"""Image files of any of Pillow's modes and depths, decoded upright and brought to 8 bits a channel."""

import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from ..errors import DataError, one_line

#: What reading and decoding a damaged file raises; DataError, of values that mean nothing, is a ValueError among them.
DAMAGE = (OSError, SyntaxError, EOFError, ValueError, RuntimeError, struct.error, zlib.error,
          Image.DecompressionBombError)


def damaged(name: str | Path, error: Exception) -> DataError:
    """The error of use of an image that cannot be read."""
    return DataError(f'Cannot read {name}: it is damaged or no image ({one_line(error)}). Replace or remove it.')


# Formats that Pillow recognises without decoding them, or decodes by another program.
_NOT_DECODED = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF'}

# Modes whose channels have 8 bits or fewer, which Pillow converts in proportion.
_EIGHT_BITS = {'1', 'L', 'LA', 'La', 'P', 'PA', 'RGB', 'RGBA', 'RGBX', 'RGBa', 'CMYK', 'YCbCr', 'HSV', 'LAB'}
_BY_WAY_OF = {'La': 'LA', 'RGBa': 'RGBA', 'LAB': 'RGB'}


def image_extensions() -> frozenset[str]:
    """Endings, in lower case, of the files that the installed Pillow decodes."""
    return frozenset(ending for ending, kind in Image.registered_extensions().items()
                     if kind in Image.OPEN and kind not in _NOT_DECODED)


def open_image(path: str | Path | IO[bytes]) -> Image.Image:
    """Decode a file, of several pictures the first, in its own mode and turned upright as its EXIF data say; raises one
    of `DAMAGE` where it cannot be decoded."""
    with Image.open(path) as image:
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            # PIL only warns up to twice as many, and would decode them.
            raise Image.DecompressionBombError(f'{image.width} x {image.height} pixels, more than PIL holds to be safe')
        if image.format == 'TIFF':
            image.filename = ''  # Pillow maps an uncompressed file by the size that it has once turned: no mapping
        image.load()
        return upright(image)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, from 1 (upright) to 8; 1 where its EXIF data are missing or damaged."""
    try:
        value = image.getexif().get(0x0112, 1)
    except (*DAMAGE, LookupError, TypeError, ArithmeticError):  # the picture itself may be whole
        return 1
    return value if value in range(2, 9) else 1


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF orientation says, once: what is returned has none any more."""
    if orientation(image) == 1:
        return image
    turned = ImageOps.exif_transpose(image)
    turned.format = image.format  # which tells the range of its values
    return turned


def stored_size(path: str | Path) -> tuple[int, int]:
    """Width and height of a file's picture before it is turned upright."""
    with Image.open(path) as image:
        return image.size


def eight_bits(image: Image.Image) -> Image.Image:
    """An image with 8 bits a channel or fewer: deeper grey in proportion to its range, any other image as it is.

    16 bits range to 65535, a TIFF of 9 to 15 bits to what they hold; floats range from 0 to 1. Of 32-bit integers the
    range is known where the format has 16 bits (PNG, PGM), and else refused.

    Raises:
        DataError: naming the mode, where its range is not known or values exceed it, or Pillow cannot make grey of it.
    """
    image.load()
    if image.mode in _EIGHT_BITS:
        return image
    if image.mode.startswith('I;16'):
        bits = getattr(image, 'tag_v2', {}).get(258, 16)  # TIFF: BitsPerSample, which Pillow leaves unscaled
        top = 2 ** min(bits[0] if isinstance(bits, tuple) else bits, 16) - 1
    elif image.mode == 'I' and image.format in ('PNG', 'PPM'):
        top = 65535
    elif image.mode == 'F':
        top = 1
    else:
        kind = '32-bit integers' if image.mode == 'I' else 'colours'
        raise DataError(f'its mode {image.mode} has {kind} whose range is not known: expected 8 or 16 bits a channel, '
                        'or floats from 0 to 1; convert it')
    values = np.asarray(image).astype(np.float64)
    if not (values.min() >= 0 and values.max() <= top):  # NaN too
        raise DataError(f'its values range from {values.min():g} to {values.max():g}, and those of mode {image.mode} '
                        f'should from 0 to {top}: convert it to 8 or 16 bits')
    scaled = Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
    scaled.info = dict(image.info)  # EXIF data among them
    return scaled


def prepared(image: Image.Image) -> Image.Image:
    """An image decoded, upright and with 8 bits a channel, in whichever mode; raises DataError as `eight_bits`."""
    return upright(eight_bits(image))


class ToMode:
    """Bring PIL images to grey or RGB of 8 bits a channel, upright, as `prepared`; an alpha channel is dropped. A named
    class so that loader processes can receive it."""

    def __init__(self, channels: int):
        self.mode = 'L' if channels == 1 else 'RGB'

    def __call__(self, image: Image.Image) -> Image.Image:
        image = prepared(image)
        # Pillow converts what is premultiplied by alpha, and LAB to grey, by way of another mode alone.
        image = image.convert(_BY_WAY_OF[image.mode]) if image.mode in _BY_WAY_OF else image
        return image if image.mode == self.mode else image.convert(self.mode)
