"""The machines that make one clip together, and the only place that calls `mx.distributed`.

Every machine runs the same command; the first one (rank 0) leads: it reads the prompt and writes the files. Arrays are
exchanged by all_gather alone, which every backend of MLX has. An exchange begins once its array is computed, and the
host waits for its end: macOS would end a command on a GPU that waits for a network.

Links are neither encrypted nor authenticated."""

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Thread, current_thread, main_thread
from typing import Any

import mlx.core as mx
import numpy as np

from ltx2.runtime.distributed.ranks import RANK, share_of
from ltx2.runtime.errors import Ltx2Error, MachinesError, UnsupportedError
from ltx2.runtime.machine.bounded import evaluate

BACKENDS = {"MLX_HOSTFILE": "ring", "MLX_IBV_DEVICES": "jaccl", "NCCL_HOST_IP": "nccl"}
LEAST = (0, 32, 4)  # version of MLX: earlier ones wait for ever for a lost machine
# The longest wait for an exchange: seconds, and so many times the longest exchange, or work between two, so far.
PATIENCE, TIMES = 600.0, 10.0
GRACE = 5.0  # seconds for an exchange to end by itself after a signal
STOPS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
AGAIN = "start the same command again with --resume, on these machines or on others"
Late = Callable[[MachinesError], None]


class StoppedError(MachinesError):
    """Ctrl-C, or another signal that ends a command, while another machine does not answer."""

    kind = "interrupted"

    def __init__(self, number: int) -> None:
        super().__init__("interrupted", f"{STOPS[signal.Signals(number)]}, while another machine did not answer", AGAIN)
        self.exit_code = 128 + number  # as shells tell it


class Machines:
    """This machine, number `rank` of `size`. `names` are for people, by rank. All exchanges so far sent `sent_bytes`
    from this machine and took `seconds`, waiting for others included."""

    def __init__(self, group: Any = None, late: Late | None = None) -> None:
        """`group` is MLX's; None: this machine alone, which exchanges nothing. `late` ends the process: another thread
        calls it when an exchange takes too long, since nothing else can interrupt one."""
        self._group, self._late = group, late or (lambda _: None)
        self.rank: int = 0 if group is None else group.rank()
        self.size: int = 1 if group is None else group.size()
        self.sent_bytes, self.seconds = 0, 0.0
        self._longest, self._left = 0.0, time.perf_counter()
        self.names = [f"{name} (rank {rank})" for rank, name in enumerate(self.everyone(socket.gethostname()))]

    def __repr__(self) -> str:
        return f"<Machines: {', '.join(self.names)}>" if self.several else "<Machines: this one>"

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.size > 1

    def stack(self, x: mx.array) -> mx.array:
        """Every machine's x, (size, *x.shape); all are of one shape and dtype."""
        if self._group is None:
            return x[None]
        own = mx.contiguous(x)[None]
        evaluate(own)
        mx.eval(own)  # waits, also where evaluations may run ahead
        began = time.perf_counter()
        limit = self._limit(began - self._left)
        why = f"an exchange has taken {limit:.0f} s: it sleeps, or the network is cut"
        with _ending(limit, self._late, MachinesError("a machine does not answer", why, AGAIN)), _lost():
            found = mx.distributed.all_gather(own, group=self._group)
            mx.eval(found)
        self._left = time.perf_counter()
        self.seconds += self._left - began
        self.sent_bytes += (self.size - 1) * x.nbytes
        self._longest = max(self._longest, self._left - began)
        return found

    def joined(self, x: mx.array, axis: int, total: int) -> mx.array:
        """The whole array, from every machine's share `x` along an axis; `total` is its length there."""
        if self._group is None:
            return x
        shares = [share_of(total, rank, self.size) for rank in range(self.size)]
        lengths = [share.stop - share.start for share in shares]
        missing = max(lengths) - x.shape[axis]
        if missing:
            x = mx.pad(x, [(0, missing if number == axis else 0) for number in range(x.ndim)])
        before = (slice(None),) * axis
        parts = zip(self.stack(x), lengths, strict=True)
        return mx.concatenate([part[(*before, slice(length))] for part, length in parts], axis)

    def share(self, total: int) -> slice:
        """This machine's part of `total` things."""
        return share_of(total, self.rank, self.size)

    def everyone(self, value: Any) -> list[Any]:
        """Every machine's `value`, by rank; values are JSON's."""
        if self._group is None:
            return [value]
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        lengths = [int(length) for length in np.array(self.stack(mx.array(len(text))))]
        padded = np.pad(text, (0, max(lengths) - len(text)))
        rows = np.array(self.stack(mx.array(padded)))
        return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]

    def told(
        self, message: Mapping[str, Any] | None = None, tensors: Mapping[str, mx.array] | None = None
    ) -> tuple[dict[str, Any], dict[str, mx.array]]:
        """The leading machine's message and tensors, on all machines; all call this at the same place."""
        found = tensors or {}
        forms = {name: (value.shape, str(value.dtype).rpartition(".")[2]) for name, value in found.items()}
        first = self.everyone([message, forms])[0]
        return first[0], {
            name: self.stack(found[name] if self.leads else mx.zeros(shape, getattr(mx, dtype)))[0]
            for name, (shape, dtype) in first[1].items()
        }

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """All machines do the work inside, or none goes on: one that cannot raises its own error, the others a
        MachinesError that names it. No exchange may be inside."""
        failure: Ltx2Error | None = None
        try:
            yield
        except Ltx2Error as error:
            failure = error
        told = self.everyone(None if failure is None else [failure.what, failure.why, failure.fix])
        if failure is not None:
            raise failure
        for name, parts in zip(self.names, told, strict=True):
            if parts is not None:
                what, why, fix = parts
                raise MachinesError(f"{name} cannot begin", f"{what}: {why}", f"there: {fix}")

    def _limit(self, worked: float) -> float:
        """Seconds after which an exchange is given up; the last one was `worked` seconds ago."""
        self._longest = max(self._longest, worked)
        return PATIENCE + TIMES * self._longest


ALONE = Machines()


def join(environment: Mapping[str, str], late: Late) -> Machines:
    """The machines that the environment names, or this one alone.

    `late`: see `Machines`. Raises MachinesError where they do not find each other, UnsupportedError for an MLX that is
    too old.
    """
    if RANK not in environment:
        return ALONE
    from importlib import metadata  # here: a process alone starts sooner without it

    version = metadata.version("mlx")
    if tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < LEAST:
        needed = ".".join(map(str, LEAST))
        why = f"this is MLX {version}, which can wait for a lost machine without end"
        raise UnsupportedError("several machines cannot be used", why, f"install MLX {needed} or later on all of them")
    backend = next((name for variable, name in BACKENDS.items() if variable in environment), "any")
    fix = "check the hostfile, that all machines are on and in one network, and that each starts this command"
    missing = MachinesError("the machines do not find each other", f"after {PATIENCE:.0f} s one is missing", fix)
    try:
        with _ending(PATIENCE, late, missing):
            group = mx.distributed.init(strict=True, backend=backend)
    except (RuntimeError, ValueError) as error:
        raise MachinesError(missing.what, str(error), fix) from error
    return Machines(group, late)


@contextmanager
def _ending(seconds: float, late: Late, error: MachinesError) -> Iterator[None]:
    """End the process when the work inside takes longer than so many seconds, or does not end soon after one
    of STOPS. Python handles a signal only once MLX has returned; but its number is written to a socket at once."""
    heard, told = socket.socketpair()
    told.setblocking(False)

    def watch() -> None:
        end, said = time.monotonic() + seconds, error
        while (left := end - time.monotonic()) > 0:
            heard.settimeout(left)
            try:
                number = heard.recv(1)
            except TimeoutError:
                break
            if not number:
                return
            if number[0] in STOPS and not isinstance(said, StoppedError):
                end = min(end, time.monotonic() + GRACE)
                said = StoppedError(number[0])
        late(said)

    hears = current_thread() is main_thread()  # Python allows it there alone
    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False) if hears else -1
    watching = Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        if hears:
            signal.set_wakeup_fd(before)
        told.close()
        watching.join()
        heard.close()


@contextmanager
def _lost() -> Iterator[None]:
    """Turn MLX's error about a lost machine into a MachinesError."""
    try:
        yield
    except RuntimeError as error:
        why = f"{error}: it has ended, and says itself why if it could"
        raise MachinesError("another machine is lost", why, AGAIN) from error
