"""The page of a report: what it says, what it refuses, and what it does with files that somebody else made."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import dfq
from dfq.cli import main
from dfq.errors import DfqError, UsageError


class Tables(HTMLParser):
    """The texts of all cells, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._inside = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data


@pytest.fixture(scope="session")
def page(
    quantized_folder: Path, bench_json: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """With everything that there can be."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "bench.json").write_text(json.dumps(bench_json()))
    costs = [{"name": "head.weight", "bits": 4, "kl": 0.25, "sqnr_db": 12.5, "changed": 50.0}]
    sensitivity = {"model": "reference", "bits": "w4a4", "recipe": "fast", "num_images": 3, "method": "leaves"}
    sensitivity |= {"together": costs[0], "sites": costs}
    (folder / "costs.json").write_text(json.dumps(sensitivity))
    out = dfq.report(
        quantized_folder,
        folder / "new" / "page.html",
        bench=folder / "bench.json",
        sensitivity=folder / "costs.json",
        progress=False,
    )
    return out.read_text()


def test_its_tables_hold_the_numbers_of_the_configuration(page: str, quantized_folder: Path) -> None:
    config = json.loads((quantized_folder / "config.json").read_text())["quantization_config"]
    rows = Tables(page).rows
    sites = {row[0]: row for row in rows if len(row) == 8}
    activations = {name: site for name, site in config["sites"].items() if not name.endswith(".weight")}
    assert {name: int(row[1]) for name, row in sites.items() if name in activations} == {
        name: site["bits"] for name, site in activations.items() if name != "pos_embed"
    }
    assert config["sha256"] in page
    assert config["model"]["fingerprint"] in page
    assert f"Quantized with dfq {config['versions']['dfq']}, torch {config['versions']['torch']}" in page


def test_its_tables_hold_the_numbers_of_the_evaluation(page: str, quantized_folder: Path) -> None:
    found = json.loads((quantized_folder / "evaluation.json").read_text())
    rows = {row[0]: row[1:] for row in Tables(page).rows if len(row) == 3}
    assert rows["top-1"][0] == f"{found['top1']:.2f} %"
    assert rows["top-1 in full precision"][0] == f"{found['baseline_top1']:.2f} %"
    assert rows["drop"][0] == f"{found['drop']:.2f} points"
    assert rows["images"][0] == "60"


def test_size_and_speed(page: str, quantized_folder: Path) -> None:
    assert f"{dfq.load(quantized_folder).weight_bytes / 1e6:.2f} MB" in page
    assert "1.50 times fp32" in page
    assert ["openvino", "w4a8", "0.25", "4.0", "375.0", "1.00", "1.50"] in Tables(page).rows
    assert ["head.weight", "4", "2.50e-01", "12.5 dB"] in Tables(page).rows


def test_every_image_is_in_it_with_its_words(page: str) -> None:
    pictures = re.findall(r'<img src="data:image/jpeg;base64,[^"]+" alt="(class \d|\d|[^"]+)"', page)
    assert len(pictures) == 6


@pytest.mark.parametrize(
    ("recipe", "said"), [("deploy", "dead leaves stood in their place"), ("paper", "were never shown to the model")]
)
def test_it_says_what_stood_where_sparse_images_are_blank(recipe: str, said: str, page: str, tmp_path: Path) -> None:
    made = ("--method", "smi", "-n", "4", "--iterations", "4", "--device", "cpu", "--quiet")
    assert (
        main(["quantize", "reference", "--bits", "w8a8", "--recipe", recipe, *made, "--out", str(tmp_path / "m")]) == 0
    )
    text = dfq.report(tmp_path / "m", progress=False).read_text()
    assert [said in sentence for sentence in text.split(". ") if "left blank" in sentence] == [True]
    assert "left blank" not in page  # Its images are whole.


def test_what_is_foreign_is_text(page: str) -> None:
    assert "A &lt;fast&gt; one" in page
    assert "said &amp; done" in page
    assert "<script" not in page


def test_nothing_of_it_lies_elsewhere(page: str) -> None:
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page) == []
    assert "url(" not in page
    assert "@import" not in page


def test_names_of_files_are_no_markup(folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / "<b onclick=x>&'\""
    shutil.move(folder, odd)
    text = dfq.report([odd, odd], tmp_path / "two.html", progress=False).read_text()
    assert "<b onclick" not in text
    assert "&lt;b onclick=x&gt;" in text


def test_alone_it_lies_in_the_folder_and_says_what_is_missing(folder: Path) -> None:
    (folder / "evaluation.json").unlink()
    shutil.rmtree(folder / "calibration")
    path = dfq.report(folder, progress=False)
    assert path == folder / "report.html"
    text = path.read_text()
    assert "not measured" in text
    assert f"dfq evaluate {folder} --data-dir IMAGES --baseline --json {folder}/evaluation.json" in text
    assert "images it was calibrated on are not in its folder" in text


def test_a_report_does_not_make_the_folder_another_models(folder: Path) -> None:
    dfq.report(folder, progress=False)
    again = ("--recipe", "paper", "--method", "leaves", "-n", "6", "--device", "cpu", "--quiet")
    assert main(["quantize", "reference", "--bits", "w4a8", *again, "--out", str(folder)]) == 0


def test_without_the_original_weights(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["model"]["checkpoint"] = "/nowhere/weights.safetensors"
    path.write_text(json.dumps(config))
    text = dfq.report(folder, progress=False).read_text()
    assert "not compared with full precision layer by layer: the original weights are not at /nowhere/weights" in text
    assert "SQNR after each stage" not in text
    with pytest.raises(DfqError, match="elsewhere"):
        dfq.report(folder, checkpoint="/elsewhere.safetensors", progress=False)


def test_several_side_by_side(folder: Path, quantized_folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(quantized_folder, tmp_path / "other"))
    path = other / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_images": 50}))
    text = dfq.report([folder, other], tmp_path / "both.html", progress=False).read_text()
    rows = {row[0]: row for row in Tables(text).rows}
    drop = json.loads((folder / "evaluation.json").read_text())["drop"]
    assert rows["ref-w4a8"][1:3] == ["W4A8", "paper"]
    assert rows["ref-w4a8"][6] == rows["other"][6] == f"{drop:.2f}"
    assert "Not all of them were evaluated on the same images" in text
    assert text.count("<polyline") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"directories": []}, "nothing to report"),
        ({"directories": ["a", "b"]}, "--out has to say"),
        ({"directories": ["a", "b"], "out": "c.html", "bench": "d.json"}, "--bench is of one model"),
    ],
)
def test_wrong_usage(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dfq.report(**arguments, progress=False)


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(DfqError, match="not a quantized model"):
        dfq.report(tmp_path, progress=False)


def test_a_folder_as_file(folder: Path) -> None:
    with pytest.raises(UsageError, match="is a folder; name the file"):
        dfq.report(folder, folder.parent, progress=False)


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["report", str(folder), "--out", str(tmp_path / "r.html"), "--device", "cpu", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"kept in {tmp_path / 'r.html'}; open it in a browser\n"
    assert printed.err == ""
