from __future__ import annotations

import base64
import hashlib
import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holotensor_net.errors import ChecksumMismatch
from holotensor_net.transport.digests import Claim, Digest, announced, check_digests, linked

DATA = bytes(range(256)) * 4
OF_DATA = Digest("sha256", hashlib.sha256(DATA).digest())
LONG = Digest("sha512", hashlib.sha512(DATA).digest())


def coded(digest: Digest) -> str:
    return f":{base64.b64encode(digest.value).decode()}:"


SHA_256, SHA_512 = f"sha-256={coded(OF_DATA)}", f"sha-512={coded(LONG)}"


# -- what a field announces


@pytest.mark.parametrize(
    ("field", "digests"),
    [
        pytest.param(None, set(), id="no field"),
        pytest.param("", set(), id="nothing"),
        pytest.param(SHA_256, {OF_DATA}, id="one"),
        pytest.param(f"{SHA_256},{SHA_512}", {OF_DATA, LONG}, id="two"),
        pytest.param(f"  {SHA_512} \t,\t {SHA_256}  ", {OF_DATA, LONG}, id="with blanks"),
        pytest.param(SHA_256.replace("=:", "=:\t"), set(), id="a blank within"),
        pytest.param(SHA_256.replace("=:", "=", 1), set(), id="no colon"),
        pytest.param(f"md5=:AAAA:, {SHA_256}, unixsum=:AAAA:", {OF_DATA}, id="among others"),
        pytest.param(f'x="a, sha-512=:AAAA:", {SHA_256}', {OF_DATA}, id="behind a string with commas"),
        pytest.param(f"a, b;c=?1;d, e=(1 x :AA==:);f=@7, g=-1.5, h=() , {SHA_256}", {OF_DATA}, id="among all types"),
        pytest.param(f"{SHA_256};q=1;r", {OF_DATA}, id="with parameters"),
        pytest.param(SHA_256.rstrip("=:") + ":", {OF_DATA}, id="without padding"),
        pytest.param(f"sha-256=:AAAA:, {SHA_256}", {OF_DATA}, id="twice: the last counts"),
        pytest.param("sha-256=:AAAA:", {Digest("sha256", bytes(3))}, id="too short: it holds for nothing"),
        pytest.param("sha-256", set(), id="a boolean"),
        pytest.param('sha-256="AAAA"', set(), id="a string"),
        pytest.param("sha-256=(:AAAA:)", set(), id="a list"),
        pytest.param("SHA-256=:AAAA:", set(), id="capitals"),
        pytest.param("sha-256=:AAA*:", set(), id="no base64"),
        pytest.param("sha-256=:A:", set(), id="base64 of no length"),
        pytest.param("sha-256=:AA=A:", set(), id="padding within"),
        pytest.param(f"{SHA_256},", set(), id="a comma at the end"),
        pytest.param(f",{SHA_256}", set(), id="a comma at the beginning"),
        pytest.param(f"{SHA_256} {SHA_512}", set(), id="no comma"),
        pytest.param(f"{SHA_256}; q=ä", set(), id="letters of other scripts"),
        pytest.param(f"?!, {SHA_256}", set(), id="nonsense first"),
        pytest.param(f"{SHA_256}, nonsense!", set(), id="nonsense last"),
    ],
)
def test_a_field_announces_what_can_be_checked(field: str | None, digests: set[Digest]) -> None:
    assert announced(field) == digests


@given(st.text(max_size=300) | st.text('sha-25612=:;,()"\\ aA+/?@%', max_size=300))
def test_any_field_is_read_without_an_error(field: str) -> None:
    for digest in announced(field):
        assert digest.algorithm in ("sha256", "sha512")


@pytest.mark.parametrize(
    "unit", ["a", "a;", "a;a=", "a=(a ", "a=(", "(", '"', "a=:", ",", "a ,", " ", "\\", "%", ";a=1.1"]
)
def test_a_field_as_long_as_a_head_may_be_is_read_at_once(unit: str) -> None:
    began = time.process_time()
    for end in ("", "!", ")", '"', ":"):
        announced("sha-256=:AAAA:, a=" + unit * (60_000 // len(unit)) + end)
    assert time.process_time() - began < 2.0


def test_a_linked_tag_is_a_digest_or_none() -> None:
    tag = OF_DATA.value.hex()
    assert linked(f'"{tag}"') == linked(tag) == {OF_DATA}
    for other in (None, "", '""', f'W/"{tag}"', tag[:40], tag.upper(), tag + "0", f'"{tag}"\n'):
        assert linked(other) == set()


# -- bytes against it


def fed(claim: Claim, *blocks: bytes) -> Claim:
    for block in blocks:
        claim.feed(memoryview(block))
    return claim


@given(st.lists(st.integers(0, len(DATA)), max_size=6))
def test_a_claim_is_checked_whatever_the_blocks_are(cuts: list[int]) -> None:
    places = sorted([0, *cuts, len(DATA)])
    blocks = [DATA[low:high] for low, high in itertools.pairwise(places)]
    fed(Claim(0, len(DATA), {OF_DATA, LONG}), *blocks).check()
    with pytest.raises(ChecksumMismatch):
        fed(Claim(0, len(DATA), {OF_DATA, LONG}), *blocks, b"!").check()


def test_every_digest_of_a_claim_counts() -> None:
    wrong = Digest("sha512", bytes(64))
    with pytest.raises(ChecksumMismatch) as caught:
        fed(Claim(0, None, {OF_DATA, wrong}), DATA).check()
    assert (caught.value.expected, caught.value.actual) == (f"sha512:{'00' * 64}", f"sha512:{LONG.value.hex()}")


def test_a_claim_knows_its_digests() -> None:
    claim = Claim(0, None, {OF_DATA})
    assert OF_DATA in claim
    assert LONG not in claim


def test_bytes_that_are_all_there_are_checked_as_they_are() -> None:
    check_digests(DATA, ())
    check_digests(memoryview(DATA), {OF_DATA, LONG})
    with pytest.raises(ChecksumMismatch):
        check_digests(DATA[1:], {OF_DATA})
