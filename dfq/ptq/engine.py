"""The pipeline: adapt the model, then walk it stage by stage and quantize each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from calibration import CalibrationSet, load_calibration_set
from calibration.background import with_leaves
from calibration.tokens import PatchGrid
from dfq.errors import DfqError, UsageError
from dfq.models import Model, Network
from dfq.progress import progress_bar
from dfq.ptq.fitting import fit_sites, move_ranges, observe_apart, place_sites
from dfq.ptq.gradients import token_gradients
from dfq.ptq.modules import QuantizedLayer, adapt
from dfq.ptq.positions import set_positions_apart
from dfq.ptq.products import search_stage
from dfq.ptq.reconstruct import Reconstructor
from dfq.ptq.rotate import rotate
from dfq.ptq.sites import POSITION_EMBEDDING, PlannedSite, plan_sites
from dfq.ptq.stages import stages
from dfq.ptq.stretch import stretched
from dfq.recipe import DEFAULT_RECIPE, Bits, Recipe, load_recipe, parse_bits
from dfq.support import check_quantizable
from quantizers import Quantizer, pack

if TYPE_CHECKING:
    from dfq.ptq.resume import ResumeFile


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
        """Bytes of `tensors`, as they are kept on disk."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """What has to be kept to make the model again: packed integers, quantizers, and parameters (`kept_state`)."""
        kept = kept_state(self.module)
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


def kept_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without quantizers; the position embedding in float16 where that holds the very same values."""
    kept: dict[str, Tensor] = {
        name: value
        for name, value in module.state_dict().items()
        if not isinstance(module.get_submodule(name.rpartition(".")[0]), Quantizer)
    }
    positions = kept.get(POSITION_EMBEDDING)
    if positions is not None and torch.equal(positions.half().to(positions.dtype), positions):
        kept[POSITION_EMBEDDING] = positions.half()
    return kept


def quantize(
    model: Model,
    bits: str = "w8a8",
    *,
    calibration: CalibrationSet | Path | str | None = None,
    recipe: Recipe | Path | str = DEFAULT_RECIPE,
    batch_size: int = 32,
    resume: Path | str | None = None,
    progress: bool = True,
) -> QuantizedModel:
    """Quantize a model on a calibration set; the model itself is left as it is.

    bits: `w4a8` and the like, 2 to 8 each; `a16` leaves activations in floating point. calibration: a set, the
    folder of one, or None to invert the model for as many images as the recipe asks for. recipe: a preset's name, a
    TOML file, or a Recipe. resume: a file in which finished stages are kept: a run that was stopped goes on from there
    to the same result, bit for bit on the same hardware. What another run left there is replaced. It is there to be
    deleted when the model is saved. Of images that are made here nothing is kept: give `calibration`.

    Where the recipe says so, channels are rotated first (`rotate`), and the position embedding is rounded to float16
    (`prepare`). The network is then walked once, stage by stage (stem, each block, head), in full precision ("parallel"
    calibration, PTQ4ViT, section 3.3), on sparse images as the recipe shows them (`as_shown`). In each stage ranges per
    channel are first moved where that costs nothing (`reparametrize`), and what positions have in common is kept from
    rounding (`set_positions_apart`; not where patches are run alone). Then all ranges are found, by the error of each
    tensor and, where the recipe says so, by that of the products (`search_stage`); activations get their quantizers and
    weights their integers. What the recipe tunes by gradients is tuned afterwards (`reconstruct`).

    Raises DfqError: bits or recipe that make no sense, a calibration set made for another image size or
    normalisation, activations that are not finite, a file to resume from that is something else.
    """
    if batch_size < 1:
        raise UsageError(f"the batch size is {batch_size}; it must be 1 or more")
    widths = parse_bits(bits)
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    module, planned = prepare(model, widths, chosen)
    chain = stages(module)
    kept = None if resume is None else _resume_file(Path(resume))
    images = as_shown(_calibration_images(model, calibration, chosen.num_images), chosen)
    batches = images.batches(batch_size, model.device)

    dampings = () if chosen.compensation is None else chosen.compensation.damping
    gradients: dict[str, list[Tensor]] = {}
    powers = [part.gradient for part in (chosen.compensation, chosen.reconstruction) if part is not None]
    if any(power > 0 for power in [*powers, *(p.settings.gradient for p in planned)]):
        weighted = [p.site.owner for p in planned if p.site.is_weight]
        gradients = token_gradients(module, weighted, batches)
    quantized = QuantizedModel(
        module=module,
        preprocessing=model.preprocessing,
        origin=model.origin,
        bits=str(widths),
        recipe=chosen,
        sites={},
        calibration={"num_images": len(images), "run": images.run},
    )
    done = 0
    inputs: Sequence[Any] = batches
    bar = progress_bar(len(chain), "calibrate", "stage", shown=progress)
    with bar, torch.no_grad():
        reconstructor = None
        if chosen.reconstruction is not None:
            reconstructor = Reconstructor(module, chosen.reconstruction, batches, chain[0].run, gradients)
        reached = None if kept is None else kept.take_up(quantized, model, images, batch_size)
        if reached is not None:
            done, inputs = reached.stages, reached.full
            bar.initial = bar.n = done
            if reconstructor is not None:
                reconstructor.entering = reached.quantized
        for index, stage in list(enumerate(chain))[done:]:
            run = stage.run
            sites = [p for p in planned if stage.owns(p.site.name)]
            looked_at = inputs
            if chosen.stretch > 0 and stage.module is not None:
                looked_at = stretched(inputs, chosen.stretch, stage.name)
            sites = move_ranges(module, stage, sites, chosen, looked_at, run, gradients)
            if stage.module is not None and not images.is_sparse:
                set_positions_apart(module, sites, inputs, run)
            seen = observe_apart(module, sites, chosen.compensation, inputs, looked_at, run, gradients)
            found = fit_sites(module, sites, seen)
            if chosen.range_search is not None:
                search_stage(module, stage, chain[index + 1 :], found, inputs, run, chosen.range_search)
            original = copy.deepcopy(stage.module) if reconstructor is not None else None
            place_sites(module, sites, found, seen.moments, dampings)
            if reconstructor is not None:
                reconstructor.tune(stage, original, inputs, seen.outputs)
            quantized.sites |= found
            inputs = seen.outputs
            if kept is not None:
                kept.keep(quantized, index + 1, inputs, () if reconstructor is None else reconstructor.entering)
            bar.update()

    quantized.sites = {p.site.name: quantized.sites[p.site.name] for p in planned}
    return quantized


def _resume_file(path: Path) -> ResumeFile:
    from dfq.ptq.resume import ResumeFile  # What it keeps is a QuantizedModel.

    return ResumeFile(path)


def prepare(model: Model, bits: Bits, recipe: Recipe) -> tuple[VisionTransformer, list[PlannedSite]]:
    """An adapted copy of the model, and what of it is to be quantized how.

    Its position embedding, unless it is a site itself, has values that float16 holds: of all that stays in floating
    point it is the largest tensor, and it is kept in half the bytes.

    Raises DfqError where the model is not supported or the recipe does not fit it: quick to find out, before images are
    made.
    """
    check_quantizable(model.name, model.module)
    module = adapt(copy.deepcopy(model.module), deferred=recipe.softmax == "deferred")
    rotated = set() if recipe.rotate is None else rotate(module, recipe.rotate)
    planned = plan_sites(module, recipe, bits)
    if recipe.reparametrize == "unrotated":
        planned = [p.per_tensor() if p.site.slot == "input" and p.site.owner in rotated else p for p in planned]
    if POSITION_EMBEDDING not in [p.site.name for p in planned]:
        # Before anything is calibrated, so that ranges are found for what will run.
        _round_position_embedding(module)
    return module, planned


@torch.no_grad()
def _round_position_embedding(module: nn.Module) -> None:
    """To values that float16 holds; it is left alone where they lie beyond its range."""
    positions = getattr(module, POSITION_EMBEDDING, None)
    if positions is not None and bool(positions.half().isfinite().all()):
        positions.copy_(positions.half())


def _calibration_images(
    model: Model, calibration: CalibrationSet | Path | str | None, num_images: int
) -> CalibrationSet:
    if calibration is None:
        from dfq.generation import generate

        calibration = generate(model, num_images=num_images)
    images = calibration if isinstance(calibration, CalibrationSet) else load_calibration_set(calibration)
    check_calibration(model, images)
    return images


def as_shown(images: CalibrationSet, recipe: Recipe) -> CalibrationSet:
    """A set as networks see it under a recipe: sparse images on their background, if they are to have one."""
    return with_leaves(images) if recipe.background == "leaves" else images


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
