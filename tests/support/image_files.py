"""Image files in modes and formats that people have, small enough to be made in each test."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

from support.images import encode_image


HEIGHT, WIDTH = 24, 36
RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
ALPHA = np.concatenate([COLORS, COLORS[..., :1]], axis=-1)
DEEP = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
ORIENTATION = 0x112


def encode(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def deep_png(values: np.ndarray, color_type: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow writes for grayscale only; `(height, width, channels)`."""
    height, width, _ = values.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def raw_tiff(values: np.ndarray, photometric: int = 1, sample_format: int = 1, orientation: int = 1, **tags) -> bytes:
    """A TIFF without compression; `(height, width[, channels])` of any type. `extra` says what a fourth channel is."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    height, width, channels = (*values.shape, 1)[:3]
    entries = {256: [width], 257: [height], 258: [8 * values.itemsize] * channels, 259: [1], 262: [photometric]}
    entries |= {273: [0], 274: [orientation], 277: [channels], 278: [height], 279: [values.nbytes]}
    entries |= {338: [tags["extra"]]} if tags else {}
    entries |= {339: [sample_format] * channels}
    later = 8 + 2 + 12 * len(entries) + 4  # where long values and then the pixels begin
    long_values = b"".join(struct.pack(f"{order}{len(v)}H", *v) for v in entries.values() if len(v) > 2)
    entries[273] = [later + len(long_values)]
    directory = b""
    for tag, numbers in entries.items():
        packed = struct.pack(f"{order}{len(numbers)}H", *numbers)
        if len(packed) > 4:
            later, packed = later + len(packed), struct.pack(f"{order}I", later)
        directory += struct.pack(f"{order}HHI", tag, 3, len(numbers)) + packed.ljust(4, b"\0")
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(entries))
    return start + directory + bytes(4) + long_values + values.tobytes()


def turned(file_format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    return encode(Image.fromarray(COLORS), file_format, exif=exif.tobytes(), **options)


def unusual_files() -> dict[str, bytes]:
    """What the file is -> the file."""
    image, other, gray = Image.fromarray(COLORS), Image.fromarray(255 - COLORS), Image.fromarray(COLORS[..., 0])
    palette, with_alpha = image.quantize(64), Image.fromarray(ALPHA)
    frames = {"save_all": True, "append_images": [other]}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    deep = RNG.integers(0, 65536, (HEIGHT, WIDTH, 4), dtype=np.uint16)
    files = {
        "grayscale": encode(gray, "PNG"),
        "one bit": encode(gray.convert("1"), "PNG"),
        "16-bit PNG": encode_image(DEEP, "PNG"),
        "16-bit TIFF, little-endian": raw_tiff(DEEP.astype("<u2")),
        "16-bit TIFF, big-endian": raw_tiff(DEEP.astype(">u2")),
        "16-bit TIFF on its side": raw_tiff(DEEP.astype("<u2"), orientation=6),
        "16-bit PPM": b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + DEEP.astype(">u2").tobytes(),
        "16-bit JPEG 2000": encode_image(DEEP, "JPEG2000"),
        "32-bit integers up to 65535": raw_tiff(DEEP.astype("<i4"), sample_format=2),
        "palette": encode(palette, "PNG"),
        "palette with a transparent color": encode(palette, "PNG", transparency=3),
        "palette with opacities": encode(palette, "PNG", transparency=bytes(range(64))),
        "palette of BMP": encode(palette, "BMP"),
        "grayscale with a transparent tone": encode(gray, "PNG", transparency=int(COLORS[0, 0, 0])),
        "RGB with a transparent color": encode(image, "PNG", transparency=tuple(COLORS[0, 0].tolist())),
        "LA": encode(Image.merge("LA", (gray, gray)), "PNG"),
        "RGBA PNG": encode(with_alpha, "PNG"),
        "RGBA WebP": encode(with_alpha, "WEBP", lossless=True, exact=True),
        "RGBA TIFF, premultiplied": raw_tiff(ALPHA, photometric=2, extra=1),
        "CMYK JPEG": encode(Image.fromarray(ALPHA, "CMYK"), "JPEG"),
        "CMYK TIFF": encode(Image.fromarray(ALPHA, "CMYK"), "TIFF"),
        "YCbCr TIFF": encode(image, "TIFF", compression="jpeg"),
        "LAB TIFF": encode(Image.fromarray(COLORS, "LAB"), "TIFF"),
        "RGB of 16 bits, PNG": deep_png(deep[..., :3], 2),
        "RGBA of 16 bits, PNG": deep_png(deep, 6),
        "LA of 16 bits, PNG": deep_png(deep[..., :2], 4),
        "RGB of 16 bits, TIFF": raw_tiff(deep[..., :3].astype("<u2"), photometric=2),
        "RGB TIFF on its side": raw_tiff(COLORS, photometric=2, orientation=6),
        "grayscale TIFF on its side": raw_tiff(COLORS[..., 0].copy(), orientation=6),
        "RGB TIFF upside down": raw_tiff(COLORS, photometric=2, orientation=3),
        "animated GIF": encode(palette, "GIF", save_all=True, append_images=[other.quantize(64)]),
        "transparent GIF": encode(palette, "GIF", transparency=3),
        "animated WebP": encode(image, "WEBP", lossless=True, **frames),
        "animated PNG": encode(image, "PNG", **frames),
        "animated PNG, another default": encode(image, "PNG", default_image=True, **frames),
        "TIFF of several pages": encode(image, "TIFF", **frames),
        "MPO": encode(image, "MPO", **frames),
        "color profile": encode(image, "PNG", icc_profile=profile),
    }
    files |= {f"JPEG with orientation {number}": turned("JPEG", number) for number in range(2, 9)}
    return files | {f"{name} with orientation 6": turned(name, 6) for name in ("PNG", "WEBP")}


def refused_files() -> dict[str, bytes]:
    """Files whose values have no meaning as 8-bit images -> the file."""
    tones = DEEP.astype("<f4") / 65535
    return {
        "floating point": raw_tiff(tones, sample_format=3),
        "floating-point PFM": encode(Image.fromarray(tones), "PPM"),
        "negative values": raw_tiff((DEEP.astype("<i4") - 1000).clip(-1000, 32767).astype("<i2"), sample_format=2),
        "more than 16 bits": raw_tiff(DEEP.astype("<i4") * 2, sample_format=2),
        "unsigned 32 bits": raw_tiff(DEEP.astype("<u4") * 60000),
        "half precision": raw_tiff(tones.astype("<f2"), sample_format=3),
        "double precision": raw_tiff(tones.astype("<f8"), sample_format=3),
        "floating-point RGB": raw_tiff(np.stack([tones] * 3, axis=-1), photometric=2, sample_format=3),
    }
