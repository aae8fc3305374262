"""Registers the models with transformers' Auto classes as soon as these are imported, and not before.

Importing transformers takes seconds, which neither the operator alone nor a command's help should cost. Models become
known when `transformers.models.auto.modeling_auto` has been imported: at once if it has been, else by a finder that
watches for it. The configuration alone is known as soon as `configuration_auto` is.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AUTO = "transformers.models.auto"
_REGISTERS = {
    f"{_AUTO}.configuration_auto": ("waveletgpt.model.configuration",),
    f"{_AUTO}.modeling_auto": ("waveletgpt.model.modeling", "waveletgpt.integrations.huggingface"),
    # Not with the others: it needs the first to be complete, which may be what imports transformers.
    "waveletgpt.model.modeling": ("waveletgpt.model.classifier",),
}
"""Module -> ours that register themselves when they are imported, which is when it has been."""


class _ThenRegister(Loader):
    """Loads a module as `loader` does, then imports ours."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader  # nobody else is to meet this one
        self.loader.exec_module(module)
        for ours in _REGISTERS[module.__name__]:
            importlib.import_module(ours)


class _Watch(MetaPathFinder):
    """Finds the modules of `_REGISTERS`, as Python's own finder does, and nothing else."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _REGISTERS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def install() -> None:
    """Register now with what has been imported, later with the rest. Calling it again changes nothing."""
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
    for theirs, modules in _REGISTERS.items():
        if theirs in sys.modules:
            for ours in modules:
                importlib.import_module(ours)
