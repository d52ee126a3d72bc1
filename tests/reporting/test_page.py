"""The page in a real browser: curves are there, nothing is fetched, nothing is said on the console, all is escaped."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from edgetune.errors import ResourceError
from edgetune.formats.adapter import MANIFEST
from edgetune.formats.bundle import load_manifest
from edgetune.formats.manifest import AdapterManifest
from edgetune.reporting.answers import Answers
from edgetune.reporting.page import MARK, MOST_BYTES, duration_words, page_of
from edgetune.reporting.runs import Run, read_run
from support.chromium import Chromium, needs_chromium
from support.described_folders import BASE
from support.written_runs import PROVENANCE, lines_of_run, seal_again, write_run

HOSTILE = "<script>window.hit=1</script><img src=x onerror=window.hit=1>\"'&</title></style>\u202e\x07"
"""In every text of an adapter: markup, quotes, what turns directions, and a bell."""
LEAST_CONTRAST = 4.5
"""Between text and what is behind it (WCAG 2.2, 1.4.3)."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    try:
        yield browser
    finally:
        browser.close()


class Server:
    """Serves one page, and writes down what is asked for."""

    def __init__(self, page: bytes) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(page)

            def log_message(self, *arguments: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}/report.html"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def two_runs(folder: Path) -> list[Run]:
    other = {**PROVENANCE, "options": PROVENANCE["options"].replace("0.0002", "0.005")}
    return [
        read_run(write_run(folder / "slow", lines_of_run(40, 6.0))),
        read_run(write_run(folder / "fast", lines_of_run(60, 4.0), other)),
    ]


def shown(browser: Chromium, page: bytes) -> str:
    """The text of a page that is opened, which asked for nothing else and complained of nothing."""
    server = Server(page)
    try:
        browser.open(server.address)
        assert browser.problems() == []
        assert server.asked == ["/report.html"]
        assert browser.run("return performance.getEntriesByType('resource').length") == 0
        return str(browser.run("return document.body.innerText"))
    finally:
        server.close()


def answers_of(count: int, length: int = 10) -> list[Answers]:
    return [Answers(f"prompt {number}", "b" * length, "a" * length) for number in range(count)]


@needs_chromium
def test_two_runs_lie_over_each_other_and_what_differs_is_marked(browser: Chromium, tmp_path: Path) -> None:
    page = page_of(two_runs(tmp_path), [Answers("Which valve?", "No idea.", "Valve 3.")])
    assert len(page) < MOST_BYTES / 10
    text = shown(browser, page)
    titles = browser.run("return [...document.querySelectorAll('figcaption')].map(e => e.firstChild.data.trim())")
    assert titles == ["Loss", "Training loss by time", "Learning rate", "Gradient norm", "Memory", "Speed"]
    drawn = browser.run(
        "return [...document.querySelectorAll('svg.plot')].map(svg => [...svg.querySelectorAll('path.line')].map(path "
        "=> [path.getTotalLength(), getComputedStyle(path).stroke]))"
    )
    assert [len(lines) for lines in drawn] == [4, 2, 2, 2, 4, 2]
    for lines in drawn:
        assert all(length > 100 for length, _ in lines)
        assert len({colour for _, colour in lines}) == 2, "each run has its own colour"
    differs = browser.run("return [...document.querySelectorAll('tr.differs th')].map(e => e.innerText)")
    assert {"learning-rate (differs)", "steps (differs)"} <= set(differs)
    assert not {"runtime (differs)", "batch-size (differs)", "bundle (differs)"} & set(differs)
    for said in ("Which valve?", "No idea.", "Valve 3.", "Kettle Board 3, aarch64, linux", "12" * 32, "400 tokens/s"):
        assert said in text
    assert "learning-rate (differs)\t0.0002\t0.005" in text


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(browser: Chromium, tmp_path: Path, scheme: str) -> None:
    browser.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    runs = [replace(run, stopped="the loss of step 41 is not finite") for run in two_runs(tmp_path)]
    shown(browser, page_of(runs, answers_of(2)))
    contrasts = browser.run(
        """
        const level = (colour) => {
            const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => {
                const share = part / 255;
                return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
        };
        const behind = (element) => {
            for (let at = element; at; at = at.parentElement) {
                const colour = getComputedStyle(at).backgroundColor;
                if (colour !== "rgba(0, 0, 0, 0)") return level(colour);
            }
        };
        const against = (one, two) => (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
        const text = [...document.querySelectorAll("h1,h2,th,td,figcaption,span,summary,p,footer,svg text")];
        const lines = [...document.querySelectorAll("path.line")];
        return [
            Math.min(...text.map((each) => {
                const style = getComputedStyle(each);
                return against(level(each.tagName === "text" ? style.fill : style.color), behind(each));
            })),
            Math.min(...lines.map((each) => against(level(getComputedStyle(each).stroke), behind(each)))),
            level(getComputedStyle(document.body).backgroundColor),
        ];
        """
    )
    assert min(contrasts[:2]) >= LEAST_CONTRAST
    assert (contrasts[2] < 0.1) == (scheme == "dark")


@needs_chromium
def test_who_does_not_see_is_told_as_much(browser: Chromium, tmp_path: Path) -> None:
    shown(browser, page_of(two_runs(tmp_path)))
    tree = browser.command("Accessibility.getFullAXTree")["nodes"]
    named = [
        (node["role"]["value"], node["name"]["value"], node.get("description", {}).get("value", ""))
        for node in tree
        if "name" in node and "role" in node
    ]
    images = [(name, description) for role, name, description in named if role in ("image", "img")]
    assert len(images) == 6
    assert any("Loss" in name and "slow, training: from 5.7" in f"{name} {told}" for name, told in images)
    assert browser.run("return document.documentElement.lang") == "en"
    assert browser.run("return document.querySelectorAll('th:not([scope])').length") == 0


def with_hostile(value: Any, hostile: str) -> Any:
    """A manifest whose texts are hostile, but for hashes, paths and what decides how it is read."""
    if is_dataclass(value) and not isinstance(value, type):
        kept = {"format", "files", "manifest_sha256", "sha256", "chat_template_sha256"}
        changed = {
            each.name: with_hostile(getattr(value, each.name), hostile)
            for each in fields(value)
            if each.name not in kept
        }
        return replace(value, **changed)
    if isinstance(value, dict):
        return {f"{name}{hostile}" if name not in PROVENANCE else name: with_hostile(each, hostile)
                for name, each in value.items()}  # fmt: skip
    if isinstance(value, list):
        return [with_hostile(each, hostile) for each in value]
    return hostile if isinstance(value, str) else value


@needs_chromium
def test_no_text_of_an_adapter_becomes_markup(browser: Chromium, tmp_path: Path) -> None:
    options = {"method": HOSTILE, HOSTILE: HOSTILE, "steps": [HOSTILE]}
    provenance = {**PROVENANCE, "stopped": HOSTILE}
    folder = write_run(tmp_path / "<script>window.hit=1<\u2215script>", lines_of_run(), provenance)
    manifest = load_manifest(folder / MANIFEST, AdapterManifest)
    hostile: AdapterManifest = with_hostile(manifest, HOSTILE)
    assert hostile.base.name == HOSTILE != manifest.base.name
    told = {**hostile.provenance, "options": json.dumps(options)}
    seal_again(folder, hostile, provenance=told)
    runs = [read_run(folder), read_run(write_run(tmp_path / "other", lines_of_run()))]
    text = shown(browser, page_of(runs, [Answers(HOSTILE, HOSTILE, HOSTILE)]))
    assert browser.run("return window.hit === undefined")
    assert browser.run("return document.querySelectorAll('script, img').length") == 0
    visible = HOSTILE.replace("\u202e", "\\u202e").replace("\x07", "\\x07")
    # The name, the base, why it stopped, each answer, options and what executed it.
    assert text.count(visible) > 10
    assert "\u202e" not in text


def test_no_script_and_no_address_is_in_a_page(tmp_path: Path) -> None:
    page = page_of(two_runs(tmp_path)).decode()
    assert page.encode()[:100].count(MARK) == 1
    assert not re.search(r"<script|javascript:|https?:|url\(|@import|src=", page)


def test_a_page_stays_small_however_long_the_runs_are(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", lines_of_run(steps=20_000)))
    runs = [replace(run, name=f"run {number}") for number in range(8)]
    assert len(page_of(runs)) < MOST_BYTES
    many = page_of(runs, answers_of(150, length=5000)).decode()
    assert len(many.encode()) < MOST_BYTES
    assert "50 more are not shown" in many
    assert "a" * 2000 + "…" in many and "a" * 2001 not in many


def test_a_page_that_cannot_be_small_is_refused(tmp_path: Path) -> None:
    provenance = {**PROVENANCE, "options": "{" + ",".join(f'"{n}": "{"&" * 400}"' for n in range(200)) + "}"}
    run = read_run(write_run(tmp_path / "run", lines_of_run(), provenance))
    with pytest.raises(ResourceError, match="give fewer adapters or answers"):
        page_of([replace(run, name=f"run {number}") for number in range(8)])


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / place / "adapter", lines_of_run(4))) for place in ("a", "b")]
    page = page_of(runs).decode()
    assert f"{tmp_path}/a/adapter, training" in page and f"{tmp_path}/b/adapter, training" in page
    assert str(tmp_path) not in page_of(runs[:1]).decode()


def test_half_a_character_in_a_name_is_written_visibly(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", lines_of_run(4), base=BASE))
    assert rb"\ud800" in page_of([replace(run, name="\ud800")])


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (3661.2, "1:01:01"), (1e300, "?"), (-1.0, "?")]
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert duration_words(seconds) == words
