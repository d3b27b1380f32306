"""The model card: README.md of a model folder, as the Hugging Face Hub reads it. Its sources, terms and use, and what
quantizing has cost. Same folder, same bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from ltx2.convert.fetch.catalogue import Published, catalogue
from ltx2.convert.names.release import releases
from ltx2.runtime.files.atomic import write_file
from ltx2.runtime.files.paths import open_regular
from ltx2.runtime.files.tensors import FileRecord
from ltx2.runtime.model.layout import CARD, MANIFEST, TRANSFORMER, ComponentRecord, Manifest, ModelFolder

ABOUT = 0.01  # share by which a size that is not known exactly may differ


@dataclass(frozen=True)
class Quality:
    """The cost of quantizing one component: average bits of a weight, the number of packed layers, the median and the
    largest of their relative errors, of the "weights" or of the layers' "output"."""

    bits_per_weight: float
    layers: int
    median: float
    largest: float
    error_of: str


def write_card(folder: ModelFolder, quality: Mapping[str, Quality] | None = None) -> None:
    """Write README.md, and ltx2.json with its record; a card that somebody has edited stays. Raises OSError."""
    if card_state(folder) == "edited":
        return
    content = card_text(folder.manifest, quality or {}).encode()
    record = FileRecord(CARD, len(content), sha256(content).hexdigest())
    if folder.manifest.card != record:
        write_file(folder.path / CARD, [content])
        write_file(folder.path / MANIFEST, [replace(folder.manifest, card=record).to_json().encode()])


def card_state(folder: ModelFolder) -> str:
    """Whether README.md is "as written", "edited", or there is "none"."""
    try:
        with open_regular(folder.path / CARD) as file:
            content = file.read()
    except OSError:
        return "none"
    card = folder.manifest.card
    return "as written" if card and sha256(content).hexdigest() == card.sha256 else "edited"


def card_text(manifest: Manifest, quality: Mapping[str, Quality]) -> str:
    """The card of a folder with this manifest."""
    bases = _bases(manifest.sources)
    packed = any(record.quantization for record in manifest.components.values())
    parts = [_front_matter(manifest, bases, packed), f"# {_title(manifest)}", _about(manifest, bases), _use(manifest)]
    parts += [_networks(manifest.components), _quality(quality), _sources(manifest), _licence(bases)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _bases(sources: Sequence[FileRecord]) -> list[Published]:
    """The published things that the sources are, by name and size; one of each repository."""
    found: dict[str, Published] = {}
    for published in catalogue().published.values():
        for file in published.files:
            near = 0 if file.exact else ABOUT * file.bytes
            names = [s for s in sources if s.name == file.path.rpartition("/")[2] and s.name.endswith(".safetensors")]
            if any(abs(source.size - file.bytes) <= near for source in names):
                found.setdefault(published.repository, published)
    return sorted(found.values(), key=lambda published: published.is_folder)  # a text encoder last


def _front_matter(manifest: Manifest, bases: Sequence[Published], packed: bool) -> str:
    lines = ["---", "library_name: mlx", "pipeline_tag: text-to-video", "license: other"]
    if bases:
        lines += [f"license_name: {bases[0].terms.lower().replace(' ', '-')}", f"license_link: {bases[0].licence}"]
        lines += ["base_model:", *(f"- {base.repository}" for base in bases)]
        lines += ["base_model_relation: quantized"] if packed else []
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in _tags(manifest)), "---"])


def _tags(manifest: Manifest) -> list[str]:
    own = [r.title.lower() for r in releases() if r.name == manifest.release]
    return ["mlx", *dict.fromkeys(["ltx-2", *own]), "ltx2", "text-to-video", "image-to-video", "text-to-audio"]


def _title(manifest: Manifest) -> str:
    release = next((r.title for r in releases() if r.name == manifest.release), "LTX-2")
    transformer = manifest.components.get(TRANSFORMER)
    kind = [_storage(transformer)] if transformer and transformer.quantization else []
    return ", ".join([f"{release} {manifest.variant or ''}".strip(), *kind, "for MLX"])


def _about(manifest: Manifest, bases: Sequence[Published]) -> str:
    made = " and ".join(f"[{base.repository}]({base.page})" for base in bases)
    origin = f"made of {made}" if made else "made of files that are not in ltx2's catalogue of published ones"
    fused = [f"{lora.name} ({lora.strength:g})" for c in manifest.components.values() for lora in c.fused]
    also = f" LoRAs fused into its weights: {', '.join(fused)}." if fused else ""
    return f"A model folder of `ltx2` for Apple Silicon, {origin} with ltx2 {manifest.tool_version}.{also}"


def _use(manifest: Manifest) -> str:
    if TRANSFORMER not in manifest.components:
        return ""
    return (
        "## Use\n\n```sh\nltx2 download OWNER/NAME    # this repository: its page shows both\n"
        'ltx2 generate "a red kite over dunes, wind in the grass" -m NAME -o kite.mp4\n```\n\n'
        '```python\nimport ltx2\n\nclip = ltx2.load("weights/NAME").generate("a red kite over dunes")\n'
        'clip.save("kite.mp4")\n```'
    )


def _networks(components: Mapping[str, ComponentRecord]) -> str:
    rows = [
        f"| `{name}` | {record.cls} | {_storage(record)} | {sum(file.size for file in record.files) / 1e9:.2f} GB |"
        for name, record in sorted(components.items())
    ]
    return "\n".join(["## Networks\n", "| folder | network | weights | size |", "|---|---|---|---|", *rows])


def _storage(record: ComponentRecord) -> str:
    form = record.quantization
    if form is None:
        return record.dtype.lower()
    return f"{form['bits']} bits ({form.get('mode', 'affine')}, groups of {form['group_size']})"


def _quality(quality: Mapping[str, Quality]) -> str:
    if not quality:
        return ""
    rows = [
        f"| `{name}` | {q.bits_per_weight:.2f} | {q.layers} | {q.median:.3g} | {q.largest:.3g} | {q.error_of} |"
        for name, q in sorted(quality.items())
    ]
    head = [
        "## Quality\n",
        "Relative error of the quantized layers, measured while they were packed.\n",
        "| | bits per weight | layers | median | largest | of the |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows])


def _sources(manifest: Manifest) -> str:
    rows = [f"| {file.name} | {file.size:,} | `{file.sha256}` |" for file in manifest.sources]
    return "\n".join(["## Made of\n", "| file | bytes | SHA-256 |", "|---|---|---|", *rows]) if rows else ""


def _licence(bases: Sequence[Published]) -> str:
    terms = [f"- {base.repository}: {base.terms}, {base.licence}" for base in bases]
    if not terms:
        terms = ["The weights stay under the terms of those who published the files above."]
    return "\n".join(["## Licence\n", *terms])
