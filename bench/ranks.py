"""What several machines gain, measured on one with several GPUs (NCCL), or with processes of its CPU (ring, to try this
itself): the suite on 1, 2, ... ranks, and every shared phase's speed-up beside the one that is expected of it.

Expected is one rank's time times the share of the work that the busiest rank has, and what is sent over a link as fast
as was measured. `python -m ltx2.bench.ranks --ranks 1 2 --out receipt.json`"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ltx2.runtime.distributed.ranks import RANK

HERE = "127.0.0.1"
SUITE = "machines"


def environments(backend: str, size: int, folder: Path) -> Iterator[dict[str, str]]:
    """What makes processes ranks of one group on this machine; nothing where there is one."""
    if size == 1:
        yield {}
        return
    ports = list(_free_ports(size))
    hostfile = folder / "hosts.json"
    hostfile.write_text(json.dumps([[f"{HERE}:{port}"] for port in ports]))
    for rank in range(size):
        if backend == "ring":
            yield {RANK: str(rank), "MLX_HOSTFILE": str(hostfile)}
        else:
            group = {"NCCL_HOST_IP": HERE, "NCCL_PORT": str(ports[0]), "MLX_WORLD_SIZE": str(size)}
            # Multicast over NVLink needs rights that a container may lack, and all_gather gains little by it.
            yield group | {RANK: str(rank), "CUDA_VISIBLE_DEVICES": str(rank), "NCCL_NVLS_ENABLE": "0"}


def _free_ports(count: int) -> Iterator[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind((HERE, 0))
        yield each.getsockname()[1]
    for each in sockets:
        each.close()


def measured(backend: str, size: int, arguments: Sequence[str]) -> dict[str, Any]:
    """The receipt of so many ranks. Raises CalledProcessError where one fails: the others end by themselves."""
    with TemporaryDirectory() as name:
        folder, processes = Path(name), []
        out = folder / "receipt.json"
        command = [sys.executable, "-m", "ltx2.bench.fullsize", *arguments, "--out", str(out)]
        for variables in environments(backend, size, folder):
            leads = variables.get(RANK, "0") == "0"
            shown = None if leads else subprocess.DEVNULL
            processes.append(subprocess.Popen(command, env=os.environ | variables, stdout=shown or sys.stderr))
        codes = [process.wait() for process in processes]
        for code in filter(None, codes):
            raise subprocess.CalledProcessError(code, command)
        return dict(json.loads(out.read_text()))


def speedups(alone: Mapping[str, Any], several: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of every shared phase that both receipts have; seconds and bytes are of a denoise step, or of all tiles."""
    link, found = several["link"], []
    for one, many in zip(alone["cases"], several["cases"], strict=True):
        before = {phase["name"]: phase for phase in one["phases"]}
        for phase in many["phases"]:
            if (share := phase.get("busiest_share")) is None:
                continue
            (seconds, _), (together, sent) = (_each(p) for p in (before[phase["name"]], phase))
            expected = seconds * share + sent / link["bytes_per_second"]
            found.append(
                {
                    "ranks": several["machines"],
                    "case": many["name"],
                    "phase": phase["name"],
                    "seconds_alone": round(seconds, 4),
                    "seconds": round(together, 4),
                    "speedup": round(seconds / together, 3),
                    "expected_speedup": round(seconds / expected, 3),
                    "busiest_share": share,
                    "sent_bytes": round(sent),
                    "exchange_share": phase["exchange_share"],
                }
            )
    return found


def _each(phase: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds, and bytes that are sent."""
    sent, step = phase.get("sent_bytes", 0), phase["step_seconds"]
    if phase["name"].startswith("stage"):
        return step["median"], sent / phase["steps"]
    return phase["work_seconds"]["median"], sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks; the first must be 1")
    parser.add_argument("--backend", choices=["nccl", "ring"], default="nccl")
    parser.add_argument("--out", type=Path, required=True, help="receipt to write")
    args, others = parser.parse_known_args()
    if args.ranks[0] != 1:
        parser.error("the first of --ranks must be 1: others are compared with it")
    arguments = others if "--suite" in others else ["--suite", SUITE, *others]
    receipts, gains = list[dict[str, Any]](), list[dict[str, Any]]()
    for size in args.ranks:
        sys.stderr.write(f"{size} of {args.ranks} ranks\n")
        receipts.append(measured(args.backend, size, arguments))
        gains += speedups(receipts[0], receipts[-1]) if size > 1 else []
        done = {"kind": "ranks", "backend": args.backend, "speedups": gains, "receipts": receipts}
        args.out.write_text(json.dumps(done, indent=1) + "\n")  # what is interrupted leaves what it measured
    sys.stdout.write(json.dumps({"speedups": gains}, indent=1) + "\n")


if __name__ == "__main__":
    main()
