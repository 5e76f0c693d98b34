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
    from dfq.benchmark import Bench, bench
    from dfq.checkpoint import load, save
    from dfq.distillation import distill
    from dfq.errors import DfqError
    from dfq.evaluation import Evaluation, evaluate
    from dfq.generation import generate, real_images
    from dfq.models import Model, load_model
    from dfq.onnx_export import Export, export
    from dfq.preprocessing import Preprocessing
    from dfq.ptq.engine import QuantizedModel, quantize
    from dfq.ptq.mixed_precision import MixedPrecision, mixed_precision
    from dfq.ptq.sensitivity import Sensitivity, sensitivity
    from dfq.recipe import Recipe, load_recipe
    from dfq.reporting.page import report
    from dfq.runtime import RuntimeModel, integer_products, open_model
    from dfq.transfer.result import Distillation
    from dfq.transfer.student import load_student
    from dfq.transfer.training import Training
    from dfq.unlabelled import Likeness, compare

__version__ = "0.1.0"

# Public names, and where they live. They are imported when first used: `dfq --help` and a mistyped option must not
# wait for torch.
_HOMES = {
    "Bench": "dfq.benchmark",
    "CalibrationSet": "calibration",
    "DfqError": "dfq.errors",
    "Distillation": "dfq.transfer.result",
    "Evaluation": "dfq.evaluation",
    "Export": "dfq.onnx_export",
    "Likeness": "dfq.unlabelled",
    "MixedPrecision": "dfq.ptq.mixed_precision",
    "Model": "dfq.models",
    "Preprocessing": "dfq.preprocessing",
    "QuantizedModel": "dfq.ptq.engine",
    "Recipe": "dfq.recipe",
    "RuntimeModel": "dfq.runtime",
    "Sensitivity": "dfq.ptq.sensitivity",
    "Training": "dfq.transfer.training",
    "bench": "dfq.benchmark",
    "compare": "dfq.unlabelled",
    "distill": "dfq.distillation",
    "evaluate": "dfq.evaluation",
    "export": "dfq.onnx_export",
    "generate": "dfq.generation",
    "integer_products": "dfq.runtime",
    "load": "dfq.checkpoint",
    "load_calibration_set": "calibration",
    "load_model": "dfq.models",
    "load_recipe": "dfq.recipe",
    "load_student": "dfq.transfer.student",
    "mixed_precision": "dfq.ptq.mixed_precision",
    "open_model": "dfq.runtime",
    "quantize": "dfq.ptq.engine",
    "real_images": "dfq.generation",
    "report": "dfq.reporting.page",
    "save": "dfq.checkpoint",
    "sensitivity": "dfq.ptq.sensitivity",
}

__all__ = [
    "Bench",
    "CalibrationSet",
    "DfqError",
    "Distillation",
    "Evaluation",
    "Export",
    "Likeness",
    "MixedPrecision",
    "Model",
    "Preprocessing",
    "QuantizedModel",
    "Recipe",
    "RuntimeModel",
    "Sensitivity",
    "Training",
    "__version__",
    "bench",
    "compare",
    "distill",
    "evaluate",
    "export",
    "generate",
    "integer_products",
    "load",
    "load_calibration_set",
    "load_model",
    "load_recipe",
    "load_student",
    "mixed_precision",
    "open_model",
    "quantize",
    "real_images",
    "report",
    "save",
    "sensitivity",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dfq' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
