"""A plan as tables for people."""

from collections.abc import Iterator

from ltx2.bench.plan.rows import Plan, Row


def tables(plan: Plan, overview: bool) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Titles, columns and rows: an overview of all models (`overview`) with the details of the recommended one, or the
    details of all. `*` marks the recommended row."""
    clip = plan.clip
    about = f"a clip of {clip['frames']} frames of {clip['width']}x{clip['height']}"
    whose = "this computer" if plan.memory_gb is None else f"a Mac of {plan.memory_gb:g} GB"
    head = f"{whose}: {plan.limit / 1e9:.1f} GB for {about}"
    shown = plan.models
    if overview:
        yield _overview(plan, head)
        shown, head = tuple(model for model in plan.models if any(row.recommended for row in model.rows)), ""
    for model in shown:
        fetched = f"; to download: {model.rows[0].downloading / 1e9:.1f} GB" if model.rows[0].downloading else ""
        title = f"{model.name}{': ' if model.purpose else ''}{model.purpose}{fetched}"
        columns = ["GB", "runs", "peak", "size", "disk at most"]
        rows = [
            [f"{'* ' if row.recommended else '  '}{row.preset}", _runs(row, "reads {} a step"), *_sizes(row)]
            for row in model.rows
        ]
        yield f"{head}\n{title}" if head else title, columns, rows
        head = ""


def _overview(plan: Plan, head: str) -> tuple[str, list[str], list[list[str]]]:
    presets = dict.fromkeys(row.preset for model in plan.models for row in model.rows[1:])
    title = f"{head}\nyes: stays in memory; a number: GB that every step reads from disk; no: does not run"
    rows = []
    for model in plan.models:
        marked = "* " if any(row.recommended for row in model.rows) else "  "
        first, *others = model.rows
        cells = {row.preset: _runs(row, "{}") for row in others}
        rows.append([marked + model.name, _runs(first, "{}"), *(cells.get(preset, "") for preset in presets)])
    return title, ["bundle", "as it is", *presets], rows


def _runs(row: Row, read: str) -> str:
    return {"resident": "yes", "streamed": read.format(f"{row.read / 1e9:.1f}")}.get(row.runs, "no")


def _sizes(row: Row) -> list[str]:
    return [f"{size / 1e9:.1f}" for size in (row.peak, row.size, max(row.downloading, row.converting, row.after))]


def advice(plan: Plan) -> str:
    """The recommendation, its disk space and its command."""
    best = plan.recommended
    if best is None:
        return "nothing of this runs there: try a smaller --width, --height or --frames"
    model, row = best
    disk = f"disk: {row.converting / 1e9:.1f} GB while converting, {row.after / 1e9:.1f} GB after with --delete-sources"
    free = f"; free here: {plan.free / 1e9:.1f} GB" if plan.memory_gb is None else ""
    lines = [f"* recommended: {model.name}, {row.preset}", *([f"{disk}{free}"] if row.downloading else [])]
    return "\n".join([*lines, *([row.command] if row.command else [])])
