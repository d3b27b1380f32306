"""What a clip's file may be, by its suffix: what ffmpeg is told, and how much room it takes at most."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ltx2.runtime.errors import UsageError

CRF = 19  # of H.264, where nothing else is asked
# Said explicitly: ffmpeg would convert with BT.601, and players take HD for BT.709 and show other colours.
COLOUR = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format={},"
    "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
)
# A palette for every frame, so that none has to wait for the last one.
PALETTES = "split[seen][drawn];[seen]palettegen=stats_mode=single[palette];[drawn][palette]paletteuse=new=1"


@dataclass(frozen=True)
class Format:
    """A kind of file: its name for ffmpeg, the encoder of pictures with its options and filters, that of sound (empty:
    it has none), and at most how many bytes a pixel takes. `crf`: its quality can be chosen."""

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
        """At most: six steps of H.264's quality double a file, up to what is lossless."""
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
    """Of a clip's file. Raises LookupError for another suffix."""
    return FORMATS[path.suffix.lower()]


def check_crf(path: Path, crf: int) -> None:
    """Raises UsageError for a quality that was chosen for a file that has none to choose."""
    if crf != CRF and not format_of(path).crf:
        why = f"a {path.suffix.lower()} has one quality"
        raise UsageError(
            f"--crf and -o {path} do not go together",
            why,
            f"give --crf {CRF}, which is the default, or use {path.stem}.mp4",
        )
