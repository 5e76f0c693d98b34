"""The benchmark of inversion: what it counts, projects and prints, and that its plain loop is one."""

from __future__ import annotations

import importlib.util
import json
import mmap
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import dfq
from calibration import Dense, ProgressiveStop, Rebirth

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))  # as when the tool is run as a program
        spec = importlib.util.spec_from_file_location("bench_inversion", ROOT / "tools" / "bench_inversion.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look themselves up there
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def model() -> dfq.Model:
    """4 blocks of width 64, 64 patches and a class token."""
    return dfq.load_model("reference", device="cpu")


@pytest.fixture
def bench(tool: Any, model: dfq.Model) -> Any:
    return tool.Bench.of(model, batch_size=2, precision="fp32", seed=0)


def record(**changes: Any) -> dict[str, Any]:
    """A run of 10 iterations, 2 canvases a batch; `smi` spends 4 of them in phase 2 and 6 in phase 3."""

    def phase(kept: int, looks: bool, seconds: list[float], flops: float, plain: bool = False) -> dict[str, Any]:
        return {"kept": kept, "looks": looks, "plain": plain, "seconds": seconds, "flops": flops}

    def contender(name: str, iterations: list[int], memory: int | None = None, images: int = 1) -> dict[str, Any]:
        return {"name": name, "iterations": iterations, "peak_memory": memory, "images_per_canvas": images}

    content = {
        "model": "vit",
        "image_size": [32, 32],
        "num_patches": 16,
        "batch_size": 2,
        "iterations": 10,
        "precision": "bf16",
        "device": "cpu",
        "machine": "a machine",
        "threads": 3,
        "versions": {"dfq": "0"},
        "seed": 7,
        "steps": 20,
        "rounds": 3,
        "matmul_flops_per_second": {"fp32": 50e9, "bf16": 200e9},
        "phases": [
            phase(16, False, [8.0, 9.0, 6.0], 60e9, plain=True),
            phase(16, True, [2.0, 2.5, 1.0], 40e9),
            phase(16, False, [1.5, 1.5, 1.5], 36e9),
            phase(4, True, [0.5, 0.1, 0.5], 6e9),
        ],
        "contenders": [
            contender("plain", [10, 0, 0, 0], 2_500_000_000),
            contender("dense", [0, 10, 0, 0]),
            contender("smi", [0, 0, 4, 6], 1_234_000),
            contender("pri", [0, 0, 4, 6], images=4),
        ],
        "whole": [],
    }
    return content | changes


def test_published_schedules_fall_into_their_phases(tool: Any) -> None:
    def spent(schedule: Any) -> list[tuple[int, bool, int]]:
        phases = tool.Contender("it", schedule).phases(196, 4000)
        return [(phase.kept, phase.looks, iterations) for phase, iterations in phases.items()]

    assert spent(Dense()) == [(196, True, 4000)]
    assert spent(ProgressiveStop()) == [
        (196, False, 50),
        (137, False, 50),
        (95, False, 100),
        (66, False, 100),
        (46, True, 3700),
    ]
    assert spent(Rebirth(4)) == [(196, False, 1000), (147, False, 1000), (98, False, 1000), (49, True, 1000)]
    assert spent(Rebirth(3)) == [(196, False, 1333), (131, False, 1333), (66, True, 1334)]
    assert tool.Contender("plain", None).phases(196, 4000) == {tool.Phase(196, looks=False, plain=True): 4000}


def test_phases_with_as_many_patches_are_one(tool: Any) -> None:
    # 2 patches: 1 is left after the first stop, and no fewer after the others.
    phases = tool.Contender("smi", ProgressiveStop()).phases(2, 4000)
    assert phases == {tool.Phase(2, looks=False): 50, tool.Phase(1, looks=False): 250, tool.Phase(1, looks=True): 3700}


def test_a_run_is_the_sum_of_its_phases(tool: Any) -> None:
    made = record()
    plain, dense, smi, pri = made["contenders"]
    assert tool.median_seconds(made) == [8.0, 2.0, 1.5, 0.5]
    assert tool.projected(smi, tool.median_seconds(made)) == 4 * 1.5 + 6 * 0.5
    assert tool.projected(smi, [60e9, 40e9, 36e9, 6e9]) == 180e9
    assert sys.modules["inversion_tables"].speedup(smi, plain, tool.median_seconds(made)) == pytest.approx(80 / 9)
    assert sys.modules["inversion_tables"].speedup(pri, dense, tool.median_seconds(made)) == pytest.approx(4 * 20 / 9)


def test_tables(tool: Any) -> None:
    rows = [row for row in tool.to_markdown(record()).splitlines() if row.startswith("|")]
    # smi: 9 s for 2 images; in the rounds 9, 6.6 and 9 s, plain 80, 90 and 60 s, dense 20, 25 and 10 s.
    assert rows == [
        "| contender | patches x iterations | s/iteration | iterations/s | s per image at 10 iterations | "
        "images/hour | x plain | x dense | x plain, FLOPs alone | x dense, FLOPs alone | GFLOP per image | "
        "peak memory, MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        "| `plain` | 16 x 10 | 8.00 | 0.125 | 40.0 | 90.0 | 1 | 0.250 [0.167, 0.278] | 1.00 | 0.667 | 600 | 2,500 |",
        "| `dense` | 16 x 10 | 2.00 | 0.500 | 10.0 | 360 | 4.00 [3.60, 6.00] | 1 | 1.50 | 1.00 | 400 | - |",
        "| `smi` | 16 x 4, 4 x 6 | 0.900 | 1.11 | 4.50 | 800 | 8.89 [6.67, 13.6] | 2.22 [1.11, 3.79] | 3.33 | 2.22 | "
        "180 | 1.23 |",
        "| `pri` | 16 x 4, 4 x 6 | 0.900 | 1.11 | 1.12 | 3,200 | 35.6 [26.7, 54.5] | 8.89 [4.44, 15.2] | 13.3 | 8.89 | "
        "45.0 | - |",
        "| loop | patches | looks | s/iteration | GFLOP per canvas and iteration | GFLOP/s | share of peak |",
        "|---|---|---|---|---|---|---|",
        "| plain | 16 | no | 8.00 [6.00, 9.00] | 60.0 | 15.0 | 30% |",
        "| dfq | 16 | yes | 2.00 [1.00, 2.50] | 40.0 | 40.0 | 20% |",
        "| dfq | 16 | no | 1.50 [1.50, 1.50] | 36.0 | 48.0 | 24% |",
        "| dfq | 4 | yes | 0.500 [0.100, 0.500] | 6.00 | 24.0 | 12% |",
    ]


def test_caption_says_where_the_numbers_come_from(tool: Any) -> None:
    text = " ".join(tool.to_markdown(record()).split())
    for part in (
        "**vit**, 32x32 pixels, batches of 2 canvases, 10 iterations",
        "the others in bf16. Times are projected",
        "An image of `pri` is 1/4 of a canvas",
        "50.0 GFLOP/s in fp32, 200 in bf16",
        "Medians of 3 rounds, 20 iterations of each phase in each. Device cpu, 3 threads; a machine; seed 7; dfq 0.",
    ):
        assert part in text


def test_runs_really_made_stand_beside_the_projection(tool: Any) -> None:
    check = {"name": "smi", "iterations": 4000, "projected": 200.0, "measured": 210.0}
    assert "| `smi` | 4,000 | 200 | 210 | 1.05 |" in tool.to_markdown(record(whole=[check])).splitlines()


def test_tables_replace_what_stands_between_the_marks(tool: Any) -> None:
    page = "a\n<!-- table: p.json -->\nold\n<!-- end -->\nb\n"
    written = tool.with_table(page, "p.json", record())
    assert written.startswith("a\n<!-- table: p.json -->\n")
    assert written.endswith("<!-- end -->\nb\n")
    assert "old" not in written
    assert tool.with_table(written, "p.json", record()) == written
    with pytest.raises(SystemExit, match=r"lacks the marks <!-- table: other.json -->"):
        tool.with_table(page, "other.json", record())


def test_the_page_of_performance_is_made_from_its_measurements(tool: Any) -> None:
    page, measured = (ROOT / "docs" / name for name in ("performance.md", "performance.json"))
    content = page.read_text()
    if measured.exists():
        assert tool.with_table(content, measured.name, json.loads(measured.read_text())) == content
    else:
        assert "| `smi` |" in tool.with_table(content, measured.name, record())


def plain(tool: Any, bench: Any, iterations: int, **others: Any) -> torch.Tensor:
    preprocessing = bench.model.preprocessing
    images: torch.Tensor = tool.invert_plainly(
        bench.model.module,
        bench.initial,
        bench.labels,
        mean=preprocessing.mean,
        std=preprocessing.std,
        iterations=iterations,
        generator=torch.Generator().manual_seed(0),
        **others,
    )
    return images


def test_the_plain_loop_is_plain(tool: Any, model: dfq.Model) -> None:
    vit, bench = model.module, tool.Bench.of(model, batch_size=8, precision="fp32", seed=0)
    reports = []

    def look(done: int, loss: torch.Tensor, maps: list[torch.Tensor]) -> None:
        reports.append(done)
        assert 0 < loss < 20
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in vit.parameters())
        assert [tuple(one.shape) for one in maps] == [(8, 4, 65, 65)] * 4
        assert all(torch.allclose(one.sum(-1), torch.ones(())) for one in maps)
        assert all(one.requires_grad and one.dtype == torch.float32 for one in maps)

    images = plain(tool, bench, 100, on_step=look)
    assert reports == list(range(10, 101, 10))
    with torch.no_grad():
        before, after = (F.cross_entropy(vit(one), bench.labels).item() for one in (bench.initial, images))
    assert after < before / 2
    # Black and white of the reference model: (0 - 0.305) / 0.323 and (1 - 0.305) / 0.323.
    assert images.min() >= -0.9443
    assert images.max() <= 2.1518


def test_the_plain_loop_leaves_the_model_as_it_was(tool: Any, bench: Any) -> None:
    vit = bench.model.module
    fused = [block.attn.fused_attn for block in vit.blocks]
    vit.head.bias.requires_grad_(True)
    try:
        plain(tool, bench, 1)
        assert [name for name, one in vit.named_parameters() if one.requires_grad] == ["head.bias"]
    finally:
        vit.head.bias.requires_grad_(False)
    assert all(parameter.grad is None for parameter in vit.parameters())
    assert [block.attn.fused_attn for block in vit.blocks] == fused
    assert not any(block.attn.attn_drop._forward_pre_hooks for block in vit.blocks)


def test_total_variation_is_that_of_the_paper(tool: Any) -> None:
    images = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(1))
    x = images.double().numpy()
    differences = (
        np.diff(x, axis=3),
        np.diff(x, axis=2),
        x[:, :, 1:, 1:] - x[:, :, :-1, :-1],
        x[:, :, 1:, :-1] - x[:, :, :-1, 1:],
    )
    expected = sum(np.sqrt((difference**2).sum()) for difference in differences)
    assert sys.modules["plain_inversion"].plain_variation(images).item() == pytest.approx(expected, rel=1e-5)


def test_an_iteration_is_one_pass_and_with_looks_a_tenth_more(tool: Any, bench: Any) -> None:
    passes: list[int] = []
    hook = bench.model.module.blocks[0].register_forward_pre_hook(lambda _module, args: passes.append(args[0].shape[1]))
    try:
        for phase, expected in (
            (tool.Phase(5, looks=False), 1.0),
            (tool.Phase(5, looks=True), 1.1),
            (tool.Phase(64, looks=True), 1.1),
            (tool.Phase(64, looks=False, plain=True), 1.0),
        ):
            passes.clear()
            assert bench.per_iteration(phase, 20, lambda: len(passes)) == pytest.approx(expected)
            # The first pass is the one that chooses the patches, among all.
            assert set(passes[1:]) == {phase.kept + 1}
    finally:
        hook.remove()


def test_flops_are_those_of_the_matrix_products(tool: Any, bench: Any) -> None:
    width, blocks, classes, patch = 64, 4, 10, 3 * 4 * 4

    def forward(kept: int) -> tuple[int, int]:
        """(products with a weight, products of two activations) of one image."""
        tokens = kept + 1
        # Queries, keys and values 3, projection 1, MLP 4 + 4, times width^2.
        weights = 2 * blocks * tokens * 12 * width**2 + 2 * kept * patch * width + 2 * width * classes
        return weights, 2 * blocks * 2 * tokens**2 * width

    # Backward: a product for the gradient of each factor, and weights have none in dfq.
    weights, activations = forward(64)
    assert bench.flops(tool.Phase(64, looks=False, plain=True)) == 3 * weights + 3 * activations
    assert bench.flops(tool.Phase(64, looks=False)) == 2 * weights + 3 * activations
    assert bench.flops(tool.Phase(64, looks=True)) == pytest.approx(2.1 * weights + 3.1 * activations)
    weights, activations = forward(9)
    assert bench.flops(tool.Phase(9, looks=False)) == 2 * weights + 3 * activations


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the memory of a process from Linux")
def test_peak_memory_is_of_the_run_alone(tool: Any) -> None:
    def fill(megabytes: int) -> None:
        # Straight from the system: libraries that other tests load have malloc keep what is freed.
        with mmap.mmap(-1, megabytes * 1_000_000) as block:
            for start in range(0, len(block), mmap.PAGESIZE):
                block[start] = 1

    fill(300)
    assert tool.peak_memory(lambda: fill(100), torch.device("cpu")) == pytest.approx(100e6, rel=0.1)


def test_numbers_have_three_digits(tool: Any) -> None:
    assert [sys.modules["inversion_tables"].number(value) for value in (0.012345, 4.5, 99.96, 45678.4)] == [
        "0.0123",
        "4.50",
        "100",
        "45,678",
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--steps", "15"], "--steps must be a multiple of 10, not 15"),
        (["--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["--iterations", "3"], "--iterations 3 cannot be divided into 4 images"),
        (["--write", "page.md"], "--write takes its tables from --json: give both"),
    ],
)
def test_wrong_usage_is_told_before_any_work(
    tool: Any, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        tool.main(given)
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


def test_from_a_model_to_a_page(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def run_here(command: list[str], **_options: Any) -> Any:
        """In place of a process of its own, which would spend seconds on importing torch."""
        assert command[:2] == [sys.executable, str(ROOT / "tools" / "bench_inversion.py")]
        asked.append(command[-1])
        tool.main(command[2:])
        return subprocess.CompletedProcess(command, 0, stdout=capsys.readouterr().out)

    monkeypatch.setattr(tool, "subprocess", SimpleNamespace(run=run_here, PIPE=subprocess.PIPE))
    results = tmp_path / "new" / "p.json"
    size = ["--model", "reference", "--device", "cpu", "-b", "2", "--iterations", "40", "--division", "2"]
    tool.main([*size, "--rounds", "1", "--steps", "10", "--precision", "fp32", "--whole", "--json", str(results)])
    made = json.loads(results.read_text())

    assert asked == ["plain", "dense", "smi", "pri"]
    assert [one["name"] for one in made["contenders"]] == asked
    assert [sum(one["iterations"]) for one in made["contenders"]] == [40] * 4
    assert [one["images_per_canvas"] for one in made["contenders"]] == [1, 1, 1, 2]
    assert all(isinstance(one["peak_memory"], int) for one in made["contenders"])
    assert all(len(phase["seconds"]) == 1 and phase["seconds"][0] > 0 for phase in made["phases"])
    assert all(speed > 0 for speed in made["matmul_flops_per_second"].values())
    assert [(check["name"], check["iterations"]) for check in made["whole"]] == [("dense", 4), ("smi", 40)]
    assert made["precision"] == "fp32"
    assert made["versions"]["torch"] == torch.__version__
    assert capsys.readouterr().out.strip() == tool.to_markdown(made).strip()

    page = tmp_path / "page.md"
    page.write_text("<!-- table: p.json -->\n<!-- end -->\n")
    tool.main(["--json", str(results), "--write", str(page)])
    assert page.read_text() == f"<!-- table: p.json -->\n\n{tool.to_markdown(made)}\n<!-- end -->\n"
