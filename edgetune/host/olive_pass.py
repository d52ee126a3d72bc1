"""Runs one Olive pass for the CPU in a child process.

Olive reconfigures logging, prints, keeps gigabytes of PyTorch weights alive and, when a build fails, clears files out
of the hub cache; none of that may happen to the caller.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

from edgetune.config import Base, PrepareConfig, Quantiser
from edgetune.errors import EdgetuneError, MissingDependencyError, ResourceError
from edgetune.host.lean_builder import lean_builder
from edgetune.machine.exhaustion import ADVICE, lack_of_process
from edgetune.machine.threads import threads_used

_ENVIRONMENT = {
    "OLIVE_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
_SHOWN_LINES = 5


def run_olive_pass(
    name: str,
    config: Mapping[str, object],
    source: Path,
    output: Path,
    base: Base = PrepareConfig.base,
    quantiser: Quantiser = PrepareConfig.quantiser,
) -> None:
    """Run a pass; what it prints is shown only when it fails.

    Args:
        name: Olive's name of the pass.
        config: The pass's own options.
        source: A Hugging Face folder.
        output: Folder for the result; its parent must exist and lends a scratch folder.
        base: How linear layers are to be stored.
        quantiser: How those of an int4 base are rounded.

    Raises:
        MissingDependencyError: Olive is not installed.
        ResourceError: It ran out of memory or of room on a disk.
        EdgetuneError: The pass failed; the message ends with the last lines that it printed.
    """
    if find_spec("olive") is None:
        raise MissingDependencyError('Olive is not installed; this is work for a host: pip install "edgetune[host]"')
    with tempfile.TemporaryDirectory(prefix=".olive-", dir=output.parent) as scratch_name:
        scratch = Path(scratch_name).absolute()
        request = {
            "name": name,
            "config": config,
            "source": str(source.absolute()),
            "output": str(output.absolute()),
            "base": base,
            "quantiser": quantiser,
        }
        paths = os.pathsep.join(entry for entry in sys.path if entry)
        environment = {**os.environ, **_ENVIRONMENT, "HF_HUB_CACHE": str(scratch), "PYTHONPATH": paths}
        silent, held = os.pipe()  # nothing is written: it closes when this process ends, however that happens
        with os.fdopen(silent), os.fdopen(held, "w"), tempfile.TemporaryFile(dir=scratch) as log:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "edgetune.host.olive_pass", json.dumps(request), str(threads_used())],
                cwd=scratch,
                env=environment,
                stdin=silent,
                stdout=log,
                stderr=log,
                check=False,
            )
            if done.returncode:
                log.seek(0)
                said = log.read().decode(errors="replace")
                failed = f"{source}: Olive's {name} failed (exit {done.returncode}) and said last:"
                message = "\n".join([failed, *said.splitlines()[-_SHOWN_LINES:]])
                if lack := lack_of_process(done.returncode, said):
                    raise ResourceError(f"{message}\n{ADVICE[lack]}")
                raise EdgetuneError(message)


def _serve(request: str) -> None:
    from olive.hardware.accelerator import AcceleratorSpec, Device
    from olive.hardware.constants import ExecutionProvider
    from olive.model import HfModelHandler
    from olive.package_config import OlivePackageConfig
    from olive.passes.olive_pass import create_pass_from_dict

    asked = json.loads(request)
    cpu = AcceleratorSpec(Device.CPU, ExecutionProvider.CPUExecutionProvider)
    kind = OlivePackageConfig.load_default_config().import_pass_module(asked["name"])
    olive_pass = create_pass_from_dict(kind, asked["config"], disable_search=True, accelerator_spec=cpu)
    with lean_builder(asked["base"], asked["quantiser"]):
        olive_pass.run(HfModelHandler(asked["source"]), asked["output"])


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _hold_to(processors: int) -> None:
    """Its libraries have no common way to be told how many threads compute; each asks where it may run."""
    if hasattr(os, "sched_setaffinity"):
        # Any of them, so that two passes at a time do not meet on the same.
        os.sched_setaffinity(0, random.sample(sorted(os.sched_getaffinity(0)), processors))


if __name__ == "__main__":
    Thread(target=_end_with_parent, daemon=True).start()
    _hold_to(int(sys.argv[2]))
    try:
        _serve(sys.argv[1])
    except Exception as error:  # the parent shows it, without a traceback
        sys.exit(f"{type(error).__name__}: {error}")
