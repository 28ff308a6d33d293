"""A host that refuses everything is asked little more often than there are transfers, and never when it asks for
silence."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile.storm import SCENES


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize(
    "transfers", [pytest.param(200, id="share"), pytest.param(1000, id="all", marks=pytest.mark.slow)]
)
def test_a_crowd_is_modest_where_everything_is_refused(scene: str, transfers: int, tmp_path: Path) -> None:
    assert SCENES[scene](transfers, tmp_path) == []
