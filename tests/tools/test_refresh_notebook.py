"""The tutorial notebook runs from the top, gives what is kept in it, and is what a user would write."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from nbclient.exceptions import CellExecutionError

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"
# Not third-party helpers of the suite: what dfq itself needs, the notebook's own displays, and the extra it names.
IMPORTS = {"dfq", "torch", "IPython", "onnx"}


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> Any:
    return load_tool("refresh_notebook")


@pytest.fixture(scope="module")
def kept(tool: Any) -> Any:
    return tool.nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(notebook: Any) -> list[Any]:
    """What each cell gives, numbers left out: they are those of one machine."""
    return [[content(output) for output in cell.outputs] for cell in code_cells(notebook)]


def content(output: Any) -> Any:
    return sorted(output.data) if "data" in output else re.sub(r"-?\d+\.?\d*", "#", output.text)


def a_notebook(tool: Any, path: Path, *sources: str) -> Path:
    cells = [tool.nbformat.v4.new_code_cell(source, id=f"cell-{index}") for index, source in enumerate(sources)]
    tool.nbformat.write(tool.nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_it_runs_and_gives_what_is_kept_in_it(
    tool: Any, kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = tool.executed(kept, tmp_path)
    outputs = [output for cell in code_cells(done) for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "execute_result"}
    # Neither warnings nor progress bars.
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert shown(done) == shown(kept)
    said = "".join(output.get("text", "") for output in outputs)
    assert "the same logits: True" in said
    assert float(re.findall(r"^top-1 ([\d.]+) %, full precision 99\.3 %$", said, re.MULTILINE)[0]) > 95
    assert (tmp_path / "reference-w4a4" / "model.safetensors").is_file()
    assert (tmp_path / "reference-w8a8.onnx").is_file()


def test_it_shows_pictures_and_holds_nothing_of_the_machine_it_ran_on(kept: Any) -> None:
    kinds = {kind for cell in code_cells(kept) for output in cell.outputs for kind in output.get("data", ())}
    assert {"image/png", "image/svg+xml"} <= kinds
    assert [cell.execution_count for cell in code_cells(kept)] == [*range(1, len(code_cells(kept)) + 1)]
    assert all(not cell.metadata for cell in kept.cells)
    assert set(kept.metadata) == {"kernelspec", "language_info"}
    text = NOTEBOOK.read_text()
    assert not re.search(r"/(?:home|root|tmp|usr|Users|private)/|site-packages|\d\d:\d\d:\d\d", text)
    assert len(text) < 200_000


def test_its_cells_are_what_a_user_would_write(kept: Any) -> None:
    for cell in code_cells(kept):
        tree = ast.parse(cell.source)  # So neither magics nor shell commands.
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom | ast.Import):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
                assert {module.split(".")[0] for module in modules} <= IMPORTS
            names = {getattr(node, key, None) for key in ("id", "attr", "name")}
            assert not any(isinstance(name, str) and name.startswith("_") and name != "_" for name in names)
        assert len(cell.source.splitlines()) <= 12


def test_its_links_lead_somewhere(kept: Any) -> None:
    text = "\n".join(cell.source for cell in kept.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", text)
    assert links
    assert [link for link in links if not (NOTEBOOK.parent / link).is_file()] == []


def test_a_cell_that_fails_ends_it_and_the_file_stays(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = a_notebook(tool, tmp_path / "n.ipynb", "1 + 1", "raise ValueError('no')")
    before = path.read_bytes()
    monkeypatch.setattr("sys.argv", ["refresh_notebook.py", "--notebook", str(path)])
    with pytest.raises(CellExecutionError, match="ValueError"):
        tool.main()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_outputs_are_refreshed_and_the_same_each_time(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "from pathlib import Path\nPath('here').touch()\nprint(6 * 7)"
    path = a_notebook(tool, tmp_path / "n.ipynb", source)
    monkeypatch.setattr("sys.argv", ["refresh_notebook.py", "--notebook", str(path)])
    written = []
    for _ in range(2):
        tool.main()
        written.append(path.read_bytes())
        (cell,) = tool.nbformat.read(path, as_version=4).cells
        assert cell.outputs[0].text == "42\n"
    assert written[0] == written[1]
    assert capsys.readouterr().out == 2 * f"{path}: 1 cells run\n"
    # It worked in a folder of its own.
    assert list(tmp_path.iterdir()) == [path]
    assert not (Path.cwd() / "here").exists()
