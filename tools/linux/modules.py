"""A kernel's modules: which others one needs, and the tables by which `modprobe` finds them.

Each module says in its `.modinfo` section what it depends on and by which names the kernel asks for it. The two
tables are those that `depmod` would write, for a few modules instead of thousands.

Source: modules.dep(5), kmod's modules.alias; Linux, include/linux/module.h (MODULE_INFO).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from elftools.elf.elffile import ELFFile


@dataclass(frozen=True)
class Module:
    """A `.ko` file, with what its `.modinfo` says."""

    name: str
    data: bytes
    depends: tuple[str, ...]
    aliases: tuple[str, ...]


def canonical(name: str) -> str:
    """Modules' names treat dashes as underscores."""
    return name.replace("-", "_")


def read(path: Path) -> Module:
    """The module in the file `path`."""
    data = path.read_bytes()
    section = ELFFile(BytesIO(data)).get_section_by_name(".modinfo")
    pairs = [text.decode().partition("=") for text in section.data().split(b"\0") if text]
    depends = [name for key, _, value in pairs if key == "depends" for name in value.split(",") if name]
    return Module(
        canonical(path.stem),
        data,
        tuple(canonical(name) for name in depends),
        tuple(value for key, _, value in pairs if key == "alias"),
    )


def closure(folder: Path, wanted: Iterable[str]) -> list[Module]:
    """`wanted` out of the modules under `folder`, and all that they need, each after what it needs.

    Raises `KeyError` for one that is not there.
    """
    paths = {canonical(path.stem): path for path in folder.rglob("*.ko")}
    found: dict[str, Module] = {}

    def add(name: str) -> None:
        if name in found:
            return
        module = read(paths[name])
        for needed in module.depends:
            add(needed)
        found[name] = module

    for name in wanted:
        add(canonical(name))
    return list(found.values())


def dependency_table(modules: Iterable[Module]) -> str:
    """`modules.dep`: a line a module, with all that it needs, nearest first."""
    by_name = {module.name: module for module in modules}

    def needed(module: Module) -> list[str]:
        names: list[str] = []
        for name in module.depends:
            names += [n for n in (name, *needed(by_name[name])) if n not in names]
        return names

    return "".join(
        f"{module.name}.ko:" + "".join(f" {name}.ko" for name in needed(module)) + "\n"
        for module in by_name.values()
    )


def alias_table(modules: Iterable[Module]) -> str:
    """`modules.alias`: by which names the kernel may ask for each."""
    return "".join(f"alias {alias} {module.name}\n" for module in modules for alias in sorted(module.aliases))
