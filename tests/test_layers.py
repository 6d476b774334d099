"""The architecture, held by tests: imports go down only, and each library has one door."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vmm"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up. A module may import from its own layer and from those before it.
LAYERS = (
    ("errors", "events", "expect"),
    ("isa",),
    ("image",),
    ("machine",),
    ("monitor",),
    ("vm", "census", "witness", "lockstep", "measures", "naming", "attribution", "blame", "comparison"),
    ("cli", "__main__"),
)
# Which layers a monitor's machinery may not know, although they lie below it.
FORBIDDEN = {"machine": {"image"}, "monitor": {"image"}}
DOORS = {
    "unicorn": ("machine",),
    "keystone": ("image",),
    "capstone": ("isa",),
    "elftools": ("image",),
    "rich": ("cli",),
    "matplotlib": ("cli",),
    "jinja2": ("cli",),
}


def _imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it leads"
            assert node.module is not None
            names.add(node.module)
            if node.module == "vmm":
                names.update(f"vmm.{alias.name}" for alias in node.names)
    return names


def _room(dotted: str) -> str:
    """The top-level part of the package that a name belongs to."""
    return dotted.split(".")[1] if "." in dotted else ""


def _level(room: str) -> int:
    for level, rooms in enumerate(LAYERS):
        if room in rooms:
            return level
    raise AssertionError(f"vmm.{room} belongs to no layer: give it one in LAYERS")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    """A module imports only from its own layer and those below it."""
    relative = path.relative_to(PACKAGE).with_suffix("")
    room = relative.parts[0]
    if room == "__init__":
        return
    level = _level(room)
    for name in _imports(path):
        if name.startswith("vmm.") and _room(name):
            other = _room(name)
            assert _level(other) <= level, f"{path.name} imports {name}, which lies above it"
            assert other not in FORBIDDEN.get(room, ()), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_each_library_has_one_door(path: Path) -> None:
    """Unicorn, Keystone, Capstone, pyelftools and Rich are imported where their door is, and nowhere else."""
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in _imports(path):
        rooms = DOORS.get(name.split(".")[0])
        assert rooms is None or room in rooms, f"{path.name} imports {name}; its door is vmm.{rooms}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_command_line_prints(path: Path) -> None:
    """Nothing but the command line writes to the terminal."""
    if path.relative_to(PACKAGE).parts[0] in ("cli", "__main__.py"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{path.name}:{node.lineno} prints"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_why_it_exists(path: Path) -> None:
    """Each module with code opens with a docstring."""
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree), f"{path.name} has no docstring"
