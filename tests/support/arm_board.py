"""An emulated Arm board: Debian's arm64 Python and the device install's own aarch64 wheels, under qemu-aarch64.

The emulation is of the processor: every instruction is that of a Cortex-A76 (a Raspberry Pi 5's), system calls are the
host's. So what is computed is what such a processor computes, and how long it takes says nothing. Everything lies in
one folder; nothing is installed on the host, and no root is needed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from support.debian_packages import NoPackagesError, download, unpack
from support.repository import ROOT

PINS = ROOT / "edgetune" / "ship" / "device_requirements.txt"
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
"""Tags of wheels that Debian 12's C library runs, as pip wants them: each by itself."""
_PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6")
"""The interpreter, its standard library, and what compiled wheels link to."""
_EMULATOR = "qemu-aarch64-static"
_CPU = "cortex-a76"
_CORES = 2
_CPUINFO = """processor\t: {core}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

"""
"""Of a Cortex-A76. QEMU shows a program the host's file: then onnxruntime from 1.28 on, which asks it for the caches,
crashes while it is imported."""


class NoBoardError(Exception):
    """This machine cannot emulate one; the message says why."""


@dataclass(frozen=True)
class Said:
    """What a program said."""

    code: int
    out: str
    err: str


class Board:
    """The emulated board in a folder, made on first use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._root, self._host = folder / "root", folder / "host"
        self.python = self._root / "usr" / "bin" / "python3"
        """Starts the emulated interpreter: a script, so that edgetune can start processes of its own."""

    def make(self) -> None:
        """Download, unpack and install.

        Raises:
            NoBoardError: This is no x86-64 Linux with apt, or apt has no arm64 packages.
        """
        if sys.platform != "linux" or platform.machine() != "x86_64":
            raise NoBoardError(f"this is {platform.machine()} {sys.platform}, the emulator is for x86-64 Linux")
        made_of = self._folder / "made-of"
        state = sha256(PINS.read_bytes() + Path(__file__).read_bytes()).hexdigest()
        if not made_of.is_file() or made_of.read_text() != state:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._root.mkdir(parents=True)
            self._unpack_packages()
            self._describe_processor()
            self._write_launcher()
            self._install("--no-deps", "--requirement", str(PINS))
            made_of.write_text(state)
        # Built here: a wheel of Python alone is the same everywhere.
        _call([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(self._folder), str(ROOT)])
        self._install("--no-deps", str(next(self._folder.glob("edgetune-*.whl"))))
        # Python compiles what it imports for the first time; under emulation that may take longer than a template may.
        self.run("-c", "import edgetune.data.template_worker, edgetune.cli.train, edgetune.training, onnxruntime, rich")

    def run(self, *arguments: object) -> Said:
        """Run the emulated interpreter."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        done = subprocess.run(
            [str(self.python), *map(str, arguments)],
            capture_output=True, text=True, check=False, env=environment, timeout=600,
        )  # fmt: skip
        return Said(done.returncode, done.stdout, done.stderr)

    @cached_property
    def version(self) -> str:
        """Of the emulated interpreter, such as `3.11`."""
        (interpreter,) = self._root.glob("usr/bin/python3.*[0-9]")
        return interpreter.name.removeprefix("python")

    def _unpack_packages(self) -> None:
        """Debian's arm64 packages, and the emulator if this machine has none."""
        emulator = [] if shutil.which(_EMULATOR) else ["qemu-user-static:amd64"]
        try:
            packages = download(self._folder / "apt", [*_PACKAGES, *emulator], architecture="arm64")
        except NoPackagesError as error:
            raise NoBoardError(str(error)) from error
        for package in packages:
            unpack(package, self._host if "_amd64" in package.name else self._root)

    def _describe_processor(self) -> None:
        """QEMU shows a program these files instead of the host's."""
        cores = self._root / "sys" / "devices" / "system" / "cpu"
        cores.mkdir(parents=True)
        for name in ("possible", "present", "online"):
            (cores / name).write_text(f"0-{_CORES - 1}\n")
        (cores / "kernel_max").write_text(f"{_CORES - 1}\n")
        (self._root / "proc").mkdir(exist_ok=True)
        (self._root / "proc" / "cpuinfo").write_text("".join(_CPUINFO.format(core=core) for core in range(_CORES)))

    def _write_launcher(self) -> None:
        qemu = shutil.which(_EMULATOR) or self._host / "usr" / "bin" / _EMULATOR
        interpreter = self._root / "usr" / "bin" / f"python{self.version}"
        self.python.unlink(missing_ok=True)
        self.python.write_text(f'#!/bin/sh\nexec "{qemu}" -cpu {_CPU} -0 "$0" -L "{self._root}" "{interpreter}" "$@"\n')
        self.python.chmod(0o755)

    def _install(self, *arguments: str) -> None:
        packages = self._root / "usr" / "local" / "lib" / f"python{self.version}" / "dist-packages"
        pip = [*pip_for_arm("install", self.version), "--target", str(packages), "--no-compile", "--upgrade"]
        _call([*pip, *arguments])


def pip_for_arm(verb: str, version: str) -> list[str]:
    """The beginning of a pip command that takes wheels for aarch64 and this version of CPython, and nothing else."""
    options = ["--quiet", "--disable-pip-version-check", "--only-binary=:all:", "--implementation", "cp"]
    options += [f"--platform={platform}" for platform in PLATFORMS]
    return [sys.executable, "-m", "pip", verb, *options, "--python-version", version]


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} …: {done.stderr[-2000:]}")
