"""Runs docs/tutorial.ipynb from the top and keeps what its cells give.

    python tools/refresh_notebook.py

The notebook is run in a kernel of its own and in an empty folder, which is deleted afterwards. What differs from run to
run is not kept: times, versions, the name of the kernel. A cell that fails ends it, and the file stays as it was.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# Without it Jupyter warns about where its folders are to be.
os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets.config import Config

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
SECONDS = 300
"""That a cell may take: a kernel that hangs must end a run."""


def executed(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """A copy of the notebook, run in `folder`. Raises nbclient's CellExecutionError where a cell fails."""
    copy = nbformat.from_dict(notebook)
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    # Kernel, history, settings and sockets would otherwise be those in the user's home.
    with tempfile.TemporaryDirectory() as private:
        client = NotebookClient(
            copy,
            timeout=SECONDS,
            kernel_name=KERNEL["name"],
            resources={"metadata": {"path": str(folder)}},
            record_timing=False,
            # Not TCP, which other users of the machine could listen to.
            config=Config(KernelManager={"transport": "ipc", "ip": f"{private}/kernel"}),
        )
        places = ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")
        homes = dict.fromkeys(places, private)
        # What libraries say where there are no widgets for their progress bars.
        quiet = {"PYTHONWARNINGS": "ignore:IProgress not found"}
        with environment(homes | quiet):
            client.execute()
    return stripped(copy)


def stripped(notebook: NotebookNode) -> NotebookNode:
    """The notebook without what hangs on the machine and the hour."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
    return notebook


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables set while it is open."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notebook", type=Path, default=NOTEBOOK, metavar="FILE.ipynb", help="(docs/tutorial.ipynb)")
    path = parser.parse_args().notebook
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        done = executed(notebook, Path(folder))
    partial = path.with_suffix(".partial")
    nbformat.write(done, partial)
    partial.replace(path)
    print(f"{path}: {sum(cell.cell_type == 'code' for cell in done.cells)} cells run")


if __name__ == "__main__":
    main()
