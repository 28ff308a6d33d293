"""The README is a promise: its code runs, its commands parse, its tables are what the code says."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from samples import llama, write, write_index

from holotensor_net import config as settings
from holotensor_net.interfaces import cli
from holotensor_net.model.remote import RemoteModel
from holotensor_net.origin import Origin

StartOrigin = Callable[..., Origin]

README = (Path(__file__).parents[1] / "README.rst").read_text()


def blocks(language: str) -> list[str]:
    """The code blocks of a language, without their indentation."""
    found = re.findall(rf"^\.\. code-block:: {language}\n\n((?:(?:   .*)?\n)+)", README, re.M)
    return ["\n".join(line[3:] for line in block.splitlines()) for block in found]


# --- Python


class Instrumented(ast.NodeTransformer):
    """Tells ``_ran`` of every statement before it runs, and gives what a bare expression yields to ``_use``."""

    def __init__(self) -> None:
        self.lines: set[int] = set()

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            if isinstance(statements, list):
                setattr(node, name, [each for statement in statements for each in self._told(statement)])
        return node

    def _told(self, statement: ast.stmt) -> Iterator[ast.stmt]:
        self.lines.add(statement.lineno)
        yield ast.parse(f"_ran({statement.lineno})").body[0]
        if isinstance(statement, ast.Expr):
            call = ast.Call(ast.Name("_use", ast.Load()), [statement.value], [])
            statement = ast.copy_location(ast.Expr(call), statement)
        yield statement


def use(value: Any) -> None:
    """What a reader would do with it."""
    if isinstance(value, RemoteModel):
        value.close()
    elif isinstance(value, Iterator):
        assert list(value), "the example yields nothing"


def execute(source: str, names: dict[str, Any]) -> set[int]:
    """Run a block in a namespace; gives the lines that did not run."""
    instrumented = Instrumented()
    tree = ast.fix_missing_locations(instrumented.visit(ast.parse(source)))
    ran: set[int] = set()
    names.update(_ran=ran.add, _use=use)
    exec(compile(tree, "README.rst", "exec"), names)
    return instrumented.lines - ran


@pytest.fixture
def house(origin: StartOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """An origin with all that the README speaks of; gives a function that puts its address into code."""
    www = tmp_path / "www"
    model = llama(blocks=7)
    write_index(www / "llama", model)
    for file in ("llama/model.safetensors", "owner/model/resolve/main/model.safetensors"):
        write(www / file, model)
    (www / "llama" / "tokenizer.json").write_text("{}")
    (www / "parts").mkdir()
    for number in range(100):
        (www / "parts" / f"{number}.bin").write_bytes(bytes(number))
    (www / "models").symlink_to(www)
    server = origin(www)
    monkeypatch.setenv("HOLOTENSOR_ENDPOINT", server.url)

    def localised(source: str) -> str:
        source = re.sub(r"https://cdn(-\d)?\.example\.com", server.url, source)
        return source.replace("/data/cache", str(tmp_path / "cache"))

    localised.server = server  # type: ignore[attr-defined]
    localised.root = www  # type: ignore[attr-defined]
    return localised


def test_every_line_of_python_runs(house: Any, capsys: pytest.CaptureFixture[str]) -> None:
    first, opened, ordered, configured, below, computed_once = blocks("python")
    names: dict[str, Any] = {"url": f"{house.server.url}/llama/model.safetensors.index.json"}
    assert execute(house(first), names) == set()
    assert "lm_head.weight float32 (64, 64)" in capsys.readouterr().out.splitlines()
    assert execute(house(opened), names) == set()
    names["model"] = names["holotensor_net"].open_model(names["url"])
    assert execute(house(ordered), names) == set()
    names["model"].close()
    assert execute(house(configured), names) == set()
    names["model"].close()
    capsys.readouterr()
    not_run = execute(house(below), names)
    assert capsys.readouterr().out == "2\n"
    assert not_run & execute(house(below).replace("tokenizer.json", "missing.json"), names) == set()
    assert "no such object" in capsys.readouterr().out
    assert execute(computed_once, {}) == set()
    assert re.fullmatch(r"hit rate 95%, \d+\.\d\d s of work saved\n", capsys.readouterr().out)
    assert "It says ``hit rate 95%``" in README


def test_credentials_of_the_example_reach_their_endpoint(house: Any) -> None:
    names: dict[str, Any] = {}
    _, _, _, configured, *_ = blocks("python")
    execute("import holotensor_net\n" + house(configured), names)
    names["model"].close()
    assert "Bearer token" in {record.headers.get("authorization") for record in house.server.requests()}


def test_what_the_instrument_misses_is_told() -> None:
    assert execute("if 1:\n    a = 2\nelse:\n    a = 3", {}) == {4}
    assert execute("match 1:\n    case 1:\n        b = 1\n    case _:\n        b = 2", {}) == {5}
    with pytest.raises(AssertionError, match="yields nothing"):
        execute("iter([])", {})


# --- the command line


def commands() -> list[str]:
    """Every command line of ours: in blocks, and inline."""
    lines = [line.partition("#")[0] for block in blocks("bash") for line in block.splitlines()]
    lines += re.findall(r"``(holotensor-net[^`]+)``", README)
    return [part.strip() for line in lines for part in line.split("&&") if part.strip().startswith("holotensor-net")]


def test_all_commands_are_named() -> None:
    named = {command.split()[1] for command in commands()}
    assert named == {"inspect", "pull", "serve", "cache", "demo"}


@pytest.mark.parametrize("command", commands())
def test_command_parses(command: str) -> None:
    cli._parser().parse_args(shlex.split(command)[1:])


def test_actions_and_options_that_comments_name_exist() -> None:
    comments = " ".join(re.findall(r"#(.*)", "\n".join(blocks("bash"))))
    actions = re.search(r"also: ([^#]+clear)", comments)
    assert actions
    for action in actions[1].split(", "):
        cli._parser().parse_args(["cache", *action.replace("SIZE", "5GB").split()])
    assert "--include GLOB" in comments
    cli._parser().parse_args(["pull", "URL", "--include", "GLOB"])
    for command in ("inspect URL", "pull URL", "demo", "cache ls", "cache path", "cache verify", "cache clear"):
        assert cli._parser().parse_args([*command.split(), "--json"]).json


def codes(text: str) -> dict[int, str]:
    told = re.search(r"Exit codes:\s+(.+?)\.\s", text, re.S)
    assert told
    return {int(part.split()[0]): " ".join(part.split()[1:]) for part in told[1].split(",")}


def test_exit_codes_are_those_of_the_code() -> None:
    assert cli.__doc__ is not None
    of_the_code = {code for _, code in cli._EXIT_CODES} | {cli.exit_code(None), 7}
    assert codes(README).keys() == of_the_code
    assert {0: "done", **codes(README)} == codes(cli.__doc__)


# --- the environment


def test_variables_are_those_that_the_settings_read() -> None:
    read = set(re.findall(r'"((?:HOLOTENSOR|HF)_[A-Z_]+)"', Path(settings.__file__).read_text()))
    table = README[README.index("variable   ") : README.index("Explicit arguments come before")]
    assert set(re.findall(r"``((?:HOLOTENSOR|HF)_[A-Z_]+)``", table)) == read


def test_names_that_the_text_uses_exist() -> None:
    import holotensor_net

    names = re.findall(r"``([A-Z][A-Za-z]+(?:Error|Found|Timeout|Loader|Config|Endpoint))``", README)
    assert len(names) > 5
    for name in {*names} - {"FileNotFoundError", "TimeoutError"}:
        assert hasattr(holotensor_net, name), name
