"""What the system answers is told in plain words, by every command, for every path that a user gives."""

import errno
import json
from pathlib import Path

import pytest

from ltx2.runtime.errors import ANSWERS, InputError, reason
from ltx2.runtime.files.jsonfile import read_object
from ltx2.runtime.files.paths import open_regular, write_failure
from tests.support.command import Here

ABSENT = [
    ["convert", "{}", "-o", "out"],
    ["quantize", "{}", "-o", "out"],
    ["inspect", "{}"],
    ["verify", "{}"],
    ["bench", "{}"],
    ["bench", "--random", "demo", "--compare", "{}"],
    ["bench", "--random", "demo", "--suite", "{}"],
    ["generate", "x", "-m", "{}"],
    ["generate", "--prompts", "{}"],
    ["generate", "--from", "{}.json"],
    ["generate", "--from", "{}.mp4"],
    ["upscale", "{}", "-m", "{}", "-o", "clip.mp4"],
]


def raised(path: Path) -> OSError:
    """What opening a path raises."""
    with pytest.raises(OSError) as caught, open_regular(path):
        pass
    return caught.value


class TestReason:
    def test_of_what_is_not_there(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert reason(raised(tmp_path / "none")) == "there is no such file or folder"
        assert reason(raised(tmp_path)) == "it is a folder"
        assert reason(raised(tmp_path / "file" / "below")) == "a part of its path is a file, not a folder"
        assert reason(raised(tmp_path / ("n" * 256))) == "the name is too long"

    def test_of_a_device(self) -> None:
        assert reason(raised(Path("/dev/null"))) == "it is a pipe, a socket or a device"

    @pytest.mark.parametrize("number", ANSWERS, ids=lambda number: errno.errorcode[number])
    def test_has_no_number_and_no_path(self, number: int) -> None:
        said = reason(OSError(number, "as C says it", "/some/path"))
        assert said == ANSWERS[number] and "Errno" not in said and "/" not in said

    def test_of_other_answers_is_the_system_s_own(self) -> None:
        assert reason(OSError(errno.EPROTO, "Protocol error", "/some/path")) == "Protocol error"
        assert reason(OSError("cannot read the socket")) == "cannot read the socket"
        assert reason(OSError()) == "OSError"

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"{", "it is no JSON: expecting property name enclosed in double quotes in column 2"),
            (b"{\n1", "it is no JSON: expecting property name enclosed in double quotes in line 2, column 1"),
            (b"\xff", "it is not UTF-8 text"),
            (b"[]", "it is not a JSON object"),
        ],
    )
    def test_of_what_a_file_holds(self, tmp_path: Path, content: bytes, said: str) -> None:
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ValueError) as caught:
            read_object(tmp_path / "file")
        assert reason(caught.value) == said

    def test_of_a_missing_key(self) -> None:
        with pytest.raises(KeyError) as caught:
            json.loads("{}")["kind"]
        assert reason(caught.value) == "it has no 'kind'"

    def test_a_full_disk_is_said_once(self) -> None:
        full = write_failure(OSError(errno.ENOSPC, "No space left on device"), Path("out"))
        assert (full.exit_code, full.what, full.why) == (3, "the disk is full", "there is no room left for out")
        denied = write_failure(PermissionError(errno.EACCES, "Permission denied", "out/x"), Path("out"))
        assert isinstance(denied, InputError) and denied.why == "permission denied"


@pytest.mark.parametrize("command", ABSENT, ids=" ".join)
@pytest.mark.parametrize("kind", ["absent", "a folder"])
def test_every_command_says_it_plainly(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for suffix in ("", ".json", ".mp4"):
        if kind == "a folder":
            Path(f"given{suffix}").mkdir()
    done = here(*(word.format("given") for word in command))
    done.failed(done.code, "given")
    assert done.code in (1, 2)
    why = next(line for line in done.err.splitlines() if line.lstrip().startswith("why:"))
    assert "Errno" not in done.err and "No such file" not in done.err and "Error:" not in why
