"""Pictures in files, read by Pillow, or by ffmpeg where Pillow does not know the format: in sRGB, rotated as EXIF
says."""

import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from pi_heif import is_supported, register_heif_opener  # type: ignore[import-untyped]
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from ltx2.runtime.errors import InputError, reason
from ltx2.runtime.files.tensors import Array
from ltx2.runtime.media.ffmpeg import complaint, run_ffmpeg
from ltx2.runtime.media.source import OTHER, QUIET, check_file, check_pixels, first_frame

# Without Pillow's others: one of them runs a program on the file.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "JPEG2000", "GIF", "BMP", "PPM", "PSD", "HEIF")
# What Pillow raises for broken files.
BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, RuntimeError, struct.error,
    zlib.error,
)  # fmt: skip
SAME_COLOURS = {"RGBa": "RGBA", "La": "LA"}  # without the multiplication by alpha
OF_PROFILE = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # a profile's colours -> Pillow's
WIDE = ("I", "F")  # 32 bits, in no known range
NARROW = (1, 2)  # a HEIC's number for the primaries of sRGB, and for unknown ones
FAST = 1  # compression


def read_picture(path: Path) -> Array:
    """A picture, or a clip's first frame: uint8 (H, W, 3) in sRGB, rotated as its EXIF says; alpha is dropped, grey
    becomes RGB, 16 bits become 8. Raises InputError, also for a damaged one."""
    check_file(path)
    register_heif_opener()
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as picture:
            check_pixels(path, *picture.size)
            if picture.format == "PNG":
                _check_sums(path)
            picture.load()
            if picture.format in ("JPEG", "MPO"):
                first_frame(path)  # Pillow shows missing parts in grey; to ffmpeg they are an error
            return np.asarray(_in_srgb(ImageOps.exif_transpose(picture), path))
    except UnidentifiedImageError as error:
        if is_supported(path):  # ffmpeg would show one of its tiles
            raise InputError(f"cannot read {path}", "it is cut off or damaged", OTHER) from error
        return first_frame(path)
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is too large", str(error), "make it smaller first") from error
    except BROKEN as error:
        raise InputError(f"cannot read {path}", reason(error), OTHER) from error


def _check_sums(path: Path) -> None:
    """Check a PNG's checksums, which decoding ignores. Raises what Pillow raises."""
    with Image.open(path, formats=("PNG",)) as picture:
        picture.verify()


def _in_srgb(picture: Image.Image, path: Path) -> Image.Image:
    """In RGB of 8 bits, with its colour profile applied. Raises InputError where that is not possible."""
    if picture.mode in WIDE:
        raise InputError(f"cannot read {path}", "it has 32 bits per colour, in no known range", "save it with 16 bits")
    if picture.mode.startswith("I;16"):  # which convert() would clip
        levels: Array = np.asarray(picture) >> 8
        narrow = Image.fromarray(levels.astype(np.uint8))
        narrow.info = picture.info
        picture = narrow
    picture = picture.convert(SAME_COLOURS.get(picture.mode, picture.mode))
    if not (data := picture.info.get("icc_profile")):
        if picture.info.get("nclx_profile", {}).get("color_primaries", NARROW[0]) not in NARROW:
            raise InputError(f"cannot read {path}", "it has wide colours without a profile", "save it as sRGB")
        return picture.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(data))
        colours = profile.profile.xcolor_space.strip()
        mode = OF_PROFILE.get(colours, "")
        if (mode == "CMYK") != (picture.mode == "CMYK") or (mode == "L" and picture.mode not in ("1", "L", "LA")):
            raise ImageCms.PyCMSError(f"it is of {colours} colours, and the picture of {picture.mode}")
        picture = picture.convert(mode)
        srgb = ImageCms.createProfile("sRGB")
        made = ImageCms.profileToProfile(picture, profile, srgb, outputMode="RGB")
        assert made is not None, "the conversion is not in place"
        return made
    except (ImageCms.PyCMSError, OSError) as error:
        why = f"its colour profile cannot be applied: {reason(error)}"
        raise InputError(f"cannot read {path}", why, "save it as sRGB") from error


def write_picture(path: str | Path, picture: Array) -> None:
    """Write uint8 (H, W, 3) as a PNG. Raises OSError."""
    Image.fromarray(picture).save(path, "PNG", compress_level=FAST)


def compressed(picture: Array, crf: int) -> Array:
    """A picture uint8 (H, W, 3) after H.264 at this quality, as in training: one frame, cut to even sides. A side below
    2 or a crf of 0: unchanged."""
    height, width = (side // 2 * 2 for side in picture.shape[:2])
    if crf == 0 or not height or not width:
        return picture
    size, raw = f"{width}x{height}", ["-f", "rawvideo", "-pix_fmt", "rgb24"]
    scaled = ["-sws_flags", "bilinear"]
    # One frame per second: the rate decides how x264 shares out bits.
    encode = [*scaled, *raw, "-framerate", "1", "-video_size", size, "-i", "pipe:0", *scaled]
    encode += ["-c:v", "libx264", "-preset", "veryfast", "-crf", str(crf), "-pix_fmt", "yuv420p"]
    encode += ["-x264-params", "sliced-threads=1:threads=2", "-f", "h264", "pipe:1"]
    decode = [*scaled, "-f", "h264", "-i", "pipe:0", *scaled, *raw, "pipe:1"]
    stream = _piped(encode, picture[:height, :width].tobytes())
    return np.frombuffer(_piped(decode, stream), np.uint8)[: height * width * 3].reshape(height, width, 3)


def covering(frames: Array, height: int, width: int) -> Array:
    """Pictures uint8 (..., H, W, 3) resized to cover a size and centre cropped: float32 (..., height, width, 3) in
    [-1, 1]. Bilinear without antialiasing, corners not aligned, in float32 without rounding."""
    values, before = frames, frames.shape[-3:-1]
    if before != (height, width):
        scale = max(height / before[0], width / before[1])
        sizes = [int(np.ceil(side * scale)) for side in before]
        for axis, size, wanted in ((-3, sizes[0], height), (-2, sizes[1], width)):
            values = _resized(values, axis, size, (size - wanted) // 2, wanted)
    return values.astype(np.float32) / np.float32(127.5) - 1


def _resized(values: Array, axis: int, size: int, start: int, count: int) -> Array:
    """Values (..., H, W, 3) with a negative axis stretched to `size` and cut to `count` from `start` on, float32."""
    length = values.shape[axis]
    at = (np.arange(start, start + count, dtype=np.float64) + 0.5) * (length / size) - 0.5
    at = np.clip(at, 0, None).astype(np.float32)
    low = np.minimum(at.astype(np.int64), length - 1)
    share = (at - low).reshape((-1,) + (1,) * (-axis - 1))
    first, second = (np.take(values, np.minimum(low + more, length - 1), axis) for more in (0, 1))
    return first.astype(np.float32) * (1 - share) + second * share


def _piped(arguments: list[str], data: bytes) -> bytes:
    done = run_ffmpeg(*QUIET, *arguments, data=data)
    if done.status:
        raise InputError("a picture cannot be compressed", complaint(done.said), "--image-crf 0")
    return done.out
