"""dfq: data-free quantization of Vision Transformers.

import dfq

model = dfq.load_model("deit_tiny_patch16_224", checkpoint="deit_tiny.safetensors")
calibration = dfq.generate(model, num_images=32)
quantized = dfq.quantize(model, "w4a8", calibration=calibration)
print(dfq.evaluate(quantized, "photographs/", baseline=model).table())
dfq.save(quantized, "deit_tiny-w4a8")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibration import CalibrationSet, load_calibration_set
    from dfq.checkpoint import load, save
    from dfq.errors import DfqError
    from dfq.evaluation import Evaluation, evaluate
    from dfq.generation import generate, real_images
    from dfq.models import Model, load_model
    from dfq.preprocessing import Preprocessing
    from dfq.ptq.engine import QuantizedModel, quantize
    from dfq.recipe import Recipe, load_recipe

__version__ = "0.1.0"

# Public names, and where they live. They are imported when first used: `dfq --help` and a mistyped option must not
# wait for torch.
_HOMES = {
    "CalibrationSet": "calibration",
    "DfqError": "dfq.errors",
    "Evaluation": "dfq.evaluation",
    "Model": "dfq.models",
    "Preprocessing": "dfq.preprocessing",
    "QuantizedModel": "dfq.ptq.engine",
    "Recipe": "dfq.recipe",
    "evaluate": "dfq.evaluation",
    "generate": "dfq.generation",
    "load": "dfq.checkpoint",
    "load_calibration_set": "calibration",
    "load_model": "dfq.models",
    "load_recipe": "dfq.recipe",
    "quantize": "dfq.ptq.engine",
    "real_images": "dfq.generation",
    "save": "dfq.checkpoint",
}

__all__ = [
    "CalibrationSet",
    "DfqError",
    "Evaluation",
    "Model",
    "Preprocessing",
    "QuantizedModel",
    "Recipe",
    "__version__",
    "evaluate",
    "generate",
    "load",
    "load_calibration_set",
    "load_model",
    "load_recipe",
    "quantize",
    "real_images",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dfq' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
