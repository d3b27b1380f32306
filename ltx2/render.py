"""Tables and lists for people."""

import sys
from collections.abc import Iterator, Mapping
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from ltx2.runtime.errors import printable
from ltx2.runtime.events import DownloadPlanned
from ltx2.runtime.units import gb

if TYPE_CHECKING:  # not at run time: a table of a clip's memory needs nothing of converting
    from ltx2.convert.fetch.catalogue import Bundle, Catalogue, Published
    from ltx2.convert.plan.entries import Plan

FILE_WIDTH = 120  # of tables, where there is no terminal that says its own
GAP = 3  # columns of a table are so far apart
WORDS = 40  # a column that is wider holds words, which may be broken between them
NOTHING = "-"  # in a cell without a value


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; all columns but the first are right-aligned. No cell is empty and no number is broken: columns
    that do not fit beside the others follow in another table, under the same first column."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)
    cells = [[printable(cell) or NOTHING for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(columns, *cells, strict=True)]
    console.print(*map(printable, title.split("\n")), sep="\n", markup=False)
    for part in _beside(widths, console.width - 2):  # a space at both ends
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
        for index in part:
            whole = widths[index] < WORDS
            table.add_column(columns[index], justify="right" if index else "left", no_wrap=whole, overflow="fold")
        for row in cells:
            if any(row[index] != NOTHING for index in part[1:]):
                table.add_row(*(row[index] for index in part))
        console.print(table, "", markup=False)


def _beside(widths: list[int], room: int) -> Iterator[list[int]]:
    """Columns that fit beside each other, the first one always among them."""
    part, taken = [0], widths[0]
    for index, width in enumerate(widths[1:], start=1):
        if len(part) > 1 and taken + width + GAP > room:
            yield part
            part, taken = [0], widths[0]
        part.append(index)
        taken += width + GAP
    yield part


def memory_table(plan: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: the memory of every phase of a generation, from a plan of `--json`."""
    tiling, phases = plan["tiling"], plan["phases"]
    tiles = (
        f"video decoded in tiles of {tiling['width']}x{tiling['height']}, {tiling['frames']} frames" if tiling else ""
    )
    sizes = f"{plan['frames']} frames of {plan['width']}x{plan['height']}"
    title = f"{sizes}; {tiles or 'video decoded in one piece'}\nlimit {gb(plan['limit'])}"
    columns = ["GB", "weights", "activations", "clip", "kept", "total", "cache"]
    streams = any(phase["streamed"] for phase in phases)
    rows = []
    for phase in phases:
        slowed = " (slowed)" if phase["held_back"] else ""
        rows.append([phase["name"] + slowed, *(f"{phase[column] / 1e9:.2f}" for column in columns[1:])])
        if streams:
            read = f"{phase['read'] / 1e9:.2f}, {len(phase['streamed'])} blocks" if phase["streamed"] else ""
            rows[-1].append(read)
    return title, [*columns, *(["read per step"] if streams else [])], rows


def plan_summary(plan: "Plan") -> str:
    """The tensors and bytes of a conversion, per component and in all."""
    from ltx2.convert.plan.entries import Drop

    groups = {name: plan.moves(name) for name in plan.components}
    sizes = {name: sum(f.nbytes for m in moves for f in m.stored().values()) for name, moves in groups.items()}
    rows = [(name, len(groups[name]), size) for name, size in sizes.items()]
    rows.append(("total", sum(map(len, groups.values())), sum(sizes.values())))
    dropped = sum(isinstance(entry, Drop) for entry in plan.entries)
    lines = [f"{name:18s} {count:5d} tensors  {size / 1e9:8.2f} GB" for name, count, size in rows]
    return "\n".join([*lines, f"{'dropped':18s} {dropped:5d} tensors"])


def download_lines(plan: DownloadPlanned) -> Iterator[str]:
    """The files of a download, those that exist already, and the free space."""
    width = max(len(file.path) for file in plan.files)
    for file in plan.files:
        state = {0: "", file.bytes: "already there"}.get(file.held, f"{_amount(file.held)} of it already there")
        yield f"{file.path:{width}s}  {_amount(file.bytes):>8s}  {state}".rstrip()
    model = f", {_amount(plan.converted)} at most for the model" if plan.converted else ""
    yield f"to fetch into {plan.weights}: {_amount(plan.missing)}{model}; free: {_amount(plan.free)}"


HEAD = f"{'size':>9s}  release  gated  what it is"


def catalogue_lines(known: "Catalogue") -> Iterator[str]:
    """All names that `download` takes, with sizes; `~` marks those not known to the byte."""
    entries: list[Bundle | Published] = [*known.bundles.values(), *known.published.values()]
    width = max(len(_short_name(entry.name)) for entry in entries)
    facts = [_catalogue_facts(known, entry) for entry in entries]
    heads = {0: "bundle", len(known.bundles): "file"}
    beside = width + 1 + max(map(len, facts)) <= _room()
    for index, entry in enumerate(entries):
        if index in heads:
            yield from [""] if index else []
            yield from _beside_or_below(f"{heads[index]:{width}s} ", HEAD, beside)
        yield from _beside_or_below(f"{_short_name(entry.name):{width}s} ", facts[index], beside)
    pages = dict.fromkeys(published.licence for published in known.published.values() if published.gated)
    yield "\ngated: accept the licence on its page and log in with `hf auth login`"
    yield from (f"  {page}" for page in pages)


def _catalogue_facts(known: "Catalogue", entry: "Bundle | Published") -> str:
    exact = all(published.exact for published in known.choose([entry.name]))
    size = ("" if exact else "~") + _amount(known.size(entry.name))
    gated = "yes" if known.gated(entry.name) else "no"
    bundle = known.bundles.get(entry.name)
    able = "" if bundle is None or bundle.generates else " (convert only so far)"
    return f"{size:>9s}  {entry.release:7s}  {gated:5s}  {entry.purpose}{able}"


def _beside_or_below(name: str, facts: str, beside: bool) -> Iterator[str]:
    """On one line; or the facts below the name, broken between words alone."""
    if beside:
        yield name + facts
        return
    yield name.rstrip()
    yield from wrap(facts.strip(), _room(), initial_indent="    ", subsequent_indent="    ", break_long_words=False)


def _room() -> int:
    """Columns of standard output. Lines of a file or pipe are not broken: programs read them too."""
    return get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def _short_name(name: str) -> str:
    return name.removesuffix(".safetensors")


def _amount(count: int) -> str:
    """Bytes as the hub states them: in powers of ten."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def described(found: dict[str, Any]) -> Iterator[str]:
    """Lines for people: what it is, then tensors, parameters and bytes of every component."""
    release = found.get("release") or " or ".join(found.get("releases", ()))
    facts = {"release": release, "variant": found.get("variant"), "storage": found.get("storage")}
    known = [*_media(found), *(f"{name} {value}" for name, value in facts.items() if value)]
    kind = f"{found['kind']} of {found['of']}" if "of" in found else found["kind"]
    yield printable(f"{found['path']}: {', '.join([kind, *known])}")
    yield from (printable(f"  {line}") for line in _settings(found))
    if found.get("reason"):
        yield printable(f"  cannot be converted: {found['reason']}")
    elif found.get("missing"):
        yield f"  parts of a model: generating from a prompt also needs {', '.join(found['missing'])}"
    elif "generate" in found:
        yield f"  this version {'generates with it' if found['generate'] else 'cannot generate with it yet'}"
    sizes: dict[str, str] = {}
    for name, part in found.get("components", {}).items():
        dtypes = " ".join(f"{dtype}:{count}" for dtype, count in part["dtypes"].items())
        size = f"{_short(part['parameters'])} parameters {_short(part['bytes'])}B"
        sizes[name] = f"{part['tensors']:5d} tensors {size}  {dtypes}"
    for name, text in sizes.items():
        yield from _beside_or_below(f"  {name:18s} ", text, 21 + max(map(len, sizes.values())) <= _room())
    for file in found.get("files", []):
        yield from described(file)


def _media(found: Mapping[str, Any]) -> Iterator[str]:
    """A clip's size and sound."""
    if "width" in found:
        yield f"{found['frames']} frames of {found['width']}x{found['height']}"
        yield f"{found['fps']:g} fps"
    if "sound_rate" in found:
        yield f"sound at {found['sound_rate']} Hz" if found["sound_rate"] else "no sound"


def _settings(found: Mapping[str, Any]) -> Iterator[str]:
    """How a clip was made; where and when a receipt was."""
    request, model, machine = (found.get(name, {}) for name in ("request", "model", "machine"))
    facts = {
        "prompt": request.get("prompt"),
        "seed": request.get("seed"),
        "model": " ".join(str(model[name]) for name in ("path", "release", "variant") if model.get(name)),
        "suite": found.get("suite"),
        "created": found.get("created"),
        "machine": ", ".join(str(machine[name]) for name in ("device", "system") if machine.get(name)),
    }
    yield from (f"{name} {value}" for name, value in facts.items() if value not in (None, ""))


def _short(count: int) -> str:
    """1234567890 -> 1.23 G"""
    return f"{count / 1e9:7.2f} G" if count >= 1e9 else f"{count / 1e6:7.2f} M"
