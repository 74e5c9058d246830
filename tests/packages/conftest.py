"""What several modules of this folder share."""

from __future__ import annotations

import pytest

from tests.packages.ipvs.lab import Lab, make


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Our ipvsadm, ready to run."""
    return make(tmp_path_factory.mktemp("ipvsadm"))
