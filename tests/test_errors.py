"""The tree of errors: as it is drawn, as it is caught, and as it travels between processes."""

from __future__ import annotations

import builtins
import concurrent.futures
import copy
import pickle
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holotensor_net import errors
from holotensor_net.errors import (
    CacheError,
    Cancelled,
    ChecksumMismatch,
    ConfigurationError,
    ConnectionFailed,
    DeadlineExceeded,
    FormatError,
    HttpError,
    InsufficientDisk,
    InvalidUrl,
    NetworkError,
    NotFound,
    ObjectChanged,
    OfflineError,
    ProtocolError,
    RangeNotSupported,
    RateLimited,
    RetriesExhausted,
    StalledTransfer,
    Timeout,
    redact_url,
    without_query,
)
from holotensor_net.values import RangeRequest

KINDS = [kind for name in errors.__all__ if isinstance(kind := getattr(errors, name), type)]

# Class, parent in the tree, parent among the builtins, whether another attempt can help.
TREE: list[tuple[type[NetworkError], type, type | None, bool]] = [
    (HttpError, NetworkError, None, False),
    (NotFound, HttpError, FileNotFoundError, False),
    (RateLimited, HttpError, None, True),
    (ConnectionFailed, NetworkError, ConnectionError, True),
    (Timeout, NetworkError, TimeoutError, True),
    (StalledTransfer, Timeout, TimeoutError, True),
    (DeadlineExceeded, NetworkError, TimeoutError, False),
    (ProtocolError, NetworkError, None, True),
    (RangeNotSupported, ProtocolError, None, False),
    (ObjectChanged, ProtocolError, None, False),
    (ChecksumMismatch, NetworkError, None, True),
    (RetriesExhausted, NetworkError, None, False),
    (InvalidUrl, NetworkError, ValueError, False),
    (ConfigurationError, NetworkError, ValueError, False),
    (FormatError, NetworkError, ValueError, False),
    (CacheError, NetworkError, OSError, False),
    (InsufficientDisk, CacheError, OSError, False),
    (OfflineError, NetworkError, None, False),
    (Cancelled, NetworkError, concurrent.futures.CancelledError, False),
]


@pytest.mark.parametrize(("kind", "parent", "builtin", "is_retryable"), TREE)
def test_each_error_stands_where_the_interface_says(
    kind: type[NetworkError], parent: type, builtin: type | None, is_retryable: bool
) -> None:
    assert parent in kind.__bases__
    assert builtin is None or issubclass(kind, builtin)
    assert kind().is_retryable is is_retryable


def test_the_table_of_this_test_is_complete() -> None:
    assert {row[0] for row in TREE} | {NetworkError} == set(KINDS)


def drawn_tree() -> dict[str, str]:
    """Each class of the drawing in the docstring, and its parent there."""
    parents: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    _, _, drawing = (errors.__doc__ or "").partition("::")
    for line in drawing.splitlines():
        if found := re.fullmatch(r"( *(?:│ +)*(?:[├└]── )?)([A-Z]\w+)( .*)?", line):
            depth = len(found[1])
            while path and path[-1][0] >= depth:
                path.pop()
            if path:
                parents[found[2]] = path[-1][1]
            path.append((depth, found[2]))
    return parents


def test_the_drawing_is_the_tree() -> None:
    assert drawn_tree() == {kind.__name__: parent.__name__ for kind, parent, _, _ in TREE}


def test_the_drawing_names_the_builtin_parents() -> None:
    for name, builtin in re.findall(r"─ (\w+) .*is an? (\w+)$", errors.__doc__ or "", re.MULTILINE):
        parent = getattr(builtins, builtin, None) or getattr(concurrent.futures, builtin)
        assert issubclass(getattr(errors, name), parent)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 412, 416, 501, 505])
def test_a_refusal_for_good_is_not_retryable(status: int) -> None:
    assert not HttpError(status=status).is_retryable


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_refusal_for_now_is_retryable(status: int) -> None:
    assert HttpError(status=status).is_retryable


def specimen(kind: type[NetworkError]) -> NetworkError:
    own: dict[type, dict[str, Any]] = {
        HttpError: {"status": 502},
        NotFound: {"status": 410},
        RateLimited: {"status": 503},
        ConnectionFailed: {"established": True},
        ChecksumMismatch: {"expected": "blake3:aa", "actual": "blake3:bb"},
        RetriesExhausted: {"last_error": Timeout("silent", attempts=2)},
    }
    return kind(
        message="what to do",
        url="https://user:secret@host/path?token=secret",
        byte_range=RangeRequest(5, 9),
        attempts=3,
        retry_after=1.5,
        **own.get(kind, {}),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clone", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
def test_every_error_travels_whole(kind: type[NetworkError], clone: Any) -> None:
    error = specimen(kind)
    twin = clone(error)
    assert type(twin) is kind
    assert str(twin) == str(error)
    assert twin.args == error.args
    old, new = vars(error).copy(), vars(twin).copy()
    assert repr(old.pop("last_error", None)) == repr(new.pop("last_error", None))
    assert new == old


def test_what_exhausted_the_retries_travels_along() -> None:
    twin = pickle.loads(pickle.dumps(RetriesExhausted(attempts=4, last_error=NotFound(status=410))))
    assert isinstance(twin.last_error, NotFound)
    assert (twin.attempts, twin.last_error.status) == (4, 410)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_tells_where_and_how_often_but_no_secret(kind: type[NetworkError]) -> None:
    error = specimen(kind)
    assert str(error) == "what to do [https://host/path?…, bytes 5–9, 3 attempts]"
    assert error.url == "https://host/path?…"
    assert "secret" not in repr(error) + str(vars(error)) + pickle.dumps(error).decode("latin-1")


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_without_a_word_still_says_something(kind: type[NetworkError]) -> None:
    assert str(kind())


def test_one_attempt_is_not_worth_a_word() -> None:
    assert str(NetworkError("no", url="http://h/x")) == "no [http://h/x]"


@pytest.mark.parametrize(
    ("url", "redacted"),
    [
        ("https://host/a/b", "https://host/a/b"),
        ("https://host:8443/a", "https://host:8443/a"),
        ("https://user@host/a", "https://host/a"),
        ("https://user:pass@host/a#part", "https://host/a"),
        ("https://u:p@ss@host/a", "https://host/a"),
        ("https://host/a?X-Amz-Signature=abc", "https://host/a?…"),
        ("https://host/a?", "https://host/a"),
        ("relative/path?key=1", "relative/path?…"),
        ("", ""),
        ("http://[::1", "(unreadable URL)"),
        ("http://[::1]:80/x", "http://[::1]:80/x"),
    ],
)
def test_what_may_be_secret_is_taken_out_of_a_url(url: str, redacted: str) -> None:
    assert redact_url(url) == redacted


@given(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=6), st.integers(0, 2))
def test_no_secret_survives_redaction(word: str, place: int) -> None:
    secret = f"zQ{word}Qz"
    url = (f"https://{secret}:{secret}@host/path", f"https://host/path?k={secret}", f"https://host/path#{secret}")
    assert secret not in redact_url(url[place])


def test_what_an_error_is_about_comes_first() -> None:
    assert HttpError(418).status == 418
    assert RateLimited(2.5).retry_after == 2.5
    assert RateLimited(2.5).status == 429
    mismatch = ChecksumMismatch("sha256:aa", "sha256:bb")
    assert (mismatch.expected, mismatch.actual) == ("sha256:aa", "sha256:bb")
    assert str(mismatch) == "checksum mismatch: expected sha256:aa, received sha256:bb"
    exhausted = RetriesExhausted(4, NotFound())
    assert exhausted.attempts == 4
    assert isinstance(exhausted.last_error, NotFound)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("a", "a"),
        ("a?signature=secret", "a?…"),
        ("https://user:secret@host/a@b?secret", "https://…@host/a@b?…"),
        ("https://secret@host", "https://…@host"),
        ("https://host/a@b", "https://host/a@b"),
        ("layer@0/weight", "layer@0/weight"),
    ],
)
def test_a_name_is_told_without_what_may_be_secret_in_it(name: str, kept: str) -> None:
    assert without_query(name) == kept
