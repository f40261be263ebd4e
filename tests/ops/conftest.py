from __future__ import annotations

import pytest

from gresbox.ops import _pixel_chunks


@pytest.fixture(params=["pieces by size", "small pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small pieces even a test's images are cut, with a part of another length at the end."""
    if request.param == "small pieces":
        for name, values in (("_SMALL", 7), ("_CPU_VALUES", 60), ("_DEVICE_VALUES", 40), ("_PANEL_VALUES", 9)):
            monkeypatch.setattr(_pixel_chunks, name, values)
