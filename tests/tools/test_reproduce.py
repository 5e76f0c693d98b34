"""The published tables made again: which cells there are, what survives a kill, and what the table says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import dfq

ROOT = Path(__file__).parents[2]

SMALL = """
[models."Digits"]
timm = "reference"
top1 = 99.0

[sources]
Someone = "somebody's table"

[tables.psaq]
title = "One table"
recipe = "paper"
differs = ["Everything is small."]
rows = [
    { images = "gaussian", bits = "w8a8", models = ["Digits"], unknown = "never written down" },
    { images = "smi", iterations = 3, bits = "w8a8", source = "Someone", top1 = { Digits = 90.0 } },
    { images = "smi", iterations = 3, bits = "w4a8", source = "Someone", top1 = { Digits = 80.0 } },
    { images = "real", bits = "w8a8", source = "Someone", top1 = { Digits = 95.0 } },
    { kind = "none", name = "magic", images = "real", bits = "w8a8", source = "Someone", top1 = { Digits = 98.0 }, cannot = "there is none" },
]

[tables.smi]
title = "Speed"
recipe = "paper"
differs = []
rows = [{ kind = "speed", images = "smi", iterations = 80, source = "Someone", factor = 3.79, models = ["Digits"] }]
"""  # noqa: E501


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> Any:
    for name in ("accuracy_table", "inversion_tables", "plain_inversion", "bench_inversion", "scaling", "published"):
        load_tool(name)
    for name in ("cell_costs", "reproduction_tables", "cell_making"):
        load_tool(name)
    return load_tool("reproduce")


@pytest.fixture(scope="module")
def published(tool: Any) -> Any:
    import published

    return published


@pytest.fixture
def small(published: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tables of the embedded model instead of the published ones."""
    file = tmp_path / "small.toml"
    file.write_text(SMALL)
    monkeypatch.setattr(published, "FILE", file)
    published._content.cache_clear()
    yield
    published._content.cache_clear()


def test_the_cells_of_every_table(published: Any) -> None:
    cells = published.published_cells()
    assert len({cell.key for cell in cells}) == len(cells)
    # SMI: two models x dense and sparse x W8A8 and W4A8, a speed and a transfer of each. PSAQ-ViT: five models x noise,
    # real and inverted images x two. PTQ4ViT: eleven models x two methods x two, seven at W4A4, and DeiT-T at W6A6.
    # RepQ-ViT: eight models x two.
    assert Counter(cell.table for cell in cells) == {"smi": 12, "psaq": 30, "ptq4vit": 52, "repq": 16}
    assert Counter(cell.kind for cell in cells) == {"accuracy": 84, "speed": 2, "none": 24}
    for cell in cells:
        assert (cell.published is None) == (not cell.source) == bool(cell.unknown)
        assert (cell.kind == "none") == bool(cell.cannot)


@pytest.mark.parametrize(
    ("table", "model", "name", "bits", "value", "settings"),
    [
        ("smi", "DeiT-B", "smi", "w4a8", 77.62, ("paper", 4000, None)),
        ("smi", "DeiT-B", "dense", "w4a8", 74.56, ("paper", 4000, None)),
        ("smi", "DeiT-T", "smi", "w8a8", None, ("paper", 4000, None)),
        ("smi", "DeiT-B", "smi", "", 3.79, ("paper", 4000, None)),
        ("psaq", "DeiT-T", "psaq", "w4a8", 65.57, ("paper", 1000, None)),
        ("psaq", "Swin-S", "psaq", "w8a8", 76.64, ("paper", 1000, 0.25)),
        ("ptq4vit", "ViT-B/384", "real", "w6a6", 83.35, ("ptq4vit", None, None)),
        ("ptq4vit", "Swin-B", "BasePTQ", "w8a8", 84.79, ("ptq4vit", None, None)),
        ("repq", "ViT-S", "real", "w4a4", 65.05, ("repq", None, None)),
        ("repq", "Swin-B", "real", "w6a6", 84.57, ("repq", None, None)),
    ],
)
def test_a_cell_has_the_number_and_the_setting_of_its_paper(
    published: Any, table: str, model: str, name: str, bits: str, value: float | None, settings: tuple[Any, ...]
) -> None:
    found = [c for c in published.published_cells([table], [model]) if (c.name, c.bits) == (name, bits)]
    assert [cell.published for cell in found] == [value]
    assert (found[0].recipe, found[0].iterations, found[0].learning_rate) == settings


def test_every_model_is_pinned_and_known(published: Any) -> None:
    import timm

    for name in published.model_names():
        (timm_name,) = {cell.timm for cell in published.published_cells(None, [name])}
        assert timm.get_pretrained_cfg(timm_name).tag == timm_name.partition(".")[2] != ""
        assert published.model_called(timm_name.partition(".")[0]) == published.model_called(timm_name) == name
    with pytest.raises(ValueError, match="'DeiT-X' is in none of the tables: choose from DeiT-T, "):
        published.model_called("DeiT-X")


def test_a_number_needs_a_source(published: Any, small: None) -> None:
    published.FILE.write_text(SMALL.replace('source = "Someone", top1 = { Digits = 90.0 }', "top1 = { Digits = 90.0 }"))
    with pytest.raises(ValueError, match="a source belong together"):
        published.published_cells()


@pytest.fixture
def command(digits: Path, tmp_path: Path) -> list[str]:
    return ["--imagenet", str(digits), "--out", str(tmp_path / "out"), "--device", "cpu", "--tables", "psaq"]


def lines_in(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_run_that_was_killed_goes_on(
    tool: Any, small: None, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    making = tool.Workshop.make

    def killed(workshop: Any, cell: Any) -> dict[str, Any]:
        if cell.bits == "w4a8":
            raise KeyboardInterrupt
        made: dict[str, Any] = making(workshop, cell)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(tool.Workshop, "make", killed)
        with pytest.raises(KeyboardInterrupt):
            tool.main(command)
    out = tmp_path / "out"
    first = lines_in(out)
    assert [(line["name"], line["bits"]) for line in first] == [("gaussian", "w8a8"), ("smi", "w8a8")]
    # What is there is in the table at any time; the last line was being written when the power went.
    assert "| Digits | `smi` | W4A8 | 80.00 (Someone) | not run |" in (out / "reproduction.md").read_text()
    with (out / "results.jsonl").open("a") as file:
        file.write('{"table": "psaq", "model": "Dig')
    made = []

    def counted(workshop: Any, cell: Any) -> dict[str, Any]:
        made.append((cell.name, cell.bits))
        found: dict[str, Any] = making(workshop, cell)
        return found

    monkeypatch.setattr(tool.Workshop, "make", counted)
    assert tool.main(command) == 0
    assert made == [("smi", "w4a8")]
    assert lines_in(out)[:2] == first
    line = lines_in(out)[2]
    assert (line["num_images"], line["iterations"], line["weights"]) == (40, 3, "of timm")
    # Both bits share the images, and what making them took.
    assert line["seconds"]["generate"] == first[1]["seconds"]["generate"] > 0
    assert [path.name for path in (out / "sets").iterdir() if "smi" in path.name and path.is_dir()] == [
        "reference-smi-3-fp32-seed0"
    ]
    # On other images it is another measurement.
    assert tool.main([*command, "--limit", "10"]) == 0
    assert made[1:] == [("gaussian", "w8a8"), ("smi", "w8a8"), ("smi", "w4a8")]
    assert "40 images instead of 50,000" in (out / "reproduction.md").read_text()


def test_the_logits_of_full_precision_are_those_of_the_same_images(
    tool: Any, small: None, command: list[str], digits: Path, tmp_path: Path
) -> None:
    assert tool.main([*command, "--batch-size", "7"]) == 0
    model = dfq.load_model("reference", device="cpu")
    alone = dfq.evaluate(model, digits, progress=False)
    for line in lines_in(tmp_path / "out"):
        assert line["baseline_top1"] == pytest.approx(alone.top1)
        assert line["drop"] == pytest.approx(line["baseline_top1"] - line["top1"])
        assert line["agreement"] > 80


def test_real_images_need_a_folder(
    tool: Any, small: None, command: list[str], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "out" / "reproduction.md"
    assert tool.main(command) == 0
    assert "| 95.00 (Someone) | skipped: real images are needed: give --train DIR |" in page.read_text()
    assert "0 cells failed, 1 were skipped" in capsys.readouterr().out
    assert tool.main([*command, "--train", str(digits)]) == 0
    assert "skipped" not in page.read_text()
    assert "the 32 images for calibration are among them" in page.read_text()
    assert [line["name"] for line in lines_in(tmp_path / "out")] == ["gaussian", "smi", "smi", "real"]


def test_a_cell_that_fails_is_noted_and_tried_again(
    tool: Any, small: None, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    making = tool.Workshop.make

    def failing(workshop: Any, cell: Any) -> dict[str, Any]:
        if cell.bits == "w8a8":
            raise dfq.DfqError("too hot") if cell.name == "smi" else RuntimeError("out of memory\nat length")
        made: dict[str, Any] = making(workshop, cell)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(tool.Workshop, "make", failing)
        assert tool.main(command) == 1
    page = tmp_path / "out" / "reproduction.md"
    assert "| `gaussian` | W8A8 | - (never written down) | failed: RuntimeError: out of memory |" in page.read_text()
    assert "| `smi` | W8A8 | 90.00 (Someone) | failed: too hot |" in page.read_text()
    assert [line.get("error") is None for line in lines_in(tmp_path / "out")] == [False, False, True]
    assert tool.main(command) == 0
    assert "failed" not in page.read_text()
    assert len(lines_in(tmp_path / "out")) == 5


def test_weights_of_the_user(tool: Any, small: None, command: list[str], tmp_path: Path) -> None:
    other = dfq.load_model("reference", random_weights=True, device="cpu", seed=3)
    torch.save(other.module.state_dict(), tmp_path / "mine.pt")
    assert tool.main([*command, "--checkpoint", f"Digits={tmp_path / 'mine.pt'}"]) == 0
    line = lines_in(tmp_path / "out")[0]
    assert line["weights"] == "mine.pt"
    assert line["baseline_top1"] < 50
    # Those of timm are another measurement, on other images.
    assert tool.main(command) == 0
    assert [line["weights"] for line in lines_in(tmp_path / "out")] == ["mine.pt"] * 3 + ["of timm"] * 3
    assert lines_in(tmp_path / "out")[3]["baseline_top1"] > 90


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --imagenet, or --dry-run"),
        (["--imagenet", "nowhere"], "there is no folder nowhere"),
        (["--imagenet", ".", "--train", "nowhere"], "there is no folder nowhere"),
        (["--models", "ResNet"], "'ResNet' is in none of the tables: choose from DeiT-T, DeiT-S"),
        (["--checkpoint", "DeiT-T"], "must be NAME=FILE, not 'DeiT-T'"),
        (["--checkpoint", "DeiT-T=nothing.pt", "--dry-run"], "there is no file nothing.pt, the weights of DeiT-T"),
        (["--limit", "0"], "must be at least 1, not 0"),
    ],
)
def test_wrong_usage(tool: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def measured(**changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {"table": "psaq", "model": "Digits", "kind": "accuracy", "name": "smi", "bits": "w8a8"}
    content |= {"num_images": 50_000, "top1": 88.5, "top1_ci95": [88.2, 88.8], "baseline_top1": 98.0}
    content |= {"drop": 9.5, "drop_ci95": [9.25, 9.75], "iterations": 3, "precision": "fp32", "seed": 0}
    content |= {"seconds": {"generate": 61.4, "quantize": 3.0, "evaluate": 20.0}, "weights": "of timm"}
    content |= {"preprocessing": "as it is", "machine": "abacus", "device": "cpu", "threads": 1}
    return content | {"versions": {"dfq": "0"}} | changes


def test_a_row_by_hand(tool: Any, published: Any, small: None) -> None:
    cells = published.published_cells(["psaq"])
    text = tool.to_markdown(cells, [measured()])
    # 88.5 beside 90 published; published, 99 in full precision less 90.
    row = "| Digits | `smi` | W8A8 | 90.00 (Someone) | 88.50 [88.20, 88.80] | -1.50 | 9.00 | 9.50 [9.25, 9.75] "
    assert f"{row}| 61 + 3 + 20 | 50,000 images |" in text
    assert (
        "| Digits | `magic` | W8A8 | 98.00 (Someone) | cannot be made: there is none | - | 1.00 | - | - | - |" in text
    )
    assert "* *Someone*: somebody's table." in text
    assert "* Everything is small." in text
    assert (
        "* Digits: reference, weights of timm; as it is; full precision 98.00 on 50,000 images, published 99.00."
        in text
    )
    assert "* abacus, device cpu, 1 threads; seed 0; dfq 0." in text

    trial = measured(
        num_images=1000,
        iterations=2,
        precision="bf16",
        seconds={"generate": None, "quantize": 3.0, "evaluate": 20.0},
        estimated={"generate": 50.0, "quantize": 2.0, "evaluate": 22.0},
    )
    text = tool.to_markdown(cells, [trial])
    assert "| ? + 3 + 20 (50 + 2 + 22) | 1,000 images instead of 50,000; 2 of 3 iterations; inverted in bf16 |" in text
    # The one on more images is shown, whichever came first, and any number rather than a failure.
    assert tool.to_markdown(cells, [measured(), trial]) == tool.to_markdown(cells, [trial, measured()])
    failed = {key: trial[key] for key in ("table", "model", "kind", "name", "bits")} | {"error": "no"}
    assert tool.to_markdown(cells, [trial, failed]) == text


def test_speed_is_measured_and_told(
    tool: Any, small: None, published: Any, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cell_making
    from scaling import flops

    # As if every patch took a second, and in the second round the dense one half a second more.
    rounds: Counter[int] = Counter()

    def seconds(_bench: Any, phase: Any, _steps: int) -> float:
        rounds[phase.kept] += 1
        return phase.kept * (1.5 if phase.looks and phase.kept == 64 and rounds[64] in (3, 4) else 1.0)

    monkeypatch.setattr(cell_making.Bench, "seconds", seconds)
    assert tool.main([*command, "--tables", "smi"]) == 0
    (line,) = lines_in(tmp_path / "out")
    # Of 80 iterations the stops are at 1, 2, 4 and 6; of 64 patches stay 44, 30, 21, 14.
    sparse = 64 + 44 + 2 * 30 + 2 * 21 + 74 * 14
    assert line["ratio"] == pytest.approx(80 * 64 / sparse)
    assert line["ratio_range"] == pytest.approx([80 * 64 / sparse, 1.5 * 80 * 64 / sparse])
    assert line["seconds_per_image"] == {"dense": 80 * 64 / 32, "smi": sparse / 32}
    vit = dfq.load_model("reference", device="cpu").module
    work = sum(count * flops(vit, kept) for kept, count in {64: 1, 44: 1, 30: 2, 21: 2, 14: 74}.items())
    assert line["flops_ratio"] == pytest.approx(80 * flops(vit, 64) / work)
    line |= {"ratio": 3.5, "ratio_range": [3.25, 3.75], "flops_ratio": 3.94}
    line |= {"seconds_per_image": {"dense": 7.0, "smi": 2.0}, "seconds": {"speed": 33.0}, "estimated": {"speed": 30.0}}
    text = tool.to_markdown(published.published_cells(["smi"]), [line])
    assert (
        "| Digits | up to 3.79 (Someone) | 3.50 [3.25, 3.75] | -0.29 | 3.94 | 7.00 | 2.00 | 33 (30) | as published |"
        in text
    )


def test_the_arithmetic_of_an_estimate(tool: Any, published: Any) -> None:
    import cell_costs

    stand_in = cell_costs.Rates(forward=0.01, load=0.002, parameters=5, patches=196)
    rates = cell_costs.Rates(
        forward=0.04,
        load=0.002,
        parameters=20,
        patches=196,
        iteration={"dense": 0.1, "psaq": 0.2},
        share={196: 1.0, 137: 0.7, 95: 0.5, 66: 0.3, 46: 0.2},
    )
    recipe = cell_costs.RecipeRates(before=3.0, per_image=0.05, slower=2.0)
    names = {cell.timm for cell in published.published_cells(None, ["DeiT-T"])}
    calibrated = cell_costs.Calibrated(dict.fromkeys(names, rates), {"paper": recipe}, stand_in, 1.0)
    cells = {
        (cell.table, cell.name, cell.bits): cell for cell in published.published_cells(["smi", "psaq"], ["DeiT-T"])
    }

    psaq = calibrated.of(cells["psaq", "psaq", "w8a8"], 1000)
    # 32 images x 1,000 iterations, and a look at every tenth; four times the weights, four times the pass.
    assert psaq["generate"] == pytest.approx(32 * (1000 * 0.2 + 100 * 0.04))
    assert psaq["quantize"] == pytest.approx(3.0 * 4 + 0.05 * 4 * 32)
    assert psaq["evaluate"] == pytest.approx(1000 * (2 * 0.04 + 0.002))
    assert calibrated.of(cells["psaq", "psaq", "w8a8"], 1000, workers=4)["evaluate"] == pytest.approx(80.5)
    # 50 iterations of all patches, 50 of 137, 100 of 95, 100 of 66 and 3,700 of 46.
    iterations = 50 + 50 * 0.7 + 100 * 0.5 + 100 * 0.3 + 3700 * 0.2
    sparse = calibrated.of(cells["smi", "smi", "w4a8"], 1000)
    assert sparse["generate"] == pytest.approx(32 * iterations * (0.1 + 0.004))
    assert calibrated.of(cells["psaq", "gaussian", "w8a8"], 1000)["generate"] == 0
    assert calibrated.of(cells["psaq", "real", "w8a8"], 1000)["generate"] == pytest.approx(32 * 0.002)
    # Three rounds of 31 iterations in each of: the five phases, the last with looks, and dense with looks.
    speed = calibrated.of(cells["smi", "smi", ""], 1000)
    assert speed == {"speed": pytest.approx(3 * 31 * 32 * (1 + 0.7 + 0.5 + 0.3 + 0.2 + 1) * 0.1)}
    # W8A8 and W4A8 share their images and the pass of full precision.
    both = calibrated.totals([cells["psaq", "psaq", "w8a8"], cells["psaq", "psaq", "w4a8"]], 1000)
    assert both["generate"] == pytest.approx(psaq["generate"])
    assert both["quantize"] == pytest.approx(2 * psaq["quantize"])
    assert both["full precision"] == pytest.approx(1000 * 0.042)


def test_a_dry_run_needs_neither_images_nor_weights(
    tool: Any, small: None, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import cell_costs

    monkeypatch.setattr(cell_costs, "STAND_IN", "reference")
    out = tmp_path / "out"
    dry = ["--dry-run", "--out", str(out), "--device", "cpu", "--calibration-batch", "2"]
    assert tool.main(dry) == 0
    told = capsys.readouterr().out
    assert "| psaq | Digits | magic | w8a8 | | | | there is none |" in told
    assert "50,000 images are measured on" in told
    assert "all of it: 5 cells" in told
    assert not (out / "results.jsonl").exists()
    # That of the images that are there is what the table tells.
    assert tool.main([*dry, *command]) == 0
    assert tool.main(command) == 0
    capsys.readouterr()
    assert all(line["estimated"].keys() == line["seconds"].keys() for line in lines_in(out))
    # What is done needs no estimate.
    assert tool.main([*dry, *command]) == 0
    assert "| psaq | Digits | smi | w4a8 | | | | done |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "told"), [(59.6, "60 s"), (119, "119 s"), (120, "2.0 min"), (7200, "2.0 h"), (172_800, "2.0 d")]
)
def test_durations(tool: Any, seconds: float, told: str) -> None:
    assert tool.duration(seconds) == told


def test_the_page_is_made_from_its_lines(tool: Any) -> None:
    page = (ROOT / "docs" / "reproduction.md").read_text()
    lines = tool.finished_lines(ROOT / "docs" / "reproduction.jsonl")
    assert lines
    assert tool.with_tables(page, "reproduction.jsonl", lines) == page


def test_the_table_goes_into_a_page(tool: Any, small: None, tmp_path: Path) -> None:
    results, page = tmp_path / "r.jsonl", tmp_path / "page.md"
    results.write_text(json.dumps(measured()) + "\n")
    page.write_text("a\n<!-- reproduction: r.jsonl -->\nold\n<!-- end -->\nb\n")
    assert tool.main(["--results", str(results), "--write", str(page)]) == 0
    written = page.read_text()
    assert "old" not in written
    assert written.startswith("a\n<!-- reproduction: r.jsonl -->\n")
    assert "### One table" in written
    # A table without a line is left out.
    assert "### Speed" not in written
