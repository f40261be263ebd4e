"""A public name cannot appear or vanish unnoticed: the names are written down in api_surface.json.

After a deliberate change: ``GRESBOX_UPDATE_API=1 pytest tests/test_api_surface.py``, and a line in CHANGELOG.md.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
from pathlib import Path

import pytest

import gresbox

RECORD = Path(__file__).with_name("api_surface.json")
UPDATE = "GRESBOX_UPDATE_API"


def public_modules() -> list[str]:
    """gresbox, its packages and its single public modules; files inside a package are reached through it."""
    return ["gresbox", *(f"gresbox.{module.name}" for module in pkgutil.iter_modules(gresbox.__path__) if module.name[0] != "_")]


def test_public_names_are_those_written_down():
    names = {module: sorted(importlib.import_module(module).__all__) for module in public_modules()}
    if os.environ.get(UPDATE):
        RECORD.write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    gone = sorted({f"{m}.{n}" for m, ns in recorded.items() for n in ns} - {f"{m}.{n}" for m, ns in names.items() for n in ns})
    new = sorted({f"{m}.{n}" for m, ns in names.items() for n in ns} - {f"{m}.{n}" for m, ns in recorded.items() for n in ns})
    assert not gone + new, f"gone: {gone}; new: {new}. If that is meant: {UPDATE}=1 pytest tests/test_api_surface.py"


@pytest.mark.parametrize("module", public_modules())
def test_every_public_name_resolves_once(module):
    package = importlib.import_module(module)
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)


def test_lazy_names_are_the_packages_own():
    for name, home in gresbox._MODULE_OF.items():
        assert getattr(gresbox, name) is getattr(importlib.import_module(home), name)
        assert name in importlib.import_module(home).__all__
    assert set(gresbox.__all__) == {*gresbox._MODULE_OF, "__version__"}


def test_every_public_class_of_the_packages_resolves_from_the_top():
    packages = [importlib.import_module(home) for home in gresbox._HOME]
    classes = {name for package in packages for name in package.__all__ if inspect.isclass(getattr(package, name))}
    assert classes <= set(gresbox.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'gresbox' has no attribute 'Nonsense'"):
        gresbox.Nonsense  # noqa: B018
