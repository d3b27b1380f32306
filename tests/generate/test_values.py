"""Values with a place, a span or a strength, as texts and as tuples."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltx2.runtime.errors import InputError
from ltx2.runtime.generate.options.kinds import Length, Numbers, One, Several, digest, portable
from ltx2.runtime.generate.options.values import (
    Auto,
    Extension,
    Form,
    KeyPicture,
    Lora,
    Picture,
    Reference,
    Sound,
    Span,
)

READ: list[tuple[type[Form], Any, Form]] = [
    (Picture, "a.png", Picture("a.png")),
    (Picture, "a.png@24", Picture("a.png", 24)),
    (Picture, "a.png@24:0.5", Picture("a.png", 24, 0.5)),
    (Picture, "a.png:0.5", Picture("a.png", 0, 0.5)),
    (Picture, "me@home.png", Picture("me@home.png")),
    (Picture, "me@2/b:1.png@8", Picture("me@2/b:1.png", 8)),
    (Picture, "a@1@2:1", Picture("a@1", 2, 1)),
    (Picture, "photo@2x.png:.25", Picture("photo@2x.png", 0, 0.25)),
    (Picture, ("a@8.png", 120, 0.8), Picture("a@8.png", 120, 0.8)),
    (Picture, ["a.png"], Picture("a.png")),
    (Picture, ("a.png", None, 0.5), Picture("a.png", 0, 0.5)),
    (Picture, Path("a@3"), Picture("a", 3)),
    (KeyPicture, "a.png@0", KeyPicture("a.png", 0)),
    (KeyPicture, ("a.png", 0), KeyPicture("a.png", 0)),
    (Sound, "rain.wav", Sound("rain.wav")),
    (Sound, "rain.wav@2.5", Sound("rain.wav", 2.5)),
    (Sound, "c:rain.wav", Sound("c:rain.wav")),
    (Span, "talk.mp4@1.2-2.4", Span("talk.mp4", 1.2, 2.4)),
    (Span, "me@home.mp4@0-2", Span("me@home.mp4", 0, 2)),
    (Span, ("talk.mp4", 1.2, 2.4), Span("talk.mp4", 1.2, 2.4)),
    (Extension, "a.mp4@2", Extension("a.mp4", 2)),
    (Extension, "a.mp4@-1.5", Extension("a.mp4", -1.5)),
    (Reference, "pose.mp4", Reference("pose.mp4")),
    (Reference, "a@5.mp4:0.75", Reference("a@5.mp4", 0.75)),
    (Lora, "style", Lora("style")),
    (Lora, "style.safetensors:0.7", Lora("style.safetensors", 0.7)),
    (Lora, "style:-0.5,1e-1", Lora("style", -0.5, 0.1)),
    (Lora, "a:b,c:2", Lora("a:b,c", 2)),
    (Lora, ("style", 0.7, 0), Lora("style", 0.7, 0)),
]

NOT_READ: list[tuple[type[Form], Any]] = [
    (KeyPicture, "a.png"),
    (KeyPicture, ("a.png", 1, 1, 1)),
    (Span, "talk.mp4"),
    (Span, "talk.mp4@1"),
    (Span, "talk.mp4@1.2.3-4"),
    (Span, ("talk.mp4", 1)),
    (Extension, "a.mp4"),
    (Picture, ""),
    (Picture, ()),
    (Picture, 7),
    (Picture, ("a.png", "first")),
    (Picture, ("a.png", True)),
    (Picture, b"a.png"),
    (Lora, (1, 2)),
]

OUT_OF_RANGE: list[tuple[type[Form], Any, str]] = [
    (Picture, "a.png@-1", "count from 0"),
    (Picture, "a.png@1.5", "whole numbers"),
    (Picture, "a.png@0:1.5", "between 0"),
    (Reference, "a.mp4:-0.1", "between 0"),
    (Sound, "a.wav@-1", "from 0"),
    (Span, "a.mp4@2-2", "end must come after"),
    (Span, ("a.mp4", 0, float("inf")), "end must come after"),
    (Extension, "a.mp4@0", "nothing to make"),
    (Lora, ("a", float("nan")), "finite"),
]


class TestForms:
    @pytest.mark.parametrize(("form", "value", "wanted"), READ)
    def test_read(self, form: type[Form], value: object, wanted: Form) -> None:
        assert form.read(value) == wanted == form.read(wanted)

    @pytest.mark.parametrize(("form", "value"), NOT_READ)
    def test_not_read(self, form: type[Form], value: object) -> None:
        with pytest.raises((ValueError, TypeError)):
            form.read(value)

    @pytest.mark.parametrize(("form", "value", "why"), OUT_OF_RANGE)
    def test_out_of_range(self, form: type[Form], value: object, why: str) -> None:
        with pytest.raises(InputError, match=why):
            form.read(value)

    @given(path=st.text(min_size=1), frame=st.integers(0, 10**6), strength=st.floats(0, 1))
    def test_any_path(self, path: str, frame: int, strength: float) -> None:
        """What is spelt out is separated at the end, whatever the path holds."""
        path = path.replace("~", "_")
        assert Picture.read(f"{path}@{frame}:{strength!r}") == Picture(path, frame, strength)

    def test_home_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/someone")
        assert Reference.read("~/a.mp4:0.5") == Reference("/home/someone/a.mp4", 0.5)
        assert Reference.read("a~/b.mp4").path == "a~/b.mp4"


class TestAuto:
    @pytest.mark.parametrize(
        ("text", "wanted"), [("auto", Auto(1, 20)), ("auto:2-8", Auto(2, 8)), ("auto:1.5-1.5", Auto(1.5, 1.5))]
    )
    def test_read(self, text: str, wanted: Auto) -> None:
        assert Auto.read(text) == wanted and Auto.read(str(wanted)) == wanted

    @pytest.mark.parametrize("text", ["automatic", "auto:", "auto:3", "auto:a-b", "auto:1.2.3-4"])
    def test_not_read(self, text: str) -> None:
        with pytest.raises(ValueError):
            Auto.read(text)

    @pytest.mark.parametrize("text", ["auto:0-5", "auto:5-2", "auto:1-21"])
    def test_out_of_range(self, text: str) -> None:
        with pytest.raises(InputError, match="from 1 to 20"):
            Auto.read(text)


class TestKinds:
    @pytest.mark.parametrize(
        ("value", "wanted"), [("29", (29,)), ("3,14", (3, 14)), ([1, 2], (1, 2)), (7, (7,)), ((), ())]
    )
    def test_numbers(self, value: Any, wanted: tuple[int, ...]) -> None:
        assert Numbers("").checked(value) == wanted

    @pytest.mark.parametrize("value", ["a", "1,", 1.5, [0.5]])
    def test_no_numbers(self, value: object) -> None:
        with pytest.raises(InputError, match="whole numbers"):
            Numbers("").checked(value)

    def test_length(self) -> None:
        row = Length("")
        assert [row.checked(value) for value in (9, "9", "auto", Auto(2, 3))] == [9, 9, Auto(), Auto(2, 3)]
        with pytest.raises(InputError, match="auto:MIN-MAX"):
            row.checked("long")

    @pytest.mark.parametrize("value", ["a.png@8", Picture("a.png", 8), Path("a.png@8")])
    def test_one_of_several(self, value: Any) -> None:
        assert Several("", form=Picture).checked(value) == (Picture("a.png", 8),)

    def test_several(self) -> None:
        row = Several("", form=Picture)
        assert row.checked(["a.png", ("b.png", 8)]) == (Picture("a.png"), Picture("b.png", 8))
        with pytest.raises(InputError, match=r"PATH\[@FRAME\[:STRENGTH\]\]"):
            row.checked([("a.png", 1, 1, 1)])


class TestFiles:
    def test_content_is_what_counts(self, tmp_path: Path) -> None:
        row, one, other = One("", form=Reference), tmp_path / "one", tmp_path / "other"
        one.write_bytes(b"same")
        other.write_bytes(b"same")
        first, second = (row.identity(Reference(str(path), 0.5)) for path in (one, other))
        assert first == second == [hashlib.sha256(b"same").hexdigest(), 0.5]
        other.write_bytes(b"else")
        assert row.identity(Reference(str(other), 0.5)) != first

    def test_a_folder_is_its_files(self, tmp_path: Path) -> None:
        for name in ("one", "other"):
            (tmp_path / name / "part").mkdir(parents=True)
            (tmp_path / name / "part" / "file").write_bytes(b"same")
        assert digest(tmp_path / "one") == digest(tmp_path / "other")
        (tmp_path / "other" / "part" / "file").rename(tmp_path / "other" / "file")
        assert digest(tmp_path / "one") != digest(tmp_path / "other")

    def test_a_name_without_a_file_stays_a_name(self) -> None:
        row = Several("", form=Lora)
        value = row.checked(["a-style-of-the-model:0.5"])
        assert row.identity(value) == row.record(value) == [["a-style-of-the-model", 0.5, None]]

    def test_records_can_be_read_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """From another folder; the name of the home folder is not in them."""
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        (tmp_path / "a@1:0.5").touch()
        row = Several("", form=Picture)
        recorded = row.record((Picture("a@1:0.5", 8, 0.5),))
        assert recorded == [["~/a@1:0.5", 8, 0.5]]
        monkeypatch.chdir("/")
        assert row.checked(recorded) == (Picture(str(tmp_path / "a@1:0.5"), 8, 0.5),)

    @pytest.mark.parametrize("form", [Picture, Sound, Reference, Lora])
    def test_a_record_of_what_was_read_is_the_same(self, form: type[Form]) -> None:
        """To the byte: it stands in the clip that is repeated."""
        row = Several("", form=form)
        recorded = json.dumps(row.record(row.checked(["not-there"])))
        assert json.dumps(row.record(row.checked(json.loads(recorded)))) == recorded

    def test_elsewhere_paths_are_absolute(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/someone")
        assert portable("/home/someone/a") == "~/a" and portable("/home/someone-else/a") == "/home/someone-else/a"
