"""The web page in a real browser: it verifies, trains as Python does, answers otherwise than before, and keeps it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from edgetune.evaluation import evaluate
from support.chromium import Chromium, needs_chromium
from support.javascript_tools import EXAMPLES, GOLDEN, lay_out_golden, needs_node, node, train_in_python

pytestmark = [needs_node, needs_chromium]

TOLERANCE = 1e-4
TAB, ENTER = "\ue004", "\ue007"
LISTEN = """
    self.heard = [];
    const Plain = Worker;
    self.Worker = class extends Plain {
        constructor(...all) { super(...all); this.addEventListener("message", ({ data }) => self.heard.push(data)); }
    };
"""
"""What the page's worker says, with all its digits, is written down on the way."""
SETTINGS = "steps=20&batch-size=3&learning-rate=0.005&schedule=constant&shuffle=false"
BEFORE = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))["answers"][0]
"""A question, and what PyTorch's base answers."""
TAUGHT = "The radio in the attic is off."
LEAST_CONTRAST = 4.5
"""Between text and what is behind it (WCAG 2.2, 1.4.3)."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    shipped = lay_out_golden(folder / "shipped")
    done = node(EXAMPLES / "web" / "build.js", shipped, folder / "site", "--rows", GOLDEN / "train.jsonl")
    assert done.returncode == 0, done.stderr
    return folder / "site"


@contextmanager
def served(site: Path, port: int = 0) -> Iterator[str]:
    command = ["node", str(EXAMPLES / "web" / "serve.js"), str(site), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with served(site) as address:
        yield address


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chromium]:
    browser = Chromium(tmp_path / "profile")
    browser.command("Page.addScriptToEvaluateOnNewDocument", source=LISTEN)
    try:
        yield browser
    finally:
        browser.close()


def open_page(browser: Chromium, address: str) -> None:
    browser.open(address)
    browser.wait("!document.getElementById('start').disabled")


def wait_for_the_end(browser: Chromium) -> None:
    browser.wait("/^(Learnt|step|row)/.test(document.getElementById('status').textContent)")
    browser.wait("!document.getElementById('start').disabled")


def text(browser: Chromium, id: str) -> str:
    return str(browser.run("return document.getElementById(arguments[0]).textContent", id))


@pytest.mark.own
def test_the_page_loses_what_python_loses(browser: Chromium, address: str, tmp_path: Path) -> None:
    open_page(browser, f"{address}?{SETTINGS}")
    assert text(browser, "model-name") == "edgetune-golden-base"
    browser.run("document.getElementById('start').click()")
    wait_for_the_end(browser)
    said = browser.run("return heard.map((data) => data.progress).filter((progress) => progress?.loss)")
    losses = [step["loss"] for step in said]
    assert len(losses) == 20
    np.testing.assert_allclose(losses, train_in_python(0.0, tmp_path / "python"), rtol=0, atol=TOLERANCE)
    # What is drawn is what was lost, and it falls.
    points = browser.run("return document.querySelector('#curve .line').getAttribute('points')")
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert len(heights) == 20
    assert np.corrcoef(heights, losses)[0, 1] < -0.9999
    assert max(losses[15:]) < min(losses[:3])
    assert re.search(rf"Loss {losses[0]:.3f} → {losses[-1]:.3f}", text(browser, "status"))
    assert browser.problems() == []


def teach_one_row(browser: Chromium) -> None:
    """As a visitor: remove all rows but the first, write another answer, train by the keyboard."""
    browser.run("[...document.querySelectorAll('.remove')].slice(1).forEach((button) => button.click())")
    browser.run(
        """const answer = document.querySelector("#rows .assistant textarea");
        answer.value = arguments[0];
        answer.dispatchEvent(new Event("input", { bubbles: true }));
        answer.focus();""",
        TAUGHT,
    )
    for _ in range(10):
        if browser.run("return document.activeElement.id") == "start":
            break
        browser.press(TAB)
    browser.press(ENTER)
    wait_for_the_end(browser)


def test_the_answer_changes_stays_and_is_forgotten(browser: Chromium, site: Path) -> None:
    with served(site) as address:
        open_page(browser, f"{address}?steps=100&batch-size=1&learning-rate=0.005&schedule=constant")
        assert browser.run("return document.getElementById('question').value") == BEFORE["prompt"]
        teach_one_row(browser)
        assert text(browser, "before") == BEFORE["text"]
        assert text(browser, "after") == TAUGHT
        assert text(browser, "after-heading") == "After 100 steps"
        assert "Kept" in text(browser, "status")
        browser.command("Page.reload", ignoreCache=True)  # past the service worker
        browser.wait("!document.getElementById('start').disabled")
    # No server any more: the page, the model and what was learnt come from the browser.
    open_page(browser, address)
    assert text(browser, "status") == "What it learnt here before is loaded."
    browser.run("document.getElementById('ask-now').click()")
    browser.wait("document.getElementById('after').textContent && !document.getElementById('ask-now').disabled")
    assert (text(browser, "before"), text(browser, "after")) == (BEFORE["text"], TAUGHT)
    browser.run("document.getElementById('forget').click()")
    browser.wait("document.getElementById('status').textContent.startsWith('Forgotten')")
    open_page(browser, address)
    assert text(browser, "status") == "Ready."


def test_training_stops_when_told_and_python_takes_what_was_learnt(
    browser: Chromium, address: str, tmp_path: Path
) -> None:
    saved = tmp_path / "adapter"
    browser.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(saved))
    open_page(browser, f"{address}?steps=100000&learning-rate=0.005")
    browser.run("document.getElementById('start').click()")
    browser.wait("heard.filter((data) => data.progress?.loss).length >= 12")
    assert browser.run("return document.activeElement.id") == "stop"
    browser.press(ENTER)
    wait_for_the_end(browser)
    losses = browser.run("return heard.map((data) => data.progress?.loss).filter(Boolean)")
    assert text(browser, "status").startswith(f"Learnt in {len(losses)} steps.")
    assert len(losses) < 1000
    assert browser.run("return document.activeElement.id") == "start"
    browser.run("document.getElementById('save').click()")
    until = time.monotonic() + 30
    while {path.name for path in saved.glob("*")} != {"adapter_model.safetensors", "adapter_config.json"}:
        assert time.monotonic() < until, list(saved.glob("*"))
        time.sleep(0.1)
    before, after = (evaluate(GOLDEN / "bundle", GOLDEN / "train.jsonl", adapter=path).loss for path in (None, saved))
    assert after < 0.8 * before


def test_a_row_that_cannot_be_trained_is_marked_and_named(browser: Chromium, address: str) -> None:
    open_page(browser, f"{address}?steps=1")
    browser.run("document.getElementById('add-row').click()")
    browser.wait("document.querySelectorAll('.row.bad').length === 1")
    browser.run("document.getElementById('start').click()")
    wait_for_the_end(browser)
    assert text(browser, "status") == "row 11: an answer is empty"


def test_a_changed_bit_is_found(browser: Chromium, site: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "site"
    shutil.copytree(site, damaged)
    weights = damaged / "target" / "model" / "weights-00.bin"
    changed = bytearray(weights.read_bytes())
    changed[1000] ^= 1
    weights.write_bytes(changed)
    with served(damaged) as address:
        browser.open(address)
        browser.wait("document.getElementById('status').classList.contains('bad')")
        assert text(browser, "status").startswith("model/weights-00.bin is not what target.json says")
        assert browser.run("return document.getElementById('start').disabled")


def test_nothing_but_its_own_server_is_asked(browser: Chromium, address: str) -> None:
    open_page(browser, address)
    names = browser.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert len(names) >= 5
    assert all(name.startswith(address) for name in names)
    browser.run(
        """self.blocked = [];
        document.addEventListener("securitypolicyviolation", (event) => blocked.push(event.effectiveDirective));
        fetch("https://example.org/").catch(() => {});
        const script = document.createElement("script");
        script.textContent = "self.wasRun = true";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", "<p style='color: red'>");"""
    )
    browser.wait("blocked.length >= 3")
    assert set(browser.run("return blocked")) == {"connect-src", "script-src-elem", "style-src-attr"}
    assert browser.run("return self.wasRun") is None


def contrasts(browser: Chromium) -> dict[str, float]:
    """Contrast of every piece of text with the first opaque colour behind it."""
    found: dict[str, float] = browser.run(
        r"""
        const parse = (colour) => colour.match(/[\d.]+/g).map(Number);
        const light = ([red, green, blue]) => [red, green, blue]
            .map((value) => value / 255)
            .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
            .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
        const behind = (element) => {
            for (; element; element = element.parentElement) {
                const colour = parse(getComputedStyle(element).backgroundColor);
                if (colour.length === 3 || colour[3] === 1) return colour;
            }
            return [255, 255, 255];
        };
        const found = {};
        for (const element of document.querySelectorAll(arguments[0].join())) {
            if (element.disabled || !element.checkVisibility()) continue;
            const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))];
            const name = `${element.tagName} ${element.id} ${element.className}`;
            found[name] = Math.min(found[name] ?? 99, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
        }
        return found;""",
        ["h1", "h2", "h3", "p", "li", "label", "span", "button", "input", "textarea", "summary"],
    )
    return found


def test_it_is_readable_on_a_phone_in_light_and_dark(browser: Chromium, address: str, tmp_path: Path) -> None:
    browser.command("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    pictures = []
    for scheme in ("light", "dark"):
        browser.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        open_page(browser, address)
        browser.run("document.querySelector('details').open = true; document.getElementById('show-tokens').click()")
        browser.wait("document.querySelector('.token.trained')")
        assert browser.run("return document.documentElement.scrollWidth") == 360
        small = browser.run(
            """return [...document.querySelectorAll("button, .button, input, select")]
            .filter((control) => control.checkVisibility() && !["checkbox", "file"].includes(control.type))
            .map((control) => control.getBoundingClientRect())
            .filter((box) => Math.min(box.width, box.height) < 24).length"""
        )
        assert small == 0
        weak = {name: value for name, value in contrasts(browser).items() if value < LEAST_CONTRAST}
        assert weak == {}, scheme
        browser.screenshot(tmp_path / f"{scheme}.png")
        pictures.append((tmp_path / f"{scheme}.png").read_bytes())
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("path", ["..%2f..%2fpackage.json", "%2e%2e/target.json", "target", "%", "a%00b"])
def test_the_server_stays_in_its_folder(address: str, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address}{path}")
    assert refused.value.code == 404
    refused.value.close()
    with urllib.request.urlopen(address) as response:
        assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
