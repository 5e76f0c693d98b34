"""The pipeline: adapt the model, walk it once stage by stage to fit the activations, then the weights."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from calibration import CalibrationSet, load_calibration_set
from calibration.tokens import PatchGrid
from dfq.errors import DfqError
from dfq.models import Model, Network, check_quantizable
from dfq.ptq import capture
from dfq.ptq.capture import Extremes, InputImportance, Sample
from dfq.ptq.modules import QuantizedLayer, adapt, quantize_parameter
from dfq.ptq.sites import PATCH_TOKENS, POSITION_EMBEDDING, PlannedSite, plan_sites
from dfq.recipe import Bits, Recipe, load_recipe, parse_bits
from quantizers import Quantizer, pack


@dataclass
class QuantizedModel(Network):
    """A quantized ViT, computed by fake quantization.

    module: the adapted timm model; bits: of the run, `w4a8`; sites: the fitted quantizer of every site, by name;
    calibration: how the images it was calibrated on were made.
    """

    bits: str
    recipe: Recipe
    sites: dict[str, Quantizer]
    calibration: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """One line for people."""
        ends = self.recipe.first_last_bits
        exception = "" if ends is None else f", patch embedding and classifier at {ends} bits"
        return f"{self.name}, {self.bits.upper()}, recipe {self.recipe.name}{exception}"

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """What has to be kept to make the model again: packed integers, quantizers, and parameters in float32."""
        kept = {
            name: value
            for name, value in self.module.state_dict().items()
            if not isinstance(self.module.get_submodule(name.rpartition(".")[0]), Quantizer)
        }
        for path, layer in self.module.named_modules():
            if not isinstance(layer, QuantizedLayer):
                continue
            if layer.integers is None or layer.weight_quantizer is None:
                kept[f"{path}.weight"] = layer.weight
            else:
                kept[f"{path}.weight.integers"] = pack(layer.integers, layer.weight_quantizer.bits)
        for name, quantizer in self.sites.items():
            kept |= {f"{name}.{key}": value for key, value in quantizer.tensors().items()}
        return kept


def place(module: VisionTransformer, name: str, quantizer: Quantizer) -> None:
    """Put a fitted quantizer where the site's activation passes."""
    owner, _, slot = name.rpartition(".")
    setattr(module.get_submodule(owner), slot, quantizer)


def quantize(
    model: Model,
    bits: str = "w8a8",
    *,
    calibration: CalibrationSet | Path | str | None = None,
    recipe: Recipe | Path | str = "default",
    batch_size: int = 32,
    progress: bool = True,
) -> QuantizedModel:
    """Quantize a model on a calibration set; the model itself is left as it is.

    bits: `w4a8` and the like, 2 to 8 each; `a16` leaves activations in floating point. calibration: a set, the
    folder of one, or None to invert the model for one now. recipe: a preset's name, a TOML file, or a Recipe.

    Every range is found on full-precision activations ("parallel" calibration, PTQ4ViT, section 3.3), on the kept
    patches only where the set is sparse.

    Raises DfqError: bits or recipe that make no sense, a calibration set made for another image size or
    normalisation, activations that are not finite.
    """
    widths = parse_bits(bits)
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    module, planned = prepare(model, widths, chosen)
    images = _calibration_images(model, calibration)

    activations = {p.site.name: p for p in planned if not p.site.is_weight and p.site.name != POSITION_EMBEDDING}
    quantizers: dict[str, Quantizer] = {}
    with (
        torch.no_grad(),
        tqdm(
            total=len(module.blocks) + 3,
            desc="calibrate",
            unit="stage",
            file=sys.stderr,
            disable=None if progress else True,
        ) as bar,
    ):
        batches = [(pixels.cpu(), keep) for pixels, keep in images.batches(batch_size, model.device)]
        weights = {p.site.name: p for p in planned if p.site.is_weight}
        fit = _StageFitter(module, activations, weights, quantizers, sum(len(pixels) for pixels, _ in batches), bar)
        tokens = fit("", batches, lambda batch: capture.stem(module, batch[0].to(model.device), batch[1]))
        for index, block in enumerate(module.blocks):
            tokens = fit(f"blocks.{index}.", tokens, block)
        fit(None, tokens, lambda x: capture.head(module, x))

        for name, quantizer in quantizers.items():
            place(module, name, quantizer)
        for p in planned:
            if p.site.is_weight:
                layer = module.get_submodule(p.site.owner)
                quantizers[p.site.name] = _fit(p, layer.weight, fit.importance.get(p.site.name))
                layer.set_integers(quantizers[p.site.name], quantizers[p.site.name].quantize(layer.weight))
            elif p.site.name == POSITION_EMBEDDING:
                quantizers[p.site.name] = _fit(p, module.pos_embed)
                quantize_parameter(module.pos_embed, quantizers[p.site.name])
        if PATCH_TOKENS in quantizers:
            for token in _joined_tokens(module):
                quantize_parameter(token, quantizers[PATCH_TOKENS])
        bar.update()

    return QuantizedModel(
        module=module,
        preprocessing=model.preprocessing,
        origin=model.origin,
        bits=str(widths),
        recipe=chosen,
        sites={p.site.name: quantizers[p.site.name] for p in planned},
        calibration={"num_images": len(images), "run": images.run},
    )


def prepare(model: Model, bits: Bits, recipe: Recipe) -> tuple[VisionTransformer, list[PlannedSite]]:
    """An adapted copy of the model, and what of it is to be quantized how.

    Raises DfqError where the model is not supported or the recipe does not fit it: quick to find out, before images are
    made.
    """
    check_quantizable(model.name, model.module)
    module = adapt(copy.deepcopy(model.module))
    return module, plan_sites(module, recipe, bits)


def _joined_tokens(module: VisionTransformer) -> list[nn.Parameter]:
    """The learned tokens that timm joins to the patches: class, distillation, registers."""
    tokens = (getattr(module, name, None) for name in ("cls_token", "dist_token", "reg_token"))
    return [token for token in tokens if token is not None]


class _StageFitter:
    """Runs one stage over all batches in full precision, and fits the quantizers of the sites in it."""

    def __init__(
        self,
        module: VisionTransformer,
        activations: dict[str, PlannedSite],
        weights: dict[str, PlannedSite],
        quantizers: dict[str, Quantizer],
        num_images: int,
        bar: tqdm,
    ) -> None:
        self._module = module
        self._activations = activations
        self._weights = weights
        self._quantizers = quantizers
        self._num_images = num_images
        self._bar = bar
        self.importance: dict[str, Tensor] = {}

    def __call__(self, prefix: str | None, inputs: list[Any], run: Callable[[Any], Tensor]) -> list[Tensor]:
        """prefix: of a block's sites; "" for those before the blocks, None for those after."""
        recorders = {name: self._recorder(p) for name, p in _of_stage(self._activations, prefix).items()}
        weighed = {name: p for name, p in _of_stage(self._weights, prefix).items() if p.settings.needs_importance}
        squares = {name: InputImportance() for name in weighed}
        inputs_of = {self._module.get_submodule(p.site.owner).input: squares[name] for name, p in weighed.items()}
        slots = {self._module.get_submodule(name): name for name in recorders}
        with (
            capture.recording(inputs_of),
            capture.recording({slot: recorders[name] for slot, name in slots.items()}) as passed,
        ):
            outputs = [run(batch) for batch in inputs]
        # In the order of the forward pass: of values that are not finite, the error names the source.
        for slot in passed | dict.fromkeys(slots):
            name = slots[slot]
            values = recorders[name].values()
            if name == PATCH_TOKENS:
                tokens = [values, *_joined_tokens(self._module)]
                values = torch.cat([token.flatten(0, -2) for token in tokens])
            planned = self._activations[name]
            counts = capture.token_importance(values) if planned.settings.range == "token_mse" else None
            self._quantizers[name] = _fit(planned, values, counts)
        for name, p in weighed.items():
            # [C] against weights [out, C] of a linear or [out, C, kh, kw] of the patch embedding.
            trailing = self._module.get_submodule(p.site.owner).weight.dim() - 2
            self.importance[name] = squares[name].values().view(-1, *[1] * trailing)
        self._bar.update()
        return outputs

    def _recorder(self, planned: PlannedSite) -> Extremes | Sample:
        if not planned.settings.needs_values:
            return Extremes()
        return Sample(lambda x: capture.SAMPLE_ELEMENTS / (self._num_images * x[0].numel()), seed=0)


def _of_stage(sites: dict[str, PlannedSite], prefix: str | None) -> dict[str, PlannedSite]:
    if prefix:
        return {name: p for name, p in sites.items() if name.startswith(prefix)}
    before = ("patch_embed.", "pos_drop.")
    outside = {name: p for name, p in sites.items() if not name.startswith("blocks.")}
    return {name: p for name, p in outside.items() if name.startswith(before) == (prefix == "")}


def _fit(planned: PlannedSite, values: Tensor, importance: Tensor | None = None) -> Quantizer:
    quantizer = planned.settings.build(planned.bits, is_weight=planned.site.is_weight)
    try:
        return quantizer.fit(values, importance)
    except ValueError as error:
        raise DfqError(f"cannot find a range for {planned.site.name}: {error}") from error


def _calibration_images(model: Model, calibration: CalibrationSet | Path | str | None) -> CalibrationSet:
    if calibration is None:
        from dfq.generation import generate

        calibration = generate(model)
    images = calibration if isinstance(calibration, CalibrationSet) else load_calibration_set(calibration)
    check_calibration(model, images)
    return images


def check_calibration(model: Model, images: CalibrationSet) -> None:
    """Raise DfqError unless the set was made for this image size, patch grid and normalisation."""
    wanted = model.preprocessing
    size = tuple(images.images.shape[-2:])
    if size != wanted.image_size:
        raise DfqError(
            f"the calibration set holds images of {size[0]}x{size[1]}, and {model.name} takes "
            f"{wanted.image_size[0]}x{wanted.image_size[1]}: generate one for this model"
        )
    grid = PatchGrid.of(model.module)
    if images.mask.shape[1:] != (grid.rows, grid.columns):
        raise DfqError(
            f"the calibration set counts {images.mask.shape[1]}x{images.mask.shape[2]} patches, and {model.name} "
            f"{grid.rows}x{grid.columns}: generate one for this model"
        )
    if (images.mean, images.std) != (wanted.mean, wanted.std):
        raise DfqError(
            f"the calibration set was made with mean {images.mean} and std {images.std}, and {model.name} is used with "
            f"mean {wanted.mean} and std {wanted.std}: give the model's own, or generate a set with these"
        )
