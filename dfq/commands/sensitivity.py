"""`dfq sensitivity`: what each tensor costs, and bits chosen by it."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from dfq.commands.command import Command
from dfq.commands.image_options import add_image_options, given_images, plan_of
from dfq.commands.model_options import add_model_options, model_of, model_words
from dfq.commands.output_options import check_files
from dfq.commands.recipe_options import add_recipe_options
from dfq.commands.values import above_zero, size_or_share


def options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_recipe_options(parser, "w4a4")
    group = parser.add_argument_group("bits of each layer (default: they are not chosen)")
    target = group.add_mutually_exclusive_group()
    target.add_argument(
        "--target-size",
        type=size_or_share,
        metavar="BYTES|RATIO",
        help="choose 4, 6 or 8 bits for each layer, so that the model takes so much (3.5MB), or so much of its size at "
        "8 bits (70%%), and loses as little as it can",
    )
    target.add_argument(
        "--target-drop",
        type=above_zero,
        metavar="POINTS",
        help="choose them so that the model is as small as it can be and no larger drop is predicted: a rule of thumb",
    )
    group = parser.add_argument_group("calibration images that are there (default: some are made)")
    group.add_argument(
        "--calibration", type=Path, metavar="DIR", help="a set that `dfq generate` made; its first -n images are used"
    )
    add_image_options(parser, num_images=16, trace=False)
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--out", type=Path, metavar="FILE.toml", help="write the recipe with the chosen bits")
    group.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    group.add_argument("--chart", type=Path, metavar="FILE.svg", help="draw what each tensor costs")
    parser.set_defaults(calibration_images=None)


def run(arguments: argparse.Namespace) -> None:
    import dfq
    from calibration.files import write_json
    from dfq.chart import write_chart
    from dfq.errors import UsageError
    from dfq.generation import run_plan
    from dfq.ptq.engine import prepare
    from dfq.ptq.mixed_precision import write_recipe
    from dfq.recipe import parse_bits

    widths = parse_bits(arguments.bits)
    recipe = dfq.load_recipe(arguments.recipe)
    plan = plan_of(arguments)
    target = {"target_size": arguments.target_size, "target_drop": arguments.target_drop}
    chosen = any(value is not None for value in target.values())
    if arguments.out is not None and not chosen:
        raise UsageError("--out is for a recipe with chosen bits: give --target-size or --target-drop too")
    check_files(arguments, {"json": "", "chart": ".svg", "out": ".toml"})
    model = model_of(arguments)
    prepare(model, widths, recipe)
    images = given_images(arguments, model) or run_plan(model, plan, progress=not arguments.quiet)
    settings: dict[str, Any] = {"calibration": images, "recipe": recipe, "num_images": arguments.num_images}
    settings["progress"] = not arguments.quiet
    result: Any
    if chosen:
        result = dfq.mixed_precision(model, str(widths), **target, **settings)
    else:
        result = dfq.sensitivity(model, str(widths), **settings)
    print(result.table())
    if arguments.json is not None:
        write_json(arguments.json, result.to_dict())
    if arguments.chart is not None:
        write_chart(result.costs.sensitivity if chosen else result, arguments.chart)
    if arguments.out is not None:
        write_recipe(result.recipe, arguments.out)
        words = ["dfq", "quantize", *model_words(arguments), "--bits", str(widths), "--recipe", str(arguments.out)]
        if arguments.calibration is not None:
            words += ["--calibration", str(arguments.calibration)]
        print(f"recipe in {arguments.out}; use it with: {shlex.join([*words, '--out', 'DIR'])}")


COMMAND = Command(
    "sensitivity",
    "measure what quantizing each tensor costs, and choose the bits of each layer",
    "dfq sensitivity vit_tiny_patch16_224 --checkpoint vit.safetensors --target-size 70% --out mixed.toml",
    options,
    run,
)
