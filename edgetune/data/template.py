"""A model's chat template: a conversation in, the text that the model was trained on out."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune.data.rows import Message
from edgetune.errors import DataError, EdgetuneError, IncompatibleError, ResourceError, TemplateStoppedError
from edgetune.machine.exhaustion import ADVICE, lack_of_process

TIME_LIMIT = 20.0
"""Seconds that one rendering may take."""
_WORKER = Path(__file__).with_name("template_worker.py")


class ChatTemplate:
    """Renders conversations exactly as transformers' `apply_chat_template` does, in a fenced process.

    Args:
        source: The Jinja template.
        bos_token: What the template may call `bos_token`; undefined there when None.
        eos_token: What the template may call `eos_token`.
    """

    def __init__(self, source: str, bos_token: str | None, eos_token: str) -> None:
        self._source = source
        self._tokens = {"eos_token": eos_token} | ({} if bos_token is None else {"bos_token": bos_token})
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The conversation as text.

        Args:
            messages: The turns.
            add_generation_prompt: End with what tells the model to answer.

        Raises:
            DataError: The template refuses this conversation; the one problem is its reason, without a place.
            IncompatibleError: The template is broken.
            TemplateStoppedError: It takes too much time or memory.
            ResourceError: The system ended its process, as it does when memory runs out.
        """
        turns = [
            {"role": message.role, "content": message.content}
            | ({} if message.tools is None else {"tools": message.tools})
            for message in messages
        ]
        answer = self._ask(
            {"messages": turns, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        )
        if "refused" in answer:
            raise DataError([f"the chat template refuses this conversation: {answer['refused']}"])
        return answer["text"]

    def compile(self) -> None:
        """Read the template and render nothing: enough to find one that was cut off.

        Raises:
            IncompatibleError: The template is broken.
        """
        self._started()

    def _ask(self, request: dict[str, Any]) -> dict[str, str]:
        return self._exchange(self._started(), request)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            process = _start()
            weakref.finalize(self, _stop, process)
            self._exchange(process, {"source": self._source, "variables": self._tokens})
            self._process = process
        return self._process

    def _exchange(self, process: subprocess.Popen[bytes], request: dict[str, Any]) -> dict[str, str]:
        assert process.stdin is not None and process.stdout is not None  # for mypy: both are pipes
        late = threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(TIME_LIMIT, give_up)
        timer.start()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            self._process = None
            if not late.is_set() and lack_of_process(process.wait(), "") == "memory":
                raise ResourceError(f"the chat template's process was ended by the system: {ADVICE['memory']}")
            reason = (
                f"does not finish in {TIME_LIMIT:g} seconds" if late.is_set() else "crashes or needs too much memory"
            )
            raise TemplateStoppedError(_broken(reason))
        answer: dict[str, str] = json.loads(line)
        if "broken" in answer:
            raise IncompatibleError(_broken(answer["broken"]))
        return answer


def _broken(reason: str) -> str:
    return f"the model's chat template is broken ({reason}); prepare the model again with a working chat_template.jinja"


def _start() -> subprocess.Popen[bytes]:
    # The worker finds jinja2 where this process does; -P keeps its own folder off the path.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    try:
        return subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
    except OSError as error:
        raise EdgetuneError(f"the chat template's process cannot start ({error}); check {sys.executable}") from error


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
