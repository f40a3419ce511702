"""Holds the import layers, the places of side effects, and a light import."""

import ast
import statistics
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sdlite"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import its own room and the floors below; rooms on one floor do not know each other.
FLOORS = (
    {"config", "files", "package"},
    {"contracts", "request"},
    {"diffusion", "models", "segmentation"},
    {"backends", "checkpoints", "images"},
    {"pipeline"},
    {"batch", "bench", "inspect", "training"},
    {"cli", "web"},
    {"__init__", "__main__"},  # the doors
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# Libraries with one home each; torch is everybody's but config's.
HOMES = {
    "transformers": {"models/text.py", "checkpoints/tokenizer.py", "training/text.py", "training/evaluation/report.py"},
    "diffusers": {"models/codec.py", "diffusion/schedulers.py", "training/codec.py", "bench/diffusers.py"},
    "accelerate": {"training/loop.py"},
    "huggingface_hub": {"checkpoints/hub.py"},
    "typer": {"cli/"},
    "rich": {"cli/", "training/keeper.py"},
    "PIL": {
        "images/",
        "pipeline/",
        "inspect/",
        "segmentation/pixels.py",
        "segmentation/segmenter.py",
        "batch/",
        "cli/",
        "bench/",
        "training/",
    },
    "safetensors": {"checkpoints/", "segmentation/segmenter.py", "training/"},
    "ray": {"batch/ray_runner.py"},
    "pickle": set(),
}
FROM_PRETRAINED = {"bench/diffusers.py", "training/text.py"}  # with safetensors only and no code of the folder's own
PRINTS = {"cli/", "training/keeper.py"}
ENVIRONMENT = {"cli/", "bench/machine.py", "batch/ray_runner.py"}  # Ray takes some of its settings from nowhere else


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def group(path: Path) -> str:
    return name(path).split("/")[0].removesuffix(".py")


def imports(tree: ast.AST):
    """Absolute module names of the imports that run; those under TYPE_CHECKING do not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert all(alias.name != "*" for alias in node.names), "import *"
            yield node.module
        else:
            yield from imports(node)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_down(path):
    for module in imports(ast.parse(path.read_text())):
        parts = module.split(".")
        if parts[0] == "sdlite" and len(parts) > 1 and parts[1] != group(path):
            assert FLOOR[parts[1]] < FLOOR[group(path)], f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_libraries_stay_in_their_corners(path):
    found = {module.split(".")[0] for module in imports(ast.parse(path.read_text()))}
    for library in found & set(HOMES):
        assert any(name(path).startswith(home) for home in HOMES[library]), f"{name(path)} imports {library}"
    if group(path) in ("config", "files"):
        assert "torch" not in found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_side_effects_stay_in_their_corners(path):
    tree = ast.parse(path.read_text())
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "print" not in called or any(name(path).startswith(home) for home in PRINTS)
    assert not used & {"os.environ", "os.getenv"} or any(name(path).startswith(home) for home in ENVIRONMENT)
    assert "torch.manual_seed" not in called or name(path).startswith("training/")
    assert not called & {"torch.randn_like", "torch.rand_like"}, "noise is an argument: draw it from a generator"
    assert not any(call.endswith("from_pretrained") for call in called) or name(path) in FROM_PRETRAINED
    assert (
        "json.loads" not in called
        or (group(path) not in ("checkpoints", "segmentation") or name(path) == "checkpoints/tokenizer.py")
        or name(path) == "checkpoints/tokenizer.py"
    ), "use files.read_json"
    assert "torch.load" not in called or name(path) == "checkpoints/pickles.py"


def test_import_loads_nothing_heavy():
    code = (
        "import sys, sdlite; "
        "print(*sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'diffusers', 'transformers', 'accelerate',"
        " 'pydantic', 'openvino', 'ray', 'numpy', 'PIL'}))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == ""


@pytest.mark.parametrize(
    "use", ["batch", "segmentation", "images", "inspect", "inspect.widgets", "training.evaluation.report"]
)
def test_one_import_is_enough(monkeypatch: pytest.MonkeyPatch, use: str):
    """`import sdlite` and then `sdlite.batch.run(...)`, as the README writes it."""
    import sdlite

    value = sdlite
    for name in use.split("."):
        monkeypatch.delitem(value.__dict__, name, raising=False)  # as in an interpreter that has not imported it
        value = getattr(value, name)
    assert value is sys.modules[f"sdlite.{use}"] and use.split(".")[0] in dir(sdlite)


def test_every_public_name_is_there():
    import sdlite

    for public in sdlite.__all__:
        assert getattr(sdlite, public) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = sdlite.nothing
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sdlite.training.nothing


LAZY = [path for path in FILES if path.name == "__init__.py" and "TYPE_CHECKING" in path.read_text()]


@pytest.mark.parametrize("path", LAZY, ids=name)
def test_names_for_type_checkers_are_those_that_are_fetched(path):
    package = import_module(".".join(("sdlite", *path.relative_to(PACKAGE).parts[:-1])))
    (block,) = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If))
    shown = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(shown) == dir(package)
    for public, module in shown.items():
        assert getattr(package, public) is getattr(import_module(module), public)


def test_files_and_functions_are_short():
    lengths = [len(path.read_text().splitlines()) for path in FILES]
    functions = [
        node.end_lineno - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert max(lengths) <= 350 and statistics.median(functions) <= 8
    rooms = {group(path) for path in FILES} - {"__init__", "__main__"}
    assert len(rooms) <= 16 and len({FLOOR[room] for room in rooms}) <= 7
