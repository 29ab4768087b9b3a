"""The package is a house of rooms, and imports point one way: to rooms further down, or to the same room."""

import ast
from pathlib import Path

import pytest

import gaml_hf


PACKAGE = Path(gaml_hf.__file__).parent
# By floor, from the ground; rooms of one floor do not know each other. What lies beside them is the roof.
FLOORS = [{"models"}, {"data", "evaluation"}, {"hub"}, {"training", "runtime"}]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# The ground floor travels to the Hub, where nothing else of ours is installed.
TRAVELLING = {"torch", "numpy", "transformers", "huggingface_hub", "safetensors"}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if "space" not in path.parts)


def imported_modules(source: str) -> list[str]:
    """Full names of what a file imports anywhere in it, also inside a function or for type checkers alone."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            found += [prefix] if node.module else [prefix + alias.name for alias in node.names]
            if node.module == "gaml_hf":
                found += [f"gaml_hf.{alias.name}" for alias in node.names]
    return found


def wrong_imports(room: str, source: str) -> list[str]:
    """The imports of a file in `room` that lead up, or to the room beside."""
    wrong = []
    for name in imported_modules(source):
        other = name.split(".")[1] if name.startswith("gaml_hf.") else None
        is_roof = name == "gaml_hf" or (other is not None and other not in FLOOR_OF)
        is_up = other in FLOOR_OF and other != room and FLOOR_OF[other] >= FLOOR_OF[room]
        if is_roof or is_up or name.startswith(".."):
            wrong.append(name)
    return wrong


def test_every_room_has_its_floor():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(FLOOR_OF)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py"}


@pytest.mark.parametrize("path", [path for path in FILES if len(path.parts) > 1], ids=str)
def test_imports_point_down(path):
    source = (PACKAGE / path).read_text(encoding="utf-8")
    assert wrong_imports(path.parts[0], source) == []
    if path.parts[0] == "models":
        outside = {name.split(".")[0] for name in imported_modules(source) if not name.startswith(".")}
        if path.name == "image_pipeline_gaml.py":
            outside.discard("PIL")  # whoever has images has it
        assert outside - TRAVELLING <= set(__import__("sys").stdlib_module_names)


def test_an_import_that_leads_up_is_found():
    assert wrong_imports("models", "from gaml_hf.hub import save_checkpoint") == ["gaml_hf.hub"]
    assert wrong_imports("training", "def f():\n    import gaml_hf.runtime.ort") == ["gaml_hf.runtime.ort"]
    assert wrong_imports("hub", "from gaml_hf import GamlTrainer") == ["gaml_hf", "gaml_hf.GamlTrainer"]
    assert wrong_imports("evaluation", "from ..models import x") == ["..models"]
    assert wrong_imports("hub", "from .folders import SEAL\nfrom gaml_hf.evaluation import replay\nimport json") == []
