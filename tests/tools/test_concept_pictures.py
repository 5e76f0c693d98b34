"""The program that draws docs/concepts.md: its numbers against hand and numpy, its places on the page, its files."""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import dfq
from calibration.tokens import PatchGrid
from calibration.trace import Trace
from dfq.models import Model
from quantizers import LogQuantizer, UniformQuantizer

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "concepts.md").read_text()
LARGEST = 150_000
SVG = "{http://www.w3.org/2000/svg}"
OPTIONS = Namespace(seed=0, block=None)
# Of one step on one image of the reference model, by hand: 65 tokens of width 64, 4 blocks, MLPs of 256, patches of 48
# numbers. 2 (4 (2 * 65 * 64 * (4 * 64 + 2 * 256) + 3 * 2 * 65^2 * 64) + 2 * 64 * 48 * 64), and the same for 15 tokens.
ALL_PATCHES, FEW_PATCHES = 64_883_712, 12_659_712


@pytest.fixture(scope="module")
def sheets(load_tool: Callable[[str], ModuleType]) -> Any:
    return load_tool("concept_sheets")


@pytest.fixture(scope="module")
def charts(load_tool: Callable[[str], ModuleType]) -> Any:
    return load_tool("concept_charts")


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType], sheets: Any, charts: Any) -> Any:
    return load_tool("concept_pictures")


@pytest.fixture(scope="module")
def reference() -> Model:
    return dfq.load_model("reference", device="cpu")


def texts(path: Path) -> list[str]:
    return [text.text or "" for text in ElementTree.parse(path).iter(f"{SVG}text")]


def ticks(svg: ElementTree.Element) -> list[list[float]]:
    """Where the levels stand, row by row."""
    paths = [path.attrib["d"] for path in svg.iter(f"{SVG}path")]
    return [[float(x) for x in re.findall(r"M([\d.]+)", path)] for path in paths]


class TestProgram:
    def test_it_draws_all_and_says_what_it_drew(
        self, tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(tool, "ACTIVATION_IMAGES", 2)
        monkeypatch.setattr(tool, "SIZES", {"fp32": None})
        out = tmp_path / "new" / "pictures"
        monkeypatch.setattr("sys.argv", ["concept_pictures.py", "--iterations", "20", "--out", str(out)])
        tool.main()
        said = capsys.readouterr().out.splitlines()
        names = {"inversion.png", "schedules.png", "softmax.svg", "gelu.svg", "outlier.svg", "sizes.svg"}
        assert {path.name for path in out.iterdir()} == names
        assert all(0 < path.stat().st_size < LARGEST for path in out.iterdir())
        assert {line.partition(",")[0] for line in said} >= {"dense", "natural", "smi", "softmax", "gelu", "outlier"}
        # What is printed of a grid is what stands beside it.
        (line,) = (line for line in said if line.startswith("softmax, logarithmic"))
        sqnr = re.findall(r"SQNR ([\d.]+ dB)", line)[0]
        assert sqnr in texts(out / "softmax.svg")
        # Tiles are 32 pixels, three times as large; 20 iterations have four stops, so there are six moments.
        with Image.open(out / "schedules.png") as picture:
            assert picture.width == 6 * (96 + 4) + 4
        assert "smi, class 6, iteration 20: 14 patches" in "\n".join(said)

    def test_the_same_files_come_out_again(self, sheets: Any, reference: Model, tmp_path: Path) -> None:
        for name in ("a.png", "b.png"):
            sheets.schedule_sheet(reference, 10, 3, tmp_path / name, classes=1)
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

    def test_a_block_that_is_not_there(
        self, tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["concept_pictures.py", "--only", "grids", "--block", "4", "--out", str(tmp_path)]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit, match=r"^reference has the blocks 0 to 3, not 4: give another --block$"):
            tool.main()
        monkeypatch.setattr("sys.argv", ["concept_pictures.py", "--only", "grid"])
        with pytest.raises(SystemExit, match="2"):
            tool.main()
        assert "invalid choice: 'grid'" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


class TestInversion:
    def test_confidence_is_that_of_the_normalised_image(self, sheets: Any, reference: Model) -> None:
        pixels = torch.randint(256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        normalised = (pixels.numpy() / 255 - 0.305) / 0.323
        with torch.no_grad():
            logits = reference(torch.from_numpy(normalised).float())[0].double().numpy()
        share = np.exp(logits[4]) / np.exp(logits).sum()
        assert sheets.confidence(reference, pixels, 4) == pytest.approx(share, rel=1e-4)

    def test_a_change_is_shown_about_gray(self, sheets: Any) -> None:
        before = torch.full((3, 10, 10), 50, dtype=torch.uint8)
        after = before.clone()
        after[:, 0] = 60
        after[:, 1] = 40
        shown, factor = sheets.amplified(before, after)
        assert factor == pytest.approx(12.7)
        assert shown[:, 0].unique().tolist() == [254]
        assert shown[:, 1].unique().tolist() == [0]
        assert shown[:, 2:].unique().tolist() == [127]
        unchanged, _ = sheets.amplified(before, before)
        assert unchanged.unique().tolist() == [127]

    @pytest.mark.parametrize(("side", "expected"), [(32, 128), (224, 144), (144, 144)])
    def test_the_size_of_a_tile(self, sheets: Any, side: int, expected: int) -> None:
        images = torch.full((2, 3, side, side), 77, dtype=torch.uint8)
        tiles = sheets.shrunk(images, 144)
        assert tiles.shape == (2, 3, expected, expected)
        assert tiles.unique().tolist() == [77]


class TestSchedules:
    def test_flops_until_each_moment(self, sheets: Any, reference: Model) -> None:
        trace = Trace(PatchGrid.of(reference.module), (0.5,) * 3, (0.5,) * 3)
        for iteration, kept in ((0, 64), (5, 14), (105, 14)):
            trace.see(iteration, torch.zeros(2, 3, 32, 32), torch.arange(kept).expand(2, -1))
        spent = sheets.spent_flops(reference.module, trace)
        assert spent == {0: 0.0, 5: 5 * ALL_PATCHES, 105: 5 * ALL_PATCHES + 100 * FEW_PATCHES}

    @pytest.mark.parametrize(
        ("flops", "said"), [(0, "0 FLOP"), (1.3e8, "130 MFLOP"), (2.832e9, "2.83 GFLOP"), (1.25e12, "1.25 TFLOP")]
    )
    def test_flops_in_words(self, sheets: Any, flops: float, said: str) -> None:
        assert sheets.in_words(flops) == said

    def test_snapshots_where_they_are_wanted(self, sheets: Any, reference: Model) -> None:
        trace, made = sheets.traced(reference, "smi", 1, 10, 0, (0, 1, 4, 10))
        assert [iteration for iteration, _, _ in trace.snapshots] == [0, 1, 4, 10]
        # Patches stop after 1, 2, 3 and 4 iterations of 10: of 64 stay 44, 30, 21, 14.
        assert [int(mask[0].sum()) for _, _, mask in trace.snapshots] == [64, 44, 14, 14]
        assert torch.equal(trace.snapshots[-1][1], made.images)


class TestGrids:
    def test_levels_are_all_values_of_the_integers(self, tool: Any) -> None:
        uniform = UniformQuantizer(2, symmetric=False)
        uniform.load_tensors({"scale": torch.tensor([0.5]), "zero_point": torch.tensor([1])})
        assert tool.levels(uniform) == [-0.5, 0.0, 0.5, 1.0]
        log = LogQuantizer(2, base="2").load_tensors({"scale": torch.tensor([1.0])})
        assert tool.levels(log) == [0.0, 0.25, 0.5, 1.0]

    def test_figures(self, tool: Any) -> None:
        quantizer = UniformQuantizer(2, symmetric=False)
        quantizer.load_tensors({"scale": torch.tensor([1.0]), "zero_point": torch.tensor([0])})
        # 3 stays, 0.4 and 0.1 become 0: errors 0.17 of 9.17, and 0.5 of 3.5 is gone.
        assert tool.figures_of(quantizer, torch.tensor([3.0, 0.4, 0.1])) == ("17.3 dB", "14 %")
        assert 10 * math.log10(9.17 / 0.17) == pytest.approx(17.3, abs=0.05)

    def test_histograms_are_numpys(self, tool: Any, charts: Any) -> None:
        values = torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 6
        even = np.histogram(values.numpy(), tool.BARS, (0.0, 1.0))[0]
        assert tool.histogram(values, charts.Axis(0.0, 1.0)) == even.tolist()
        inside = values[values > 1e-6]
        decades = np.histogram(np.log10(inside.numpy()), tool.BARS, (-6.0, 0.0))[0]
        decades[0] += len(values) - len(inside)
        assert tool.histogram(values, charts.Axis(1e-6, 1.0, True)) == decades.tolist()

    def test_what_is_recorded_is_what_timm_computes(self, tool: Any, reference: Model) -> None:
        block: Any = reference.module.blocks[1]
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        was = block.attn.fused_attn
        with tool.recorded(reference.module) as seen, torch.inference_mode():
            reference(images)
        assert block.attn.fused_attn == was
        probabilities: Tensor = seen[block.attn.attn_drop]
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 4, 65))
        assert seen[block.mlp.fc2].min() >= -0.17
        assert seen[block.mlp.fc2].shape == (2, 65, 256)
        with torch.inference_mode():
            reference(images + 1)
        assert torch.equal(probabilities, seen[block.attn.attn_drop])

    def test_levels_and_bars_stand_where_the_axis_has_them(self, charts: Any) -> None:
        axis = charts.Axis(1e-2, 1.0, logarithmic=True)
        grids = [charts.Grid("a<b", (0.0, 0.1, 1.0, 10.0), ("1 dB",)), charts.Grid("c", (0.01,), ("2 dB",))]
        root = ElementTree.fromstring(charts.grids_svg("title", ["line"], axis, [0, 1, 100, 10], ("SQNR",), grids))
        left, plot = charts.NAMES, charts.PLOT
        # Zero stands left of the axis, and 10 is beyond its end.
        assert ticks(root) == [[left - charts.ZERO_AT, left + plot / 2, left + plot], [left]]
        bars = [box for box in root.iter(f"{SVG}rect") if box.attrib["fill"] == charts.GRAY]
        # 100 fills the two decades there are, 10 one of them, and a single value is still to be seen.
        assert [float(bar.attrib["height"]) for bar in bars] == [1.5, charts.HIGH, charts.HIGH / 2]
        assert [text.text for text in root.iter(f"{SVG}text")].count("a<b") == 1

    def test_marks_of_an_axis(self, charts: Any) -> None:
        assert [name for _, name in charts.Axis(-0.2, 5.4).marks()] == ["0", "1", "2", "3", "4", "5"]
        assert [name for _, name in charts.Axis(1e-3, 1.0, True).marks()] == ["1e-3", "1e-2", "1e-1", "1"]


class TestOutlier:
    def test_levels_left_to_the_others(self, tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # One range for all: steps of 51 / 255 = 0.2, so six levels from 0 to 1.15; 0.25 becomes 0.2 and 1.15 becomes
        # 1.2, which is an error of 0.05 twice.
        hidden = torch.tensor([[0.25, 0.0, 0.0], [1.15, 51.0, 0.0]])
        flat = torch.tensor([[1.0, 1.0, 1.0]])
        monkeypatch.setattr(tool, "blockwise", lambda *_: [(flat[0], flat), (flat[0], hidden)])
        said = tool.outlier(Namespace(name="vit"), OPTIONS, tmp_path)
        sqnr = 10 * math.log10((0.25**2 + 1.15**2) / (2 * 0.05**2))
        assert said[0].startswith("outlier, blocks.1.mlp.fc2: channel 1 has 51.00")
        assert said[1] == f"outlier, one range for all: levels 6 of 256, SQNR {sqnr:.1f} dB"
        assert said[2].startswith("outlier, channel 1 apart: levels 256 of 256")
        shown = texts(tmp_path / "outlier.svg")
        assert "channel 1: 51" in shown
        assert "all others: at most 1.15" in shown
        rows = ticks(ElementTree.parse(tmp_path / "outlier.svg").getroot())
        assert [len(row) for row in rows] == [2, 6, 256]  # The first are the bars of the others.


class TestSizes:
    def test_bytes_by_kind(self, tool: Any, reference: Model) -> None:
        whole = tool.bytes_by_kind(reference)
        # 4 blocks with 2 * 64 * 256 and 64 * 192 + 64 * 64 weights; 64 * 48 in front, 10 * 64 behind; 65 positions.
        numbers = {"MLP weights": 131_072, "attention weights": 65_536, "patch embedding": 3_072, "classifier": 640}
        numbers |= {"position embedding": 65 * 64, "scales, zero points": 0}
        assert {kind: whole[kind] for kind in numbers} == {kind: 4 * count for kind, count in numbers.items()}
        assert sum(whole.values()) == reference.weight_bytes

        images = dfq.generate(reference, "leaves", 2, progress=False)
        quantized = dfq.quantize(reference, "w4a8", calibration=images, recipe="paper", progress=False)
        small = tool.bytes_by_kind(quantized)
        # All weights have 4 bits under this recipe, two to a byte.
        kinds = list(numbers)[:4]
        assert [small[kind] for kind in kinds] == [numbers[kind] // 2 for kind in kinds]
        assert small["scales, zero points"] > 0
        assert sum(small.values()) == quantized.weight_bytes

    def test_bars_are_bytes(self, charts: Any) -> None:
        svg = charts.sizes_svg("t", [], {"fp32": {"a": 3_000_000, "b": 1_000_000}, "W8": {"a": 1_000_000, "b": 0}})
        root = ElementTree.fromstring(svg)
        bars = [box for box in root.iter(f"{SVG}rect") if box.attrib["height"] == f"{charts.ROW:.1f}"]
        widths = [float(bar.attrib["width"]) for bar in bars]
        assert widths == pytest.approx([3 * widths[1], widths[1], widths[1], 0.0])
        assert "4.00 MB" in svg
        assert ">3.000 MB<" in svg


class TestPage:
    def test_every_picture_is_shown_and_small(self) -> None:
        shown = re.findall(r"!\[([^\]]+)\]\(pictures/([^)]+)\)", PAGE)
        there = {path.name: path.stat().st_size for path in (DOCS / "pictures").iterdir()}
        assert sorted(name for _, name in shown) == sorted(there)
        assert all(size < LARGEST for size in there.values())

    def test_its_links_lead_somewhere(self) -> None:
        links = re.findall(r"\]\(((?!https?:)[^)#]+)(?:#([^)]+))?\)", PAGE)
        assert links
        for path, part in links:
            assert (DOCS / path).is_file()
            heads = re.findall(r"^#+ (.+)$", (DOCS / path).read_text() if path.endswith(".md") else "", re.MULTILINE)
            assert not part or part in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]

    def test_its_commands_are_those_of_the_program(
        self, tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (block,) = re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)
        drawn: set[str] = set()
        for command in block.replace("\\\n", " ").splitlines()[1:]:
            monkeypatch.setattr("sys.argv", command.split()[1:])
            drawn |= set(tool.parse_arguments().only)
        assert drawn == set(tool.PICTURES)
