"""Knowledge transfer by the method that makes the images: accuracy of the student at equal images and at equal time.

    python tools/distill_table.py --images cifar10/test --crop-pct 1 \\
        --teacher vit_tiny_patch16_224=teacher.safetensors --student deit_tiny_patch16_224=deit_tiny.safetensors

tools/fit_teacher.py makes the teacher. For every method and seed one line of JSON in --results: images, seconds and
accuracy after every round. Lines that are there are not made again, and a transfer that was stopped goes on; students
and pools lie beside --results. `natural+waves` shares the images of a round between two methods, `smi@200` runs so many
iterations. `real` draws on --real-images instead of making any, photographs of the task, and `others` on
--other-images, photographs of anything else: ceilings. --fits also teaches students in other ways, from pools that are
there. With `both:` in front of a method half of the images are made of the student as it was pretrained, of its own
classes. --markdown prints the table of all lines; --write FILE.md puts it into a page, between
`<!-- students: RESULTS.jsonl -->` and `<!-- end -->`. One machine, nothing else running: the seconds are measured.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accuracy_table import append, between_marks, machine, read_lines, shown

import dfq
from calibration import Plan

KEY = ("teacher", "student", "method", "seed", "rounds", "round_images", "fit")
METHODS = ["natural+waves", "waves", "natural", "leaves", "dense", "smi", "pri", "gaussian"]
BOTH = "both:"
TIMES = (75, 150)
"""Seconds after which students are compared."""

FEW = 5
"""Rounds that two columns say enough of."""

DEFAULT_FIT = "ridge"
FITS = {
    DEFAULT_FIT: dfq.Training(optimizer="ridge"),
    "ridge, level on the pool": dfq.Training(optimizer="ridge", level="pool"),
    "ridge, shrinkage 0.1": dfq.Training(optimizer="ridge", shrinkage=0.1),
    "ridge, no windows": dfq.Training(optimizer="ridge", windows=0),
    # Every round is a student of its own.
    "sgd, temperature 20": dfq.Training(optimizer="sgd", steps=200, learning_rate=0.003, decay="constant"),
}


def main() -> None:
    arguments = parse_arguments()
    lines = read_lines(arguments.results)
    if shown(arguments, lines, to_markdown, with_tables):
        return
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    teacher_name, _, teacher_weights = arguments.teacher.partition("=")
    student_name, _, student_weights = arguments.student.partition("=")
    photographs = {"real": arguments.real_images, "others": arguments.other_images}
    known = {tuple(line[key] for key in KEY) for line in lines}
    teacher = dfq.load_model(teacher_name, checkpoint=teacher_weights or None, crop_pct=arguments.crop_pct)
    for seed in arguments.seeds:
        for method, fit in [(method, fit) for method in arguments.methods for fit in (DEFAULT_FIT, *arguments.fits)]:
            cell = {"teacher": teacher_name, "student": student_name, "method": method, "seed": seed}
            cell |= {"rounds": arguments.rounds, "round_images": arguments.round_images, "fit": fit}
            if tuple(cell[key] for key in KEY) in known:
                continue
            out = arguments.results.parent / "students" / f"{student_name}-{method}-{seed}"
            plans = [] if method in photographs else plans_of(method, arguments.round_images, seed)
            training, calibration = FITS[fit], None
            if method in photographs:
                count = arguments.rounds * arguments.round_images
                calibration = dfq.real_images(teacher, photographs[method], count, seed=seed)
                # They have nothing in common that photographs do not have.
                training = replace(training, level="pool")
            elif fit != DEFAULT_FIT:
                calibration = [dfq.load_calibration_set(pool) for pool in sorted((out / "pool").iterdir())]
            student = dfq.load_student(
                student_name, teacher, checkpoint=student_weights or None, fresh_classifier=True, seed=seed
            )
            pretrained = None
            if calibration is None and method.startswith(BOTH):
                pretrained = dfq.load_model(student_name, checkpoint=student_weights or None)
            result = dfq.distill(
                teacher,
                student,
                rounds=arguments.rounds,
                plan=plans or None,
                also_invert=pretrained,
                training=training,
                calibration=calibration,
                data=arguments.images,
                seed=seed,
                out=out if calibration is None else None,
            )
            line = cell | {"training": training.to_dict(), "result": result.to_dict(), "machine": machine()}
            line |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": str(teacher.device)}
            append(arguments.results, line)
            print(to_markdown([line]), flush=True)


def plans_of(method: str, round_images: int, seed: int) -> list[Plan]:
    """Of one round: each part of `method` makes an equal share of its images, of each network."""
    parts = [part.partition("@") for part in method.removeprefix(BOTH).split("+")]
    count = round_images // len(parts) // (2 if method.startswith(BOTH) else 1)
    return [
        Plan(name, count, int(iterations) if iterations else None, count, seed, "auto") for name, _, iterations in parts
    ]


def after(rounds: list[dict[str, Any]], seconds: float) -> float | None:
    """Accuracy of the last student that was done within so many seconds; None where there was none."""
    passed, found = 0.0, None
    for entry in rounds:
        passed += entry["generating_seconds"] + entry["training_seconds"]
        if passed <= seconds and entry["top1"] is not None:
            found = entry["top1"]
    return found


def seconds_of(rounds: list[dict[str, Any]]) -> float:
    return float(sum(entry["generating_seconds"] + entry["training_seconds"] for entry in rounds))


def to_markdown(lines: list[dict[str, Any]]) -> str:
    """Tables: a row for each method, with columns at two numbers of images and after `TIMES`; where students of more
    than `FEW` rounds were measured, all of these; and where students were taught in other ways too, a row for each."""
    usual = [line for line in lines if line["fit"] == DEFAULT_FIT] or lines
    methods = list(dict.fromkeys(line["method"] for line in usual))
    runs = {method: [line["result"]["rounds"] for line in usual if line["method"] == method] for method in methods}
    last = usual[0]["result"]["images"]
    # A pool that is whole from the first round on has no half.
    half = min(rounds[(len(rounds) - 1) // 2]["images"] for found in runs.values() for rounds in found)
    head = ["images by", f"{half} images", f"{last} images", f"seconds for {last}", *(f"after {t} s" for t in TIMES)]
    text = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method, found in runs.items():
        at_half = [entry["top1"] for rounds in found for entry in rounds if entry["images"] == half]
        whole = [rounds[-1]["top1"] for rounds in found]
        cells = [_over_seeds(at_half), _over_seeds(whole), f"{mean(seconds_of(rounds) for rounds in found):.0f}"]
        cells += [_over_seeds([after(rounds, seconds) for rounds in found]) for seconds in TIMES]
        text.append(f"| {' | '.join([f'`{method}`', *cells])} |")
    for method, found in runs.items():
        measured = list(dict.fromkeys(entry["images"] for entry in found[0] if entry["top1"] is not None))
        if len(measured) > FEW:
            reached = [
                _over_seeds([e["top1"] for rounds in found for e in rounds if e["images"] == count])
                for count in measured
            ]
            text += ["", f"| images by `{method}` | {' | '.join(map(str, measured))} |"]
            text += ["|---" * (len(measured) + 1) + "|", f"| top-1 | {' | '.join(reached)} |"]
    others = {line["method"]: None for line in lines if line["fit"] != DEFAULT_FIT}
    for method in others if len(usual) < len(lines) else ():
        text += ["", f"| taught on {last} images by `{method}` | |", "|---|---|"]
        for fit in dict.fromkeys(line["fit"] for line in lines if line["method"] == method):
            whole = [line["result"]["top1"] for line in lines if (line["method"], line["fit"]) == (method, fit)]
            text.append(f"| {fit} | {_over_seeds(whole)} |")
    first = lines[0]
    teacher_top1 = first["result"]["teacher_top1"]
    seeds = sorted({line["seed"] for line in lines})
    listed = ", ".join(map(str, seeds))
    over = f"the mean over seeds {listed}, in brackets lowest and highest" if len(seeds) > 1 else f"seed {listed}"
    text.append(
        f"\nTop-1 in percent of a {first['student']} taught by a {first['teacher']} that has {teacher_top1:.1f}; "
        f"{over}. {first['machine']}, threads: {first['threads']}; torch {first['torch']}.\n"
    )
    return "\n".join(text)


def _over_seeds(values: list[float | None]) -> str:
    """A dash where a seed has none: a mean of the others would be of other seeds than its neighbours."""
    found = [value for value in values if value is not None]
    if len(found) < max(1, len(values)):
        return "-"
    spread = f" ({min(found):.1f} to {max(found):.1f})" if len(found) > 1 else ""
    return f"{mean(found):.1f}{spread}"


def with_tables(page: str, name: str, lines: list[dict[str, Any]]) -> str:
    """`page` with what stands between the marks for the results file `name` replaced by its table."""
    return between_marks(page, f"<!-- students: {name} -->\n", to_markdown(lines))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", metavar="NAME[=CHECKPOINT]")
    parser.add_argument("--student", metavar="NAME[=CHECKPOINT]")
    parser.add_argument("--crop-pct", type=float, help="of the teacher's preprocessing, which is the student's too")
    parser.add_argument("--images", type=Path, metavar="DIR", help="labelled images to measure on")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD")
    parser.add_argument("--real-images", type=Path, metavar="DIR", help="for `real`: photographs of the teacher's task")
    parser.add_argument("--other-images", type=Path, metavar="DIR", help="for `others`: any other photographs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--round-images", type=int, default=20)
    parser.add_argument(
        "--fits",
        nargs="+",
        default=[],
        choices=[fit for fit in FITS if fit != DEFAULT_FIT],
        metavar="FIT",
        help="other ways to teach: " + "; ".join(fit for fit in FITS if fit != DEFAULT_FIT),
    )
    parser.add_argument("--results", type=Path, default=Path("runs/students/results.jsonl"))
    parser.add_argument("--threads", type=int, help="of PyTorch; all cores where it is not given")
    parser.add_argument("--markdown", action="store_true", help="print the table of --results")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the table of --results into a page")
    arguments = parser.parse_args()
    given = arguments.teacher and arguments.student and arguments.images
    if not (arguments.markdown or arguments.write or given):
        parser.error("give --teacher, --student and --images, or --markdown, or --write")
    for method, folder in (("real", arguments.real_images), ("others", arguments.other_images)):
        if given and method in arguments.methods and folder is None:
            parser.error(f"{method} needs a folder: give --{method.removesuffix('s')}-images")
    return arguments


if __name__ == "__main__":
    main()
