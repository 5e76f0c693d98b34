"""The robustness tool: its rescaling changes nothing, it tells recipes apart, and it does no cell twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.datasets import reference_digits
from dfq.models import Model, Origin
from dfq.preprocessing import Preprocessing

TINY = {"img_size": 32, "num_classes": 5}


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> Any:
    return load_tool("robustness")


@pytest.fixture(scope="module")
def reference() -> Model:
    return dfq.load_model("reference", device="cpu")


@pytest.fixture(scope="module")
def images(reference: Model) -> CalibrationSet:
    return dfq.generate(reference, "leaves", 4, progress=False)


@pytest.fixture(scope="module")
def pair(tool: Any, reference: Model) -> Any:
    data = reference_digits(reference)
    pixels, labels = zip(*(data[index] for index in range(150)), strict=True)
    return tool.Pair(reference, torch.stack(pixels), torch.tensor(labels), channels=4, factor=30.0, seed=0)


def wrapped(module: nn.Module) -> Model:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    preprocessing = Preprocessing((32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    return Model(module.eval().requires_grad_(False), preprocessing, Origin("tiny", "tiny"))


def vit(**changes: Any) -> nn.Module:
    vit: nn.Module = VisionTransformer(patch_size=8, embed_dim=24, depth=2, num_heads=3, **TINY, **changes)
    return vit


def swin() -> nn.Module:
    # 8x8 patches in windows of 3x3: padded.
    swin: nn.Module = SwinTransformer(
        patch_size=4, window_size=3, embed_dim=16, depths=(2, 2), num_heads=(1, 2), **TINY
    )
    return swin


@pytest.mark.parametrize(
    ("module", "norms"), [(vit(), 4), (vit(qk_norm=True, qkv_bias=False), 4), (swin(), 9)], ids=["vit", "qk", "swin"]
)
def test_some_channels_of_every_norm_grow_and_the_function_stays(tool: Any, module: nn.Module, norms: int) -> None:
    model = wrapped(module)
    twin = tool.rescaled(model, channels=3, factor=30.0, seed=0)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(twin(pixels), model(pixels), rtol=1e-4, atol=1e-4)
    found = list(zip(tool.norms(module), tool.norms(twin.module), strict=True))
    assert len(found) == norms
    grown: list[Tensor] = []
    for (norm, linears), (other, takers) in found:
        ratios = other.weight / norm.weight
        grown.append((ratios - 1).abs() > 1e-3)
        assert int(grown[-1].sum()) == 3
        torch.testing.assert_close(ratios[grown[-1]], torch.full((3,), 30.0))
        torch.testing.assert_close(other.bias, norm.bias * ratios)
        for linear, taker in zip(linears, takers, strict=True):
            torch.testing.assert_close(taker.weight * ratios, linear.weight)
    assert not torch.equal(grown[0], grown[1])
    assert torch.equal(tool.rescaled(model, 3, 30.0, 0)(pixels), twin(pixels))
    assert not torch.equal(tool.rescaled(model, 3, 30.0, 1)(pixels), twin(pixels))


def test_another_function_is_noticed(tool: Any, reference: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = tool.norms
    monkeypatch.setattr(tool, "norms", lambda network: ((norm, []) for norm, _ in norms(network)))
    with pytest.raises(SystemExit, match="another function"):
        tool.Pair(reference, torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long), 4, 30.0, 0)


def test_a_model_without_norms(tool: Any) -> None:
    with pytest.raises(SystemExit, match="no LayerNorm"):
        tool.rescaled(wrapped(nn.Sequential(nn.Linear(2, 2))), 1, 2.0, 0)


def test_the_default_recipe_survives(pair: Any, images: CalibrationSet) -> None:
    found = pair.measure(images, "w4a8", "fast")
    assert found["num_images"] == 150
    assert found["logit_change"] < 1e-4
    assert abs(found["between"]["drop"]) <= 2.0
    assert found["between"]["agreement"] >= 98.0
    assert found["after"]["drop"] == pytest.approx(found["before"]["drop"] + found["between"]["drop"])


def test_one_range_for_all_channels_does_not(pair: Any, images: CalibrationSet) -> None:
    found = pair.measure(images, "w8a4", "paper")
    assert found["between"]["drop"] > 10.0
    assert found["between"]["agreement"] < 80.0


def test_a_run_goes_on_and_its_tables_go_into_a_page(
    tool: Any, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "out" / "r.jsonl"
    command = ["robustness.py", "--model", "reference", "--images", str(digits), "--results", str(results)]
    command += ["--source", "gaussian:8", "--recipes", "paper", "--limit", "20"]
    for bits, cells in ((["w8a8"], 1), (["w8a8", "w4a8"], 2)):
        monkeypatch.setattr("sys.argv", [*command, "--bits", *bits])
        tool.main()
        assert len(capsys.readouterr().out.splitlines()) == 1
        assert len(results.read_text().splitlines()) == cells
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- robustness: r.jsonl -->\nold\n<!-- end -->\nb\n")
    monkeypatch.setattr("sys.argv", ["robustness.py", "--results", str(results), "--write", str(page)])
    tool.main()
    written = page.read_text()
    assert "old" not in written
    assert written.startswith("a\n<!-- robustness: r.jsonl -->\n")
    assert written.endswith("<!-- end -->\nb\n")
    assert sum(row.startswith("| `paper` | 8 `gaussian` | W") for row in written.splitlines()) == 2


def test_a_row_of_the_table(tool: Any) -> None:
    def part(drop: float, agreement: float) -> dict[str, Any]:
        low, high = drop - 1, drop + 1
        return {"baseline_top1": 80.0, "drop": drop, "drop_ci95": [low, high], "agreement": agreement}

    line = {"model": "vit", "source": "smi", "recipe": "folder/mine.toml", "seed": 0, "channels": 4, "factor": 30.0}
    line |= {"num_images": 100, "logit_change": 1.23e-5, "iterations": 20, "calibration_images": 16}
    line |= {"machine": "a machine", "threads": 1, "versions": {"dfq": "0"}}
    parts = {"before": part(1.0, 95.0), "after": part(1.5, 94.0), "between": part(0.5, 97.0)}
    better = parts | {"between": part(-0.75, 96.0)}
    text = tool.to_markdown([line | parts | {"bits": "w8a8"}, line | better | {"bits": "w4a8"}])
    assert "full precision 80.0 % on 100 images; rescaled, its logits differ by at most 1e-05." in text
    assert (
        "| `mine` | 16 `smi`, 20 iterations | W8A8 | 4 x 30 | 1.0 [0.0, 2.0]; 95.0 % | 1.5 [0.5, 2.5]; 94.0 % | "
        "0.5 [-0.5, 1.5] | 97.0 % |" in text
    )
    assert "The largest change is -0.8 [-1.8, 0.2] points, `mine` at W4A8." in text
