"""Getting published files."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ltx2.commands.shared import PATH, follow_model
from ltx2.console import Dependent, Output, common
from ltx2.runtime.errors import UsageError

if TYPE_CHECKING:
    from ltx2.convert.fetch.catalogue import Published
    from ltx2.convert.fetch.download import Options
    from ltx2.runtime.events import Event

with_convert = partial(click.option, cls=Dependent, needs=("converted",))


@click.command()
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("-o", "--output", "weights", type=PATH, default="weights", help="Folder to fill.")
@click.option("--list", "listed", is_flag=True, help="List all names; needs no network.")
@click.option("--dry-run", is_flag=True, help="Say what would be fetched, and write nothing.")
@click.option("--convert", "converted", is_flag=True, help="Then convert the bundle to a model folder.")
@with_convert("--bits", type=int, help="With --convert: quantize on the way, to 2, 3, 4, 5, 6 or 8 bits.")
@with_convert("--recipe", metavar="NAME|FILE", help="With --convert: quantize by this recipe, see quantize.")
@with_convert("--delete-sources", is_flag=True, help="With --convert: then remove what was fetched.")
@with_convert("-m", "--model", type=PATH, help="With --convert: the folder; default: by name.")
@common
def download(
    output: Output, names: tuple[str, ...], weights: Path, listed: bool, dry_run: bool, converted: bool, **options: Any
) -> None:
    """Fetch published files from the Hugging Face Hub.

    NAME is a file or a bundle of all that one model needs, such as ltx-2-distilled; OWNER/NAME is a model folder that
    somebody has published. Files that are there already are not fetched again; run the same command again to continue
    after an interruption. Gated files need a login: `hf auth login`.
    """
    from ltx2.convert.fetch.catalogue import catalogue
    from ltx2.convert.fetch.download import Options
    from ltx2.convert.fetch.repository import choose

    known = catalogue()
    if listed:
        from ltx2.render import catalogue_lines

        output.result(known.to_dict(), "\n".join(catalogue_lines(known)))
        return
    if not names:
        fix = f"name one of {', '.join(known.bundles)}, or a file; --list shows all"
        raise UsageError("there is nothing to download", "no file or bundle is named", fix)
    if converted and (len(names) != 1 or names[0] not in known.bundles):
        fix = f"name one of {', '.join(known.bundles)}"
        raise UsageError("--convert takes one bundle", "a bundle has all that a model needs, and no more", fix)
    chosen, model, settings = choose(names), None, None
    if converted:
        from ltx2.api import packing

        model = options["model"] or weights / _name(names[0], options["bits"], options["recipe"])
        settings = packing(bits=options["bits"], recipe=options["recipe"])
    bits = settings.form.bits if settings else None
    if model is not None and options["delete_sources"] and _is_done(model, [p.source(weights) for p in chosen]):
        output.result({"model": str(model), "reused": True}, f"{model} is already there, and its sources are removed")
        return
    fetched, text = _follow_download(output, _checked(chosen, weights, Options(model, bits, dry_run)), dry_run)
    if model is not None and not dry_run:
        from ltx2.api import conversion, plan_conversion
        from ltx2.convert.write import WriteOptions

        sources, variant = [p.source(weights) for p in chosen], known.bundles[names[0]].variant
        plan, deleted = plan_conversion(sources, variant=variant), sources if options["delete_sources"] else ()
        made, model_text = follow_model(output, conversion(plan, model, settings, WriteOptions(), deleted))
        removed = {"deleted": made.pop("deleted")} if deleted else {}
        fetched, text = {**fetched, "converted": made, **removed}, f"{text}\n{model_text}"
    output.result(fetched, text)


def _checked(chosen: "Sequence[Published]", weights: Path, options: "Options") -> "Iterator[Event]":
    """The events of a download; model folders are compared with their ltx2.json before the last one."""
    from ltx2.convert.fetch.download import download as fetch
    from ltx2.convert.fetch.repository import check_whole
    from ltx2.runtime.events import Downloaded

    for event in fetch(chosen, weights, options):
        if isinstance(event, Downloaded):
            check_whole(chosen, weights, event)
        yield event


def _name(bundle: str, bits: int | None, recipe: str | None) -> str:
    """The name of a bundle's model folder: ltx-2-distilled, ltx-2-distilled-q4."""
    return "-".join([bundle, *([Path(recipe).stem] if recipe else []), *([f"q{bits}"] if bits else [])])


def _is_done(model: Path, sources: "Iterable[Path]") -> bool:
    """Whether an earlier run has finished the model and removed what it was made of."""
    from ltx2.runtime.model.layout import MANIFEST

    return (model / MANIFEST).is_file() and not all(source.exists() for source in sources)


def _follow_download(output: Output, events: "Iterable[Event]", dry_run: bool) -> tuple[dict[str, Any], str]:
    """Follow a download; what came of it, as data and for people. The plan of a dry run is its result, said also where
    there is no room for it; else it is progress."""
    from dataclasses import asdict

    from ltx2.render import download_lines
    from ltx2.runtime.events import Downloaded, DownloadPlanned

    plans: list[DownloadPlanned] = []

    def progress() -> "Iterator[Event]":
        for event in events:
            if dry_run and isinstance(event, DownloadPlanned):
                plans.append(event)
            else:
                yield event

    try:
        downloads = output.follow_all(progress(), Downloaded)
    finally:
        output.text("\n".join(line for plan in plans for line in download_lines(plan)))
    if dry_run:
        (planned,) = plans
        return {**asdict(planned), "missing": planned.missing}, ""
    (done,) = downloads
    size = sum(file.bytes for file in done.files if file.fetched)
    count = sum(file.fetched for file in done.files)
    text = f"{count} of {len(done.files)} files fetched ({size / 1e9:.2f} GB, {done.seconds:.1f} s), all are whole"
    return {"files": [asdict(file) for file in done.files], "seconds": round(done.seconds, 3)}, text
