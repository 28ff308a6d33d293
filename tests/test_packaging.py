"""What pip installs, and what the README promises of it."""

from __future__ import annotations

import configparser
import hashlib
import json
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from servers import unavailable

from holotensor_net import config

TOP = Path(__file__).parents[1]
APACHE_2_0_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


@pytest.fixture(scope="module")
def settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(TOP / "setup.cfg")
    return parser


@pytest.fixture(scope="module")
def installed() -> metadata.Distribution:
    """The distribution that pip installed; never the ``.egg-info`` that a build may have left in the tree."""
    elsewhere = [folder for folder in sys.path if Path(folder).resolve() not in (TOP, TOP / "tests")]
    found = next(iter(metadata.distributions(name="holotensor-net", path=elsewhere)), None)
    return found or unavailable("holotensor-net is not installed: pip install '.[test]'")


def test_version_is_told_once(installed: metadata.Distribution, settings: configparser.ConfigParser) -> None:
    assert config.version() == installed.version == settings["metadata"]["version"]


def test_every_file_of_the_package_is_installed(installed: metadata.Distribution) -> None:
    if json.loads(installed.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable"):
        pytest.skip("an editable installation is the tree itself")
    tree = {path.relative_to(TOP).as_posix() for path in (TOP / "holotensor_net").rglob("*") if path.is_file()}
    tree = {name for name in tree if "__pycache__" not in name}
    assert "holotensor_net/py.typed" in tree
    assert tree <= {file.as_posix() for file in installed.files or ()}, "outdated: pip install '.[test]' again"


def test_command_is_installed(installed: metadata.Distribution) -> None:
    (command,) = installed.entry_points.select(group="console_scripts")
    assert command.name == "holotensor-net"
    assert callable(command.load())


def test_license_is_apache_2(settings: configparser.ConfigParser) -> None:
    assert settings["metadata"]["license"] == "Apache-2.0"
    assert hashlib.sha256((TOP / "LICENSE").read_bytes()).hexdigest() == APACHE_2_0_SHA256


@pytest.mark.parametrize(("name", "word"), [("demo", "holotensor"), ("test", "pytest")])
def test_readme_gives_the_command(name: str, word: str) -> None:
    block = re.search(
        rf"^\.\. run: {name}\n\n(?:\.\. code(?:-block)?)?::.*\n\n((?:[ \t]+\S.*\n)+)",
        (TOP / "README.rst").read_text(),
        re.M,
    )
    assert block, f"README.rst has no code block after a comment '.. run: {name}'"
    assert word in block[1]


def test_readme_is_restructured_text() -> None:
    try:
        from docutils.core import publish_doctree
    except ImportError:
        unavailable("docutils is not installed: pip install '.[test]'")
    strict = {"report_level": 1, "halt_level": 1, "syntax_highlight": "none", "file_insertion_enabled": False}
    publish_doctree((TOP / "README.rst").read_text(), settings_overrides=strict)
