"""Kills `dfq quantize` or `dfq distill` at random moments until it has survived so many kills, and compares the files.

    python tools/survive_kills.py --kills 50 --seed 0
    python tools/survive_kills.py --command "distill reference reference --train full --method leaves -n 8"

The command runs undisturbed once. Then it is started again and again, and killed (SIGKILL) after a time drawn between
nothing and all that the undisturbed run took, until it ends by itself; that is one trip. Trips follow each other until
there were `--kills` kills. After each trip all files must be those of the undisturbed run, bit for bit but for the
seconds in logs, and no other. Where `--processes` is more than 1, torchrun starts it and one of them is killed, chosen
at random; of several numbers one is drawn for each start.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from accuracy_table import append, machine

from calibration.files import sha256_of

QUANTIZE = "quantize reference --bits w4a4 --recipe accurate -n 32 --batch-size 4 --iterations 20"
TIMED = ("log.jsonl", "curve.svg", "distillation.json")
"""Files with seconds in them; of these only the presence is compared."""


def main() -> None:
    arguments = parse_arguments()
    draw = random.Random(arguments.seed)
    # Rounding depends on the number of threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        started = time.monotonic()
        run(arguments, 1, folder / "undisturbed").wait_for_success()
        whole = time.monotonic() - started
        wanted = sums(folder / "undisturbed")
        kills, trips, early, seconds = 0, 0, 0, 0.0
        while kills < arguments.kills:
            out = folder / "disturbed"
            started = time.monotonic()
            while True:
                process = run(arguments, draw.choice(arguments.processes), out)
                if not process.killed_after(draw.uniform(0, whole), draw):
                    process.wait_for_success()
                    break
                kills += 1
                early += not has_all_images(out)
            seconds += time.monotonic() - started
            trips += 1
            found = sums(out)
            if found != wanted:
                differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
                sys.exit(f"after {kills} kills these differ from the undisturbed run: {', '.join(differing)}")
            shutil.rmtree(out)
            print(f"{kills} kills in {trips} trips: the same {len(wanted)} files", flush=True)
    line = {"command": arguments.command, "processes": arguments.processes, "seed": arguments.seed, "kills": kills}
    line |= {"trips": trips, "files": len(wanted), "kills_among_images": early}
    line |= {"seconds_undisturbed": whole, "seconds_per_trip": seconds / trips, "machine": machine()}
    print(
        f"{kills} kills in {trips} trips, {early} of them before all images were made: always the {len(wanted)} files "
        f"of the undisturbed run. What a kill costs is the batch, stage or round it meets: {whole:.0f} s undisturbed, "
        f"{seconds / trips:.0f} s and {1 + kills / trips:.1f} starts a trip"
    )
    if arguments.results is not None:
        append(arguments.results, line)


class Run:
    """The command, in a process group of its own."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def killed_after(self, seconds: float, draw: random.Random) -> bool:
        """Kill it then; False where it has ended before."""
        try:
            self._process.wait(seconds)
            return False
        except subprocess.TimeoutExpired:
            pass
        os.kill(draw.choice(workers_of(self._process.pid)), signal.SIGKILL)
        # Where there are others, torchrun has noticed when it ends.
        self._process.communicate()
        return True

    def wait_for_success(self) -> None:
        _, said = self._process.communicate()
        if self._process.returncode != 0:
            sys.exit(f"the command failed:\n{said}")


def workers_of(process: int) -> list[int]:
    """Processes that do the work: what torchrun has started, or the process itself."""
    children = Path(f"/proc/{process}/task/{process}/children")
    started = [int(child) for child in children.read_text().split()] if children.exists() else []
    return started or [process]


def run(arguments: argparse.Namespace, processes: int, out: Path) -> Run:
    command = [*shlex.split(arguments.command), "--device", "cpu", "--quiet", "--out", str(out)]
    if processes == 1:
        return Run([sys.executable, "-m", "dfq", *command])
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    return Run([sys.executable, *launcher, "dfq", *command])


def sums(folder: Path) -> dict[str, str]:
    """A checksum for each file; none for those that hold seconds."""
    return {
        str(path.relative_to(folder)): "" if path.name in TIMED else sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def has_all_images(folder: Path) -> bool:
    manifests = [*folder.glob("calibration/manifest.json"), *folder.glob("pool/*/manifest.json")]
    return any(json.loads(path.read_text())["complete"] for path in manifests)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", default=QUANTIZE, help="of dfq, without --out (%(default)s)")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", nargs="+", type=int, default=[1])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="add a line of JSON there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
