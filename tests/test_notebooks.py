"""Every notebook runs from top to bottom without a network, and is committed as it ran."""

import ast
import importlib
import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICK = {"02_inside_one_step"}  # the others take most of a minute, or minutes, on two cores
MAX_SECONDS = 1_200  # of a cell: a bound for a stuck kernel, on busy machines too
MAX_BYTES = 600_000
MACHINE_PATH = re.compile(r"(?<![\w.])/(root|home|Users|work|tmp|opt|var)/")

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_marked = pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=[] if p.stem in QUICK else [pytest.mark.slow]) for p in NOTEBOOKS],
)


def cells(path, kind=None):
    return [c for c in json.loads(path.read_text())["cells"] if kind in (None, c["cell_type"])]


def source(cell):
    return "".join(cell["source"])


def python(cell):
    """The cell without magics and shell commands."""
    return "".join(line for line in source(cell).splitlines(keepends=True) if not line.lstrip().startswith(("%", "!")))


def shown(cell):
    """(kind, text) of all that the cell put out, pictures left out."""
    for output in cell["outputs"]:
        kind = output.get("name", output["output_type"])
        data = output.get("data", {"text/plain": output.get("text", "")})
        yield from ((kind, "".join(text)) for mime, text in data.items() if mime.startswith("text/"))


@each_marked
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="running notebooks needs nbformat, nbclient and ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="running notebooks needs nbclient and ipykernel")
    for name in ("ipykernel", "matplotlib"):
        pytest.importorskip(name, reason=f"running notebooks needs {name}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))  # sdlite
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=MAX_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()


@each
def test_uses_public_names_only(path):
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse(python(cell))):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [part for alias in node.names for part in alias.name.split(".")]
            elif isinstance(node, ast.Attribute) and not node.attr.endswith("__"):
                names = [node.attr]
            private = [name for name in names if name.startswith("_")]
            assert not private, f"{path.name}: {', '.join(private)} in\n{source(cell)}"


@each
def test_imports_names_that_are_there(path):
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse(python(cell))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sdlite":
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{path.name}: {node.module} has no {', '.join(missing)}"


@each
def test_is_committed_as_it_ran(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        for kind, text in shown(cell):
            assert kind not in ("error", "stderr"), f"{path.name} puts out a {kind}: {text:.300}"
            assert not MACHINE_PATH.search(text), f"{path.name} shows a path of the machine: {text:.300}"
        assert not any(output["output_type"] == "error" for output in cell["outputs"])
    for cell in cells(path):
        assert not MACHINE_PATH.search(source(cell)), f"{path.name} names a path of the machine: {source(cell):.300}"
    assert path.stat().st_size <= MAX_BYTES, f"{path.name} is large; keep pictures as JPEG, and small"


@each
def test_asks_one_question_and_ends_in_its_answer(path):
    first, *_, last = cells(path)
    assert first["cell_type"] == last["cell_type"] == "markdown"
    assert "?" in source(first), f"{path.name}: the first cell states the question"
    assert re.search(r"^#+ .*answer", source(last), re.I | re.M), f'{path.name}: the last cell is headed "Answer"'
