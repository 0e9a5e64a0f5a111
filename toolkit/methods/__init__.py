"""Distillation methods, one file each, found by scanning this folder.

A method's module has: a docstring whose first line is the help text; a frozen dataclass ``Config`` whose
fields are its command-line options (default, and ``metadata["help"]``); and ``phases(config, setting) ->
tuple[Phase, ...]``.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any, get_type_hints


def find_methods() -> dict[str, ModuleType]:
    """Method name -> module, in alphabetical order."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f".{name}", __name__) for name in names}


@dataclass(frozen=True)
class Option:
    """One field of a method's Config, for a command line."""

    name: str
    kind: Any
    default: Any
    help: str


def options_of(method: ModuleType) -> list[Option]:
    """What can be said of a method: the fields of its Config."""
    kinds = get_type_hints(method.Config)
    return [Option(f.name, kinds[f.name], f.default, f.metadata["help"]) for f in fields(method.Config)]
