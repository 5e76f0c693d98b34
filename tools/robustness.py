"""Whether quantizing survives a rescaling that changes nothing in full precision, on labelled images of your own.

    python tools/robustness.py --images imagenet/val --model deit_tiny_patch16_224=deit_tiny.safetensors

In every block, --channels channels of each LayerNorm, drawn by --seed, get weight and bias --factor times as large,
and the columns of the linears that take them become as much smaller. The function stays, which is checked; but one
range for all channels meets outliers that the original does not have. Both models are quantized on the same images
(--source, as in accuracy_table.py; they are made of the original) and compared on the same photographs.

Every cell is one line of JSON in --results; cells that are there are not made again. --markdown makes nothing and
prints the tables of all lines in the file; --write FILE.md puts them into a page, between
`<!-- robustness: RESULTS.jsonl -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accuracy_table import (
    BATCH,
    Replayed,
    append,
    argument_parser,
    between_marks,
    calibration_set,
    calibration_text,
    load_images,
    logits_of,
    machine,
    parsed,
    read_lines,
    shown,
    unfinished,
)
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dfq
from dfq.versions import versions

KEY = ("model", "source", "recipe", "bits", "seed", "channels", "factor")
# Of the largest logit: beyond it the two are not the same function.
TOLERANCE = 1e-3


def main() -> None:
    arguments = parse_arguments()
    lines = read_lines(arguments.results)
    if shown(arguments, lines, to_markdown, with_tables):
        return
    common = {"seed": arguments.seed, "channels": arguments.channels, "factor": arguments.factor}
    wanted = [
        {"source": arguments.source, "recipe": recipe, "bits": bits} | common
        for recipe in arguments.recipes
        for bits in arguments.bits
    ]
    for name, model, missing in unfinished(arguments, wanted, lines, KEY):
        images, labels = load_images(arguments.images, model, arguments.limit)
        pair = Pair(model, images, labels, arguments.channels, arguments.factor, arguments.seed)
        for cell in missing:
            calibration, made = calibration_set(cell, model, arguments)
            line = cell | made | pair.measure(calibration, cell["bits"], cell["recipe"])
            line |= {"machine": machine(), "threads": torch.get_num_threads(), "versions": versions()}
            append(arguments.results, line)
            print(
                f"{name} {cell['recipe']} {cell['bits']}: drop {line['before']['drop']:.2f}, rescaled "
                f"{line['after']['drop']:.2f}; the two agree on {line['between']['agreement']:.1f} %",
                flush=True,
            )


class Pair:
    """A model and its rescaled twin, and images [M, 3, H, W] with labels [M] to compare them on."""

    def __init__(
        self, model: dfq.Model, images: Tensor, labels: Tensor, channels: int, factor: float, seed: int
    ) -> None:
        self.model, self.twin = model, rescaled(model, channels, factor, seed)
        self.images, self.data = images, TensorDataset(images, labels)
        self.logits = logits_of(model, images)
        self.change = float((logits_of(self.twin, images) - self.logits).abs().max())
        if not self.change <= TOLERANCE * float(self.logits.abs().max()):
            raise SystemExit(f"{model.name}: rescaled it is another function, its logits differ by {self.change:.2g}")

    def measure(self, calibration: dfq.CalibrationSet, bits: str, recipe: str) -> dict[str, Any]:
        """Both quantized: before, of the original, and after, of the twin, beside full precision; between, of after
        beside before."""
        started = time.monotonic()
        before, after = (
            dfq.quantize(model, bits, calibration=calibration, recipe=recipe) for model in (self.model, self.twin)
        )
        seconds = time.monotonic() - started
        found = {"before": logits_of(before, self.images), "after": logits_of(after, self.images)}
        return {
            "num_images": len(self.images),
            "logit_change": self.change,
            "before": self.compared(before, found["before"], self.logits),
            "after": self.compared(after, found["after"], self.logits),
            "between": self.compared(after, found["after"], found["before"]),
            "quantize_seconds": round(seconds, 1),
        }

    def compared(self, model: Any, logits: Tensor, baseline: Tensor) -> dict[str, Any]:
        result = dfq.evaluate(
            Replayed(model, logits), self.data, baseline=Replayed(self.model, baseline), batch_size=BATCH
        ).to_dict()
        return {name: result[name] for name in ("baseline_top1", "top1", "drop", "drop_ci95", "agreement")}


@torch.no_grad()
def rescaled(model: dfq.Model, channels: int, factor: float, seed: int) -> dfq.Model:
    """The same function, with `channels` channels of each block's LayerNorms `factor` times as large."""
    module = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(seed)
    pairs = list(norms(module))
    if not pairs:
        raise SystemExit(f"{model.name} has no LayerNorm before a linear that could be rescaled")
    for norm, linears in pairs:
        chosen = torch.randperm(norm.weight.numel(), generator=generator)[:channels].to(norm.weight.device)
        norm.weight[chosen] *= factor
        if norm.bias is not None:
            norm.bias[chosen] *= factor
        for linear in linears:
            linear.weight[:, chosen] /= factor
    return replace(model, module=module)


def norms(network: nn.Module) -> Iterator[tuple[nn.LayerNorm, list[nn.Linear]]]:
    """Each LayerNorm of timm's blocks (and Swin's patch mergings) with the linears that take what it gives."""
    for part in network.modules():
        block: Any = part
        found: list[tuple[Any, list[Any]]] = []
        if hasattr(part, "norm1") and hasattr(part, "norm2"):
            attention, mlp = block.attn, block.mlp
            gate = getattr(attention, "gate", None)
            found = [(block.norm1, [attention.qkv] + ([] if gate is None else [gate])), (block.norm2, [mlp.fc1])]
        elif hasattr(part, "reduction"):
            found = [(block.norm, [block.reduction])]
        for norm, linears in found:
            if isinstance(norm, nn.LayerNorm) and norm.elementwise_affine:
                yield norm, linears


def to_markdown(lines: list[dict[str, Any]]) -> str:
    """One table per model, a row per cell; under each the largest change."""
    blocks = []
    for model in dict.fromkeys(line["model"] for line in lines):
        own = [line for line in lines if line["model"] == model]
        first = own[0]
        blocks.append(
            f"**{model}**: full precision {first['before']['baseline_top1']:.1f} % on {first['num_images']} images; "
            f"rescaled, its logits differ by at most {max(line['logit_change'] for line in own):.1g}. Drop in points "
            "[95 % interval]; agreement with full precision.\n"
        )
        blocks.append(
            "| recipe | calibration | bits | channels x factor | original | rescaled | change | same answer of both |"
        )
        blocks.append("|---" * 8 + "|")
        for line in own:
            cells = [
                f"`{Path(line['recipe']).stem}`",
                calibration_text(line),
                line["bits"].upper(),
                f"{line['channels']} x {line['factor']:g}",
                *(f"{drop_text(line[part])}; {line[part]['agreement']:.1f} %" for part in ("before", "after")),
                drop_text(line["between"]),
                f"{line['between']['agreement']:.1f} %",
            ]
            blocks.append(f"| {' | '.join(cells)} |")
        largest = max(own, key=lambda line: abs(line["between"]["drop"]))
        blocks.append(
            f"\nThe largest change is {drop_text(largest['between'])} points, `{Path(largest['recipe']).stem}` at "
            f"{largest['bits'].upper()}. Seed {first['seed']}; {first['machine']}, {first['threads']} of them used; "
            f"{', '.join(f'{name} {version}' for name, version in first['versions'].items())}.\n"
        )
    return "\n".join(blocks)


def drop_text(part: dict[str, Any]) -> str:
    low, high = part["drop_ci95"]
    return f"{part['drop']:.1f} [{low:.1f}, {high:.1f}]"


def with_tables(page: str, name: str, lines: list[dict[str, Any]]) -> str:
    """`page` with what stands between the marks for the results file `name` replaced by its tables."""
    return between_marks(page, f"<!-- robustness: {name} -->\n", to_markdown(lines))


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__, results="robustness", images="labelled images to measure on")
    parser.add_argument("--source", default="natural", help="as a source of accuracy_table.py (%(default)s)")
    parser.add_argument("--recipes", nargs="+", default=["fast"])
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a8", "w4a4"])
    parser.add_argument("--channels", type=int, default=4, metavar="N", help="of each norm (%(default)s)")
    parser.add_argument("--factor", type=float, default=30.0, metavar="X", help="(%(default)g)")
    parser.add_argument("--limit", type=int, metavar="N", help="measure on N of the images, evenly spaced")
    return parsed(parser)


if __name__ == "__main__":
    main()
