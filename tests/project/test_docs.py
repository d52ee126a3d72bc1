"""What the documentation says is true: links, command lines, exit codes, options, metrics, and the code in it."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from urllib.parse import unquote

import click
import pytest

from edgetune.cli import VERBS, main
from edgetune.cli.failures import INTERRUPTED, exit_code_of
from edgetune.config import ExportConfig, GenerateConfig, TrainConfig
from edgetune.data.encode import load_encoder
from edgetune.data.rows import Message
from edgetune.errors import EdgetuneError
from edgetune.exporting import export
from edgetune.formats.bundle import load_bundle
from edgetune.generation import generate
from edgetune.preview import preview
from edgetune.training import StepMetrics, TrainResult, train
from edgetune.training.record import RunRecord
from support.golden import GOLDEN
from support.repository import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for pattern in (
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "docs/**/*.md",
        "artifacts/*.md",
        "examples/**/*.md",
        "benchmarks/notebooks/*.md",
    )
    for path in ROOT.glob(pattern)
    if "node_modules" not in path.parts
)
LEAST_PAGES, LEAST_LINKS, LEAST_COMMANDS = 20, 50, 25
"""Fewer would mean that the walks below miss some."""

_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^(?: {4}|\t)(.*)$", re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
_COMMAND = re.compile(r"^\s*(?:\$ )?(?:\.venv/bin/)?edgetune (?P<arguments>.*)$")


def code_of(text: str) -> str:
    """Fenced and indented code; lines that a backslash continues are joined."""
    blocks = _FENCE.findall(text) + _INDENTED.findall(_FENCE.sub("", text))
    return re.sub(r"\\\n\s*", "", "\n".join(blocks))


def commands_of(text: str) -> Iterator[list[str]]:
    """The arguments of every `edgetune …` line, up to a comment, a pipe or a redirection."""
    for line in code_of(text).splitlines():
        if found := _COMMAND.match(line):
            lexer = shlex.shlex(found["arguments"], posix=True, punctuation_chars="|>&;")
            lexer.whitespace_split = True
            words = list(lexer)
            end = next((index for index, word in enumerate(words) if set(word) <= set("|>&;")), len(words))
            yield words[:end]


def parse(arguments: list[str]) -> None:
    """Let click read a command line without running it."""
    # A command keeps the help options of the first context that it meets.
    group = click.Context(main, info_name="edgetune", **main.context_settings)
    verb, *rest = arguments
    command = main.get_command(group, verb)
    if command is None:
        raise click.UsageError(f"no command {verb!r}")
    command.make_context(verb, rest, parent=group)


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+?)\s*$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere, or to a heading that is not there."""
    broken = []
    for target in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        place = (page.parent / path) if path else page
        if not place.exists() or (anchor and anchor not in anchors_of(place)):
            broken.append(target)
    return broken


def table_after(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    text = page.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert lines, f"no table under {heading!r} of {page}"
    return [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines[0].splitlines()[2:]]


def quoted(cells: list[str]) -> list[str]:
    return [word for cell in cells for word in re.findall(r"`([^`]+)`", cell)]


def relative_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_all_pages_are_seen() -> None:
    assert len(PAGES) >= LEAST_PAGES
    links = sum(len(_LINK.findall(page.read_text(encoding="utf-8"))) for page in PAGES)
    assert links >= LEAST_LINKS


@pytest.mark.parametrize("page", PAGES, ids=relative_name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Here I am\n[a](#here-i-am) [b](#there) [c](other.md) [d](https://example.org)\n")
    assert broken_links(page) == ["#there", "other.md"]


def test_the_index_lists_every_page() -> None:
    listed = set(_LINK.findall((DOCS / "README.md").read_text(encoding="utf-8")))
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} - {"README.md"}
    assert pages - listed == set()


def test_the_readme_places_every_room_and_top_module() -> None:
    """What lies directly under `edgetune/` and no file of a room, each with what it is."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listing = readme.partition("\n    edgetune/\n")[2].partition("\n    devices/")[0]
    named = re.findall(r"^ {6}(\S+) +\S", listing, re.MULTILINE)
    files = [path.relative_to(ROOT / "edgetune") for path in (ROOT / "edgetune").rglob("*.py")]
    top = {f"{file.parts[0]}/" if len(file.parts) > 1 else file.name for file in files}
    assert len(named) == len(listing.splitlines()) == len(set(named))
    assert set(named) == top - {"__init__.py", "__main__.py"}


def test_the_environment_has_the_extras_that_contributing_says() -> None:
    said = re.search(r"^\| `\.venv` \| `\.\[(.*?)\]`", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    installed = re.search(r"--editable '\.\[(.*?)\]'", (ROOT / "Makefile").read_text())
    assert said and installed and said[1] == installed[1]


def test_command_lines_parse() -> None:
    commands = [(page, command) for page in PAGES for command in commands_of(page.read_text(encoding="utf-8"))]
    assert len(commands) >= LEAST_COMMANDS
    wrong = []
    for page, command in commands:
        try:
            parse(command)
        except click.ClickException as error:
            wrong.append(f"{relative_name(page)}: edgetune {shlex.join(command)}: {error.format_message()}")
    assert wrong == []
    assert {command[0] for _, command in commands} == set(VERBS)


@pytest.mark.parametrize(
    "line", ["train bundle --output a", "eval bundle --data f --adaptor a", "trian bundle", "generate --prompt x"]
)
def test_a_wrong_command_line_is_found(line: str) -> None:
    [command] = commands_of(f"```\nedgetune {line}  # nobody would\n```\n")
    with pytest.raises(click.ClickException):
        parse(command)


def test_what_follows_a_command_is_left_out() -> None:
    fenced = '```\n$ edgetune preview b \\\n    --data "a b.jsonl" --json > rows.jsonl\n```\n'
    text = f"{fenced}\n    edgetune doctor | head  # all\n"
    assert list(commands_of(text)) == [["preview", "b", "--data", "a b.jsonl", "--json"], ["doctor"]]


def test_exit_codes_are_those_of_the_errors() -> None:
    rows = table_after(DOCS / "reliability.md", "Exit codes")
    said = {(name, int(row[0])) for row in rows for name in quoted(row[3:])}
    errors = {EdgetuneError, *EdgetuneError.__subclasses__()}
    assert said == {(error.__name__, exit_code_of(error)) for error in errors}
    assert {int(row[0]) for row in rows if not row[3]} == {0}


def test_exit_codes_in_other_pages_exist() -> None:
    known = {exit_code_of(error) for error in EdgetuneError.__subclasses__()} | {0, 1, INTERRUPTED}
    said = {int(code) for page in PAGES for code in re.findall(r"exit code (\d+)", page.read_text(encoding="utf-8"))}
    assert said and said <= known


def test_metrics_are_those_of_the_record(tmp_path: Path) -> None:
    with RunRecord(tmp_path, print) as record:
        values = {field.name: 1 for field in fields(StepMetrics)}
        record.write(StepMetrics(**values), validation_loss=1.0, initial_validation_loss=1.0)
    written = json.loads((tmp_path / "metrics.jsonl").read_text())
    said = [key for row in table_after(DOCS / "training.md", "metrics.jsonl") for key in quoted(row[:1])]
    assert sorted(said) == sorted(written)


@pytest.mark.parametrize(
    ("page", "verb"),
    [("training.md", "train"), ("prepare.md", "prepare"), ("mobile.md", "ship"), ("export.md", "export")],
)
def test_options_are_those_of_the_command(page: str, verb: str) -> None:
    said = [option for row in table_after(DOCS / page, "Options") for option in quoted(row[:1])]
    command = main.get_command(click.Context(main), verb)
    assert command is not None
    options = [param for param in command.params if isinstance(param, click.Option) and not param.hidden]
    assert sorted(said) == sorted(name for option in options for name in (*option.opts, *option.secondary_opts))


def python_of(page: str) -> str:
    [code] = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return str(code)


def train_golden(output: Path, config: TrainConfig) -> TrainResult:
    return train(GOLDEN / "bundle", GOLDEN / "train.jsonl", output, config)


def run_code(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a page's code where `bundle` is the golden one; returns what it prints."""
    (folder / "bundle").symlink_to(GOLDEN / "bundle", target_is_directory=True)
    (folder / "code.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(folder)
    capsys.readouterr()
    runpy.run_path(str(folder / "code.py"))
    return capsys.readouterr().out


def test_the_native_recipe_trains_as_edgetune_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = preview(GOLDEN / "bundle", GOLDEN / "train.jsonl")
    lines = [json.dumps({"line": row.line, "input_ids": row.input_ids, "labels": row.labels}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    printed = run_code(python_of("native.md"), tmp_path, monkeypatch, capsys)
    config = TrainConfig("onnxruntime", epochs=1, learning_rate=1e-3, schedule="constant", shuffle=False)
    train_golden(tmp_path / "adapter", config)
    metrics = [json.loads(line) for line in (tmp_path / "adapter" / "metrics.jsonl").read_text().splitlines()]
    expected = [number for step in metrics for number in (step["loss"], step["grad_norm"])]
    found = [float(number) for number in re.findall(r"(?:loss|norm) ([\d.]+)", printed)]
    assert len(found) == 6
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def kept_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `model` is the golden bundle's, with an adapter beside it."""
    folder = tmp_path_factory.mktemp("kept")
    train_golden(folder / "adapter", TrainConfig(epochs=60, learning_rate=1e-2))
    bundle = load_bundle(GOLDEN / "bundle")
    export(bundle, folder / "adapter", folder / "model", ExportConfig(merge=False))
    return folder


def test_the_genai_example_answers_with_and_without_adapter(
    kept_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = run_code(python_of("export.md"), kept_model, monkeypatch, capsys)
    base, adapted = re.findall(r"(?:base|adapter): *(.*)", printed)
    assert base != adapted
    for answer, folder in ((base, GOLDEN / "bundle"), (adapted, kept_model / "model")):
        assert answer.strip() == "".join(generate(folder, "Turn on the lamp.", GenerateConfig())).strip()


def test_the_genai_example_encodes_as_training_does(kept_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GenAI's own tokenizer does not: the second text is one that it reads otherwise."""
    monkeypatch.chdir(kept_model)
    Path("code.py").write_text(python_of("export.md"), encoding="utf-8")
    example = runpy.run_path("code.py")
    encoder = load_encoder(GOLDEN / "bundle", load_bundle(GOLDEN / "bundle").manifest.tokenizer)
    for text, genai_agrees in (("Turn on the lamp.", True), ("\u2003Turn on the lamp.", False)):
        message = Message("user", text)
        ids = encoder.encode_prompt([message])
        assert example["prompt_ids"](text) == ids
        assert encoder.template is not None
        prompt = encoder.template.render([message], add_generation_prompt=True)
        assert ([int(token) for token in example["template"].encode(prompt)] == ids) == genai_agrees
