"""`dfq distill`: a student of a teacher."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dfq.commands.command import Command
from dfq.commands.image_options import add_image_options, plan_of
from dfq.commands.model_options import add_model_options, model_of
from dfq.commands.output_options import add_output_options
from dfq.commands.values import above_zero, count, finite, positive


def options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, "the teacher", name="teacher")
    parser.add_argument(
        "student", metavar="STUDENT", help="a timm name of any classifier, or a folder that `dfq quantize` made"
    )
    group = parser.add_argument_group("student")
    weights = group.add_mutually_exclusive_group()
    weights.add_argument(
        "--student-checkpoint", type=Path, metavar="FILE", help="its weights (default: timm's pretrained ones)"
    )
    weights.add_argument("--student-random-weights", action="store_true", help="it starts from scratch")
    group.add_argument(
        "--invert-student",
        action="store_true",
        help="by each method make as many images of it too, of the classes that it was pretrained on",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--train",
        default="linear",
        metavar="PART",
        help="linear: a new classifier alone; last-K: also K layers below it; full: all of it, which a quantized "
        "student needs (default: %(default)s)",
    )
    training.add_argument(
        "--rounds", type=positive, default=10, metavar="N", help="of making images and training (default: %(default)s)"
    )
    training.add_argument(
        "--windows",
        type=count,
        default=9,
        metavar="N",
        help="random windows of each image that are shown besides it (default: %(default)s)",
    )
    training.add_argument(
        "--opt",
        choices=("ridge", "sgd", "adamw"),
        help="ridge: a linear classifier in closed form (default: ridge; sgd where more is trained; of a quantized "
        "student adamw)",
    )
    training.add_argument(
        "--shrinkage",
        type=finite,
        default=0.3,
        metavar="X",
        help="of ridge: share of the features' mean square that is added to it (default: %(default)s)",
    )
    training.add_argument(
        "--level",
        choices=("origin", "pool"),
        help="of ridge: where classes are balanced: origin, where the student's features are zero, or pool, as likely "
        "on the pool as the teacher finds them (default: origin, where features are given by a LayerNorm)",
    )
    training = parser.add_argument_group("training by sgd or adamw")
    training.add_argument("--steps", type=positive, default=100, metavar="N", help="per round (default: %(default)s)")
    training.add_argument(
        "--train-batch-size", type=positive, default=128, metavar="N", help="images per step (default: %(default)s)"
    )
    training.add_argument(
        "--temperature", type=above_zero, default=20.0, metavar="X", help="of both distributions (default: %(default)s)"
    )
    training.add_argument("--lr", type=above_zero, metavar="X", help="learning rate (default: one that suits the rest)")
    training.add_argument("--momentum", type=finite, default=0.9, metavar="X", help="of sgd (default: %(default)s)")
    training.add_argument(
        "--weight-decay", type=finite, default=1e-4, metavar="X", help="of the optimizer (default: %(default)s)"
    )
    training.add_argument(
        "--sched", choices=("cosine", "constant"), default="cosine", help="of the rate (default: %(default)s)"
    )
    group = parser.add_argument_group("calibration images that are there (default: some are made)")
    group.add_argument(
        "--calibration",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="train on sets that `dfq generate` made, and make no other",
    )
    measured = parser.add_argument_group("what is measured besides agreement (default: nothing)")
    measured.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="labelled, one folder per class, to measure teacher and student on"
    )
    add_image_options(parser, num_images=32, trace=False, methods=("waves",))
    add_output_options(parser, "folder for the student, the pool, log and curve; one that was begun is continued")


def run(arguments: argparse.Namespace) -> None:
    import dfq
    from dfq.architectures import REFERENCE
    from dfq.checkpoint import is_quantized_model
    from dfq.errors import UsageError
    from dfq.transfer.student import load_student
    from dfq.transfer.training import Training

    quantized = is_quantized_model(arguments.student)
    training = Training(
        part=arguments.train,
        steps=arguments.steps,
        windows=arguments.windows,
        batch_size=arguments.train_batch_size,
        temperature=arguments.temperature,
        optimizer=arguments.opt,
        shrinkage=arguments.shrinkage,
        level=arguments.level,
        learning_rate=arguments.lr,
        momentum=arguments.momentum,
        weight_decay=arguments.weight_decay,
        decay=arguments.sched,
    )
    arguments.batch_size = arguments.num_images
    arguments.model = arguments.teacher
    plans = [plan_of(arguments, method) for method in arguments.method]
    if quantized and (arguments.student_checkpoint or arguments.student_random_weights):
        raise UsageError(f"{arguments.student} is a quantized model and has its weights; leave out those for it")
    if arguments.invert_student and (quantized or arguments.student_random_weights):
        raise UsageError("--invert-student is for a student that was pretrained on classes of its own")
    teacher = model_of(arguments)
    student: Any
    if quantized:
        student = dfq.load(arguments.student, device=teacher.device)
    else:
        student = load_student(
            arguments.student,
            teacher,
            checkpoint=arguments.student_checkpoint,
            random_weights=arguments.student_random_weights,
            fresh_classifier=training.part == "linear",
            seed=arguments.seed,
        )
    pretrained = None
    if arguments.invert_student:
        pretrained = dfq.load_model(
            arguments.student,
            checkpoint=arguments.student_checkpoint,
            image_size=None if arguments.student == REFERENCE else teacher.preprocessing.image_size[0],
            device=teacher.device,
        )
    result = dfq.distill(
        teacher,
        student,
        plan=plans,
        also_invert=pretrained,
        rounds=arguments.rounds,
        training=training,
        calibration=arguments.calibration,
        data=arguments.data_dir,
        seed=arguments.seed,
        out=arguments.out,
        overwrite=arguments.overwrite,
        progress=not arguments.quiet,
    )
    print(result.describe())
    print(f"kept in {arguments.out}; curve.svg there shows how it went")


COMMAND = Command(
    "distill",
    "teach a student what a teacher knows, without data",
    "dfq distill vit_tiny_patch16_224 deit_tiny_patch16_224 --checkpoint teacher.safetensors "
    "--student-checkpoint deit_tiny.safetensors --data-dir photographs --out student",
    options,
    run,
    shared=True,
    resumes=True,
)
