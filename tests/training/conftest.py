"""A model and data small enough to train in seconds."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def program() -> Callable[[str], ModuleType]:
    """``program("tiny_run")``: a program beside the tests, which they also run as a process of its own, as a module."""

    @cache
    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def tiny(program: Callable[[str], ModuleType]) -> ModuleType:
    return program("tiny_run")
