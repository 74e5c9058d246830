"""A series adds no compiler warning, not even one that W=1 asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernel import build
from pipeline.store import Store

pytestmark = pytest.mark.build


@pytest.mark.parametrize("name", build.flavours())
def test_no_new_warning(name: str, tmp_path: Path) -> None:
    store = Store()
    room = build.kernels(store)
    store.ensure(room.base_stage())
    assert room.new_warnings(name, tmp_path) == []
