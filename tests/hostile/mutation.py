"""Switches each guard off in turn, and shows which rows of the matrix notice: ``python -m hostile.mutation``.

A guard is whatever refuses: every ``raise`` of the rooms that judge an answer, and the bounds that they keep. Each is
taken out of the running library by exchanging a function's code; no file is changed.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any
from unittest import mock

from hostile.fault_origin import Addresses, origin_process
from hostile.faults import BY_NAME
from hostile.runner import run, some
from hostile.storm import SCENES

from holotensor_net.engine import assembly
from holotensor_net.transport import addresses as dialling
from holotensor_net.transport import client, digests, guards, names, pools, retry, sockets, transfer
from holotensor_net.values import Validator

ROOMS = (guards, digests, transfer, client, sockets, names, dialling, pools)

AT_ONCE = 12
"""Transfers of a row that are made to see whether it notices."""

CROWD = 50
"""The same, of a scene with a crowd."""


@dataclass(frozen=True)
class Mutant:
    """A library without one guard. ``off`` switches it off for as long as its block lasts."""

    name: str
    off: Callable[[], contextlib.AbstractContextManager[Any]]


# -- refusals: every raise


def refusals(room: ModuleType) -> Iterator[Mutant]:
    """A mutant for each statement of a room that raises an error of its own making."""
    counts: dict[str, int] = {}
    seen: dict[tuple[str, str], int] = {}
    tree = ast.parse(inspect.getsource(room))
    for owner, statement in _raises(tree):
        number = counts[owner] = counts.get(owner, 0) + 1
        words = " ".join(ast.unparse(statement).split())
        name = f"{room.__name__.rpartition('.')[2]}.{owner}"
        seen[name, words] = times = seen.get((name, words), 0) + 1
        again = " (again)" if times > 1 else ""
        yield Mutant(f"{name}  {words[:90]}{again}", functools.partial(_without, room, owner, number))


def _raises(tree: ast.Module) -> Iterator[tuple[str, ast.Raise]]:
    """Every raise that names what it raises, and the outermost function that it is in."""
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        for member in members:
            if isinstance(member, ast.FunctionDef):
                owner = f"{node.name}.{member.name}" if isinstance(node, ast.ClassDef) else member.name
                named = [n for n in ast.walk(member) if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call)]
                yield from ((owner, statement) for statement in sorted(named, key=lambda n: n.lineno))


@contextlib.contextmanager
def _without(room: ModuleType, owner: str, number: int) -> Iterator[None]:
    """The room without the ``number``-th raise of a function."""
    tree = ast.parse(inspect.getsource(room))
    doomed = [statement for name, statement in _raises(tree) if name == owner][number - 1]

    class Remove(ast.NodeTransformer):
        def visit_Raise(self, node: ast.Raise) -> ast.stmt:
            return ast.copy_location(ast.Pass(), node) if node is doomed else node

    changed = compile(ast.fix_missing_locations(Remove().visit(tree)), room.__file__ or "", "exec")
    function = _function(room, owner)
    before = function.__code__
    function.__code__ = _code(changed, owner.split("."))
    try:
        yield
    finally:
        function.__code__ = before


def _function(room: ModuleType, owner: str) -> FunctionType:
    found: Any = room
    for name in owner.split("."):
        found = inspect.getattr_static(found, name)
    found = getattr(found, "__func__", getattr(found, "fget", found))
    unwrapped = inspect.unwrap(found)
    assert isinstance(unwrapped, FunctionType)
    return unwrapped


def _code(outer: CodeType, path: list[str]) -> CodeType:
    for const in outer.co_consts:
        if isinstance(const, CodeType) and const.co_name == path[0]:
            return const if len(path) == 1 else _code(const, path[1:])
    raise LookupError(path)


# -- bounds and judgements: what is no raise


@contextlib.contextmanager
def _rewritten(room: ModuleType, owner: str, *changes: tuple[str, str]) -> Iterator[None]:
    """The room with other words in one of its functions."""
    function = _function(room, owner)
    lines, first = inspect.getsourcelines(function)
    before = "".join(lines)
    after = before
    for old, new in changes:
        assert old in after, f"{owner} says {old!r} no longer: write this mutant anew"
        after = after.replace(old, new)
    source = inspect.getsource(room).splitlines(keepends=True)
    source[first - 1 : first - 1 + len(lines)] = [after]
    code = function.__code__
    function.__code__ = _code(compile("".join(source), room.__file__ or "", "exec"), owner.split("."))
    try:
        yield
    finally:
        function.__code__ = code


def _patched(owner: object, name: str, value: object) -> Mutant:
    where = getattr(owner, "__name__", "").rpartition(".")[2]
    return Mutant(f"{where}.{name}  = {str(value)[:40]}", lambda: mock.patch.object(owner, name, value))


def _changed(room: ModuleType, owner: str, words: str, *changes: tuple[str, str]) -> Mutant:
    where = room.__name__.rpartition(".")[2]
    return Mutant(f"{where}.{owner}  {words}", functools.partial(_rewritten, room, owner, *changes))


class _All(frozenset[str]):
    def __contains__(self, name: object) -> bool:
        return True


def _every_validator_is_strong(headers: guards.Headers) -> Validator:
    return Validator(headers.get("etag"), headers.get("last-modified"), True)


def judgements() -> Iterator[Mutant]:
    """A mutant for each bound, and for each judgement that refuses nothing by itself."""
    yield _patched(guards, "_is_old_enough", lambda *_: True)
    yield _patched(guards, "validator_of", _every_validator_is_strong)
    yield _patched(guards, "retry_after", lambda *_: None)
    yield _patched(transfer, "announced", lambda _: frozenset())
    yield _patched(transfer, "linked", lambda _: frozenset())
    yield _patched(assembly, "check_digests", lambda *_: None)
    yield _patched(client, "_TRAVELS", _All())
    yield _patched(client, "_REFUSED", ())
    yield _patched(client, "_MOST_CONTINUATIONS", 1 << 40)
    yield _patched(client, "_DRAIN", 1 << 60)
    yield _patched(client, "_DRAIN_SECONDS", 1e6)
    yield _patched(sockets, "SLOWEST", 0.0)
    yield _patched(retry._StopBeforeDeadline, "__call__", lambda *_: False)
    yield _patched(retry, "_worth_retrying", lambda error: True)
    yield _patched(retry.Allowance, "pays", lambda *_: True)
    yield _patched(retry.Host, "refusal", lambda *_: None)
    yield _changed(transfer, "Transfer.resume", "resumes what has no version", ("self.version is None or ", ""))
    yield _changed(
        client, "HttpClient._follow", "a head may drip for ever", ("+ self.config.connect_timeout + timeout", "+ 1e6")
    )


CAUGHT_BY = {
    "came in several parts": "7-several-parts-and-a-place",
    "came with no Content-Range": "2-no-content-range",
    "malformed Content-Range": "5-other-unit",
    "impossible Content-Range": "5-last-before-first",
    "check_content_range  raise ProtocolError(f'asked for": "3-other-part",
    "did not say how long the object is": "6-star-unknown",
    "check_content_range  raise ObjectChanged": "6-other-total",
    "malformed Content-Length": "9-length-in-words",
    "check_framing  raise ProtocolError(f'Transfer-Encoding": "15-gzip-chunked",
    "both Content-Length and Transfer-Encoding": "10-length-and-chunks",
    "the answer announces": "9-length-less-than-part",
    "check_encoding": "14-said-to-be-gzip",
    "check_same_version": "19-if-match-ignored",
    "guards.check_checksum": "16-bit-flip",
    "digests.Digest.check": "17-sha-512",
    "raise ValueError('no dictionary')": "17-unknown-digest",
    "transfer.announced": "17-whole-against-repr-digest",
    "transfer.linked": "17-linked-etag",
    "assembly.check_digests": "17-linked-etag",
    "HttpClient.fetch  raise _too_large": "29-endless-200",
    "HttpClient.describe  raise": "33-status-404",
    "keeps sending less": "34-one-byte-at-a-time",
    "of a version it does": "4-half-of-no-version",
    "Transfer.judge  raise ObjectChanged": "18-replaced",
    "Transfer.judge  raise guards.error_of_status": "26-204",
    "_judge_part": "26-part-for-a-whole",
    "how long the body is": "9-whole-without-end",
    "_judge_whole  raise ObjectChanged": "18-longer-when-asked-again",
    "_judge_whole  raise RangeNotSupported": "1-whole-for-a-range",
    "304 to a question": "25-unsolicited-304",
    "304 for another version": "25-304-of-another-version",
    "_judge_unsatisfied  raise ObjectChanged": "24-refused-where-what-may-end-was-cut",
    "refuses the range": "24-refused-although-there-is-more",
    "_end_at": "24-ends-before-the-range",
    "cut in the middle of the body": "9-part-without-length-cut",
    "_move  raise ProtocolError('the server sent": "11-excess",
    "more than {self.config.max_redirects}": "30-redirect-loop",
    "_decoded  raise ProtocolError(f'Content-Encoding": "14-gzip-said-to-be-brotli",
    "the compressed body is cut": "14-gzip-cut-at-a-flush",
    "the compressed body is broken": "14-broken-gzip",
    "which is not fetched": "30-redirect-to-file",
    "give up encryption": "30-https-to-http",
    "no time is left": "27-flood-of-100",
    "cut in the middle of the answer": "8-cut-in-the-length",
    "malformed chunk size": "12-chunk-length-with-plus",
    "come too slowly": "27-body-drip",
    "a change of protocol": "26-change-of-protocol",
    "connect  raise TimeoutError('timed out')": "35-all-endpoints-are-black-holes",
    "the name was not resolved": "35-no-name-server-answers",
    "a header in several lines": "5-folded",
    "a header line that is none": "13-leading-space",
    "raise NewConnectionError(connection": "35-all-endpoints-refuse",
    "raise ConnectTimeoutError(connection": "35-all-endpoints-are-black-holes",
    "raise NameResolutionError(connection": "35-no-endpoint-has-an-address",
    "guards._is_old_enough": "21-date-of-the-same-second",
    "guards.validator_of": "20-weak-etag",
    "guards.retry_after": "31-retry-after-30-years",
    "client._TRAVELS": "39-redirect-to-another-origin",
    "client._REFUSED": "33-expired-signature",
    "client._MOST_CONTINUATIONS": "34-one-byte-at-a-time",
    "client._DRAIN_SECONDS": "29-slow-500",
    "client._DRAIN ": "29-endless-500-in-a-hurry",
    "sockets.SLOWEST": "27-body-drip",
    "_StopBeforeDeadline": "31-retry-after-beyond-the-deadline",
    "Allowance.pays": "32-refused",
    "Host.refusal": "32-silenced",
    "retry._worth_retrying": "33-status-400",
    "resumes what has no version": "20-cut-of-a-weak-version",
    "a head may drip for ever": "27-head-drip",
}
"""Words of a mutant's name → the row, or the scene with a crowd, that notices it."""

EXCUSED = {
    "raise ValueError('no comma')": "what is no comma is no member either, and so refused as that",
    "HTTP cannot ask for an empty range": "a caller's mistake, no answer",
    "byte_range must be a RangeRequest": "a caller's mistake, no answer",
    "the function given as auth=": "a setting, no answer",
    "no connection came free": "a caller's threads, no answer",
    "_moved  raise ProtocolError('the server sent": "as chunks say how long they are, nothing gives more than asked",
    "the client is closed": "a closed client, no answer",
    "the transfer was interrupted": "a transfer that nobody wants any more, no answer",
    "the wait for the resolver was cut": "a transfer that nobody wants any more, no answer",
    "there is no CA bundle": "a setting, no answer",
    "a credential or a header holds": "a setting, no answer",
    "_decoded  raise _too_large": "what goes beyond the bound is not unpacked in any case, and so refused as cut",
    "redirects to something that is no URL": "what has no scheme is none that is fetched, either",
    "raise OSError(number": "to write to what is not connected fails likewise",
    "raise NewConnectionError(self": "a closed client, no answer",
}
"""Words of a mutant's name → why no row can notice it: no answer leads there, or another guard stands behind it."""


def mutants() -> list[Mutant]:
    return [mutant for room in ROOMS for mutant in refusals(room)] + list(judgements())


# -- who notices


def row_for(mutant: Mutant) -> str | None:
    """The row that is to notice a mutant; None if it is excused. Raises LookupError for one that nobody thought of."""
    for words, row in CAUGHT_BY.items():
        if words in mutant.name:
            return row
    if any(words in mutant.name for words in EXCUSED):
        return None
    raise LookupError(f"no row is named for a new guard, {mutant.name}: add one to CAUGHT_BY")


def notices(row: str, mutant: Mutant, addresses: Addresses, folder: Path) -> bool:
    """Whether a row of the matrix fails without the guard."""
    with mutant.off():
        if row in SCENES:
            return bool(SCENES[row](CROWD, folder))
        fault = BY_NAME[row]
        return bool(run(fault, some(fault, AT_ONCE), addresses, folder).wrongs)


def line(mutant: Mutant, row: str | None, verdict: str) -> str:
    """A line of the table."""
    return f"{mutant.name[:100]:<100}  {row or '–':<40}  {verdict}"


def main() -> int:
    """Print the table; 1 if a mutant was not noticed."""
    missed = 0
    with origin_process() as addresses, tempfile.TemporaryDirectory() as folder:
        for number, mutant in enumerate(mutants()):
            row = row_for(mutant)
            is_noticed = row is None or notices(row, mutant, addresses, Path(folder) / str(number))
            missed += not is_noticed
            verdict = "excused" if row is None else "yes" if is_noticed else "NO"
            print(line(mutant, row, verdict), flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
