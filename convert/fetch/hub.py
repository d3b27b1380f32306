"""The Hugging Face Hub: facts about its files, and their bytes. Endpoint, token and timeouts are those of
huggingface_hub; its downloader is not used, since it begins an interrupted file anew and checks no hashes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, get_session, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from ltx2 import __version__
from ltx2.convert.fetch.catalogue import HubFile, Published
from ltx2.convert.fetch.partfile import Span
from ltx2.convert.fetch.transfer import BrokenConnectionError
from ltx2.runtime.errors import DownloadError

RETRIED = (408, 425, 429, 500, 502, 503, 504)  # statuses that another try may change
PARTIAL_CONTENT = 206
ETAG_LENGTHS = (40, 64)  # git's hash, sha256
# The base of all errors of the HTTP library: httpx, or httpx2 since huggingface_hub 2.
HTTPError: Any = HfHubHTTPError.__bases__[0]


@dataclass(frozen=True)
class Wanted:
    """A file as it is on the hub now, and its path here. An empty `etag`: the hub was not reached."""

    published: Published
    path: str
    target: Path
    size: int
    etag: str = ""
    url: str = ""


class UnreachableError(DownloadError):
    """The hub cannot be reached at all."""


class MissingError(DownloadError):
    """The hub has no such file, or no such repository."""


def has_token() -> bool:
    """Whether a login is stored here; only the hub knows whether it is valid."""
    return get_token() is not None


def ask(published: Published, file: HubFile, target: Path) -> Wanted:
    """Size, hash and address of the newest version of a file."""
    with _explained(published, file.path):
        where = hf_hub_url(published.repository, file.path)
        found = get_hf_file_metadata(where, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, library_name="ltx2")
    if found.size is None or found.commit_hash is None or len(found.etag or "") not in ETAG_LENGTHS:
        why = "its size, version or hash is missing in the answer"
        raise DownloadError(f"the hub does not describe {file.path}", why, "check HF_ENDPOINT, if you have set it")
    url = hf_hub_url(published.repository, file.path, revision=found.commit_hash)
    return Wanted(published, file.path, target, found.size, found.etag or "", url)


def read(file: Wanted, span: Span) -> Iterator[bytes]:
    """Bytes [start, stop) of a file, in parts. Raises BrokenConnectionError where another try may help."""
    start, stop = span
    headers = build_hf_headers(library_name="ltx2", library_version=__version__)
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    stream = get_session().stream("GET", file.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    with _explained(file.published, file.path, again=True), stream as response:
        hf_raise_for_status(response)
        position = _first_byte(file, response)
        for data in response.iter_bytes():
            wanted = data[max(0, start - position) : max(0, stop - position)]
            position += len(data)
            if wanted:
                yield wanted


def _first_byte(file: Wanted, response: Any) -> int:
    """The position in the file of the answer's first byte: 0 if the server ignores ranges."""
    sent, begin = response.headers.get("Content-Length"), 0
    if response.status_code == PARTIAL_CONTENT:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        sent, begin = (match[2], int(match[1])) if match else ("an unknown part of it", 0)
    if sent not in (None, str(file.size)):
        why = f"the hub states {file.size} bytes and sends {sent}"
        raise DownloadError(f"{file.path} has a wrong size", why, "try again later")
    return begin


@contextmanager
def _explained(published: Published, path: str, again: bool = False) -> Iterator[None]:
    """Turn the library's errors into ours; with `again`, temporary ones into BrokenConnectionError."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        if again and status in RETRIED:
            raise BrokenConnectionError(f"the hub answers with status {status}") from error
        raise _refusal(published, path, status) from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        if again:
            raise BrokenConnectionError(_reason(error)) from error
        fix = "check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, and run the same command again"
        raise UnreachableError(f"{constants.ENDPOINT} cannot be reached", _reason(error), fix) from error


def _refusal(published: Published, path: str, status: int) -> DownloadError:
    """The error for an HTTP status."""
    repository, page = published.repository, published.page
    if status in (401, 403):
        login = "log in with `hf auth login` (or set HF_TOKEN)"
        if published.gated:
            asked = "log in, and accept its licence" if status == 401 else "accept its licence with this account"
            why = f"the hub wants you to {asked} first (status {status})"
            fix = f"accept the licence at {published.licence}, then {login}"
            return DownloadError(f"{repository} is gated", why, fix)
        why = f"status {status}: the token is not valid, or the repository is not public"
        return DownloadError(f"the hub refuses access to {repository}", why, f"{login}; its page: {page}")
    if status == 404:
        why = f"the repository {repository} has no such file, or no longer"
        return MissingError(f"{path} is not on the hub", why, f"look at {page}/tree/main, or update ltx2")
    return DownloadError(
        f"the hub does not give {path}", f"it answers with status {status}", "try again later: what is here is kept"
    )


def _reason(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
