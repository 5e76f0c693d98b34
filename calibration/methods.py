"""The named methods, each a few lines of composition, and the one function that runs them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from torch import nn

from calibration import inversion
from calibration.attention import capture
from calibration.augment import RollAndFlip
from calibration.errors import DfqError, did_you_mean
from calibration.initial import INITIAL
from calibration.inversion import Settings
from calibration.objectives import Objective
from calibration.passes import Precision
from calibration.saliency import saliency_kind
from calibration.schedules import Dense, PatchSchedule, ProgressiveStop, Rebirth
from calibration.tokens import PatchGrid

log = logging.getLogger("dfq")

SCHEDULES: dict[str, PatchSchedule] = {"dense": Dense(), "smi": ProgressiveStop(), "pri": Rebirth()}


@dataclass(frozen=True)
class Method:
    """How images are made. `schedule` is None for a source without inversion; `summary` is for people.

    initial: where inversion starts (`calibration.initial`); settings: its iterations are the most that are run;
    soft_labels: whether the wanted class is asked for among others (SARDFQ) instead of alone.
    """

    summary: str
    schedule: PatchSchedule | None = None
    objective: Objective = field(default_factory=Objective)
    settings: Settings = field(default_factory=lambda: Settings(iterations=500, enough=0.5))
    initial: str = "noise"
    soft_labels: bool = False

    @property
    def is_sparse(self) -> bool:
        """Whether patches are left out on the way."""
        return self.schedule is not None and bool(self.schedule.decisions(self.settings.iterations))


_PSAQ = Objective({"cross_entropy": 1.0, "patch_similarity_entropy": 1.0, "bounded_variation": 0.05})
_APA = Objective({"cross_entropy": 1.0, "attention_prior": 0.1, "bounded_variation": 0.05})
_GENTLE = Settings(iterations=200, enough=1.0, learning_rate=0.02)
_WAVES = Settings(
    iterations=100, learning_rate=0.4, betas=(0.9, 0.999), augment=RollAndFlip(0.0, smallest=0.7), waves=1.5, noise=0.4
)

METHODS: dict[str, Method] = {
    "natural": Method(
        "gentle inversion of dead leaves, a few dozen dense steps: the default",
        Dense(),
        settings=_GENTLE,
        initial="leaves",
    ),
    "smi": Method("sparse model inversion: background patches stop early (SMI, ICML 2024)", ProgressiveStop()),
    "dense": Method("dense model inversion: every patch, all the time (DeepInversion, CVPR 2020)", Dense()),
    "pri": Method("patch rebirth inversion: several sparse images of one canvas (PRI, 2025)", Rebirth()),
    "psaq": Method(
        "dense, with diverse similarities between patches (PSAQ-ViT, ECCV 2022)",
        Dense(),
        _PSAQ,
        Settings(500, 0.5, 0.2, (0.5, 0.9), RollAndFlip(30 / 224)),
    ),
    "apa": Method(
        "dense, with random attention priors and soft labels (SARDFQ, ICCV 2025)", Dense(), _APA, soft_labels=True
    ),
    "apa-smi": Method("the same, sparse", ProgressiveStop(), _APA, soft_labels=True),
    "waves": Method(
        "waves are moved, not pixels, seen through windows and noise: shapes that other networks know too",
        Dense(),
        Objective({"cross_entropy": 1.0}),
        _WAVES,
        initial="pink",
    ),
    "leaves": Method("dead leaves: random occluding shapes, no inversion", initial="leaves"),
    "pink": Method("noise with the spectrum and the colours of photographs, no inversion", initial="pink"),
    "gaussian": Method("Gaussian noise, no inversion: the lower end of any comparison"),
}

DEFAULT_METHOD = "natural"


@dataclass(frozen=True)
class Plan:
    """One run, fixed to the last number: what is made, from which seed, in which batches.

    method: a name in `METHODS`, or a composition of one's own; iterations: per batch, or None to stop a batch when its
    images are good enough; batch_size: canvases optimised together; initial, schedule, learning_rate: where given,
    instead of the method's own.
    """

    method: str | Method
    num_images: int
    iterations: int | None
    batch_size: int
    seed: int
    precision: Precision
    initial: str | None = None
    schedule: PatchSchedule | None = None
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.method, str) and self.method not in METHODS:
            raise DfqError(
                f"unknown method {self.method!r}{did_you_mean(self.method, METHODS)}: choose from {', '.join(METHODS)}"
            )
        counts = {"num_images": self.num_images, "iterations": self.iterations, "batch_size": self.batch_size}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise DfqError(f"{name} must be at least 1, not {count}")
        if self.seed < 0:
            raise DfqError(f"the seed must not be negative, and {self.seed} is")
        if self.precision not in get_args(Precision):
            raise DfqError(f"unknown precision {self.precision!r}: choose from {', '.join(get_args(Precision))}")
        if self.initial is not None and self.initial not in INITIAL:
            raise DfqError(f"unknown start {self.initial!r}: choose from {', '.join(INITIAL)}")
        given = {"initial": self.initial, "schedule": self.schedule, "learning_rate": self.learning_rate}
        meant = [name for name, value in given.items() if value is not None]
        if self._method.schedule is None and meant:
            raise DfqError(f"{self.name} inverts nothing: {meant[0]} is not for it")
        try:
            composed = self.composed
            if composed.schedule is not None:
                composed.schedule.decisions(composed.settings.iterations)
        except ValueError as error:
            raise DfqError(str(error)) from error

    @property
    def name(self) -> str:
        """Of the method, `custom` for one without."""
        return self.method if isinstance(self.method, str) else "custom"

    @property
    def _method(self) -> Method:
        return METHODS[self.method] if isinstance(self.method, str) else self.method

    @property
    def composed(self) -> Method:
        """The method with everything that this plan changes in it."""
        method = self._method
        settings = method.settings
        if self.iterations is not None:
            settings = replace(settings, iterations=self.iterations, enough=None)
        if self.learning_rate is not None:
            settings = replace(settings, learning_rate=self.learning_rate)
        return replace(
            method,
            schedule=self.schedule or method.schedule,
            settings=settings,
            initial=self.initial or method.initial,
        )

    @property
    def images_per_canvas(self) -> int:
        schedule = self.composed.schedule
        return 1 if schedule is None else schedule.images_per_canvas

    @property
    def canvases(self) -> list[int]:
        """The number of canvases of each batch."""
        full, rest = divmod(-(-self.num_images // self.images_per_canvas), self.batch_size)
        return [self.batch_size] * full + [rest] * bool(rest)

    @property
    def batches(self) -> list[int]:
        """The number of images of each batch: of the last canvas only as many as are wanted."""
        counts = [canvases * self.images_per_canvas for canvases in self.canvases]
        counts[-1] -= sum(counts) - self.num_images
        return counts

    def describe(self, mean: tuple[float, ...], std: tuple[float, ...], grid: PatchGrid) -> dict[str, Any]:
        """Everything the images depend on, apart from the model."""
        method = self.composed
        run: dict[str, Any] = {
            "method": self.name,
            "num_images": self.num_images,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "image_size": list(grid.image_size),
            "patch_grid": [grid.rows, grid.columns],
            "mean": list(mean),
            "std": list(std),
            "initial": method.initial,
        }
        if method.schedule is not None:
            run["inversion"] = inversion.describe(method.objective, method.schedule, method.settings)
            run["inversion"]["soft_labels"] = method.soft_labels
            run["precision"] = self.precision
        return run


def check_method(vit: nn.Module, plan: Plan) -> None:
    """Raise DfqError where the schedule or the objective of `plan` needs what `vit` lacks."""
    method = plan.composed
    if method.schedule is None:
        return
    patches, images = PatchGrid.of(vit).num_patches, method.schedule.images_per_canvas
    if images > patches:
        raise DfqError(f"{patches} patches cannot be divided into {images} images")
    inversion.check_windows(method.objective, method.schedule, method.settings)
    if method.is_sparse:
        saliency_kind(vit)
    with capture(vit, method.objective.needs):
        pass
