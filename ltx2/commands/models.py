"""Making model folders and looking into them."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from ltx2.commands.shared import PATH, Gigabytes, follow_fit, follow_model, generate_options, given
from ltx2.console import Dependent, Output, common
from ltx2.quant.codes.methods import METHODS, SEARCH
from ltx2.runtime.errors import Ltx2Error
from ltx2.runtime.model.forms import AFFINE, MODES

PACKS = ("bits", "mode", "recipe", "fit")  # options that each make a conversion quantize
when_packing = partial(click.option, cls=Dependent, needs=PACKS)


@click.command()
@click.argument("sources", nargs=-1, required=True, type=PATH)
@click.option("-o", "--output", "target", type=PATH, required=True, help="Model folder to write.")
@click.option("--variant", type=click.Choice(["dev", "distilled"]), help="Variant, if the file's name does not say it.")
@click.option("--dtype", type=click.Choice(["bf16", "f16", "f32"]), help="Cast weights; default: as published.")
@click.option("--only", multiple=True, metavar="COMPONENT", help="Convert this component only; repeatable.")
@click.option("--fuse", multiple=True, metavar="LORA[:S]", help="Add a LoRA to the transformer's weights; repeatable.")
@click.option("--bits", type=int, help="Quantize on the way, without a 16-bit copy on disk.")
@click.option("--mode", type=click.Choice(list(MODES)), help="Quantize with this kind of codes; else affine.")
@click.option("--recipe", metavar="NAME|FILE", help="Quantize by this recipe, see quantize: q4, for example.")
@click.option("--fit", type=Gigabytes(int), help="Quantize for a Mac of so much memory, see quantize.")
@when_packing("--group-size", type=int, help="Weights per scale, when quantizing: 32, 64 (default) or 128.")
@when_packing("--stats", type=PATH, metavar="FILE", help="Statistics by calibrate, when quantizing: for better codes.")
@when_packing("--method", type=click.Choice(METHODS), help="How codes are chosen, when quantizing; see quantize.")
@click.option("--shard-size", type=Gigabytes(), default=5.0, show_default=True, help="Largest weight file.")
@click.option(
    "--delete-sources",
    is_flag=True,
    help="Remove the sources once the model folder is whole and verified.",
    cls=Dependent,
    unless=("only",),
)
@click.option("--dry-run", is_flag=True, help="Read headers (--fit: some weights); --json prints the plan.")
@click.option("--force", is_flag=True, help="Replace a different model folder.")
@common
def convert(output: Output, sources: tuple[Path, ...], target: Path, dry_run: bool, **options: Any) -> None:
    """Turn published checkpoints into one MLX model folder.

    SOURCES are recognised by content: an LTX-2 checkpoint, upscalers, LoRAs, a Gemma folder. Run the same command
    again to continue after an interruption.
    """
    from ltx2.api import conversion, packing, plan_conversion
    from ltx2.convert.delete import check_deletion, removable
    from ltx2.convert.plan.check import check_plan
    from ltx2.convert.plan.entries import plan_json
    from ltx2.convert.write import WriteOptions
    from ltx2.quant.apply import quantize_plan
    from ltx2.render import plan_summary

    written, deletes = WriteOptions(options.pop("shard_size"), options.pop("force")), options.pop("delete_sources")
    settings = packing(**{name: options.pop(name) for name in (*PACKS, "group_size", "stats", "method")})
    plan = plan_conversion(sources, **options)
    if deletes:
        check_deletion(plan)
    if dry_run:
        try:
            check_plan(plan)
        except Ltx2Error as error:  # the plan is what was asked for; converting would be refused
            if not output.quiet:
                click.echo(f"warning: convert would refuse this plan: {error.what}: {error.why}", err=True)
        fit = follow_fit(output, plan, settings) if settings and settings.fit else None
        plan = quantize_plan(plan, settings, fit) if settings else plan
        lines, more = [plan_summary(plan), *(fit.reasons() if fit else [])], {"fit": fit.to_dict()} if fit else {}
        if deletes:
            files = removable(plan, sources)
            freed = sum(path.stat().st_size for path in files)
            more["deletes"] = {"files": list(map(str, files)), "bytes": freed}
            lines.append(f"then {len(files)} files of the sources are removed, which frees {freed / 1e9:.2f} GB")
        output.result(plan_json(plan) | more, "\n".join(lines))
        return
    output.result(*follow_model(output, conversion(plan, target, settings, written, sources if deletes else ())))


@click.command()
@click.argument("model", type=PATH)
@click.option("-o", "--output", "target", type=PATH, required=True, help="Model folder to write.")
@click.option("--bits", type=int, help="2, 3, 4 (default), 5, 6 or 8; mxfp4, nvfp4: 4; mxfp8: 8.")
@click.option("--recipe", metavar="NAME|FILE", help="Bits per layer; default: q4, or what --bits says.")
@click.option("--fit", type=Gigabytes(int), help="Choose bits for a Mac of so much memory: 16, 24, 32, 48, 64.")
@click.option("--mode", type=click.Choice(list(MODES)), default=AFFINE, show_default=True, help="Kind of codes.")
@click.option("--group-size", type=int, help="Weights per scale: 32, 64 (default) or 128; mxfp4, mxfp8: 32; nvfp4: 16.")
@click.option("--stats", type=PATH, metavar="FILE", help="Statistics by calibrate, for better codes of the same size.")
@click.option("--method", type=click.Choice(METHODS), default=SEARCH, show_default=True, help="How codes are chosen.")
@click.option("--only", multiple=True, metavar="COMPONENT", help="Quantize this component only; repeatable.")
@click.option("--report", type=PATH, help="Write bits, bytes and error of every layer (JSON).")
@click.option("--shard-size", type=Gigabytes(), default=5.0, show_default=True, help="Largest weight file.")
@click.option("--force", is_flag=True, help="Replace a different model folder.")
@common
def quantize(output: Output, model: Path, target: Path, report: Path | None, **options: Any) -> None:
    """Write a smaller copy of a model folder.

    A recipe gives some layers more bits than the rest. q8, q6, q4 and q3 are made for their bits; q4-small is q4 with a
    text encoder of 6 bits, or of 4 where --stats shows small errors; "mixed" raises the same layers above any --bits,
    "uniform" none. --bits N alone is --recipe qN, or "mixed" if there is no qN; with --recipe it replaces the recipe's
    bits.

    --fit chooses bits for each layer of the transformer, at least those of its recipe ("mixed"), so that it fits a Mac
    of that memory with a clip of 121 frames of 768x512 and loses least. It measures the error of every layer on a part
    of it, which takes minutes, and weighs it by its effect on the clip if --stats has sensitivities. With --stats,
    errors of weights count as they do for the model's own inputs, and biases make up for a part of them.

    --method gptq chooses the codes of the transformer's blocks column by column; each column makes up for errors of
    those before it. It needs a file of calibrate --gptq, the more prompts the better, and computes the steps in it
    again, block by block. gptq-hadamard also rotates the inputs of these layers, so that weights are easier to round:
    it loses least, and every step of a clip takes a little longer.
    """
    from ltx2.convert.write import WriteOptions
    from ltx2.quant.apply import Settings
    from ltx2.quant.apply import quantize as quantize_folder
    from ltx2.runtime.files.paths import check_output

    written = WriteOptions(options.pop("shard_size"), options.pop("force"))
    if report is not None:
        check_output(report)
    output.result(*follow_model(output, quantize_folder(model, target, Settings(**options), written), report))


@click.command()
@click.argument("model", type=PATH)
@click.option("-o", "--output", "target", type=PATH, required=True, help="Statistics to write, *.safetensors.")
@click.option("--prompts", type=PATH, metavar="FILE", help="A prompt a line, also as JSON; default: 16 of ours.")
@click.option("--sensitivity", is_flag=True, help="Also measure which layers matter most, for quantize --fit.")
@click.option("--gptq", is_flag=True, help="Also keep some denoise steps for quantize --method gptq: 20 MB a prompt.")
@generate_options("pipeline", "steps", "width", "height", "frames", "fps", "no_upscale", "memory_limit", "low_memory")
@click.option("--seed", type=int, help="Of the first prompt; the others count on from it.")
@common
def calibrate(output: Output, model: Path, target: Path, prompts: Path | None, gptq: bool, **options: Any) -> None:
    """Measure the inputs of a model's layers, for quantize --stats.

    Generates prompts up to their latents and writes the mean and mean square of every layer's inputs. One file serves
    all folders of a model, and convert --bits.

    --sensitivity tries errors in 172 groups of the transformer's layers at 9 steps of the first stage: it takes as
    long as 1550 more of those steps, and the memory of a whole transformer. A smaller --width, --height and --frames
    make both cheaper.
    """
    from ltx2.quant.measure.calibrate import Calibrated
    from ltx2.quant.measure.calibrate import calibrate as calibrate_folder
    from ltx2.runtime.generate.options.prompts import read_prompts

    sensitivity, texts = options.pop("sensitivity"), read_prompts(prompts) if prompts else ()
    done = output.follow(calibrate_folder(model, target, texts, given(options), gptq, sensitivity))
    assert isinstance(done, Calibrated), "a calibration ends with its file"
    seen = f"{done.layers} layers, {done.prompts} prompts, up to {done.inputs} inputs of a layer"
    output.result(done.to_dict(), f"{done.path}  ({seen}, {done.seconds:.1f} s)")


@click.command()
@click.argument("path", type=PATH)
@common
def inspect(output: Output, path: Path) -> None:
    """Say what a published file or a model folder contains. Reads headers only."""
    from ltx2.convert.inspect import inspect as describe
    from ltx2.render import described

    found = describe(path)
    output.result(found, "\n".join(described(found)))


@click.command()
@click.argument("model", type=PATH)
@click.option("--source", "sources", multiple=True, type=PATH, help="Compare values; repeatable.")
@click.option(
    "--stats",
    type=PATH,
    metavar="FILE",
    help="With --source: the statistics it was quantized with.",
    cls=Dependent,
    needs=("sources",),
)
@common
def verify(output: Output, model: Path, sources: tuple[Path, ...], stats: Path | None) -> None:
    """Check every file, hash, tensor and shape of a model folder.

    With --source, a checkpoint that it was converted from, also every value.
    """
    from functools import partial

    from ltx2.convert.verify import Verified
    from ltx2.convert.verify import verify as check_folder
    from ltx2.quant.measure.statistics import Statistics
    from ltx2.quant.plan.replan import repack

    statistics = Statistics.open(stats) if stats else None
    done = output.follow(check_folder(model, sources, partial(repack, statistics=statistics)))
    assert isinstance(done, Verified), "a verification ends with what it found"
    values = f", {done.compared} compared with the sources" if sources else ""
    card = "; README.md was edited" if done.card == "edited" else ""
    output.result(done.to_dict(), f"{model} is sound: {done.files} files, {done.tensors} tensors{values}{card}")
