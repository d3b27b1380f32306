"""Configuration of the audio VAE, and of the spectrograms that it encodes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ltx2.runtime.errors import ConfigError
from ltx2.runtime.model.config import AS_PUBLISHED, Config, Repeats

SECTIONS = frozenset({"model", "params", "ddconfig", "preprocessing", "audio", "stft", "mel"})


@dataclass(frozen=True)
class AudioVAEConfig(Config):
    """Checkpoint section `audio_vae`; its nested sections have different keys, and are read as one."""

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "double_z": (True,),
        "downsample_time": (False,),
        "attn_resolutions": ((),),
        "mid_block_add_attention": (False,),
        "norm_type": ("pixel",),
        "causality_axis": ("height",),
        "causal": (True,),
        "stereo": (True,),
    }
    # Where attention is (there is none), scaling of integer samples, training.
    IGNORED: ClassVar[frozenset[str]] = frozenset(
        {"resolution", "max_wav_value", "dropout", "duration", "causal_padding"}
    )

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: Repeats
    in_channels: int
    out_ch: int
    z_channels: int
    mel_bins: int
    sampling_rate: int  # Hz, of the sound that spectrograms are made from; the vocoder's output has its own
    hop_length: int  # samples per mel frame
    filter_length: int = 1024  # samples that a mel frame is made from
    win_length: int = 1024  # of them within the window
    n_mel_channels: int = 64
    mel_fmin: float = 0.0  # Hz
    mel_fmax: float = 8000.0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """As Config.from_dict. Raises ConfigError also for a key that has two values."""
        flat: dict[str, Any] = {}
        for key, value in _flat(data):
            if flat.setdefault(key, value) != value:
                raise ConfigError(
                    f"AudioVAEConfig: {key} has two values", f"they are {flat[key]!r} and {value!r}", AS_PUBLISHED
                )
        return super().from_dict(flat)

    def __post_init__(self) -> None:
        if self.mel_bins % self.temporal_scale:
            why = f"{self.mel_bins} bins cannot be halved {len(self.ch_mult) - 1} times"
            raise ConfigError("AudioVAEConfig: mel_bins does not fit ch_mult", why, AS_PUBLISHED)
        if self.n_mel_channels != self.mel_bins or self.win_length > self.filter_length:
            why = f"{self.n_mel_channels} mel bins and windows of {self.win_length} samples are made"
            raise ConfigError("AudioVAEConfig: spectrograms do not fit the network", why, AS_PUBLISHED)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level, finest first."""
        return tuple(self.ch * m for m in self.ch_mult)

    @property
    def temporal_scale(self) -> int:
        """Mel frames per latent frame, and mel bins per latent frequency."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def hop_seconds(self) -> float:
        """Seconds per mel frame."""
        return self.hop_length / self.sampling_rate

    @property
    def latent_channels(self) -> int:
        return self.z_channels

    @property
    def latent_frequencies(self) -> int:
        return self.mel_bins // self.temporal_scale

    def latent_frames(self, samples: int) -> int:
        """Latent frames of so many samples of sound."""
        return -(-(samples // self.hop_length + 1) // self.temporal_scale)


def _flat(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if key in SECTIONS and isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield key, value
