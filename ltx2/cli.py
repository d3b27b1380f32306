"""The commands. They import what they need when they run, so that help is instant."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ltx2 import __version__
from ltx2.console import InOrder, Output, common, refuse_given, run_group, say_how_to_continue
from ltx2.runtime.errors import Ltx2Error

if TYPE_CHECKING:
    from ltx2.runtime.estimate import MemoryPlan
    from ltx2.runtime.events import Event

PATH = click.Path(path_type=Path, readable=False)  # what is wrong with a file is said by what reads it
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")  # known here because importing quant takes time


def main() -> None:
    """Entry point of the `ltx2` script."""
    sys.exit(run(sys.argv[1:]))


def run(args: list[str]) -> int:
    """Run a command line and return its exit code."""
    return run_group(cli, args)


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ltx2")
def cli() -> None:
    """LTX-2 video with sound on Apple Silicon: convert, quantize, generate and benchmark with MLX."""


@cli.command()
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("-o", "--output", "weights", type=PATH, default="weights", help="Folder to fill.")
@click.option("--list", "listed", is_flag=True, help="List all names; needs no network.")
@click.option("--dry-run", is_flag=True, help="Say what would be fetched, and write nothing.")
@click.option("--convert", "converted", is_flag=True, help="Then convert the bundle to a model folder.")
@click.option("--bits", type=click.Choice(["2", "3", "4", "5", "6", "8"]), help="With --convert: quantize on the way.")
@click.option("-m", "--model", type=PATH, help="With --convert: the folder; default: by name.")
@common
def download(
    output: Output, names: tuple[str, ...], weights: Path, listed: bool, dry_run: bool, converted: bool, **options: Any
) -> None:
    """Fetch published files from the Hugging Face Hub.

    NAME is a file or a bundle of all that one model needs, such as ltx-2-distilled. Files that are there already are
    not fetched again; run the same command again to continue after an interruption. Gated files need a login:
    `hf auth login`.
    """
    from ltx2.convert.catalogue import catalogue
    from ltx2.convert.download import Options
    from ltx2.convert.download import download as fetch

    known = catalogue()
    if listed:
        from ltx2.render import catalogue_lines

        output.result(known.to_dict(), "\n".join(catalogue_lines(known)))
        return
    if not names:
        raise click.UsageError(f"Name a file or a bundle: {', '.join(known.bundles)}. --list shows all.")
    if not converted:
        refuse_given(options, "--convert")
    elif len(names) != 1 or names[0] not in known.bundles:
        raise click.UsageError("--convert takes one bundle, which has all that a model needs.")
    chosen, bits = known.choose(names), int(options["bits"]) if options["bits"] else None
    model = (options["model"] or weights / f"{names[0]}{f'-q{bits}' if bits else ''}") if converted else None
    fetched, text = _follow_download(output, fetch(chosen, weights, Options(model, bits, dry_run)))
    if model is not None and not dry_run:
        sources, variant = [p.source(weights) for p in chosen], known.bundles[names[0]].variant
        fetched["converted"], model_text = _convert_to(output, model, bits, sources, variant)
        text += f"\n{model_text}"
    output.result(fetched, text)


def _convert_to(
    output: Output, model: Path, bits: int | None, sources: list[Path], variant: str
) -> tuple[dict[str, Any], str]:
    """Go on from a download."""
    from ltx2.api import conversion, plan_conversion
    from ltx2.convert.write import WriteOptions
    from ltx2.quant.apply import Settings

    settings = Settings(bits) if bits else None
    plan = plan_conversion(sources, variant=variant)
    return _follow_model(output, conversion(plan, model, settings, WriteOptions()))


def _follow_download(output: Output, events: "Iterable[Event]") -> tuple[dict[str, Any], str]:
    """Follow a download; what came of it, as data and for people."""
    from dataclasses import asdict

    from ltx2.runtime.events import Downloaded, DownloadPlanned

    done = output.follow(events)
    if isinstance(done, DownloadPlanned):
        return {**asdict(done), "missing": done.missing}, ""
    assert isinstance(done, Downloaded), "a download ends with its files"
    size = sum(file.bytes for file in done.files if file.fetched)
    count = sum(file.fetched for file in done.files)
    text = f"{count} of {len(done.files)} files fetched ({size / 1e9:.2f} GB, {done.seconds:.1f} s), all are whole"
    return {"files": [asdict(file) for file in done.files], "seconds": round(done.seconds, 3)}, text


@cli.command()
@click.argument("sources", nargs=-1, required=True, type=PATH)
@click.option("-o", "--output", "target", type=PATH, required=True, help="Model folder to write.")
@click.option("--variant", type=click.Choice(["dev", "distilled"]), help="Where the file name does not say it.")
@click.option("--dtype", type=click.Choice(["bf16", "f16", "f32"]), help="Cast weights; default: as published.")
@click.option("--only", multiple=True, metavar="COMPONENT", help="Convert this component only; repeatable.")
@click.option("--bits", type=int, help="Quantize on the way, without a 16-bit copy on disk.")
@click.option("--mode", type=click.Choice(MODES), help="Quantize with this kind of codes; affine with --bits alone.")
@click.option("--group-size", type=int, help="Weights per scale, with --bits: 32, 64 (default) or 128.")
@click.option("--recipe", default="mixed", show_default=True, metavar="NAME|FILE", help="Bits per layer, with --bits.")
@click.option("--shard-size", type=float, default=5.0, show_default=True, metavar="GB", help="Largest weight file.")
@click.option("--dry-run", is_flag=True, help="Read headers only; --json prints the plan.")
@click.option("--force", is_flag=True, help="Replace a different model folder.")
@common
def convert(output: Output, sources: tuple[Path, ...], target: Path, dry_run: bool, **options: Any) -> None:
    """Turn published checkpoints into one MLX model folder.

    SOURCES are recognised by content: an LTX-2 checkpoint, upscalers, LoRAs, a Gemma folder. Run the same command
    again to continue after an interruption.
    """
    from ltx2.api import conversion, plan_conversion
    from ltx2.convert.check import check_plan
    from ltx2.convert.plan import plan_json
    from ltx2.convert.write import WriteOptions
    from ltx2.quant.apply import Settings, quantize_plan
    from ltx2.render import plan_summary

    written = WriteOptions(options.pop("shard_size"), options.pop("force"))
    packing = {name: options.pop(name) for name in ("bits", "mode", "group_size", "recipe")}
    packed = packing["bits"] is not None or packing["mode"] is not None
    if not packed:
        refuse_given(packing, "--bits")
    settings = Settings(**packing | {"mode": packing["mode"] or MODES[0]}) if packed else None
    plan = plan_conversion(sources, **options)
    if dry_run:
        try:
            check_plan(plan)
        except Ltx2Error as error:  # the plan is what was asked for; converting would be refused
            if not output.quiet:
                click.echo(f"warning: convert would refuse this plan: {error.what}: {error.why}", err=True)
        plan = quantize_plan(plan, settings) if settings else plan
        output.result(plan_json(plan), plan_summary(plan))
        return
    output.result(*_follow_model(output, conversion(plan, target, settings, written)))


@cli.command()
@click.argument("model", type=PATH)
@click.option("-o", "--output", "target", type=PATH, required=True, help="Model folder to write.")
@click.option("--bits", type=int, help="2, 3, 4 (default), 5, 6 or 8; mxfp4, nvfp4: 4; mxfp8: 8.")
@click.option("--mode", type=click.Choice(MODES), default="affine", show_default=True, help="Kind of codes.")
@click.option("--group-size", type=int, help="Weights per scale: 32, 64 (default) or 128; mxfp4, mxfp8: 32; nvfp4: 16.")
@click.option("--recipe", default="mixed", show_default=True, metavar="NAME|FILE", help="Bits per layer.")
@click.option("--only", multiple=True, metavar="COMPONENT", help="Quantize this component only; repeatable.")
@click.option("--report", type=PATH, help="Write bits, bytes and error of every layer (JSON).")
@click.option("--force", is_flag=True, help="Replace a different model folder.")
@common
def quantize(output: Output, model: Path, target: Path, report: Path | None, **options: Any) -> None:
    """Write a smaller copy of a model folder.

    Sensitive layers get more bits than --bits (recipe "mixed"); "uniform" gives all layers the same.
    """
    from ltx2.convert.write import WriteOptions
    from ltx2.quant.apply import Settings
    from ltx2.quant.apply import quantize as quantize_folder
    from ltx2.runtime.paths import check_output

    written = WriteOptions(force=options.pop("force"))
    if report is not None:
        check_output(report)
    output.result(*_follow_model(output, quantize_folder(model, target, Settings(**options), written), report))


def _follow_model(
    output: Output, events: "Iterable[Event]", report: Path | None = None
) -> tuple[dict[str, Any], str]:
    """Follow a conversion or quantization; the finished folder, as data and for people."""
    from ltx2.quant.report import Quantized
    from ltx2.runtime.events import Written
    from ltx2.runtime.paths import write_text

    quantized: dict[str, Any] = {}

    def watched() -> "Iterable[Event]":
        for event in events:
            if isinstance(event, Quantized):
                quantized.update(event.report.to_dict())
            yield event

    done = output.follow(watched())
    assert isinstance(done, Written), "a conversion ends with its folder"
    if report is not None:
        write_text(report, json.dumps(quantized, indent=2) + "\n")
    size = f"{done.bytes / 1e9:.2f} GB"
    text = f"{done.path} is already there ({size})" if done.reused else f"{done.path}  ({size}, {done.seconds:.1f} s)"
    if quantized:
        total = quantized["totals"]["all"]
        text += f"\n{total['bits_per_weight']:.2f} bits per weight, {total['bytes_before'] / 1e9:.2f} GB before"
    data = {"model": done.path, "bytes": done.bytes, "seconds": round(done.seconds, 3), "reused": done.reused}
    return data | ({"report": quantized} if quantized else {}), text


@cli.command()
@click.argument("prompt", required=False)
@click.option("-m", "--model", type=PATH, help="Model folder (with --from: that run's).")
@click.option("-o", "--output", "target", type=PATH, required=True, help="Clip, e.g. clip.mp4.")
@click.option("--width", type=int, help="Pixels; a multiple of 64 (32 with --no-upscale).")
@click.option("--height", type=int, help="Pixels; a multiple of 64 (32 with --no-upscale).")
@click.option("--frames", type=int, help="8k+1, e.g. 121.")
@click.option("--fps", type=float, help="Frames per second.")
@click.option("--seed", type=int, help="Same seed, same clip.")
@click.option("--no-audio", is_flag=True, default=None, help="Write no sound. The picture stays the same.")
@click.option("--no-upscale", is_flag=True, default=None, help="One stage at full size, without the upscaler.")
@click.option("--embeddings", metavar="FILE", help="Use saved prompt embeddings; skips the text encoder.")
@click.option("--save-embeddings", metavar="FILE", help="Save the prompt's embeddings.")
@click.option("--noise", metavar="FILE", help="Start from these noises instead of the seed.")
@click.option("--save-latents", metavar="FILE", help="Save the latents before they are decoded.")
@click.option("--latents", metavar="FILE", help="Decode these latents only.")
@click.option("--from", "sidecar", metavar="CLIP.json", type=PATH, help="Repeat a run.")
@click.option("--memory-limit", type=float, metavar="GB", help="Stay below; default: what the GPU can use.")
@click.option("--low-memory", is_flag=True, default=None, help="Take as little as possible; slower.")
@click.option("--dry-run", is_flag=True, help="Show each phase's memory from headers, and whether it fits; do nothing.")
@click.option("--checkpoint-every", type=int, metavar="N", help="Keep the state after every N denoise steps.")
@click.option("--resume", is_flag=True, default=None, help="Continue a run that was cut off, with the same result.")
@common
def generate(
    output: Output, target: Path, model: Path | None, sidecar: Path | None, dry_run: bool, **options: Any
) -> None:
    """Make a video with sound from PROMPT.

    PROMPT is not needed with --latents, --embeddings or --from. Beside clip.mp4, clip.json records the run. The
    result of the last denoise step is kept until the clip is written: a run that is cut off then can be continued.
    """
    from ltx2.generation import Generation
    from ltx2.runtime.events import Generated

    if model is None and sidecar is None:
        raise click.UsageError("Missing option '-m' / '--model'.")
    given = {name: value for name, value in options.items() if value is not None}
    generation = Generation(target, model, sidecar, given)
    if dry_run:
        _show_plan(output, generation.plan())
        return
    try:
        done = output.follow(generation.events())
    except (Ltx2Error, KeyboardInterrupt) as error:
        if generation.left:
            say_how_to_continue(error, "--resume")
        raise
    assert isinstance(done, Generated), "a generation ends with its clip"
    data = {"clip": str(target), "sidecar": str(target.with_suffix(".json")), **done.clip.record}
    output.result(data, f"{target}  ({len(done.clip.frames)} frames, {done.clip.record['seconds']:.1f} s)")


def _show_plan(output: Output, plan: "MemoryPlan") -> None:
    """The memory plan, also when it does not fit; then that is the command's failure."""
    from ltx2.render import memory_table, print_table

    if not output.quiet and not output.as_json:
        print_table(*memory_table(plan))
    plan.check()
    output.result({"plan": plan.to_dict()}, f"fits: {plan.peak / 1e9:.1f} GB of {plan.limit / 1e9:.1f} GB")


@cli.command()
@click.argument("model", type=PATH)
@click.option("--width", type=int, help="As for generate.")
@click.option("--height", type=int, help="As for generate.")
@click.option("--frames", type=int, help="As for generate.")
@click.option("--fps", type=float, help="As for generate.")
@click.option("--no-audio", is_flag=True, default=None, help="Leave out the sound's decoding.")
@click.option("--no-upscale", is_flag=True, default=None, help="One stage at full size.")
@click.option("--repeat", type=int, default=3, show_default=True, help="Measured runs.")
@click.option("--warmup", type=int, default=1, show_default=True, help="Runs before, not measured.")
@click.option("--out", type=PATH, help="Write the receipt (JSON).")
@common
def bench(output: Output, model: Path, repeat: int, warmup: int, out: Path | None, **options: Any) -> None:
    """Measure time and memory, phase by phase and per denoise step.

    Runs whole generations: the median and the spread ((slowest - fastest) / median) of --repeat runs.
    """
    from ltx2.bench.run import Benched, Case, run_bench, table
    from ltx2.bench.stats import write_receipt
    from ltx2.render import print_table
    from ltx2.runtime.paths import check_output

    if out is not None:
        check_output(out)
    given = {name: value for name, value in options.items() if value is not None}
    done = output.follow(run_bench(Case(model, given, repeat, warmup)))
    assert isinstance(done, Benched), "a benchmark ends with its receipt"
    if out is not None:
        write_receipt(out, done.receipt)
    if not output.quiet and not output.as_json:
        facts = done.receipt["machine"]
        print_table(f"{model} on {facts['device']}, mlx {facts['mlx']}", *table(done.receipt))
    output.result(done.receipt)


@cli.command()
@click.argument("path", type=PATH)
@common
def inspect(output: Output, path: Path) -> None:
    """Say what a published file or a model folder contains. Reads headers only."""
    from ltx2.convert.inspect import inspect as describe
    from ltx2.render import described

    found = describe(path)
    output.result(found, "\n".join(described(found)))


@cli.command()
@click.argument("model", type=PATH)
@click.option("--source", "sources", multiple=True, type=PATH, help="Compare values; repeatable.")
@common
def verify(output: Output, model: Path, sources: tuple[Path, ...]) -> None:
    """Check every file, hash, tensor and shape of a model folder.

    With --source, a checkpoint that it was converted from, also every value.
    """
    from ltx2.convert.verify import Verified
    from ltx2.convert.verify import verify as check_folder
    from ltx2.quant.apply import repack

    done = output.follow(check_folder(model, sources, repack))
    assert isinstance(done, Verified), "a verification ends with what it found"
    values = f", {done.compared} compared with the sources" if sources else ""
    output.result(done.to_dict(), f"{model} is sound: {done.files} files, {done.tensors} tensors{values}")


@cli.command()
@click.argument("folder", metavar="[DIR]", default="ltx2-demo", type=PATH)
@common
def demo(output: Output, folder: Path) -> None:
    """Run the whole chain on an embedded tiny model.

    It draws coloured shapes that move, with tones. Converted, quantized to 8 and 4 bits, used and measured in DIR
    (default: ltx2-demo), without a network.
    """
    from dataclasses import asdict

    from ltx2.bench.run import table
    from ltx2.demo import Demonstrated, run_demo
    from ltx2.render import print_table

    done = output.follow(run_demo(folder))
    assert isinstance(done, Demonstrated), "a demo ends with its summary"
    if not output.quiet and not output.as_json:
        print_table("bench", *table(done.receipt))
    made = [f"model {name:5s} {path}" for name, path in done.models.items()]
    made += [f"clip  {name:5s} {path}" for name, path in done.clips.items()]
    output.result(asdict(done), "\n".join([f'"{done.prompt}"', *made]))
