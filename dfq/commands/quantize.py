"""`dfq quantize`: a folder with a quantized model."""

from __future__ import annotations

import argparse
from pathlib import Path

from dfq.commands.command import Command
from dfq.commands.image_options import add_image_options, generated_images, given_images, plan_of
from dfq.commands.model_options import add_model_options, model_of
from dfq.commands.output_options import add_output_options
from dfq.commands.recipe_options import add_recipe_options


def options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_recipe_options(parser, "w8a8")
    group = parser.add_argument_group("calibration images that are there (default: some are made)")
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--calibration", type=Path, metavar="DIR", help="a set that `dfq generate` made; with -n its first N images"
    )
    source.add_argument(
        "--calibration-images", type=Path, metavar="DIR", help="a folder of real images, of which -n are drawn"
    )
    add_image_options(parser, num_images=None)
    add_output_options(
        parser,
        "folder for the quantized model; one that was begun is continued, a recipe that tunes blocks after the last "
        "finished one",
    )


def run(arguments: argparse.Namespace) -> None:
    import dfq
    from calibration import check_method
    from calibration.files import FolderLock, remove_file, take_folder
    from calibration.team import team
    from dfq.checkpoint import claim_directory
    from dfq.errors import UsageError
    from dfq.generation import describe_run
    from dfq.ptq.engine import check_calibration, prepare
    from dfq.ptq.resume import UNFINISHED
    from dfq.recipe import parse_bits

    # Everything that can be wrong is found here, before the folder is touched and images are made.
    widths = parse_bits(arguments.bits)
    bits = str(widths)
    recipe = dfq.load_recipe(arguments.recipe)
    wanted = arguments.num_images
    if wanted is None:
        arguments.num_images = recipe.num_images
    plan = plan_of(arguments)
    model = model_of(arguments)
    prepare(model, widths, recipe)
    images = given_images(arguments, model)
    if images is not None and wanted is not None:
        if len(images) < wanted:
            raise UsageError(f"{arguments.calibration} holds {len(images)} images, and -n asks for {wanted}")
        images = images.first(wanted)
    if images is None:
        check_method(model.module, plan)
        calibration = {"num_images": plan.num_images, "run": describe_run(model, plan)}
    else:
        check_calibration(model, images)
        calibration = {"num_images": len(images), "run": images.run}
    identity = {
        "bits": bits,
        "model": model.origin.to_dict(),
        "preprocessing": model.preprocessing.to_dict(),
        "recipe": recipe.to_dict(),
        "calibration": calibration,
    }
    held: list[FolderLock] = []

    def claim() -> bool:
        held.append(take_folder(arguments.out))
        return claim_directory(arguments.out, identity, overwrite=arguments.overwrite)

    shared = team()
    complete = shared.lead(claim)
    if images is None and not complete:
        images = generated_images(arguments, model, plan, arguments.out / "calibration")
    if not shared.leads:
        # Images are made together; what comes after them is the leader's.
        return
    if complete:
        quantized = dfq.load(arguments.out, device=arguments.device)
        print(f"{arguments.out} already holds this model; nothing to do")
    else:
        # Without, it is soon done.
        resume = None if recipe.reconstruction is None else arguments.out / UNFINISHED
        quantized = dfq.quantize(
            model, bits, calibration=images, recipe=recipe, resume=resume, progress=not arguments.quiet
        )
        dfq.save(quantized, arguments.out)
    remove_file(arguments.out / UNFINISHED)
    print(
        f"{quantized.describe()}: {len(quantized.sites)} tensors quantized, "
        f"{quantized.weight_bytes / 1e6:.2f} MB ({model.weight_bytes / 1e6:.2f} MB in float32)"
    )
    print(f"kept in {arguments.out}; measure it with: dfq evaluate {arguments.out} --data-dir IMAGES --baseline")


COMMAND = Command(
    "quantize",
    "quantize a model, on generated images or on a set",
    "dfq quantize vit_tiny_patch16_224 --checkpoint vit.safetensors --bits w4a8 --out vit-w4a8",
    options,
    run,
    shared=True,
    resumes=True,
)
