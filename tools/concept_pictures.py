"""Makes the pictures of docs/concepts.md, and prints the numbers in them.

    python tools/concept_pictures.py --out runs/pictures
    python tools/concept_pictures.py --model deit_tiny_patch16_224=deit_tiny.safetensors --seed 31 \\
        --iterations 200 --only inversion schedules grids sizes
    python tools/concept_pictures.py --model vit_tiny_patch16_224=vit_tiny.safetensors --only outlier

The first draws all of them from the model that comes with dfq, in half a minute; the others are the pictures of the
page, in a few minutes on one core. Nothing but the model enters them. What each shows:

- inversion: one image from noise and one from dead leaves, on its way to a class.
- schedules: the same classes by dense and by sparse inversion, with patches and FLOPs.
- grids: the levels of quantizers of 4 bits under the histogram of what softmax and GELU give, in the block --block.
- outlier: what the largest channel in front of a second MLP layer does to a range, of the block where it does most.
- sizes: where the bytes are, at fp32, W8 and W4.

With one version of torch, one seed and one make of CPU the files come out the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from concept_charts import Axis, Grid, grids_svg, outlier_svg, sizes_svg
from concept_sheets import inversion_sheet, schedule_sheet
from torch import Tensor, nn

import dfq
from calibration.files import replace_file
from dfq.ptq.engine import QuantizedModel
from quantizers import MSE, LogQuantizer, OutlierQuantizer, Quantizer, TwinUniformQuantizer, UniformQuantizer
from quantizers.twin_uniform import GELU_MINIMUM

BITS = 4
OUTLIER_BITS = 8
BARS = 110
# Softmax gives smaller values too; they are counted at the left end.
SMALLEST = 1e-6
ACTIVATION_IMAGES = 16
RECIPE = "fast"
SIZES = {"fp32": None, "W8": "w8a8", "W4": "w4a8"}


def grids(model: dfq.Model, options: argparse.Namespace, out: Path) -> list[str]:
    """What softmax and GELU give in one block, and the grids for it."""
    blocks = len(model.module.blocks)
    block = options.block if options.block is not None else blocks // 2
    if not 0 <= block < blocks:
        raise dfq.DfqError(f"{model.name} has the blocks 0 to {blocks - 1}, not {block}: give another --block")
    probabilities, hidden = blockwise(model, options)[block]
    origin = f"{model.name}, block {block}, on {ACTIVATION_IMAGES} made images; {BITS} bits; seed {options.seed}"
    said = []
    for name, what, values, quantizers in (
        ("softmax", "probabilities after softmax", probabilities, candidates("magnitude")),
        ("gelu", "activations after GELU", hidden, candidates("sign")),
    ):
        drawn = []
        for how, quantizer in quantizers.items():
            quantizer.fit(values)
            drawn.append(Grid(how, levels(quantizer), figures_of(quantizer, values)))
        points = [level for grid in drawn for level in grid.levels]
        ends = (min(*points, float(values.min())), max(*points, float(values.max())))
        axis = Axis(SMALLEST, 1.0, logarithmic=True) if name == "softmax" else Axis(*ends)
        lines = [
            origin,
            "gray: how many values there are, on a logarithmic axis; blue: the levels they are rounded to",
            "lost: the share of the sum of all magnitudes that is in values rounded to zero",
        ]
        heads = ("SQNR", "lost")
        text = grids_svg(f"Grids for {what}", lines, axis, histogram(values, axis), heads, drawn)
        write(out / f"{name}.svg", text)
        said += [f"{name}, {grid.name}: SQNR {grid.figures[0]}, of the sum {grid.figures[1]} lost" for grid in drawn]
    return said


def candidates(split: Literal["magnitude", "sign"]) -> dict[str, Quantizer]:
    """Quantizers by name; split: `magnitude` for what comes after softmax, `sign` for what comes after GELU."""
    return {
        "uniform, min-max": UniformQuantizer(BITS, symmetric=False),
        "uniform, squared error": UniformQuantizer(BITS, symmetric=False, search=MSE()),
        "twin-uniform": TwinUniformQuantizer(BITS, split=split),
        "logarithmic": LogQuantizer(BITS, base="search", shift=GELU_MINIMUM if split == "sign" else 0.0),
    }


def outlier(model: dfq.Model, options: argparse.Namespace, out: Path) -> list[str]:
    """The channel that is largest beside the others, and the levels it leaves them."""
    seen = [hidden for _, hidden in blockwise(model, options)]
    largest = [values.abs().amax(0) for values in seen]
    block = max(range(len(seen)), key=lambda index: float(largest[index].max() / largest[index].median()))
    values, of_channels = seen[block], largest[block]
    channel = int(of_channels.argmax())
    others = torch.arange(len(of_channels)) != channel
    together = UniformQuantizer(OUTLIER_BITS, symmetric=False).fit(values)
    apart = OutlierQuantizer(UniformQuantizer(OUTLIER_BITS, symmetric=False), torch.tensor([channel])).fit(values)
    points = levels(apart.main)
    axis = Axis(points[0], points[-1])
    drawn = []
    for name, quantizer, grid in (
        ("one range for all", together, levels(together)),
        (f"channel {channel} apart", apart, points),
    ):
        inside = sum(axis.low <= level <= axis.high for level in grid)
        noise = sqnr_db(values[:, others], quantizer(values)[:, others])
        drawn.append(Grid(name, grid, (f"{inside} of {len(grid)}", f"{noise:.1f} dB")))
    site = f"blocks.{block}.mlp.fc2"
    lines = [
        f"{model.name}, input of {site}, {ACTIVATION_IMAGES} made images; {OUTLIER_BITS} bits; seed {options.seed}",
        "above: the largest magnitude of each channel; below: the levels where the others are, and their SQNR",
    ]
    heads = ("levels", "SQNR")
    title = "One channel stretches the range of all"
    write(out / "outlier.svg", outlier_svg(title, lines, of_channels.tolist(), channel, axis, heads, drawn))
    said = f"outlier, {site}: channel {channel} has {of_channels[channel]:.2f}, the median {of_channels.median():.2f}"
    return [said, *(f"outlier, {grid.name}: levels {grid.figures[0]}, SQNR {grid.figures[1]}" for grid in drawn)]


def sizes(model: dfq.Model, options: argparse.Namespace, out: Path) -> list[str]:
    """Bytes by kind of tensor."""
    calibration = dfq.generate(model, "leaves", 4, seed=options.seed, progress=False)
    # What takes long changes values, and no tensor's size.
    recipe = replace(dfq.load_recipe(RECIPE), compensation=None)
    table = {}
    for name, bits in SIZES.items():
        whole = (
            model if bits is None else dfq.quantize(model, bits, calibration=calibration, recipe=recipe, progress=False)
        )
        table[name] = bytes_by_kind(whole)
    lines = [
        f"{model.name}; recipe {RECIPE}, activations at 8 bits",
        "patch embedding and classifier keep 8 bits",
    ]
    write(out / "sizes.svg", sizes_svg("Where the bytes are", lines, table))
    return [f"sizes, {name}, {kind}: {count} bytes" for name, one in table.items() for kind, count in one.items()]


def bytes_by_kind(model: dfq.Model | QuantizedModel) -> dict[str, int]:
    """What the tensors that a model's file holds take."""
    quantized = isinstance(model, QuantizedModel)
    tensors = model.tensors() if quantized else dict(model.module.named_parameters())
    sites = tuple(f"{site}." for site in model.sites) if quantized else ()
    kinds = dict.fromkeys(
        ("MLP weights", "attention weights", "patch embedding", "classifier", "position embedding"), 0
    ) | {"norms, biases, class token": 0, "scales, zero points": 0}
    for name, tensor in tensors.items():
        kinds[kind_of(name, sites)] += tensor.nbytes
    return kinds


def kind_of(name: str, sites: tuple[str, ...]) -> str:
    """sites: what the names of a quantizer's tensors begin with."""
    is_matrix = name.endswith((".weight", ".weight.integers"))
    if name.startswith(sites) and not name.endswith(".integers"):
        return "scales, zero points"
    if name == "pos_embed":
        return "position embedding"
    for mark, kind in {
        ".mlp.fc": "MLP weights",
        ".attn.qkv.": "attention weights",
        ".attn.proj.": "attention weights",
        "patch_embed.proj.": "patch embedding",
        "head.": "classifier",
    }.items():
        if is_matrix and (mark in name if mark.startswith(".") else name.startswith(mark)):
            return kind
    return "norms, biases, class token"


def blockwise(model: dfq.Model, options: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """Of each block, on made images: probabilities after softmax, flat; after GELU, [tokens, channels]."""
    images = dfq.generate(model, num_images=ACTIVATION_IMAGES, seed=options.seed, precision="fp32", progress=False)
    vit: Any = model.module
    with recorded(vit) as seen, torch.inference_mode():
        for batch, _ in images.batches(ACTIVATION_IMAGES, model.device):
            model(batch)
    return [(seen[block.attn.attn_drop].flatten(), seen[block.mlp.fc2].flatten(0, -2)) for block in vit.blocks]


@contextmanager
def recorded(vit: Any) -> Iterator[dict[nn.Module, Tensor]]:
    """What enters the dropout after softmax, and the second layer of each MLP, while it is open."""
    seen: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[module] = args[0].detach().clone()

    fused = [block.attn.fused_attn for block in vit.blocks]
    hooks = []
    for block in vit.blocks:
        # Fused attention never forms the probabilities.
        block.attn.fused_attn = False
        hooks += [module.register_forward_pre_hook(keep) for module in (block.attn.attn_drop, block.mlp.fc2)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for block, was in zip(vit.blocks, fused, strict=True):
            block.attn.fused_attn = was


def levels(quantizer: Quantizer) -> list[float]:
    """All values that the integers of a quantizer stand for, each once, ascending."""
    integers = torch.arange(quantizer.qmin, quantizer.qmax + 1).to(quantizer.dtype)
    return sorted(set(quantizer.dequantize(integers).tolist()))


def figures_of(quantizer: Quantizer, values: Tensor) -> tuple[str, str]:
    """The SQNR, and how much of the sum of magnitudes is in values that become zero."""
    rounded = quantizer(values)
    lost = float(values[rounded == 0].abs().sum(dtype=torch.float64) / values.abs().sum(dtype=torch.float64))
    return f"{sqnr_db(values, rounded):.1f} dB", f"{100 * lost:.0f} %"


def sqnr_db(values: Tensor, rounded: Tensor) -> float:
    """10 log10 of the sum of squares over the sum of squared errors."""
    signal, noise = (each.double().square().sum() for each in (values, rounded - values))
    return float(10 * torch.log10(signal / noise))


def histogram(values: Tensor, axis: Axis) -> list[int]:
    """How many values lie in each of `BARS` equal parts of the axis; those beyond an end are counted there."""
    low, high = torch.tensor([axis.low, axis.high], dtype=torch.float64)
    x = values.flatten().double().clamp(low, high)
    if axis.logarithmic:
        x, low, high = x.log10(), low.log10(), high.log10()
    part = ((x - low) / (high - low) * BARS).long().clamp(max=BARS - 1)
    return torch.bincount(part, minlength=BARS).tolist()


def write(path: Path, text: str) -> None:
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


PICTURES: dict[str, Callable[[dfq.Model, argparse.Namespace, Path], list[str]]] = {
    "inversion": lambda model, options, out: inversion_sheet(
        model, options.iterations, options.seed, out / "inversion.png"
    ),
    "schedules": lambda model, options, out: schedule_sheet(
        model, options.iterations, options.seed, out / "schedules.png"
    ),
    "grids": grids,
    "outlier": outlier,
    "sizes": sizes,
}


def main() -> None:
    options = parse_arguments()
    name, _, checkpoint = options.model.partition("=")
    try:
        model = dfq.load_model(name, checkpoint=checkpoint or None, device="cpu")
        options.out.mkdir(parents=True, exist_ok=True)
        for picture in options.only:
            print("\n".join(PICTURES[picture](model, options, options.out)), flush=True)
    except dfq.DfqError as error:
        raise SystemExit(str(error)) from error


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference", metavar="NAME[=CHECKPOINT]", help="(%(default)s)")
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES), help="some of the pictures")
    parser.add_argument("--iterations", type=int, default=400, metavar="N", help="from noise (%(default)s)")
    parser.add_argument("--block", type=int, metavar="N", help="whose activations are drawn (one in the middle)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), metavar="DIR", help="(%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
