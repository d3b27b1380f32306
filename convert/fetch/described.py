"""The sources of a bundle before it is downloaded, from the headers that come with ltx2."""

from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath

from ltx2.convert.fetch.catalogue import Bundle, Published, catalogue
from ltx2.convert.names.header import HEADERS, NONE, described_file, header_of
from ltx2.convert.names.release import recognise_releases
from ltx2.convert.sources.checkpoint import described_source
from ltx2.convert.sources.source import GEMMA, Source, read_json

ALL_BLOCKS = range(1 << 16)


def bundle_sources(bundle: Bundle, skip: range = NONE) -> tuple[Source, ...]:
    """The sources to convert, without the transformer blocks whose number is in `skip`. Bundles with the same headers
    share sources; LoRAs alone keep their published names. Raises InputError where a file's header is not at hand."""
    return tuple(_source(published, skip) for published in catalogue().choose([bundle.name]))


def _source(published: Published, skip: range) -> Source:
    names = [PurePosixPath(file.path).name for file in published.files]
    headers = tuple(header_of(name) for name in names if name.endswith(".safetensors"))
    if published.is_folder:
        return _folder_source(published.name, headers)
    source = _file_source(headers[0], skip)
    return replace(source, path=Path(published.name)) if source.kind == "lora" else source


def block_count(bundle: Bundle) -> int:
    """The number of its transformer's blocks, from the configuration in a header. Raises as `bundle_sources`."""
    sources = bundle_sources(bundle, skip=ALL_BLOCKS)
    return next(int(source.config["transformer"]["num_layers"]) for source in sources if "transformer" in source.config)


@cache
def _file_source(header: str, skip: range) -> Source:
    return described_source(described_file(header, skip))


@cache
def _folder_source(name: str, headers: tuple[str, ...]) -> Source:
    """A text encoder's folder."""
    files, config = tuple(map(described_file, headers)), read_json(HEADERS / f"{name}-config.json")
    return Source(Path(name), GEMMA, files, config, recognise_releases(files[0], config))
