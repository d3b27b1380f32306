"""Fixtures shared by all tests: random checkpoints, the same converted, and the record of measured figures."""

import gc
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

import ltx2.api  # ltx2.convert is the function, whichever sub-package a test imports first
from tests.support.command import SEED, SIZE, Done, Here
from tests.support.hostile import HANGS
from tests.support.machine import small_ceilings
from tests.support.official import DEMO, DEMO_25, MONOLITH, Official, Split, random_23, random_25, random_official
from tests.support.parity import require
from tests.support.sampling import first_steps

if TYPE_CHECKING:
    from tests.support.reference_chain import ReferenceChain

FIGURE = "figure"  # key of the measured figures among a test's properties, which reach us from every worker process
FROZEN = pytest.StashKey[int]()  # how many modules were there when all objects were last taken from the collector


def pytest_configure(config: pytest.Config) -> None:
    """Compare on the CPU: a GPU's float32 products may round more coarsely. Commands that tests start as processes
    use the machine's own device."""
    if config.option.markexpr not in ("fullsize", "speed"):
        mx.set_default_device(mx.cpu)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Imported modules stay, so the collector need not walk them. A clip collects at the end of each of its phases:
    with torch in the process, that took two thirds of a small clip's time."""
    stash, modules = item.config.stash, len(sys.modules)
    if stash.get(FROZEN, 0) != modules:
        gc.collect()
        gc.freeze()
        stash[FROZEN] = modules


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> Official:
    """A random checkpoint set in the official layout, float32."""
    return random_official(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="session")
def model(official: Official, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`official` converted by our converter, as users would."""
    out = tmp_path_factory.mktemp("converted") / "model"
    ltx2.convert([str(path) for path in official.sources], str(out))
    return out


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded demo checkpoint converted; what the golden tensors were computed with."""
    out = tmp_path_factory.mktemp("demo") / "model"
    ltx2.convert([str(path) for path in DEMO], str(out), variant="distilled")
    return out


@pytest.fixture(scope="session")
def demo_f32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in float32: a CPU computes bf16 slowly and imprecisely."""
    out = tmp_path_factory.mktemp("demo") / "f32"
    ltx2.convert(DEMO, out, variant="distilled", dtype="f32")
    return out


@pytest.fixture(scope="session")
def demo_dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in float32, as a dev model."""
    out = tmp_path_factory.mktemp("demo") / "dev"
    ltx2.convert(DEMO, out, variant="dev", dtype="f32")
    return out


@pytest.fixture(scope="session")
def chain(official: Official) -> "ReferenceChain":
    """All of the official networks in diffusers' pipelines."""
    require("torch"), require("diffusers"), require("transformers")
    from tests.support.reference_chain import ReferenceChain

    return ReferenceChain(official)


@pytest.fixture(scope="session")
def official_25(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """A random checkpoint set in the layout of 2.5, float32."""
    return random_25(tmp_path_factory.mktemp("official-25"))


@pytest.fixture(scope="session")
def model_25(official_25: Split, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`official_25` converted."""
    out = tmp_path_factory.mktemp("converted") / "model-25"
    ltx2.convert(official_25.sources, out, variant="distilled")
    return out


@pytest.fixture(scope="session")
def official_23(tmp_path_factory: pytest.TempPathFactory) -> Official:
    """A random checkpoint set in the layout of 2.3, float32."""
    return random_23(tmp_path_factory.mktemp("official-23"))


@pytest.fixture(scope="session")
def model_23(official_23: Official, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`official_23` converted."""
    out = tmp_path_factory.mktemp("converted") / "model-23"
    ltx2.convert(official_23.sources, out)
    return out


@pytest.fixture(scope="session")
def demo_25(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded 2.5 demo checkpoint converted to float32; what its golden tensors were computed with."""
    out = tmp_path_factory.mktemp("demo") / "25"
    ltx2.convert(DEMO_25, out, variant="distilled", dtype="f32")
    return out


@pytest.fixture
def in_time() -> Iterator[None]:
    """A command that waits for a pipe, or computes for ever, fails."""

    def stop(*_: object) -> None:
        raise TimeoutError("the command hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two components of the demo model, several files each."""
    out = tmp_path_factory.mktemp("small") / "model"
    ltx2.convert(MONOLITH, out, variant="distilled", only=("vocoder", "connectors"), shard_size=0.0004)
    assert (out / "vocoder" / "model.safetensors.index.json").is_file()
    return out


@pytest.fixture
def stranger(small_model: Path, tmp_path: Path) -> Path:
    """A copy of the small model to spoil, with a file beside it that no folder's name leads to."""
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "secret.safetensors")
    return Path(shutil.copytree(small_model, tmp_path / "model"))


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str]) -> Here:
    """`ltx2 ...` in this process, which saves its start."""

    import ltx2.cli

    def call(*args: str | Path) -> Done:
        capfd.readouterr()
        code = ltx2.cli.run([str(arg) for arg in args])
        return Done(code, *capfd.readouterr())

    return call


@pytest.fixture
def generate(here: Here, demo_f32: Path, tmp_path: Path) -> Here:
    """`ltx2 generate -m demo -o clip.mp4 --width 64 ...` in an empty folder; `to` is the clip's name."""

    def call(*args: str | Path, to: str = "clip.mp4", size: Sequence[str] = SIZE) -> Done:
        return here("generate", *([] if "--seed" in args else SEED), *args, "-m", demo_f32, "-o", tmp_path / to, *size)

    return call


@pytest.fixture(scope="module")
def few_steps() -> Iterator[None]:
    """Three steps a stage and short texts, in the whole file."""
    with pytest.MonkeyPatch.context() as patch:
        first_steps(patch, 3)
        yield


@pytest.fixture
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step a stage, short texts, and no time for what a machine reaches at best."""
    first_steps(monkeypatch, 1)
    small_ceilings(monkeypatch)


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """`note(text)`: list a result at the end of the run."""
    return lambda text: request.node.user_properties.append((FIGURE, text))


@pytest.fixture
def figure(note: Callable[[str], None]) -> Callable[..., None]:
    """`figure(name, value, limit=...)`: assert value <= limit and list the reached figure at the end of the run."""

    def record(name: str, value: float, *, limit: float) -> None:
        line = f"{name}: {value:.3g} (limit {limit:.3g})"
        note(line)
        assert value <= limit, line

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    lines = [text for report in reports for key, text in report.user_properties if key == FIGURE]
    if lines:
        terminalreporter.section("measured figures")
        for line in lines:
            terminalreporter.write_line(line)
