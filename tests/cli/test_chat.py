"""`edgetune chat` as a program: lines through a pipe, commands, signals, and a terminal."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import edgetune
from edgetune.config import ChatConfig
from edgetune.generation.chat import Chat
from support.golden import BUNDLE

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(edgetune.__file__).parents[1]), "TERM": "dumb"}
COMMAND = [sys.executable, "-m", "edgetune", "chat", str(BUNDLE), "--max-new-tokens", "16"]


def talk(lines: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *options], input=lines, env=ENVIRONMENT, capture_output=True, text=True, encoding="utf-8"
    )


def answers(*turns: str) -> list[str]:
    chat = Chat(BUNDLE, ChatConfig(max_new_tokens=16))
    return ["".join(chat.answer(turn)) for turn in turns]


def test_lines_of_a_pipe_are_turns() -> None:
    done = talk("Turn on the lamp.\n\n  Is it on?  \n//help\nlast line without an end")
    assert done.returncode == 0
    assert done.stdout == "".join(
        f"{each}\n" for each in answers("Turn on the lamp.", "Is it on?", "/help", "last line without an end")
    )
    assert done.stderr == ""


def test_commands_do_what_the_help_says() -> None:
    done = talk("/help\n/adapter\nhello\n/reset\nhello\n/adapter kitchen\n/rezet\n/exit\nnobody hears this\n")
    assert done.returncode == 0
    assert done.stdout == "".join(f"{each}\n" for each in answers("hello") * 2)
    for line in (
        "/reset         forget all that was said",
        "base answers; there are base",
        "all is forgotten",
        "has no adapters beside its base, so there is no 'kitchen' to choose",
        "no such command '/rezet'; did you mean '/reset'?",
    ):
        assert line in done.stderr


def test_a_line_that_is_too_long_does_not_end_the_chat() -> None:
    done = talk("lamp " * 2000 + "\nhello\n")
    assert done.returncode == 0
    assert "shorten it" in done.stderr
    assert done.stdout == f"{answers('hello')[0]}\n"


def test_what_is_not_utf_8_is_a_usage_error() -> None:
    done = subprocess.run(COMMAND, input=b"caf\xe9\n", env={**ENVIRONMENT, "PYTHONUTF8": "1"}, capture_output=True)
    assert done.returncode in (0, 2)
    assert b"internal error" not in done.stderr


INTERRUPTING = """
import os, signal, sys
from edgetune.cli import main
write, times = sys.stdout.write, int(os.environ["TIMES"])
def interrupting(text):
    global times
    if times and text.strip():
        times -= 1
        signal.raise_signal(signal.SIGINT)
    return write(text)
sys.stdout.write = interrupting
main(["chat", sys.argv[1], "--max-new-tokens", "16"])
"""
"""As Ctrl-C does, while the first pieces are shown."""


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_stops_the_answer_and_twice_the_chat(times: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTING, str(BUNDLE)], input="Turn on the lamp.\n/reset\nhello\n",
        env={**ENVIRONMENT, "TIMES": str(times)}, capture_output=True, text=True,
    )  # fmt: skip
    if times == 2:
        assert (done.returncode, done.stderr) == (130, "error: interrupted\n")
        return
    assert done.returncode == 0
    whole, other = answers("Turn on the lamp.")[0], answers("hello")[0]
    stopped, rest = done.stdout.split(" …\n")
    assert stopped and whole.startswith(stopped) and stopped != whole
    assert rest == f"{other}\n"


def test_sigterm_ends_it() -> None:
    with subprocess.Popen(
        COMMAND, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("hello\n")
        process.stdin.flush()
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 130


def read_until(terminal: int, text: str) -> str:
    seen, begin = "", time.monotonic()
    while text not in seen:
        assert time.monotonic() - begin < 60, seen
        seen += os.read(terminal, 1000).decode(errors="replace")
    return seen


def test_on_a_terminal_ctrl_c_discards_a_line_and_ctrl_d_ends() -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        COMMAND, env=ENVIRONMENT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        assert "base answers" in read_until(ours, "> ")
        os.write(ours, b"half a li")
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        read_until(ours, "> ")
        os.write(ours, b"hello\n")
        assert answers("hello")[0].split("\n")[0][:8] in read_until(ours, "\n> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    os.close(ours)
    os.close(theirs)
