"""Models of every shape that timm has, held to the table of those that were tried."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dfq
from calibration.saliency import saliency_kind, saliency_probe
from calibration.tokens import PatchGrid, token_gather
from dfq.architectures import build_architecture
from dfq.errors import DfqError, UnsupportedModelError
from dfq.models import Model, Origin
from dfq.preprocessing import Preprocessing
from dfq.ptq.gradients import token_gradients
from dfq.ptq.modules import adapt
from dfq.ptq.sites import list_sites
from dfq.support import check_invertible, check_quantizable, describe_support
from dfq.tried import TRIED

# The image size each name is run at, and what makes the larger ones small enough to be run here.
TWO_BLOCKS = {"depth": 2}
NARROW = {"depth": 2, "embed_dim": 96, "num_heads": 2}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "vit_tiny_patch16_224": (64, {}),
    "vit_base_patch8_224": (32, NARROW),
    "vit_small_patch32_224": (128, TWO_BLOCKS),
    "vit_base_patch32_clip_224": (128, NARROW),
    "vit_small_patch14_reg4_dinov2": (56, TWO_BLOCKS | {"num_classes": 5}),
    "vit_giant_patch14_dinov2": (56, NARROW | {"num_classes": 5}),
    "deit_tiny_patch16_224": (64, TWO_BLOCKS),
    "deit_tiny_distilled_patch16_224": (64, {}),
    "deit3_small_patch16_224": (64, TWO_BLOCKS),
    "vit_small_patch16_18x2_224": (64, TWO_BLOCKS),
    "vit_base_patch16_xp_224": (64, NARROW),
    "vit_base_patch16_siglip_224": (64, NARROW | {"num_classes": 5}),
    "vit_so150m_patch16_reg4_map_256": (64, NARROW),
    "test_vit3": (64, {}),
    "vit_medium_patch16_gap_240": (48, NARROW),
    "vit_little_patch16_reg4_gap_256": (64, TWO_BLOCKS),
    "test_vit4": (64, {}),
    "beit3_base_patch16_224": (64, NARROW),
    "vit_base_patch16_rpn_224": (64, NARROW),
    "vit_pwee_patch16_reg1_gap_256": (64, TWO_BLOCKS),
    "vit_dwee_patch16_reg1_gap_256": (64, TWO_BLOCKS),
    "vit_dpwee_patch16_reg1_gap_256": (64, TWO_BLOCKS),
    "beit_base_patch16_224": (64, NARROW),
    "vit_relpos_small_patch16_224": (64, TWO_BLOCKS),
    "eva02_tiny_patch14_336": (56, {}),
    "vit_base_patch16_rope_224": (64, NARROW),
    "cait_xxs24_224": (64, TWO_BLOCKS),
    "convit_tiny": (64, {}),
    "samvit_base_patch16_224": (64, NARROW),
    "swin_tiny_patch4_window7_224": (64, {}),
    "swinv2_tiny_window8_256": (64, {"depths": (1, 1, 1, 1)}),
    "swinv2_cr_tiny_ns_224": (64, {"depths": (1, 1, 1, 1)}),
    "nest_tiny": (64, {}),
}
# Never run: refused when they are loaded.
REFUSED = ("vit_base_r50_s16_224", "pit_ti_224", "naflexvit_base_patch16_gap")


def part_refused(cell: str) -> str | None:
    return cell.removeprefix("no: ") if cell.startswith("no: ") else None


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    """One model after another, with random weights."""
    size, smaller = CASES[request.param]
    if not smaller:
        yield dfq.load_model(request.param, random_weights=True, image_size=size, device="cpu")
        return
    arguments = smaller | {"img_size": size}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build_architecture(request.param, arguments).eval().requires_grad_(False)
    check_invertible(request.param, module)
    preprocessing = Preprocessing((size, size), (0.5,) * 3, (0.5,) * 3)
    yield Model(module, preprocessing, Origin(request.param, request.param, arguments))


def generate(model: Model, method: str) -> dfq.CalibrationSet:
    # float32: RMS norms warn about bfloat16.
    return dfq.generate(model, method, 2, iterations=3, batch_size=2, precision="fp32", progress=False)


def test_the_table_has_what_is_tested() -> None:
    assert list(TRIED) == [*CASES, *REFUSED]


def test_the_documentation_has_the_table() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "models.md").read_text().replace("`", "").splitlines()
    start = lines.index("| timm name | what it has | sparse inversion, by | dense inversion | quantization |")
    rows = [f"| {name} | {' | '.join(row)} |" for name, row in TRIED.items()]
    assert lines[start + 2 : start + 3 + len(rows)] == [*rows, ""]


@pytest.mark.parametrize("name", TRIED)
def test_support_is_told_as_in_the_table(name: str) -> None:
    support, row = describe_support(name), TRIED[name]
    assert (support.head_needed and not support.dense_refusal) == (row.dense == "yes, head needed")
    assert support.saliency == (None if part_refused(row.sparse) else row.sparse)
    refusals = (support.sparse_refusal, support.dense_refusal, support.quantization_refusal)
    for refusal, cell in zip(refusals, row[1:], strict=True):
        assert (refusal is None) == (part_refused(cell) is None)
        assert part_refused(cell) is None or str(part_refused(cell)) in str(refusal).replace(name, "")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_inverted_is_not_loaded(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{name}.* {part_refused(TRIED[name].dense)}"):
        dfq.load_model(name, device="cpu")  # told before pretrained weights are asked for


def test_scores_of_some_patches(model: Model) -> None:
    row, vit, count = TRIED[model.name], model.module, 5
    part = part_refused(row.sparse)
    if part is not None:
        with pytest.raises(DfqError, match=rf"\b{part}\b.* use a dense method"), saliency_probe(vit):
            pass
        return
    assert saliency_kind(vit) == row.sparse
    images = torch.randn(2, 3, *model.preprocessing.image_size, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[7, 0, 3, 2, 5], [1, 8, 2, 6, 4]])
    with token_gather(vit) as gather, saliency_probe(vit) as probe, torch.no_grad():
        gather.keep, probe.active = keep, True
        vit(images)
    assert probe.scores.shape == (2, count)
    assert bool((probe.scores > 0).all())
    assert bool((probe.scores.sum(1) <= 1 + 1e-5).all())
    assert probe.scores.std(1).min() > 0  # patches differ


def test_dense_inversion(model: Model) -> None:
    made = generate(model, "dense")
    grid = PatchGrid.of(model.module)
    assert made.images.shape == (2, 3, *model.preprocessing.image_size)
    assert made.mask.shape == (2, grid.rows, grid.columns)
    assert bool(made.mask.all())


def test_sparse_inversion(model: Model) -> None:
    if part_refused(TRIED[model.name].sparse) is not None:
        with pytest.raises(DfqError, match=r"use a dense method"):
            generate(model, "smi")
        return
    kept = generate(model, "smi").mask.flatten(1).sum(1)
    assert bool((kept == kept[0]).all())
    assert 0 < kept[0] < PatchGrid.of(model.module).num_patches


def test_quantization(model: Model) -> None:
    part = part_refused(TRIED[model.name].quantization)
    if part is not None:
        for refused in (
            lambda: check_quantizable(model.name, model.module),
            lambda: dfq.quantize(model, "w8a8", progress=False),
        ):
            with pytest.raises(UnsupportedModelError, match=rf"^{model.name}.* is a {part}\b"):
                refused()
        return
    images = torch.randn(2, 3, *model.preprocessing.image_size, generator=torch.Generator().manual_seed(0))
    logits = model(images)
    torch.testing.assert_close(adapt(copy.deepcopy(model.module))(images), logits, rtol=1e-4, atol=1e-5)
    noise = dfq.generate(model, "gaussian", 2, progress=False)
    quantized = dfq.quantize(model, "w8a16", calibration=noise, recipe="paper", progress=False)
    error = quantized(images) - logits
    assert error.norm() < 0.1 * logits.norm()


def test_gradients_for_every_layer_that_is_quantized(model: Model) -> None:
    """What `fast` and `accurate` ask for, and `paper` does not."""
    if part_refused(TRIED[model.name].quantization) is not None:
        return
    network = adapt(copy.deepcopy(model.module))
    layers = {site.owner for site in list_sites(network, "gemm") if site.is_weight}
    images = torch.randn(2, 3, *model.preprocessing.image_size, generator=torch.Generator().manual_seed(0))
    found = token_gradients(network, sorted(layers), [(images, None)])
    assert set(found) == layers
    assert all(bool(gradients.isfinite().all()) and gradients.numel() for (gradients,) in found.values())
