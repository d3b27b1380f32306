"""README.md and docs/, held to the code: commands, names, tables and links are checked, so that they cannot drift."""

import ast
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from ltx2 import api
from ltx2.bench.plan.rows import RESIDENT, STREAMED, plan_models
from ltx2.bench.plots.demo import packed_bits
from ltx2.bench.speed.compare import read_receipt
from ltx2.commands.group import cli
from ltx2.convert.fetch.catalogue import catalogue
from ltx2.convert.plan.entries import Plan
from ltx2.demo import PROMPT
from ltx2.quant.apply import Settings, quantize_plan
from ltx2.runtime.generate.options.preset import load_preset, pipeline_row
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.model.layout import COMPONENTS
from tests.support import published
from tests.support.bench_table import MADE, tables_in
from tests.support.official import plan_of

ROOT = Path(__file__).parent.parent.parent
PAGES = {path.stem: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
ALL = "\n".join(TEXTS.values())
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
INLINE = re.findall(r"`([^`\n]+)`", BLOCK.sub("", ALL))
# Options of other programs.
FOREIGN = {
    *("--force-reinstall", "--no-deps"),
    *("--hosts", "--over", "--backend", "--auto-setup", "--hostfile", "--env"),  # mlx.launch
    *("--sshloginfile", "--workdir", "--joblog", "--resume-failed", "--retries", "--return", "--cleanup"),  # parallel
}
GIB, GB = 2**30, 10**9


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(ALL) if kind == language]


def flowing(page: str) -> str:
    """A page's text without line breaks."""
    return " ".join(TEXTS[page].split())


def shell_lines() -> list[str]:
    """Commands in the shell blocks; a backslash continues one on the next line."""
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    return [line.partition(" #")[0].strip() for line in text.splitlines() if line.strip()]


def table(page: str, heading: str) -> list[list[str]]:
    """Rows of the first table under a heading, without its first two lines."""
    text = "\n" + TEXTS[page]
    lines = text[text.index(f"\n{heading}\n") :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def options(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


class TestCommands:
    @pytest.mark.parametrize("line", [line for line in shell_lines() if line.startswith("ltx2 ")])
    def test_would_run(self, line: str) -> None:
        _, name, *args = shlex.split(line)
        context = cli.commands[name].make_context(name, args)
        given = {k: v for k, v in context.params.items() if k in Request.__dataclass_fields__ and v is not None}
        if name == "generate":
            given |= {"prompt": "one of the file"} if context.params["prompts"] else {}
            Request.from_options(given).with_defaults(load_preset("2.0").defaults)

    @pytest.mark.parametrize("text", [text for text in INLINE if text.startswith("ltx2 ")])
    def test_in_the_text(self, text: str) -> None:
        _, name, *args = text.split()
        known = options(cli.commands[name]) if name in cli.commands else {"--help"}
        assert name in cli.commands or name == "COMMAND"
        assert {arg for arg in args if arg.startswith("-")} <= known

    def test_table_lists_all(self) -> None:
        assert [row[0].strip("`").split()[1] for row in table("README", "## Commands")] == list(cli.commands)

    def test_every_option_exists(self) -> None:
        known = {option for command in cli.commands.values() for option in options(command)} | {"--help"} | FOREIGN
        mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ALL))
        assert mentioned and mentioned <= known

    def test_make_targets(self) -> None:
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        mentioned = re.findall(r"\bmake ([a-z-]+)", "\n".join([*shell_lines(), *INLINE]))
        assert mentioned and set(mentioned) <= set(targets)

    def test_downloaded_files_are_the_converted_ones(self) -> None:
        """What is downloaded is what the next command converts."""
        downloads = [line for line in shell_lines() if line.startswith("ltx2 download ltx")]
        (download,) = (line for line in downloads if "--convert" not in line)
        (convert,) = (shlex.split(line) for line in shell_lines() if line.startswith("ltx2 convert"))
        chosen = catalogue().choose(shlex.split(download)[2:])
        assert convert[2 : convert.index("-o")] == [str(published.source(Path("weights"))) for published in chosen]

    def test_names_to_download(self) -> None:
        """With their sizes and places."""
        for names, _, size, place in table("files", "# Files: from Hugging Face to a model folder"):
            chosen = [name.strip("` ") for name in names.split(",")]
            assert size == ", ".join(f"{catalogue().size(name) / GB:.1f}" for name in chosen) + " GB"
            if place:
                (found,) = catalogue().choose(chosen)
                assert place == f"`weights/{found.folder}`"

    def test_demo_prompt(self) -> None:
        assert f'"{PROMPT}"' in flowing("README")


class TestPython:
    CODE = "\n".join(blocks("python"))

    def calls(self) -> Iterator[tuple[str, set[str]]]:
        """Called attributes with their keyword arguments."""
        for node in ast.walk(ast.parse(self.CODE)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                yield ast.unparse(node.func), {str(word.arg) for word in node.keywords}

    def test_calls(self) -> None:
        functions = ("load", "download", "convert", "calibrate", "quantize")
        takes = {f"ltx2.{name}": set(inspect.signature(getattr(api, name)).parameters) for name in functions}
        request = set(Request.__dataclass_fields__)
        takes |= {"pipe.generate": request, "pipe.stream": request, "clip.save": set()}
        found = dict(self.calls())
        assert found.keys() == takes.keys()
        assert all(found[name] <= takes[name] for name in found)

    def test_attributes(self, demo_f32: Path) -> None:
        clip = api.load(demo_f32).generate("a red square", width=64, height=64, frames=1)
        for name in set(re.findall(r"\bclip\.(\w+)", self.CODE)):
            assert hasattr(clip, name), name


class TestNames:
    @pytest.mark.parametrize("page", PAGES)
    def test_links(self, page: str) -> None:
        prose = BLOCK.sub("", TEXTS[page])
        headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ ([\w ]+)$", prose, re.MULTILINE)}
        for target in re.findall(r"\]\(([^)]+)\)", prose):
            if target.startswith("#"):
                assert target[1:] in headings, target
            elif not target.startswith("https://"):
                assert (PAGES[page].parent / target).exists(), target

    def test_every_page_is_named(self) -> None:
        linked = set(re.findall(r"\]\(docs/([\w-]+)\.md\)", TEXTS["README"]))
        assert linked == PAGES.keys() - {"README"}

    def test_paths_in_the_text(self) -> None:
        """Names with a slash that start at the top of the repository."""
        top = {path.name for path in ROOT.iterdir()} - {"weights", "demo"}
        paths = [text for text in INLINE if text.partition("/")[0] in top and "/" in text]
        assert len(paths) >= 5
        for path in paths:
            assert list(ROOT.glob(path.rstrip("/"))), path

    def test_architecture(self) -> None:
        """Every file that the tree names lies where it says, and every top folder is in it."""
        (tree,) = (text for text in blocks("") if "run.py runs them" in text)
        folder, named = "", set()
        for line in tree.splitlines():
            if match := re.match(r"(\w+)/ ", line):
                folder = match[1]
                named.add(folder)
            for name in re.findall(r"(?<=\s)\w+/(?=\s)|\w+\.py|\w+/\*\.json", line[line.find(" ") :]):
                assert list((ROOT / folder).rglob(name.rstrip("/"))), f"{folder}/{name}"
        assert named == {"ltx2", "bench", "quant", "convert", "runtime"}

    def test_components(self) -> None:
        (sentence,) = re.findall(r"^Components: (.*?)\.\n", TEXTS["architecture"], re.MULTILINE | re.DOTALL)
        assert re.findall(r"`(\w+)`", sentence) == list(COMPONENTS)

    def test_stages(self) -> None:
        stages = pipeline_row("distilled").stages
        first, second = (len(stage.schedule.fixed) - 1 for stage in stages)
        assert f"stage 1: transformer, {first} steps at half size" in TEXTS["architecture"] and stages[0].downscale == 2
        assert f"stage 2: transformer, {second} steps" in TEXTS["architecture"] and stages[1].downscale == 1


def receipt() -> dict[str, Any]:
    """The receipt that the table of speed is made from."""
    path = re.search(r"bench table: (\S+)", TEXTS["performance"])
    assert path is not None
    return read_receipt(ROOT / path[1])


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """The published files that the README converts."""
    folder = tmp_path_factory.mktemp("published")
    distilled = next(p for p in published.write_published(folder, published.MONOLITH) if "distilled" in p.name)
    (upscaler,) = published.write_published(folder, published.SPATIAL)
    return plan_of(distilled, upscaler, published.write_gemma(folder / "gemma"))


class TestSizes:
    def test_downloads(self, plan: Plan) -> None:
        sizes = {entry.file.path: entry.file.size for entry in plan.entries}
        gemma = sum(size for path, size in sizes.items() if path.parent.name == "gemma")
        model, upscaler = sorted((size for path, size in sizes.items() if path.parent.name != "gemma"), reverse=True)
        sizes_said = r"([\d.]+) GB for the model, ([\d.]+) GB for the upscaler, ([\d.]+) GB for the text"
        said = re.search(sizes_said, flowing("README"))
        assert said is not None and said.groups() == tuple(f"{size / GB:.1f}" for size in (model, upscaler, gemma))

    def test_table(self, plan: Plan) -> None:
        rows = table("README", "## Will my Mac run it?")
        assert len(rows) == 6
        for how, *cells in rows:
            sizes = self.sizes(plan, how)
            numbers = [sum(sizes.values()), sizes["transformer"], sizes["text_encoder"]]
            preset = re.sub(r"`--(?:bits (\d)|recipe ([\w-]+))`", lambda found: found[2] or f"q{found[1]}", how)
            preset = preset.replace("(16 bits)", "16 bit")
            mac = next(memory for memory in (16, 24, 32, 48, 64) if self.runs(preset, memory) == RESIDENT)
            assert cells == [*(f"{number / GB:.1f} GB" for number in numbers), f"{mac} GB"], how

    def test_recommendation(self) -> None:
        """What `ltx2 plan` recommends."""
        assert "16 bits from 64 GB on, 8 bits from 32 GB on, else 4 bits; on 16 GB a part of them" in flowing("README")
        for memory, preset, runs in ((64, "16 bit", RESIDENT), (48, "q8", RESIDENT), (32, "q8", RESIDENT),
                                     (24, "q4", RESIDENT), (16, "q4", STREAMED)):  # fmt: skip
            best = plan_models(["ltx-2-distilled"], memory).models[0].best
            assert best is not None and (best.preset, best.runs) == (preset, runs), memory

    @staticmethod
    def sizes(plan: Plan, how: str) -> dict[str, int]:
        bits, recipe = re.search(r"--bits (\d)", how), re.search(r"--recipe ([\w-]+)", how)
        if bits or recipe:
            plan = quantize_plan(plan, Settings(int(bits[1]) if bits else None, recipe=recipe[1] if recipe else None))
        return {n: sum(f.nbytes for m in plan.moves(n) for f in m.stored().values()) for n in plan.components}

    @staticmethod
    def runs(preset: str, memory: int) -> str:
        """What `ltx2 plan` says."""
        (model,) = plan_models(["ltx-2-distilled"], memory).models
        return next(row.runs for row in model.rows if row.preset == preset)


class TestMeasured:
    @pytest.mark.parametrize("page", PAGES)
    def test_generated_tables(self, page: str) -> None:
        """Those between marks follow from the receipts that they name."""
        found = list(tables_in(TEXTS[page]))
        assert found or page != "performance"
        for kind, receipts, shown in found:
            assert shown == MADE[kind]([read_receipt(ROOT / receipt) for receipt in receipts]), receipts

    def test_what_was_measured(self) -> None:
        data = receipt()
        text = flowing("performance")
        assert data["machine"]["device"] in text and f"mlx {data['machine']['mlx']}" in text
        options = data["cases"][0]["options"]
        assert f"{options['frames']} frames of {options['width']}x{options['height']} at {options['fps']:g} fps" in text
        assert f"medians of {data['repeat']} clips" in text

    def test_what_quantizing_costs(self) -> None:
        """The table of docs/quantization.md is the demo model's receipt."""
        (path,) = (ROOT / "bench" / "results").glob("quality-demo-*.json")
        data = json.loads(path.read_text())
        models = {model["name"]: model for model in data["models"]}
        endings = ("-stock", "", "-stats", "-gptq", "-gptq-hadamard")
        rows = table("quantization", "# Quantization")
        assert [row[0] for row in rows] == ["`q8`", "`q6`", "`q4`", "`q3`"]
        for name, bits, *cells in rows:
            assert bits == f"{packed_bits(models[name.strip('`')]):.2f}"
            for ending, cell in zip(endings, cells, strict=True):
                model = models.get(name.strip("`") + ending)
                assert cell == (f"{100 * model['velocity']['video']:.2f} %" if model else ""), (name, ending)
        text = flowing("quantization")
        assert f"{data['compared']} prompts, medians" in text and f"of {data['prompts']} prompts" in text
