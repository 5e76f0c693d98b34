"""Speed of model inversion: `dense`, `smi` and `pri` as dfq runs them, beside a plain dense loop, all in one run.

    python tools/bench_inversion.py --json docs/performance.json
    python tools/bench_inversion.py --json docs/performance.json --write docs/performance.md

The first measures, writes --json and prints its tables; --write measures nothing and puts the tables of --json into a
page, between `<!-- table: NAME.json -->` and `<!-- end -->`. Weights are random unless --checkpoint is given: speed
does not depend on them.

A run of thousands of iterations is not run whole. A patch schedule cuts it into phases, each with its own number of
patches, and within a phase one iteration costs what the next one does. So each phase is run alone, by
`calibration.invert` with a schedule that keeps so many patches from the first iteration on, and seconds per iteration
are read off between two reports of progress, after a warm-up. With looks are the phases in which every tenth iteration
also looks at the unmoved images to keep the best: the last one of a schedule. The projection is the sum over phases of
iterations x seconds per iteration. It leaves out what is done once per batch (opening the model, the last look) and
what a decision costs (one to two forward passes): --whole really runs all iterations of `smi` and a tenth of `dense`,
and says how far off the projection is.

Every phase is measured once in each of --rounds rounds, one after the other, so that a machine that slows down slows
all of them. FLOPs are those of matrix products and convolutions, by the formulas of torch.utils.flop_counter. Peak
memory is what ten iterations with all decisions need beyond the loaded model, each contender in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accuracy_table import machine, peak_memory
from inversion_tables import contender_of, median_seconds, projected, to_markdown, with_table
from plain_inversion import invert_plainly
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import dfq
from calibration import Dense, Objective, PatchSchedule, ProgressiveStop, Rebirth, Settings, invert
from calibration.inversion import COMPARE_EVERY, Progress
from calibration.passes import Precision, resolve_precision
from calibration.schedules import Choice
from calibration.tokens import PatchGrid
from dfq.versions import versions

WARM_UP = COMPARE_EVERY
DENSE_SHARE = 10
"""--whole runs one in so many iterations of `dense`."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Phase:
    """A part of a run in which every iteration costs the same; looks: whether images are compared in it."""

    kept: int
    looks: bool
    plain: bool = False


@dataclass(frozen=True)
class Held:
    """The patch schedule of one phase alone: `kept` patches, the most salient ones, from the first iteration on."""

    kept: int
    looks: bool
    images_per_canvas: int = 1

    def decisions(self, iterations: int) -> tuple[int, ...]:
        # Images are compared from the last decision on: where they are not to be, one is put at the very end.
        return (0,) if self.looks else (0, iterations - 1)

    def choose(self, keep: Tensor, scores: Tensor, decision: int) -> Choice:
        return Choice(keep.gather(1, scores.topk(self.kept, dim=1).indices).sort(dim=1).values)

    def describe(self) -> dict[str, Any]:
        return {"name": "held", "kept": self.kept}


@dataclass(frozen=True)
class Contender:
    """What a row of the table is about; schedule: None for the plain loop."""

    name: str
    schedule: PatchSchedule | None

    @property
    def images_per_canvas(self) -> int:
        return 1 if self.schedule is None else self.schedule.images_per_canvas

    def phases(self, num_patches: int, iterations: int) -> dict[Phase, int]:
        """How many of so many iterations are spent in each phase."""
        if self.schedule is None:
            return {Phase(num_patches, looks=False, plain=True): iterations}
        decisions = self.schedule.decisions(iterations)
        bounds = [0, *decisions, iterations]
        keep = torch.arange(num_patches)[None]
        phases: dict[Phase, int] = {}
        for number, (start, end) in enumerate(pairwise(bounds)):
            if number:
                keep = self.schedule.choose(keep, keep.float(), number - 1).stay
            phase = Phase(keep.shape[1], looks=end == iterations)
            if end > start:
                phases[phase] = phases.get(phase, 0) + end - start
        return phases


def contenders(division: int) -> list[Contender]:
    return [
        Contender("plain", None),
        Contender("dense", Dense()),
        Contender("smi", ProgressiveStop()),
        Contender("pri", Rebirth(division)),
    ]


class FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the FLOPs of what runs while it is open, backward passes included.

    FlopCounterMode also follows modules, by hooks that torch refuses where `torch.autograd.grad` is asked for the
    gradient of a module's own input, as inversion asks for it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


@dataclass(frozen=True)
class Bench:
    """A model and a batch to invert on it. initial: [B, 3, H, W]; labels: [B]."""

    model: dfq.Model
    initial: Tensor
    labels: Tensor
    precision: Precision
    seed: int

    @classmethod
    def of(cls, model: dfq.Model, batch_size: int, precision: Precision, seed: int) -> Bench:
        generator = torch.Generator().manual_seed(seed)
        initial = torch.randn(batch_size, 3, *PatchGrid.of(model.module).image_size, generator=generator)
        labels = torch.randint(model.num_classes, (batch_size,), generator=generator)
        return cls(model, initial.to(model.device), labels.to(model.device), precision, seed)

    def run(self, schedule: PatchSchedule | None, iterations: int, on_step: Callable[[int], None]) -> None:
        """Invert the batch; on_step: called every `COMPARE_EVERY` iterations, with the number of iterations done."""
        generator = torch.Generator().manual_seed(self.seed)
        mean, std = self.model.preprocessing.mean, self.model.preprocessing.std
        if schedule is None:
            invert_plainly(
                self.model.module,
                self.initial,
                self.labels,
                mean=mean,
                std=std,
                iterations=iterations,
                generator=generator,
                on_step=lambda done, _loss, _maps: on_step(done),
            )
            return

        def report(progress: Progress) -> None:
            if progress.iteration % COMPARE_EVERY == 0:
                on_step(progress.iteration)

        invert(
            self.model.module,
            self.initial,
            self.labels,
            mean=mean,
            std=std,
            objective=Objective(),
            schedule=schedule,
            settings=Settings(iterations),
            generator=generator,
            precision=self.precision,
            on_step=report,
        )

    def per_iteration(self, phase: Phase, steps: int, read: Callable[[], float]) -> float:
        """What one iteration of `phase` adds to what `read` gives, mean over `steps` of them after a warm-up."""
        marks: list[float] = []
        schedule: PatchSchedule | None = None
        if not phase.plain:
            everything = phase.kept == PatchGrid.of(self.model.module).num_patches
            # Only a dense run looks at images of all patches, and it is run without what choosing patches takes.
            schedule = Dense() if everything and phase.looks else Held(phase.kept, phase.looks)
        # One iteration more, for the decision at the end of a phase without looks.
        self.run(schedule, WARM_UP + steps + 1, lambda _done: marks.append(read()))
        return (marks[-1] - marks[0]) / steps

    def clock(self) -> float:
        """Seconds, once the device has done what it was asked to do."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def seconds(self, phase: Phase, steps: int) -> float:
        return self.per_iteration(phase, steps, self.clock)

    def flops(self, phase: Phase) -> float:
        """Of one iteration, for one canvas: all counted work is proportional to their number."""
        single = replace(self, initial=self.initial[:1], labels=self.labels[:1])
        with FlopCount() as counter:
            return single.per_iteration(phase, COMPARE_EVERY, lambda: float(counter.total))

    def matmul_peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of the fastest product of all tokens with a weight of the first block."""
        vit: Any = self.model.module
        tokens = len(self.initial) * (PatchGrid.of(vit).num_patches + vit.num_prefix_tokens)
        linears = [module for module in vit.blocks[0].modules() if isinstance(module, nn.Linear)]
        return max(self._matmul_speed(tokens, linear.in_features, linear.out_features, dtype) for linear in linears)

    def _matmul_speed(self, rows: int, inner: int, columns: int, dtype: torch.dtype, calls: int = 10) -> float:
        left = torch.randn(rows, inner, device=self.model.device, dtype=dtype)
        right = torch.randn(inner, columns, device=self.model.device, dtype=dtype)
        fastest = float("inf")
        for _ in range(3):
            started = self.clock()
            for _ in range(calls):
                torch.matmul(left, right)
            fastest = min(fastest, (self.clock() - started) / calls)
        return 2 * rows * inner * columns / fastest

    def peak_memory(self, schedule: PatchSchedule | None) -> int:
        """Bytes that a short run with all decisions needs at most, beyond what is held already."""
        iterations = COMPARE_EVERY if schedule is None else max(COMPARE_EVERY, schedule.images_per_canvas)
        return peak_memory(lambda: self.run(schedule, iterations, lambda _done: None), self.model.device)


def measure(bench: Bench, arguments: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Everything the tables are made from, for JSON.

    phases: seconds per iteration of the batch, one number per round, and FLOPs per iteration and canvas; contenders:
    how many iterations of a run fall into each of these phases, in their order.
    """
    runners = contenders(arguments.division)
    # Before anything else takes memory that the other processes need.
    memory = {runner.name: memory_apart(runner.name, argv) if arguments.memory else None for runner in runners}
    num_patches = PatchGrid.of(bench.model.module).num_patches
    spent = {runner.name: runner.phases(num_patches, arguments.iterations) for runner in runners}
    phases = list(dict.fromkeys(phase for own in spent.values() for phase in own))
    seconds: dict[Phase, list[float]] = {phase: [] for phase in phases}
    peaks = dict.fromkeys(DTYPES, 0.0)
    for number in range(arguments.rounds):
        note(f"round {number + 1} of {arguments.rounds}")
        for phase in phases:
            seconds[phase].append(bench.seconds(phase, arguments.steps))
        for name, dtype in DTYPES.items():
            peaks[name] = max(peaks[name], bench.matmul_peak(dtype))
    record = {
        "model": bench.model.name,
        "image_size": list(PatchGrid.of(bench.model.module).image_size),
        "num_patches": num_patches,
        "batch_size": len(bench.initial),
        "iterations": arguments.iterations,
        "precision": precision_name(resolve_precision(bench.precision, bench.model.device)),
        "device": str(bench.model.device),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "seed": bench.seed,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "matmul_flops_per_second": peaks,
        "phases": [asdict(phase) | {"seconds": seconds[phase], "flops": bench.flops(phase)} for phase in phases],
        "contenders": [
            {
                "name": runner.name,
                "images_per_canvas": runner.images_per_canvas,
                "iterations": [spent[runner.name].get(phase, 0) for phase in phases],
                "peak_memory": memory[runner.name],
            }
            for runner in runners
        ],
    }
    return record | {"whole": check_whole(bench, record) if arguments.whole else []}


def memory_apart(name: str, argv: Sequence[str]) -> int:
    """`Bench.peak_memory` of a contender, in a fresh process with the same arguments."""
    note(f"memory of {name}")
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--memory-of", name]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def check_whole(bench: Bench, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Projection and wall clock of runs that are really made."""
    schedules = {runner.name: runner.schedule for runner in contenders(1)}
    checks = []
    for name, share in (("dense", DENSE_SHARE), ("smi", 1)):
        iterations = -(-record["iterations"] // share)
        note(f"{iterations} iterations of {name}")
        started = bench.clock()
        bench.run(schedules[name], iterations, lambda _done: None)
        measured = bench.clock() - started
        whole = projected(contender_of(record, name), median_seconds(record))
        projection = whole * iterations / record["iterations"]
        checks.append({"name": name, "iterations": iterations, "projected": projection, "measured": measured})
    return checks


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def precision_name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known is dtype)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="a timm name, or `reference`")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights; without, random ones")
    parser.add_argument("--image-size", type=int, metavar="PIXELS")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; by default CUDA where there is one")
    parser.add_argument("--threads", type=int, help="of torch on a CPU; by default its own choice")
    parser.add_argument("--precision", choices=("auto", *DTYPES), default="auto", help="of all but the plain loop")
    parser.add_argument("--batch-size", "-b", type=int, default=32, help="canvases optimised together")
    parser.add_argument("--iterations", type=int, default=4000, help="of the run that is projected")
    parser.add_argument("--division", type=int, default=4, help="of pri: images per canvas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2 * COMPARE_EVERY, help="iterations timed per phase and round")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    parser.add_argument("--whole", action="store_true", help="check the projection on runs that are really made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the tables of --json into a page")
    parser.add_argument("--memory-of", choices=[runner.name for runner in contenders(1)], help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.write and not arguments.json:
        parser.error("--write takes its tables from --json: give both")
    if arguments.steps < 1 or arguments.steps % COMPARE_EVERY:
        parser.error(f"--steps must be a multiple of {COMPARE_EVERY}, not {arguments.steps}")
    for name in ("batch_size", "iterations", "division", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(arguments, name)}")
    if arguments.iterations < arguments.division:
        parser.error(f"--iterations {arguments.iterations} cannot be divided into {arguments.division} images")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    if arguments.write:
        record = json.loads(arguments.json.read_text())
        arguments.write.write_text(with_table(arguments.write.read_text(), arguments.json.name, record))
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = dfq.load_model(
        arguments.model,
        checkpoint=arguments.checkpoint,
        random_weights=arguments.checkpoint is None,
        image_size=arguments.image_size,
        device=arguments.device,
        seed=arguments.seed,
    )
    bench = Bench.of(model, arguments.batch_size, arguments.precision, arguments.seed)
    if arguments.memory_of:
        schedules = {runner.name: runner.schedule for runner in contenders(arguments.division)}
        print(bench.peak_memory(schedules[arguments.memory_of]))
        return
    record = measure(bench, arguments, argv)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    print(to_markdown(record))


if __name__ == "__main__":
    main()
