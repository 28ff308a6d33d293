"""Every guard has a row of the matrix that fails without it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile.fault_origin import Addresses, origin_process
from hostile.faults import BY_NAME
from hostile.mutation import CAUGHT_BY, EXCUSED, Mutant, line, mutants, notices, row_for
from hostile.storm import SCENES

MUTANTS = mutants()


@pytest.fixture(scope="module")
def addresses() -> Iterator[Addresses]:
    with origin_process() as running:
        yield running


@pytest.fixture(autouse=True)
def _broken_on_purpose(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A library without a guard may log, and end threads, as it likes."""
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[f"{index}-{one.name[:70]}" for index, one in enumerate(MUTANTS)])
def test_a_guard_is_missed(
    mutant: Mutant, addresses: Addresses, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = row_for(mutant)
    is_noticed = row is None or notices(row, mutant, addresses, tmp_path)
    with capsys.disabled():
        print("\n" + line(mutant, row, "excused" if row is None else "yes" if is_noticed else "NO"), end="")
    assert is_noticed, f"nobody notices that this is gone: {mutant.name}"


def test_rows_and_excuses_are_for_guards_that_exist() -> None:
    names = "\n".join(mutant.name for mutant in MUTANTS)
    assert [words for words in (*CAUGHT_BY, *EXCUSED) if words not in names] == []
    assert [
        row for row in CAUGHT_BY.values() if row not in SCENES and (row not in BY_NAME or BY_NAME[row].pending)
    ] == []
