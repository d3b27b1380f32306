"""The same thing of the picture and of the sound."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T", covariant=True)
U = TypeVar("U")
R = TypeVar("R")


@dataclass(frozen=True)
class Streams(Generic[T]):
    """One of the video and one of the audio stream; None where a clip has no such stream (sound only, silent)."""

    video: T | None = None
    audio: T | None = None

    @overload
    def map(self, function: Callable[[T], R]) -> "Streams[R]": ...

    @overload
    def map(self, function: Callable[[T, U], R], other: "Streams[U]") -> "Streams[R]": ...

    def map(self, function: Callable[..., R], other: "Streams[Any] | None" = None) -> "Streams[R]":
        """The function's results, of the streams that are there (in `other` too)."""
        if other is not None:
            return self.zip(other).map(lambda pair: function(*pair))
        video = None if self.video is None else function(self.video)
        return Streams(video, None if self.audio is None else function(self.audio))

    def named(self, function: Callable[[str, T], R]) -> "Streams[R]":
        """As `map`, of a function that is also given the stream's name."""
        return Streams(**{name: function(name, value) for name, value in self.items()})

    def get(self, name: str) -> T:
        """The stream of this name. Raises KeyError where it is absent."""
        return dict(self.items())[name]

    def zip(self, other: "Streams[U]") -> "Streams[tuple[T, U]]":
        """Pairs, of the streams that both have."""
        video = None if self.video is None or other.video is None else (self.video, other.video)
        return Streams(video, None if self.audio is None or other.audio is None else (self.audio, other.audio))

    def items(self) -> Iterator[tuple[str, T]]:
        """Name and value of the streams that are there, video first."""
        for name, value in (("video", self.video), ("audio", self.audio)):
            if value is not None:
                yield name, value

    def values(self) -> Iterator[T]:
        return (value for _, value in self.items())
