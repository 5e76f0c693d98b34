"""Calibration sets: model inversion, patch schedules, objectives, and sources without inversion.

Knows timm Vision Transformers and nothing of quantization. Users meet it through `dfq`.
"""

from calibration.calibration_set import CalibrationSet, load_calibration_set
from calibration.errors import DfqError
from calibration.inversion import Settings, invert
from calibration.methods import METHODS, Method, Plan, check_method, generate
from calibration.objectives import Objective
from calibration.schedules import Dense, PatchSchedule, ProgressiveStop, Rebirth
from calibration.sources import real_images

__all__ = [
    "METHODS",
    "CalibrationSet",
    "Dense",
    "DfqError",
    "Method",
    "Objective",
    "PatchSchedule",
    "Plan",
    "ProgressiveStop",
    "Rebirth",
    "Settings",
    "check_method",
    "generate",
    "invert",
    "load_calibration_set",
    "real_images",
]
