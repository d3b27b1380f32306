"""The formats of clips by suffix: ffmpeg's options, and the most room that a clip takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ltx2.runtime.errors import UsageError

CRF = 19  # of H.264, where nothing else is asked
# Explicit: by default ffmpeg converts with BT.601, and players take HD for BT.709 and show other colours.
COLOUR = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format={},"
    "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
)
# A palette per frame, so that no frame has to wait for the last one.
PALETTES = "split[seen][drawn];[seen]palettegen=stats_mode=single[palette];[drawn][palette]paletteuse=new=1"


@dataclass(frozen=True)
class Format:
    """A format: its name in ffmpeg, the encoder of pictures with its options and filters, that of sound (empty: it has
    none), and the most bytes that a pixel takes. `crf`: its quality can be chosen."""

    container: str
    video: str
    filters: str
    audio: str
    pixel: float
    options: tuple[str, ...] = ()
    audio_options: tuple[str, ...] = ()
    crf: bool = False

    @property
    def encoders(self) -> tuple[str, ...]:
        return tuple(name for name in (self.video, self.audio) if name)

    def bytes_of_a_pixel(self, crf: int) -> float:
        """At most: six steps of H.264's quality double a file, up to a lossless one."""
        return min(1.5, self.pixel * 2 ** ((CRF - crf) / 6)) if self.crf else self.pixel


FORMATS: Mapping[str, Format] = {
    # several times what is usual at CRF
    ".mp4": Format("mp4", "libx264", COLOUR.format("yuv420p"), "aac", 0.1, (), ("-b:a", "192k"), crf=True),
    # 422 HQ, for editing
    ".mov": Format(
        "mov", "prores_ks", COLOUR.format("yuv422p10le"), "pcm_s16le", 1.0, ("-profile:v", "3", "-vendor", "apl0")
    ),
    ".gif": Format("gif", "gif", PALETTES, "", 1.5),
}
MP4 = FORMATS[".mp4"]


def format_of(path: Path) -> Format:
    """The format of a clip's file. Raises LookupError for another suffix."""
    return FORMATS[path.suffix.lower()]


def check_crf(path: Path, crf: int) -> None:
    """Raises UsageError where a quality was chosen and the format has one only."""
    if crf != CRF and not format_of(path).crf:
        why, fix = f"a {path.suffix.lower()} has one quality", f"give --crf {CRF}, or use {path.stem}.mp4"
        raise UsageError(f"--crf and -o {path} do not go together", why, fix)
