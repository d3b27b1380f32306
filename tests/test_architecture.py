"""The rules that keep the code readable, checked on the syntax trees of every source file.

A rule is a function from a source file to its violations. Each is proved below: on a tiny bad source it must fire, on a
similar good one it must not."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("convert", "runtime", "quant", "bench")  # at the top, imported as ltx2.<part> through symlinks


def _layers(*folders: str) -> dict[str, set[str]]:
    """Each folder may import those before it."""
    return {folder: set(folders[:index]) for index, folder in enumerate(folders)}


# Folder -> folders that it may import beside itself and `ltx2.__version__`. Sub-folders count with the folder above
# them from the third level on: runtime/networks/audio is runtime/networks.
MAY_IMPORT = _layers(
    "runtime", "runtime/machine", "runtime/files", "runtime/model", "runtime/media", "runtime/layers",
    "runtime/networks", "runtime/sampling", "runtime/distributed", "runtime/memory", "runtime/generate",
    "convert/names", "convert/tensors", "convert/sources", "convert/plan", "convert/output", "convert/fetch", "convert",
    "quant/codes", "quant/recipes", "quant/measure", "quant/plan", "quant/choose", "quant",
    "bench/random", "bench/plan", "bench/doctor", "bench/plots", "bench/speed", "bench/quality", "bench",
    "ltx2/demo", "ltx2", "ltx2/commands",
) | {
    "runtime/files": {"runtime"},
    "runtime/model": {"runtime", "runtime/files"},
    "runtime/media": {"runtime", "runtime/files"},
}  # fmt: skip
MAY_ALSO_IMPORT = {
    "ltx2/cli.py": {"ltx2/commands"},
    "bench/plots/quality.py": {"bench/quality"},
    "ltx2/demo/__init__.py": {"ltx2"},  # it uses the public functions, as a user would
}
# Only users of a library; an empty set: none outside the tests.
USERS = {
    "click": {"ltx2/console.py", "ltx2/render.py", "ltx2/commands"},
    "rich": {"ltx2/progress.py", "ltx2/render.py"},
    "gguf": {"convert/tensors/gguf.py"},
    "huggingface_hub": {"convert/fetch/hub.py"},
    "imageio_ffmpeg": {"runtime/media"},
    "PIL": {"runtime/media/picture.py"},
    "matplotlib": {"bench/plots/plot.py"},
    "tokenizers": {"runtime/networks/text/tokenizer.py"},
    **{name: set[str]() for name in ("torch", "diffusers", "transformers", "mlx_lm")},
}
PRINTERS = {
    "ltx2/cli.py", "ltx2/console.py", "ltx2/render.py",
    "bench/convert.py", "bench/quality/demo_quality.py",  # python -m
}  # fmt: skip
WITHOUT_MLX = ("convert/names", "convert/tensors", "runtime/model", "runtime/files", "quant/recipes")
WITHOUT_MLX_FILES = (
    "runtime/errors.py",
    "convert/sources/checkpoint.py",
    "convert/plan/make.py",
)
MAX_LINES = {"tests": 600}
MAX_LINES_ELSEWHERE = 400
MAX_FUNCTION_LINES = 100
MAX_PARAMETERS = 6

RELEASE_NAME = re.compile(r"ltx[-_ ]?v?2[-_.]?\d|(?<!\w)(?:release|version|ltx-?) v?2\.\d", re.IGNORECASE)
RELEASE_NUMBER = re.compile(r"v?2\.[0-9]")
CLOCK = re.compile(r"(?:^|\.)(?:perf_counter|monotonic|process_time|thread_time|time\.time|timeit)(?:_ns)?$")
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|opt/venv|tmp/w|root)\b")

Node = TypeVar("Node", bound=ast.AST)


@dataclass(frozen=True)
class Source:
    """A source file; `path` is its real place relative to the repository."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def part(self) -> str:
        return self.path.split("/")[0]

    @property
    def folder(self) -> str:
        """As MAY_IMPORT names it."""
        return "/".join(self.path.split("/")[:-1][:2])

    @cached_property
    def nodes(self) -> dict[type[ast.AST], list[ast.AST]]:
        found: dict[type[ast.AST], list[ast.AST]] = defaultdict(list)
        for node in ast.walk(self.tree):
            found[type(node)].append(node)
        return found

    def of_type(self, kind: type[Node]) -> Iterator[Node]:
        return (node for node in self.nodes.get(kind, ()) if isinstance(node, kind))

    @cached_property
    def imports(self) -> list[tuple[int, str]]:
        """Line and dotted name of everything imported, at any depth; `from a import b` is "a.b"."""
        found = [(node.lineno, alias.name) for node in self.of_type(ast.Import) for alias in node.names]
        for origin in self.of_type(ast.ImportFrom):
            module = f"{'.' * origin.level}{origin.module or ''}"
            found += [(origin.lineno, f"{module}.{alias.name}") for alias in origin.names]
        return found

    def texts(self) -> Iterator[tuple[int, str]]:
        """Line and value of every string literal but docstrings."""
        documented: tuple[type[Any], ...] = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = {
            node.body[0].value
            for kind in documented
            for node in self.of_type(kind)
            if node.body and isinstance(node.body[0], ast.Expr)
        }
        for node in self.of_type(ast.Constant):
            if isinstance(node.value, str) and node not in docstrings:
                yield node.lineno, node.value


unparsed = cache(ast.unparse)  # what is called is asked by several rules
Violations = Iterator[tuple[int, str]]
Rule = Callable[[Source], Violations]


def import_directions(source: Source) -> Violations:
    allowed = {source.folder} | MAY_IMPORT.get(source.folder, set()) | MAY_ALSO_IMPORT.get(source.path, set())
    for line, name in source.imports:
        if name.startswith("."):
            yield line, "relative import"
        package, *parts = name.split(".")
        if package == "ltx2" and source.part != "tests" and parts != ["__version__"] and _folder(parts) not in allowed:
            yield line, f"{source.folder} imports {name}"


def _folder(parts: list[str]) -> str:
    """Of an import below `ltx2`: ["runtime", "files", "paths", "write_text"] is runtime/files."""
    if not parts or parts[0] not in (*PARTS, "demo", "commands"):
        return "ltx2"
    if parts[0] not in PARTS:
        return f"ltx2/{parts[0]}"
    folder = "/".join(parts[:2])
    return folder if (ROOT / folder).is_dir() else parts[0]


def library_users(source: Source) -> Violations:
    if source.part == "tests":
        return
    for line, name in source.imports:
        library = name.split(".")[0]
        if library in USERS and not {source.path, source.folder} & USERS[library]:
            yield line, f"{library} is for {', '.join(sorted(USERS[library])) or 'the tests only'}"
        if library == "mlx" and (source.folder in WITHOUT_MLX or source.path in WITHOUT_MLX_FILES):
            yield line, "works without MLX"


def only_the_command_line_prints(source: Source) -> Violations:
    if source.path in PRINTERS:
        return
    for call in source.of_type(ast.Call):
        if unparsed(call.func) in ("print", "builtins.print", "sys.stdout.write", "sys.stderr.write"):
            yield call.lineno, "prints"


def releases_are_data(source: Source) -> Violations:
    if source.part == "tests":
        return
    for line, text in source.texts():
        if RELEASE_NAME.search(text) or RELEASE_NUMBER.fullmatch(text):
            yield line, f"names a release: {text!r}"
    for compare in source.of_type(ast.Compare):
        sides = [compare.left, *compare.comparators]
        names = {ast.unparse(side).rpartition(".")[2] for side in sides}
        if names & {"release", "version"} and any(isinstance(side, ast.Constant) and side.value for side in sides):
            yield compare.lineno, "branches on a release"


def no_swallowed_exception(source: Source) -> Violations:
    broad = {"Exception", "BaseException"}
    for handler in source.of_type(ast.ExceptHandler):
        caught = {"BaseException"} if handler.type is None else {ast.unparse(node) for node in ast.walk(handler.type)}
        if caught & broad and not any(isinstance(node, ast.Raise) for node in ast.walk(handler)):
            yield handler.lineno, "swallows every exception"
    for call in source.of_type(ast.Call):
        suppresses = unparsed(call.func) in ("suppress", "contextlib.suppress")
        if suppresses and {unparsed(argument) for argument in call.args} & broad:
            yield call.lineno, "suppresses every exception"


def failures_in_plain_words(source: Source) -> Violations:
    """runtime/errors.reason says what an OSError means; its own text has a number and repeats the path."""
    for handler in source.of_type(ast.ExceptHandler):
        if source.part == "tests" or handler.name is None or handler.type is None:
            continue
        if "OSError" in {ast.unparse(node) for node in ast.walk(handler.type)}:
            raw = {f"str({handler.name})", f"{handler.name}.strerror", f"{{{handler.name}}}"}
            for node in ast.walk(handler):
                shown = f"{{{ast.unparse(node.value)}}}" if isinstance(node, ast.FormattedValue) else ast.unparse(node)
                if shown in raw:
                    yield handler.lineno, "shows an OSError as it is: use reason"


def no_environment_variables(source: Source) -> Violations:
    if source.part != "runtime":
        return
    names = {f"os.{name}" for name in ("environ", "environb", "getenv")}
    used = ((node.lineno, ast.unparse(node)) for node in source.of_type(ast.Attribute))
    yield from ((line, f"reads {name}") for line, name in [*used, *source.imports] if name in names)


def one_place_exchanges(source: Source) -> Violations:
    if source.path != "runtime/distributed/machines.py" and "distributed" in source.text:
        used = [(node.lineno, ast.unparse(node)) for node in source.of_type(ast.Attribute)]
        names = [(line, name) for line, name in [*used, *source.imports] if name.startswith("mx.distributed")]
        imported = [(line, name) for line, name in source.imports if "mlx.core.distributed" in name]
        yield from ((line, f"calls {name}: use runtime/distributed/machines.py") for line, name in [*names, *imported])


def strict_weights(source: Source) -> Violations:
    for call in source.of_type(ast.Call):
        loose = any(word.arg == "strict" and ast.unparse(word.value) == "False" for word in call.keywords)
        if unparsed(call.func).endswith("load_weights") and loose:
            yield call.lineno, "loads weights loosely"


def sizes(source: Source) -> Violations:
    lines = source.text.count("\n")
    limit = MAX_LINES.get(source.part, MAX_LINES_ELSEWHERE)
    if lines > limit:
        yield lines, f"{lines} lines, at most {limit}"
    for function in source.of_type(ast.FunctionDef):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > MAX_FUNCTION_LINES:
            yield function.lineno, f"{function.name} has {length} lines, at most {MAX_FUNCTION_LINES}"
        count = len(_parameters(source, function))
        if source.part != "tests" and count > MAX_PARAMETERS:
            yield function.lineno, f"{function.name} has {count} parameters, at most {MAX_PARAMETERS}"


def _parameters(source: Source, function: ast.FunctionDef) -> list[str]:
    """What counts: not self, not a command's options, not the keywords of the public interface."""
    decorators = {ast.unparse(d).partition("(")[0].rpartition(".")[2] for d in function.decorator_list}
    if decorators & {"command", "option", "argument"}:
        return []
    keywords = [] if source.path == "ltx2/api.py" else function.args.kwonlyargs
    names = [argument.arg for argument in [*function.args.posonlyargs, *function.args.args, *keywords]]
    return [name for name in names if name not in ("self", "cls")]


def documented(source: Source) -> Violations:
    if source.path != "tests/__init__.py" and not ast.get_docstring(source.tree):
        yield 1, "has no module docstring"


def no_path_of_one_machine(source: Source) -> Violations:
    for number, line in enumerate(source.text.splitlines(), 1):
        if MACHINE_PATH.search(line):
            yield number, "names a path of one machine"


def references_through_parity(source: Source) -> Violations:
    """tests/support/parity.py decides whether a missing reference skips or fails."""
    if source.part == "tests" and source.path != "tests/support/parity.py":
        for call in source.of_type(ast.Call):
            if unparsed(call.func).endswith("importorskip"):
                yield call.lineno, "importorskip: use tests.support.parity.require"


def no_test_looks_at_a_clock(source: Source) -> Violations:
    """On a busy machine everything takes longer. Wait with tests.support.waiting, count calls, or give the code a clock
    that the test sets; speed is what tests/bench_hot.py is for."""
    if source.part != "tests" or source.path in ("tests/bench_hot.py", "tests/test_architecture.py"):
        return
    for call in source.of_type(ast.Call):
        if CLOCK.search(unparsed(call.func)):
            yield call.lineno, "looks at a clock"
        if any(word.arg == "timeout" for word in call.keywords):
            yield call.lineno, "waits for a limited time"
    for line, text in source.texts():  # programs that run in processes of their own
        if re.search(CLOCK.pattern.replace("$", r"\("), text):
            yield line, "looks at a clock"


RULES: list[Rule] = [
    import_directions,
    library_users,
    only_the_command_line_prints,
    releases_are_data,
    no_swallowed_exception,
    failures_in_plain_words,
    no_environment_variables,
    one_place_exchanges,
    strict_weights,
    sizes,
    documented,
    no_path_of_one_machine,
    references_through_parity,
    no_test_looks_at_a_clock,
]


def python_files() -> list[Path]:
    """Every source file once, at its real place."""
    found = [path for part in (*PARTS, "tests", "ltx2/demo", "ltx2/commands") for path in (ROOT / part).rglob("*.py")]
    return sorted([*(ROOT / "ltx2").glob("*.py"), *found])


SOURCES = [Source(path.relative_to(ROOT).as_posix(), path.read_text()) for path in python_files()]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Rule) -> None:
    found = [f"{source.path}:{line}: {what}" for source in SOURCES for line, what in rule(source)]
    assert not found, "\n".join(found)


def test_every_part_is_read() -> None:
    assert {source.part for source in SOURCES} == {"ltx2", "tests", *PARTS}


BAD: list[tuple[Rule, str, str]] = [
    (import_directions, "runtime/networks/load.py", "from ltx2.convert import plan"),
    (import_directions, "runtime/networks/load.py", "from ltx2 import convert"),
    (import_directions, "runtime/networks/load.py", "def f():\n    import ltx2.convert.plan.entries"),
    (import_directions, "runtime/networks/load.py", "from . import layout"),
    (import_directions, "convert/plan/entries.py", "from ltx2.quant.codes.pack import pack"),
    (import_directions, "quant/codes/pack.py", "import ltx2.bench"),
    (import_directions, "bench/speed/run.py", "from ltx2.api import load"),
    (import_directions, "ltx2/api.py", "from ltx2.commands import clips"),
    (import_directions, "ltx2/demo/__init__.py", "from ltx2.commands import clips"),
    (import_directions, "runtime/networks/text/gemma3.py", "from ltx2.runtime.memory.meter import Phase"),
    (import_directions, "runtime/sampling/denoise.py", "from ltx2.runtime.generate.job import Job"),
    (library_users, "convert/plan/entries.py", "import huggingface_hub.utils"),
    (library_users, "ltx2/api.py", "from rich.table import Table"),
    (library_users, "runtime/networks/load.py", "import torch"),
    (library_users, "convert/names/rules.py", "import mlx.core as mx"),
    (only_the_command_line_prints, "runtime/networks/load.py", "print(1)"),
    (only_the_command_line_prints, "ltx2/api.py", "import sys\nsys.stdout.write('1')"),
    (releases_are_data, "runtime/networks/load.py", "x = '2.3'"),
    (releases_are_data, "runtime/networks/load.py", "x = f'ltx-2.3-{y}'"),
    (releases_are_data, "runtime/networks/load.py", "x = 'LTX23'"),
    (releases_are_data, "runtime/networks/load.py", "x = 'ltx-2-19b-dev'"),
    (releases_are_data, "runtime/networks/load.py", "x = 'only release 2.0 works'"),
    (releases_are_data, "runtime/networks/load.py", "if manifest.release == 'x': y = 1"),
    (no_swallowed_exception, "tests/test_a.py", "try: x()\nexcept: pass"),
    (no_swallowed_exception, "ltx2/api.py", "try: x()\nexcept (ValueError, Exception): y = 1"),
    (no_swallowed_exception, "ltx2/api.py", "with contextlib.suppress(Exception): x()"),
    (failures_in_plain_words, "ltx2/api.py", "try: x()\nexcept OSError as e: f(str(e))"),
    (failures_in_plain_words, "ltx2/api.py", "try: x()\nexcept (ValueError, OSError) as e: f(e.strerror)"),
    (failures_in_plain_words, "ltx2/api.py", "try: x()\nexcept OSError as e: f(f'no: {e}')"),
    (no_environment_variables, "runtime/networks/load.py", "import os\nx = os.environ.get('A')"),
    (no_environment_variables, "runtime/networks/load.py", "from os import getenv"),
    (one_place_exchanges, "bench/speed/run.py", "x = mx.distributed.all_sum(y)"),
    (one_place_exchanges, "runtime/networks/load.py", "from mlx.core.distributed import init"),
    (strict_weights, "runtime/networks/load.py", "network.load_weights(w, strict=False)"),
    (sizes, "runtime/networks/load.py", "x = 1\n" * 401),
    (sizes, "runtime/networks/load.py", "def f():\n" + "    x = 1\n" * 100),
    (sizes, "runtime/networks/load.py", "def f(a, b, c, d, *, e, f, g): ..."),
    (sizes, "ltx2/api.py", "def f(a, b, c, d, e, f, g): ..."),
    (documented, "quant/__init__.py", ""),
    (documented, "tests/test_a.py", "import os"),
    (no_path_of_one_machine, "tests/test_a.py", "# see /" + "opt/venv/bin"),
    (no_path_of_one_machine, "tests/test_a.py", "x = '/" + "work/shared/demo'"),
    (references_through_parity, "tests/test_a.py", "torch = pytest.importorskip('torch')"),
    (no_test_looks_at_a_clock, "tests/test_a.py", "import time\nassert time.perf_counter() - started < 5"),
    (no_test_looks_at_a_clock, "tests/test_a.py", "from time import monotonic\ndeadline = monotonic() + 5"),
    (no_test_looks_at_a_clock, "tests/test_a.py", "CODE = 'import time; print(time.process_time())'"),
    (no_test_looks_at_a_clock, "tests/support/a.py", "thread.join(timeout=5)"),
]

GOOD: list[tuple[Rule, str, str]] = [
    (
        import_directions,
        "convert/plan/make.py",
        "from ltx2 import __version__\nfrom ltx2.runtime.errors import Ltx2Error",
    ),
    (import_directions, "quant/apply.py", "from ltx2.convert.tensors.steps import cast"),
    (import_directions, "ltx2/__main__.py", "from ltx2.cli import main"),
    (import_directions, "tests/test_cli.py", "from ltx2.cli import run"),
    (import_directions, "runtime/networks/transformer/model.py", "from ltx2.runtime.model.config import Config"),
    (import_directions, "runtime/generate/pipeline.py", "from ltx2.runtime import events"),
    (library_users, "ltx2/render.py", "from rich.table import Table"),
    (library_users, "convert/write.py", "import mlx.core as mx"),
    (only_the_command_line_prints, "ltx2/cli.py", "print(1)"),
    (
        releases_are_data,
        "runtime/networks/load.py",
        "x = 2.0\ny = 'ltx2.json'\nz = '2.05 GB'\nw = '''LTX-2 checkpoint'''",
    ),
    (releases_are_data, "runtime/networks/load.py", "def f():\n    '''Release 2.0 has no gates.'''"),
    (releases_are_data, "runtime/generate/options/preset.py", "x = data['release'] != release"),
    (no_swallowed_exception, "runtime/media/video.py", "try: x()\nexcept BaseException:\n    y()\n    raise"),
    (no_swallowed_exception, "runtime/media/video.py", "with suppress(BrokenPipeError): x()"),
    (failures_in_plain_words, "ltx2/api.py", "try: x()\nexcept OSError as error: f(reason(error), error.filename)"),
    (failures_in_plain_words, "ltx2/api.py", "try: x()\nexcept ValueError as e: f(str(e))"),
    (no_environment_variables, "tests/support/parity.py", "import os\nx = os.environ['CI']"),
    (one_place_exchanges, "runtime/distributed/machines.py", "x = mx.distributed.all_gather(y)"),
    (strict_weights, "runtime/networks/load.py", "zip(a, b, strict=False)\nnetwork.load_weights(w, strict=True)"),
    (sizes, "ltx2/api.py", "def f(a, *, b, c, d, e, f, g, h): ..."),
    (sizes, "ltx2/cli.py", "@cli.command()\n@click.option('-a')\ndef f(a, b, c, d, e, f, g): ..."),
    (no_path_of_one_machine, "tests/test_a.py", "x = 'frame/work/root', './work'"),
    (references_through_parity, "tests/test_a.py", "torch = require('torch')"),
    (no_test_looks_at_a_clock, "tests/test_a.py", "time.sleep(0.01)\nset(time, 'monotonic', clock)\nthread.join()"),
    (no_test_looks_at_a_clock, "runtime/memory/streaming.py", "asked = time.perf_counter()"),
]


@pytest.mark.parametrize(("rule", "path", "text"), BAD)
def test_rule_fires(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(path, text)))


@pytest.mark.parametrize(("rule", "path", "text"), GOOD)
def test_rule_allows(rule: Rule, path: str, text: str) -> None:
    assert not list(rule(Source(path, text)))


def test_every_rule_is_proved() -> None:
    assert {rule for rule, _, _ in BAD} == set(RULES)


def test_planning_does_not_load_mlx() -> None:
    """The import rule sees one file; this sees what those files import in turn."""
    found = [path for part in WITHOUT_MLX for path in sorted((ROOT / part).rglob("*.py"))]
    paths = [path.relative_to(ROOT).as_posix() for path in found] + list(WITHOUT_MLX_FILES)
    modules = ["ltx2." + path[:-3].removesuffix("/__init__").replace("/", ".") for path in paths]
    code = f"import sys, {', '.join(modules)}; sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("part", PARTS)
def test_symlink(part: str) -> None:
    link = ROOT / "ltx2" / part
    assert link.is_symlink(), f"{link} is no symlink: on Windows, clone with git -c core.symlinks=true"
    assert link.readlink() == Path("..", part)


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for path in python_files()}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_data_files_are_packaged() -> None:
    """setuptools counts every folder as a package, so a pattern is matched in a file's own folder."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    data = {path for part in (*PARTS, "ltx2") for path in (ROOT / part).rglob("*") if path.is_file()}
    data = {path for path in data if path.suffix not in (".py", ".pyc") and path.parent != ROOT / "bench" / "results"}
    assert sorted(path for path in data if not any(path.match(pattern) for pattern in patterns)) == []
    assert {"ltx-2-demo.safetensors", "tokenizer.json", "py.typed"} <= {path.name for path in data}


def test_no_machine_path_in_set_up_files() -> None:
    files = [ROOT / "Makefile", ROOT / "pyproject.toml"]
    files += [path for pattern in ("*.md", ".ci/*", ".github/*/*") for path in ROOT.glob(pattern)]
    assert [file for file in files if list(no_path_of_one_machine(Source(file.name, file.read_text())))] == []
