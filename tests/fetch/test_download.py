"""Downloading, from a hub on this machine: what is fetched, kept, checked, refused, and what people and scripts are
told. No other network is used."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import threading
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

import ltx2
from ltx2.convert.fetch.catalogue import catalogue
from ltx2.convert.fetch.download import Options, download
from ltx2.convert.fetch.partfile import RECORD
from ltx2.convert.fetch.transfer import Pacing
from ltx2.convert.names import release
from ltx2.runtime.errors import DoesNotFitError, DownloadError, InputError
from ltx2.runtime.events import BytesDone, Downloaded, DownloadPlanned, Event, FetchedFile, Warned
from tests.support import published
from tests.support.command import SCRIPT, Done, Here
from tests.support.hub import Hub, running
from tests.support.official import GEMMA, MONOLITH, UPSCALER
from tests.support.stopped import listen
from tests.support.waiting import until

MODEL, UPSCALE = "ltx-2-19b-distilled.safetensors", "ltx-2-spatial-upscaler-x2-1.0.safetensors"
TEXT = "gemma-3-12b-it"
PATHS = "/{repo_id}/resolve/{revision}/{filename}"
PIECE = 1 << 16
QUICK = Pacing(connections=4, piece_bytes=PIECE, attempts=2, pause=0.01)
LENGTH = 10 * PIECE + 123  # of the served model


def bytes_of(name: str, length: int) -> bytes:
    return random.Random(name).randbytes(length)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The files of the bundle ltx-2-distilled, with any content; nobody is logged in."""
    files = {f"Lightricks/LTX-2/{name}": bytes_of(name, size) for name, size in ((MODEL, LENGTH), (UPSCALE, 999))}
    (gemma,) = catalogue().choose([TEXT])
    files |= {f"{gemma.repository}/{file.path}": bytes_of(file.path, 500) for file in gemma.files}
    with running(Hub(files)) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + PATHS)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("NO_PROXY", "*")
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        huggingface_hub.close_session()
        yield served
        huggingface_hub.close_session()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return tmp_path / "weights"


def run(weights: Path, *names: str, **options: Any) -> list[Event]:
    """The events of a download, with short pieces and pauses."""
    return list(download(catalogue().choose(names), weights, Options(**{"pacing": QUICK, **options})))


def fetched(events: list[Event]) -> dict[str, bool]:
    """Names of the files that are there at the end, and whether this run brought them."""
    done = events[-1]
    assert isinstance(done, Downloaded)
    return {Path(file.path).name: file.fetched for file in done.files}


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {RECORD}


class TestCatalogue:
    known = catalogue()

    def test_names_are_unique(self) -> None:
        """A bundle is no file, and no two files lie at the same place."""
        assert not self.known.bundles.keys() & {name.removesuffix(".safetensors") for name in self.known.published}
        places = [f"{p.folder}/{file.path}" for p in self.known.published.values() for file in p.files]
        assert len(places) == len(set(places))
        released = sum(len(r["files"]) if "name" not in r else 1 for r in self.repositories())
        assert released == len(self.known.published), "no name is in two repositories"

    @staticmethod
    def repositories() -> Iterator[dict[str, Any]]:
        folder = Path(release.__file__).parent / "releases"
        for path in folder.glob("*.json"):
            yield from json.loads(path.read_text())["repositories"]

    def test_bundles_hold_known_files_of_their_release(self) -> None:
        for bundle in self.known.bundles.values():
            members = [self.known.published[name] for name in bundle.names]
            others = {member.name for member in members if member.release != bundle.release}
            assert others <= {TEXT}, bundle.name
            assert bundle.variant in bundle.name and bundle.variant in members[0].name

    def test_every_published_file_is_listed_with_its_size(self) -> None:
        """As the headers of published files know it."""
        sizes = {Path(f.path).name: f for p in self.known.published.values() for f in p.files if not p.is_folder}
        checked = 0
        for header in published.HEADERS.glob("ltx-*.json"):
            for name, size in json.loads(header.read_text())["files"].items():
                assert name in sizes, name
                assert size is None or not sizes[name].exact or sizes[name].bytes == size, name
                checked += size is not None
        assert checked >= 6
        shards = [json.loads((published.HEADERS / f"{name}.json").read_text())["files"] for name in published.GEMMA]
        known = {file.path: file.bytes for file in self.known.published[TEXT].files}
        assert sum(shard.items() <= known.items() for shard in shards) == 5

    def test_what_generates_today(self) -> None:
        assert all(bundle.generates for bundle in self.known.bundles.values())

    def test_gated_ones_name_their_licence(self) -> None:
        assert {p.name for p in self.known.published.values() if p.gated} >= {TEXT}
        assert all(p.licence.startswith("https://huggingface.co/") for p in self.known.published.values())

    def test_choosing(self) -> None:
        names = [p.name for p in self.known.choose(["ltx-2-distilled", MODEL, UPSCALE.removesuffix(".safetensors")])]
        assert names == [MODEL, UPSCALE, TEXT], "each once, with or without its suffix"
        with pytest.raises(InputError, match="did you mean ltx-2-distilled"):
            self.known.choose(["ltx-2-distiled"])


class TestFetching:
    def test_a_bundle(self, hub: Hub, weights: Path) -> None:
        plan, *progress, done = run(weights, "ltx-2-distilled")
        assert isinstance(plan, DownloadPlanned) and plan.missing == sum(map(len, hub.files.values()))
        places = {"Lightricks/LTX-2": "ltx-2", "google/gemma-3-12b-it": "gemma-3-12b"}
        for key, content in hub.files.items():
            repository, _, path = key.rpartition("/")
            assert (weights / places[repository] / path).read_bytes() == content
        assert len(files_in(weights)) == len(hub.files), "and nothing else"
        assert isinstance(done, Downloaded) and all(file.fetched for file in done.files)
        assert done.files[0] == FetchedFile(str(weights / "ltx-2" / MODEL), LENGTH, sha256(hub, MODEL), True)
        assert isinstance(progress[-1], BytesDone) and progress[-1].done == progress[-1].total == plan.missing

    def test_large_files_come_in_pieces_from_their_version(self, hub: Hub, weights: Path) -> None:
        run(weights, MODEL)
        assert hub.ranges(MODEL) == [(at, min(at + PIECE, LENGTH) - 1) for at in range(0, LENGTH, PIECE)]
        assert sum(asked.method == "HEAD" for asked in hub.asked) == 1

    def test_a_second_run_fetches_and_reads_nothing(self, hub: Hub, weights: Path) -> None:
        run(weights, MODEL, UPSCALE)
        hub.asked.clear()
        events = run(weights, MODEL, UPSCALE)
        assert fetched(events) == {MODEL: False, UPSCALE: False}
        assert {asked.method for asked in hub.asked} == {"HEAD"}
        assert not [event for event in events if isinstance(event, BytesDone) and event.file.startswith("checking ltx")]

    def test_what_came_another_way_is_checked_once(self, hub: Hub, weights: Path) -> None:
        target = weights / "ltx-2" / MODEL
        target.parent.mkdir(parents=True)
        target.write_bytes(hub.files[f"Lightricks/LTX-2/{MODEL}"])
        for checked in (True, False):
            events = run(weights, MODEL)
            assert fetched(events) == {MODEL: False}
            assert any(isinstance(event, BytesDone) and MODEL in event.file for event in events) is checked
        os.utime(target)
        assert any(isinstance(event, BytesDone) and MODEL in event.file for event in run(weights, MODEL)), "touched"

    @pytest.mark.parametrize("content", [b"another", b"\0" * LENGTH])
    def test_another_file_is_never_overwritten(self, hub: Hub, weights: Path, content: bytes) -> None:
        target = weights / "ltx-2" / MODEL
        target.parent.mkdir(parents=True)
        target.write_bytes(content)
        with pytest.raises(InputError, match="another file than the published one"):
            run(weights, MODEL)
        assert target.read_bytes() == content

    def test_a_new_version_replaces_ours(self, hub: Hub, weights: Path) -> None:
        run(weights, UPSCALE)
        hub.files[f"Lightricks/LTX-2/{UPSCALE}"] = b"a newer one"
        warned, *_ = events = run(weights, UPSCALE)
        assert isinstance(warned, Warned) and "has changed" in warned.message and fetched(events) == {UPSCALE: True}
        assert (weights / "ltx-2" / UPSCALE).read_bytes() == b"a newer one"

    def test_a_server_without_ranges(self, hub: Hub, weights: Path) -> None:
        hub.ignores_ranges = True
        run(weights, MODEL)
        assert (weights / "ltx-2" / MODEL).read_bytes() == hub.files[f"Lightricks/LTX-2/{MODEL}"]

    def test_whole_files_will_do_without_the_hub(
        self, hub: Hub, weights: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run(weights, MODEL)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9" + PATHS)
        warned, *_ = events = run(weights, MODEL)
        assert isinstance(warned, Warned) and "cannot be reached" in warned.message
        assert fetched(events) == {MODEL: False}
        with pytest.raises(DownloadError, match="cannot be reached"):
            run(weights, UPSCALE)

    def test_python(self, hub: Hub, weights: Path) -> None:
        """What it returns is what convert takes."""
        assert ltx2.download("ltx-2-distilled", to=weights) == [
            weights / "ltx-2" / MODEL, weights / "ltx-2" / UPSCALE, weights / "gemma-3-12b",
        ]  # fmt: skip


def sha256(hub: Hub, name: str) -> str:
    (content,) = [content for key, content in hub.files.items() if key.endswith(name)]
    return hashlib.sha256(content).hexdigest()


class TestCuts:
    CUT = 4 * PIECE + 1000

    def cut_off(self, hub: Hub, weights: Path) -> None:
        hub.cut_after[MODEL] = self.CUT
        with pytest.raises(DownloadError, match="was cut off") as failure:
            run(weights, MODEL)
        assert "goes on where it stopped" in failure.value.fix
        hub.cut_after.clear()
        hub.asked.clear()

    def test_it_goes_on_where_it_stopped(self, hub: Hub, weights: Path) -> None:
        self.cut_off(hub, weights)
        assert files_in(weights) == {f"ltx-2/{MODEL}.partial", f"ltx-2/{MODEL}.partial.done"}
        plan, *_ = events = run(weights, MODEL)
        assert isinstance(plan, DownloadPlanned) and plan.missing == LENGTH - self.CUT
        assert sum(last + 1 - first for first, last in hub.ranges(MODEL)) == LENGTH - self.CUT, "not a byte twice"
        assert fetched(events) == {MODEL: True} and files_in(weights) == {f"ltx-2/{MODEL}"}
        assert (weights / "ltx-2" / MODEL).read_bytes() == hub.files[f"Lightricks/LTX-2/{MODEL}"]

    def test_a_short_failure_is_survived(self, hub: Hub, weights: Path) -> None:
        """The connection breaks within every piece, and each time a bit further."""
        hub.status[MODEL] = 503
        events = download(catalogue().choose([MODEL]), weights, Options(pacing=replace(QUICK, attempts=100)))
        for event in events:
            if isinstance(event, BytesDone):
                hub.status.clear()
        assert (weights / "ltx-2" / MODEL).read_bytes() == hub.files[f"Lightricks/LTX-2/{MODEL}"]

    def test_a_newer_version_starts_anew(self, hub: Hub, weights: Path) -> None:
        self.cut_off(hub, weights)
        hub.files[f"Lightricks/LTX-2/{MODEL}"] = newer = bytes_of("newer", LENGTH)
        run(weights, MODEL)
        assert (weights / "ltx-2" / MODEL).read_bytes() == newer

    def test_half_a_line_in_the_journal(self, hub: Hub, weights: Path) -> None:
        """As a crash leaves it."""
        self.cut_off(hub, weights)
        journal = weights / "ltx-2" / f"{MODEL}.partial.done"
        journal.write_text(journal.read_text() + "0 6553")
        run(weights, MODEL)
        assert (weights / "ltx-2" / MODEL).read_bytes() == hub.files[f"Lightricks/LTX-2/{MODEL}"]

    def test_killed_before_it_was_checked(self, hub: Hub, weights: Path) -> None:
        run(weights, MODEL)
        whole = weights / "ltx-2" / MODEL
        head = json.dumps({"size": LENGTH, "etag": sha256(hub, MODEL)})
        whole.with_name(f"{MODEL}.partial.done").write_text(f"{head}\n0 {LENGTH}\n")
        whole.rename(whole.with_name(f"{MODEL}.partial"))
        hub.asked.clear()
        assert fetched(run(weights, MODEL)) == {MODEL: True} and hub.ranges(MODEL) == []

    def test_two_at_once(self, hub: Hub, weights: Path) -> None:
        first = download(catalogue().choose([MODEL]), weights, Options(pacing=QUICK))
        assert isinstance(next(first), DownloadPlanned) and isinstance(next(first), BytesDone)
        with pytest.raises(InputError, match="another process is writing it"):
            run(weights, MODEL)
        assert isinstance([*first][-1], Downloaded)

    @pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
    def test_killed(self, hub: Hub, weights: Path, sign: signal.Signals) -> None:
        """Ctrl-C and its like keep every byte that came, and say nothing but that; the next run goes on."""
        hub.stall = threading.Event()
        command = [str(SCRIPT), "download", MODEL, "-o", str(weights), "--json"]
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, env=environment, preexec_fn=listen
        ) as process:
            part = weights / "ltx-2" / f"{MODEL}.partial"
            until(lambda: part.exists() and part.stat().st_size > 0)
            process.send_signal(sign)
            out, err = process.communicate()
            hub.stall.set()
        hub.stall = None
        assert "Traceback" not in err, err
        if sign != signal.SIGKILL:
            assert process.returncode == 128 + sign and json.loads(out)["error"]["kind"] == "interrupted"
        plan, *_ = run(weights, MODEL)
        assert isinstance(plan, DownloadPlanned) and plan.missing <= LENGTH - (0 if sign == signal.SIGKILL else 1000)
        assert (weights / "ltx-2" / MODEL).read_bytes() == hub.files[f"Lightricks/LTX-2/{MODEL}"]


class TestRefusals:
    def refused(self, weights: Path, *names: str) -> DownloadError:
        with pytest.raises(DownloadError) as failure:
            run(weights, *names)
        assert not weights.exists() or files_in(weights) == set()
        return failure.value

    @pytest.mark.parametrize(("status", "why"), [(401, "log in, and accept"), (403, "accept its licence with")])
    def test_gated(self, hub: Hub, weights: Path, status: int, why: str) -> None:
        """Known before the first byte of the other files."""
        hub.gated["google/gemma-3-12b-it"] = status
        error = self.refused(weights, "ltx-2-distilled")
        assert "google/gemma-3-12b-it is gated" in error.what and why in error.why
        assert "https://huggingface.co/google/gemma-3-12b-it" in error.fix and "hf auth login" in error.fix
        assert {asked.method for asked in hub.asked} == {"HEAD"}

    def test_a_bad_token(self, hub: Hub, weights: Path) -> None:
        hub.gated["Lightricks/LTX-2"] = 401
        error = self.refused(weights, MODEL)
        assert "refuses access to Lightricks/LTX-2" in error.what and "hf auth login" in error.fix

    def test_not_there(self, hub: Hub, weights: Path) -> None:
        error = self.refused(weights, "ltx-2-19b-dev")
        assert "ltx-2-19b-dev.safetensors is not on the hub" in error.what and "or no longer" in error.why

    def test_no_network(self, hub: Hub, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9" + PATHS)
        error = self.refused(weights, MODEL)
        assert "cannot be reached" in error.what and "check the connection" in error.fix

    def test_offline_mode(self, hub: Hub, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "cannot be reached" in self.refused(weights, MODEL).what

    def test_access_lost_on_the_way(self, hub: Hub, weights: Path) -> None:
        hub.status[MODEL] = 403
        with pytest.raises(DownloadError, match="refuses access"):
            run(weights, MODEL)

    @pytest.mark.parametrize("by", [-5, 5])
    def test_wrong_size(self, hub: Hub, weights: Path, by: int) -> None:
        hub.stated_size[MODEL] = LENGTH + by
        with pytest.raises(DownloadError, match=f"{MODEL} has a wrong size"):
            run(weights, MODEL)
        assert not (weights / "ltx-2" / MODEL).exists()

    @pytest.mark.parametrize("name", [MODEL, "gemma-3-12b-it"])
    def test_wrong_hash(self, hub: Hub, weights: Path, name: str) -> None:
        """It is not kept under any name."""
        hub.stated_hash |= {MODEL: "0" * 64, "model-00001-of-00005.safetensors": "0" * 64}
        with pytest.raises(DownloadError, match="arrived damaged"):
            run(weights, name)
        assert not {f for f in files_in(weights) if MODEL in f or "00001" in f}

    def test_no_hash(self, hub: Hub, weights: Path) -> None:
        hub.stated_hash[MODEL] = "W/weak"
        assert "does not describe" in self.refused(weights, MODEL).what


class TestTokens:
    def test_is_sent_to_the_hub_only(self, hub: Hub, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        run(weights, MODEL)
        sent = {(asked.large_storage, asked.token) for asked in hub.asked}
        assert sent == {(False, "Bearer hf_secret"), (True, "")}


class TestBeforeTheFirstByte:
    def room(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, free))

    @pytest.mark.parametrize(("free", "fits"), [(LENGTH, True), (LENGTH - 1, False)])
    def test_room(self, hub: Hub, weights: Path, monkeypatch: pytest.MonkeyPatch, free: int, fits: bool) -> None:
        self.room(monkeypatch, free)
        if fits:
            assert fetched(run(weights, MODEL)) == {MODEL: True}
            return
        with pytest.raises(DoesNotFitError, match="the disk is too small"):
            run(weights, MODEL)
        assert not weights.exists()

    def test_room_for_the_rest_is_enough(self, hub: Hub, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        TestCuts().cut_off(hub, weights)
        self.room(monkeypatch, LENGTH - TestCuts.CUT)
        assert fetched(run(weights, MODEL)) == {MODEL: True}

    @pytest.mark.parametrize(("bits", "factor"), [(None, 1), (8, 11 / 16), (4, 8 / 16)])
    def test_room_for_the_model(
        self, hub: Hub, weights: Path, monkeypatch: pytest.MonkeyPatch, bits: int | None, factor: float
    ) -> None:
        needed = LENGTH + int(LENGTH * factor)
        self.room(monkeypatch, needed - 1)
        with pytest.raises(DoesNotFitError):
            run(weights, MODEL, model=weights / "model", bits=bits)
        self.room(monkeypatch, needed)
        plan, *_ = run(weights, MODEL, model=weights / "model", bits=bits)
        assert isinstance(plan, DownloadPlanned) and plan.converted == int(LENGTH * factor)

    def test_the_disk_fills_up(self, hub: Hub, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(DoesNotFitError, match="the disk is full"):
            run(weights, MODEL)

    def test_a_target_that_cannot_be_written(
        self, hub: Hub, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="is not a folder"):
            run(tmp_path / "file" / "weights", MODEL)
        monkeypatch.setattr(os, "access", lambda *_: False)
        with pytest.raises(InputError, match="cannot be written"):
            run(weights, MODEL)
        assert hub.asked == []

    def test_a_dry_run_writes_nothing(self, hub: Hub, weights: Path) -> None:
        (plan,) = run(weights, "ltx-2-distilled", dry_run=True)
        assert isinstance(plan, DownloadPlanned) and len(plan.files) == len(hub.files)
        assert not weights.exists()

    def test_a_dry_run_without_access(self, hub: Hub, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Sizes are the catalogue's."""
        hub.gated["google/gemma-3-12b-it"] = 401
        self.room(monkeypatch, 10**12)
        warned, plan = run(weights, "ltx-2-distilled", dry_run=True)
        assert isinstance(warned, Warned) and "gated" in warned.message
        assert isinstance(plan, DownloadPlanned) and plan.missing == catalogue().size("ltx-2-distilled")


class TestCommand:
    def test_list_needs_no_network(self, here: Here) -> None:
        done = here("download", "--list")
        assert done.code == 0 and done.err == ""
        for name in [*catalogue().bundles, *catalogue().published]:
            assert f"{name.removesuffix('.safetensors')} " in done.out
        listed = here("download", "--list", "--json").json
        assert {bundle["name"] for bundle in listed["bundles"]} == set(catalogue().bundles)
        assert {file["name"] for file in listed["files"]} == set(catalogue().published)

    def test_without_a_name(self, here: Here) -> None:
        here("download").failed(2, "ltx-2-distilled", "--list")

    def test_options_without_effect(self, here: Here) -> None:
        here("download", MODEL, "--bits", "4").failed(2, "--bits has no effect without --convert")
        here("download", MODEL, "--convert").failed(2, "one bundle")
        here("download", "ltx-2-distilled", "--convert", "--bits", "7").failed(2, "--bits 7")
        here("download", "ltx-2-distilled", "--convert", "--recipe", "q5").failed(1, "no recipe 'q5'")
        here("download", MODEL, "--recipe", "q4").failed(2, "--recipe has no effect without --convert")

    def test_failures(self, hub: Hub, here: Here, weights: Path) -> None:
        here("download", "nothing", "-o", weights).failed(1, "nothing is published as nothing", "--list")
        hub.gated["google/gemma-3-12b-it"] = 401
        here("download", TEXT, "-o", weights).failed(1, "is gated", "hf auth login")
        done = here("download", TEXT, "-o", weights, "--json")
        assert (done.code, done.json["error"]["kind"]) == (1, "download")

    def test_people_see_the_list_first(self, hub: Hub, here: Here, weights: Path) -> None:
        done = here("download", MODEL, UPSCALE, "-o", weights)
        assert done.code == 0 and done.out.startswith("2 of 2 files fetched (0.00 GB, ")
        first, second, third, *_ = done.err.splitlines()
        assert first.split() == [str(weights / "ltx-2" / MODEL), "655.5", "kB"] and UPSCALE in second
        assert third.startswith(f"to fetch into {weights}: 656.5 kB; free: ")
        assert "it/s" not in done.err and "\r" not in done.err, "no progress bars of other libraries"

    def test_quiet(self, hub: Hub, here: Here, weights: Path) -> None:
        assert here("download", MODEL, "-o", weights, "-q") == Done(0, "", "")

    def test_json(self, hub: Hub, here: Here, weights: Path) -> None:
        for first in (True, False):
            files = here("download", MODEL, "-o", weights, "--json").json["files"]
            path = str(weights / "ltx-2" / MODEL)
            assert files == [{"path": path, "bytes": LENGTH, "sha256": sha256(hub, MODEL), "fetched": first}]
        plan = here("download", MODEL, UPSCALE, "-o", weights, "--dry-run", "--json").json
        assert [file["held"] for file in plan["files"]] == [LENGTH, 0] and plan["missing"] == 999

    def test_the_plan_of_a_dry_run_is_its_result(self, hub: Hub, here: Here, weights: Path) -> None:
        done = here("download", MODEL, UPSCALE, "-o", weights, "--dry-run")
        assert done.code == 0 and f"to fetch into {weights}: 656.5 kB" in done.out and "to fetch" not in done.err
        assert here("download", MODEL, "-o", weights, "--dry-run", "-q") == Done(0, "", "")


class TestConvert:
    @pytest.fixture
    def demo(self, hub: Hub) -> Hub:
        """The demo model under the published names; its text encoder in five shards."""
        hub.files[f"Lightricks/LTX-2/{MODEL}"] = MONOLITH.read_bytes()
        hub.files[f"Lightricks/LTX-2/{UPSCALE}"] = UPSCALER.read_bytes()
        prefix = "google/gemma-3-12b-it/"
        for path in GEMMA.iterdir():
            if f"{prefix}{path.name}" in hub.files:
                hub.files[f"{prefix}{path.name}"] = path.read_bytes()
        where: dict[str, str] = {}
        for name, tensors, content in shards(GEMMA / "model.safetensors", 5):
            hub.files[prefix + name] = content
            where |= dict.fromkeys(tensors, name)
        hub.files[f"{prefix}model.safetensors.index.json"] = json.dumps({"weight_map": where}).encode()
        return hub

    def test_goes_on_to_the_model(self, demo: Hub, here: Here, weights: Path, tmp_path: Path) -> None:
        done = here("download", "ltx-2-distilled", "--convert", "--bits", "8", "-o", weights, "--json").json
        model = weights / "ltx-2-distilled-q8"
        assert done["converted"]["model"] == str(model) and not done["converted"]["reused"]
        assert here("verify", model).code == 0
        sources = [weights / "ltx-2" / MODEL, weights / "ltx-2" / UPSCALE, weights / "gemma-3-12b"]
        assert here("convert", *sources, "-o", tmp_path / "same", "--bits", "8").code == 0
        assert (model / "ltx2.json").read_bytes() == (tmp_path / "same" / "ltx2.json").read_bytes()
        again = here("download", "ltx-2-distilled", "--convert", "--bits", "8", "-o", weights, "--json").json
        assert again["converted"]["reused"] and not any(file["fetched"] for file in again["files"])

    def test_where_it_is_told(self, demo: Hub, here: Here, weights: Path, tmp_path: Path) -> None:
        done = here("download", "ltx-2-distilled", "--convert", "-m", tmp_path / "out", "-o", weights)
        assert done.code == 0 and str(tmp_path / "out") in done.out and "16 of 16 files fetched" in done.out


def shards(path: Path, count: int) -> Iterator[tuple[str, list[str], bytes]]:
    """A safetensors file in `count` ones: their names, tensors and contents."""
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    header.pop("__metadata__", None)
    names = sorted(header)
    for number in range(count):
        part, data = names[number::count], b""
        tensors = {}
        for name in part:
            begin, end = header[name]["data_offsets"]
            tensors[name] = header[name] | {"data_offsets": [len(data), len(data) + end - begin]}
            data += whole[start + begin : start + end]
        text = json.dumps(tensors).encode()
        content = len(text).to_bytes(8, "little") + text + data
        yield f"model-{number + 1:05d}-of-{count:05d}.safetensors", part, content
