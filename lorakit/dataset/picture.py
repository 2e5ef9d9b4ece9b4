"""Open pictures and masks of every supported format as RGB, upright, in sRGB."""

from __future__ import annotations

import functools
import hashlib
import io
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

HEIF = {".heic", ".heif", ".hif"}
RAW = {".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"}
PICTURES = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
PICTURES |= {".pjpeg", ".pjp", ".mpo", ".ppm", ".pgm", ".pbm", ".pnm", ".ico", ".jp2", ".j2k", ".jpx", ".tga", ".qoi"}
PICTURES |= HEIF | RAW
FOREIGN = {".jxl", ".svg", ".psd", ".xcf", ".kra", ".eps", ".exr", ".hdr"}

# Only these decoders see people's files: Pillow has dozens, and one of them starts Ghostscript.
FORMATS = (
    "PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF", "MPO", "PPM", "ICO", "JPEG2000", "TGA", "QOI",
)  # fmt: skip
CERTAIN = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")  # conversion from these modes to RGB never fails
STAND_INS = ("given", "folder", "none")  # caption sources that are not the picture's own

FLIPS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
UPRIGHT = {2 + i: Image.Transpose[name] for i, name in enumerate(FLIPS.split())}  # by EXIF orientation
SIDEWAYS = tuple(UPRIGHT[orientation] for orientation in (5, 6, 7, 8))
GiB = 2**30


@dataclass(frozen=True)
class Picture:
    """A picture of a dataset, by its file."""

    path: Path
    caption: str  # for the text encoder; "" if there is none
    caption_source: str  # ".txt", ".caption", "metadata.jsonl" …, "given" (to scan), "folder" (its name) or "none"
    repeats: int  # times per epoch
    width: int  # pixels, as open_picture returns it
    height: int
    digest: str  # SHA-256 of the file, in hex
    group: str  # its folder relative to the root, "5_cat"; "" for the root itself
    instead_of: Path | None = None  # the file that it replaces, whose name and caption it keeps
    lines: tuple[str, ...] = ()  # of the caption, without empty ones

    @property
    def known_as(self) -> Path:
        """The file that gives it its name."""
        return self.instead_of or self.path

    @property
    def has_own_caption(self) -> bool:
        return self.caption_source not in STAND_INS


@dataclass(frozen=True)
class Mask:
    """The part of a picture that is trained on: white; the rest is black."""

    path: Path
    digest: str  # SHA-256 of the file, in hex
    alpha: bool  # the file is the picture itself, and its transparency the mask


def open_picture(picture: Picture | str | os.PathLike) -> Image.Image:
    """A picture as a viewer shows it: RGB in sRGB colours, upright, transparency on white, the first frame.

    Raises:
        ValueError: it cannot be decoded, or (given a Picture) is no longer the file that was scanned.
    """
    path = Path(picture.path if isinstance(picture, Picture) else picture)
    encoded = path.read_bytes()
    if isinstance(picture, Picture) and hashlib.sha256(encoded).hexdigest() != picture.digest:
        raise ValueError(f"{path} has changed since it was scanned: scan again (with fresh=True if this comes back)")
    try:
        return _rgb(_load(encoded, path.suffix.lower()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@functools.lru_cache(2048)  # a dataset's, some 10 MB
def thumbnail(picture: Picture, side: int = 128) -> bytes:
    """A picture of at most `side` pixels a side, as JPEG; a grey square if its file is missing or has changed."""
    try:
        image = open_picture(picture)
    except (ValueError, OSError):
        image = Image.new("RGB", (side, side), "gray")
    image.thumbnail((side, side))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return stream.getvalue()


def open_mask(mask: Mask) -> Image.Image:
    """A mask, upright: mode L.

    Raises:
        ValueError: it cannot be decoded.
    """
    if not mask.alpha:
        return open_picture(mask.path).convert("L")
    with Image.open(mask.path, formats=register_formats()) as image:
        turned, alpha = _turned(image), image.convert("RGBA").getchannel("A")
    return alpha if turned is None else alpha.transpose(turned)


def has_alpha(path: Path) -> bool:
    """Whether a picture is transparent anywhere."""
    if path.suffix.lower() in RAW:
        return False
    with Image.open(path, formats=register_formats()) as image:
        return _has_alpha(image) and bool(np.asarray(image.convert("RGBA").getchannel("A")).min() < 255)


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def measure(file: Path) -> list | str:
    """[width, height, SHA-256] of a picture that can be decoded completely; else what is wrong with it."""
    try:
        if (length := file.stat().st_size) > GiB:
            return f"{length / GiB:.1f} GiB is too large for a picture: scale it down"
        encoded = file.read_bytes()
        image = _load(encoded, file.suffix.lower())
        if image.mode not in CERTAIN:
            _rgb(image)
        if _has_alpha(image) and image.convert("RGBA").getchannel("A").getextrema()[1] == 0:
            return "transparent everywhere, so that nothing of it can be seen: save it without transparency"
        size = image.size[::-1] if _turned(image) in SIDEWAYS else image.size
        return [*size, hashlib.sha256(encoded).hexdigest()]
    except OSError as error:
        return f"cannot be read ({error.strerror}): check its permissions or copy it again"
    except ValueError as error:
        return str(error)


@functools.cache
def register_formats() -> list[str]:
    """Pillow's names of the formats that can be read, with HEIF where its library is installed."""
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return [name for name in FORMATS if name in Image.OPEN]


def _load(encoded: bytes, suffix: str) -> Image.Image:
    """A file's first picture, with its pixels as they are stored.

    Raises:
        ValueError: it cannot be decoded; the message gives the reason and advice.
    """
    if not encoded:
        raise ValueError("empty (0 bytes): copy it again")
    try:
        if suffix in RAW:
            return _develop(encoded)
        image = Image.open(io.BytesIO(encoded), formats=register_formats())
        image.load()
        return image
    except ImportError:
        raise ValueError(_needs("camera raw", "rawpy")) from None
    except Image.UnidentifiedImageError:
        raise ValueError(_unknown(encoded)) from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"too many pixels to decode safely ({error}): scale it down") from error
    except Exception as error:  # a damaged file can raise nearly anything: SyntaxError, struct.error, …
        raise ValueError(f"cannot be decoded ({error}): copy it again, or save it as PNG or JPEG") from error


def _develop(encoded: bytes) -> Image.Image:
    """A camera raw, with the camera's white balance and sRGB's tone curve."""
    import rawpy

    with rawpy.imread(io.BytesIO(encoded)) as raw:
        return Image.fromarray(raw.postprocess(use_camera_wb=True, gamma=(2.4, 12.92)))


def _unknown(encoded: bytes) -> str:
    brands = encoded[8:32] if encoded[4:8] == b"ftyp" else b""
    if b"avif" in brands:
        return _needs("AVIF", "pillow>=11.3")
    if any(brand in brands for brand in (b"heic", b"heix", b"mif1")):
        return _needs("HEIC", "pillow-heif")
    return "not a picture of a known format, despite its name: save it as PNG or JPEG"


def _needs(kind: str, package: str) -> str:
    return f"{kind} needs {package}, which is not installed: pip install {package!r}, or save it as PNG or JPEG"


def _rgb(image: Image.Image) -> Image.Image:
    """A decoded picture as `open_picture` returns it."""
    turned, profile, alpha = _turned(image), image.info.get("icc_profile"), None
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # older Pillow calls it I
        image, alpha = _eight_bits(image)
    elif image.mode in ("I", "F"):
        raise ValueError(f"samples in mode {image.mode} have no known white: save it as PNG or JPEG")
    elif _has_alpha(image):
        with_alpha = image.convert("RGBA")
        alpha = with_alpha.getchannel("A")
        image = with_alpha.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    image = _srgb(image, profile)
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image if turned is None else image.transpose(turned)


def _eight_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """16-bit grey → 8-bit grey, and its transparency. A TIFF may use fewer bits, and 0 for white."""
    tags, values = getattr(image, "tag_v2", {}), np.asarray(image).astype(np.uint32)
    white = 2 ** tags.get(258, (16,))[0] - 1
    grey = ((values * 255 + white // 2) // white).astype(np.uint8)
    clear = image.info.get("transparency")
    alpha = None if clear is None else Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    return Image.fromarray(255 - grey if tags.get(262) == 0 else grey), alpha


def _turned(image: Image.Image) -> Image.Transpose | None:
    """The rotation that makes a picture upright, by its EXIF; None if it is upright."""
    try:
        return UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:  # broken EXIF does not make a broken picture
        return None


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to RGB through the picture's ICC profile; a broken profile, or one of another kind, is ignored."""
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}.get(source.profile.xcolor_space.strip())
            if image.mode == "L" and mode == "RGB":
                image = image.convert("RGB")
            if image.mode == mode and not (source.profile.profile_description or "").startswith("sRGB"):
                srgb = ImageCms.createProfile("sRGB")
                return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB") or image
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass
    return image if image.mode == "RGB" else image.convert("RGB")  # a copy would cost more than decoding did
