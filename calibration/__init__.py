"""Calibration sets: model inversion, patch schedules, objectives, and sources without inversion.

Knows timm Vision Transformers and nothing of quantization. Users meet it through `dfq`.
"""

from calibration.augment import RollAndFlip
from calibration.calibration_set import CalibrationSet, load_calibration_set
from calibration.errors import DfqError
from calibration.initial import INITIAL, initial_images
from calibration.inversion import Inverted, Progress, Settings, invert
from calibration.making import generate
from calibration.methods import METHODS, Method, Plan, check_method
from calibration.objectives import Loss, Objective, Scene, Step
from calibration.schedules import Choice, Dense, PatchSchedule, ProgressiveStop, Rebirth
from calibration.sources import real_images

__all__ = [
    "INITIAL",
    "METHODS",
    "CalibrationSet",
    "Choice",
    "Dense",
    "DfqError",
    "Inverted",
    "Loss",
    "Method",
    "Objective",
    "PatchSchedule",
    "Plan",
    "Progress",
    "ProgressiveStop",
    "Rebirth",
    "RollAndFlip",
    "Scene",
    "Settings",
    "Step",
    "check_method",
    "generate",
    "initial_images",
    "invert",
    "load_calibration_set",
    "real_images",
]
