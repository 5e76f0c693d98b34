"""Speed of quantized models beside full precision, as a table of a page.

    python tools/bench_table.py deit-w8a8.onnx vit-w8a8.onnx --threads 2 --results docs/bench.jsonl
    python tools/bench_table.py --results docs/bench.jsonl --write docs/deploy.md

Each target is measured as `dfq bench` does, and becomes one line of JSON in --results. --markdown prints the tables of
all lines; --write FILE.md puts them into a page, between `<!-- bench: RESULTS.jsonl -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from accuracy_table import append, between_marks, read_lines, shown

import dfq


def main() -> None:
    arguments = parse_arguments()
    if shown(arguments, read_lines(arguments.results), to_markdown, with_tables):
        return
    for target in arguments.targets:
        result = dfq.bench(
            target, batch_sizes=arguments.batch_size, threads=arguments.threads, repeats=arguments.repeats
        )
        append(arguments.results, result.to_dict())
        print(result.table(), flush=True)


def to_markdown(lines: list[dict[str, Any]]) -> str:
    """A table for each line, and what has to be known to read it."""
    return "\n".join(text for line in lines for text in table(line))


def table(line: dict[str, Any]) -> list[str]:
    sizes = [timing["batch_size"] for timing in line["rows"][0]["timings"]]
    heads = ["in", "bits", "MB", "ms, batch 1 (p95)", *(f"images/s, batch {size}" for size in sizes)]
    heads += ["times PyTorch fp32: latency, throughput", "times fp32 there"]
    height, width = line["image_size"]
    text = [f"**{line['model']}**, {line['bits'].upper()}, {height}x{width}:\n"]
    text += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in line["rows"]:
        cells = [row["runtime"], row["bits"], f"{row['size'] / 1e6:.1f}"]
        cells += [f"{row['latency_ms']:.1f} ({row['latency_p95_ms']:.1f})"]
        cells += [f"{timing['images_per_second']:.1f}" for timing in row["timings"]]
        for ratios in (row["speedup_over_pytorch_fp32"], row["speedup_over_fp32"]):
            cells.append(f"{ratios['latency']:.2f}, {ratios['throughput']:.2f}")
        text.append(f"| {' | '.join(cells)} |")
    machine = line["machine"]
    sets = ", ".join(machine["instruction_sets"] or ["instruction sets unknown"])
    versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items())
    text.append(
        f"\nMedians of {line['repeats']} turns; {line['threads']} threads, seed {line['seed']}; {machine['cpu']}, "
        f"{machine['cores']} cores ({sets}); {versions}. {'; '.join(line['notes'])}.\n"
    )
    return text


def with_tables(page: str, name: str, lines: list[dict[str, Any]]) -> str:
    """`page` with what stands between the marks for the results file `name` replaced by its tables."""
    return between_marks(page, f"<!-- bench: {name} -->\n", to_markdown(lines))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", type=Path, metavar="DIR_OR_ONNX")
    parser.add_argument("--results", type=Path, default=Path("runs/bench/results.jsonl"))
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16], metavar="N")
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch and of every runtime")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns of each (%(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print the tables of --results")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the tables of --results into a page")
    arguments = parser.parse_args()
    if not (arguments.targets or arguments.markdown or arguments.write):
        parser.error("give targets, or --markdown, or --write")
    return arguments


if __name__ == "__main__":
    main()
