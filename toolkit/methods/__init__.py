"""Distillation methods, one file each, found by scanning this folder.

A method's module has: a docstring whose first line is the help text; a frozen dataclass ``Config`` whose fields are
its command-line options (default, and ``metadata["help"]``); and ``phases(config, setting) -> tuple[Phase, ...]``.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def find_methods() -> dict[str, ModuleType]:
    """Method name -> module, in alphabetical order."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f".{name}", __name__) for name in names}
