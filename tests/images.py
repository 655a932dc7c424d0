"""Image files of the kinds that turn up in data sets: odd ones that can be read, and damaged ones that can't."""

from __future__ import annotations

import io
import random
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int = 0, size: int = 32) -> np.ndarray:
    """A smooth picture, uint8 [size, size, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, color: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file made by hand: `rows` are the scan lines, each behind a filter byte."""
    header = struct.pack('>IIBBBBB', width, height, depth, color, 0, 0, 0)
    parts = [(b'IHDR', header), *chunks, (b'IDAT', zlib.compress(rows, 1)), (b'IEND', b'')]
    body = b''.join(
        struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data)) for name, data in parts
    )
    return b'\x89PNG\r\n\x1a\n' + body


@cache
def odd_images() -> dict[str, tuple[bytes, np.ndarray, int]]:
    """By file name: its bytes, the RGB pixels that are in it, and how far a lossy format may be off them."""
    pixels = picture()
    image = Image.fromarray(pixels)
    gray = pixels[..., 0]
    three = np.repeat(gray[..., None], 3, axis=2)
    cmyk = np.zeros((32, 32, 4), np.uint8)
    cmyk[..., :3] = 255 - pixels  # no black: each ink takes away its own color
    deep = np.random.default_rng(1).integers(0, 2**16, (32, 32), dtype=np.uint16)
    deep_rgb = np.random.default_rng(2).integers(0, 2**16, (32, 32, 3), dtype=np.uint16)
    lines = b''.join(b'\0' + row.astype('>u2').tobytes() for row in deep_rgb)
    palette = image.quantize(16)
    table = np.array(palette.getpalette(), np.uint8).reshape(-1, 3)
    frames = [Image.fromarray(picture(seed)) for seed in range(3)]
    animated: dict = {'save_all': True, 'append_images': frames[1:]}
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    bits = gray > 127
    return {
        'gray.png': (encoded(Image.fromarray(gray), 'PNG'), three, 0),
        'gray.jpg': (encoded(Image.fromarray(gray), 'JPEG', quality=95), three, 12),
        'gray alpha.png': (encoded(Image.fromarray(gray).convert('LA'), 'PNG'), three, 0),
        'alpha.png': (encoded(image.convert('RGBA'), 'PNG'), pixels, 0),
        'one bit.png': (encoded(Image.fromarray(bits), 'PNG'), np.repeat(bits[..., None] * 255, 3, axis=2), 0),
        'cmyk.jpg': (encoded(Image.fromarray(cmyk, 'CMYK'), 'JPEG', quality=95), pixels, 24),
        '16 bit gray.png': (encoded(Image.fromarray(deep), 'PNG'), np.repeat(deep[..., None] >> 8, 3, axis=2), 0),
        '16 bit.png': (png(32, 32, 16, 2, lines), deep_rgb >> 8, 0),
        'palette.png': (encoded(palette, 'PNG', transparency=bytes([0, 128] * 8)), table[np.asarray(palette)], 0),
        'palette one clear.png': (encoded(palette, 'PNG', transparency=3), table[np.asarray(palette)], 0),
        'animated gif.png': (encoded(frames[0], 'GIF', **animated), picture(0), 96),  # of 256 colors
        'animated webp.png': (encoded(frames[0], 'WEBP', **animated, lossless=True), picture(0), 0),
        'animated.png': (encoded(frames[0], 'PNG', **animated), picture(0), 0),
        'progressive.jpg': (encoded(image, 'JPEG', quality=95, progressive=True), pixels, 24),
        'turned.jpg': (encoded(image, 'JPEG', quality=95, exif=exif), pixels, 24),
        'broken exif.jpg': (encoded(image, 'JPEG', quality=95, exif=b'Exif\0\0II*\0\xff\xff\xff\xff'), pixels, 24),
        'one pixel.png': (encoded(Image.fromarray(pixels[:1, :1]), 'PNG'), pixels[:1, :1], 0),
        'one column.png': (encoded(Image.fromarray(pixels[:, :1]), 'PNG'), pixels[:, :1], 0),
        'bitmap.jpg': (encoded(image, 'BMP'), pixels, 0),
        'tiff.png': (encoded(image, 'TIFF'), pixels, 0),
    }


@cache
def damaged_images() -> dict[str, bytes]:
    """By file name: bytes that are no image, each wrong in another way."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    jpeg, whole = encoded(image, 'JPEG'), encoded(image, 'PNG')
    wrong_check = bytearray(whole)
    wrong_check[29] ^= 0xFF  # of the header's check sum
    broken = bytearray(whole)
    start = whole.index(b'IDAT') + 12
    broken[start : start + 40] = bytes(40)
    text = b'comment\0\0' + zlib.compress(bytes(2**27))  # 128 MB of text in a few hundred KB
    gif = encoded(image, 'GIF')
    return {
        'empty.png': b'',
        'one byte.jpg': b'\xff',
        'random.png': random.Random(0).randbytes(5000),
        'page.jpg': b'<!DOCTYPE html><title>404</title>',
        'truncated.jpg': jpeg[: len(jpeg) // 2],
        'truncated header.jpg': jpeg[:30],
        'truncated.png': whole[: len(whole) // 2],
        'truncated gif.png': gif[: len(gif) // 2],
        'wrong check sum.png': bytes(wrong_check),
        'broken stream.png': bytes(broken),
        'no pixels.png': png(0, 0, 8, 2, b''),
        'bomb.png': png(20_000, 20_000, 1, 0, bytes(2501 * 20_000)),  # 50 KB for 400 million pixels
        'bomb header.png': png(2**31 - 1, 2**31 - 1, 8, 2, b'\0'),
        'text bomb.png': png(1, 1, 8, 0, b'\0\0', (b'zTXt', text)),
        'thread.png': png(1, 60_000, 8, 0, bytes(2 * 60_000)),  # sized to 224 pixels across it would take 9 GB
    }


def write_odd(folder: Path) -> None:
    """Each odd image as a file."""
    for name, (data, _, _) in odd_images().items():
        (folder / name).write_bytes(data)


def write_damaged(folder: Path) -> None:
    """Each damaged image as a file, and a link that leads nowhere."""
    for name, data in damaged_images().items():
        (folder / name).write_bytes(data)
    (folder / 'gone.png').symlink_to('nowhere.png')
