"""Graphs on an execution provider that is a plugin of stock ONNX Runtime."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from edgetune.errors import EdgetuneError, IncompatibleError
from edgetune.formats.bundle import Bundle
from edgetune.machine.threads import thread_count
from edgetune.runtimes.onnx_session import RECORD_PLACEMENT, partitions_of
from edgetune.runtimes.placement import Partition, Placement, named
from edgetune.runtimes.whole.compiled import Arrays
from edgetune.runtimes.whole.contexts import Context, ContextKey, ContextStore
from edgetune.runtimes.whole.ep_context import check_ep_context
from edgetune.runtimes.whole.error_line import first_line

_NO_LOG = 4
"""Fatal errors only: what a provider refuses is told by the placement."""
_ALL = 0
_REASON = re.compile(r"Node name: (.+?) Node index: \d+\s+REASON : (.+)")
_NOTICE = b"LIBNATIVE: No alternate configuration present"
"""Of the line that Qualcomm's emulation prints when it is loaded; it is no error."""
_NO_CPU = "session.disable_cpu_ep_fallback"
UNPACKED = {"session.disable_quant_qdq": "1"}
"""Configuration with which int4 weights are unpacked before the graph is divided, for who does not take them."""


@dataclass(frozen=True)
class Plugin:
    """An execution provider in a library of its own."""

    name: str
    """Such as `QNNExecutionProvider`."""
    version: str
    """Package and version."""
    hardware: Any
    """The `OrtEpDevice` that it compiles for."""
    device: str
    """What it compiles for, in words."""
    options: dict[str, str]
    """The provider's."""
    session: dict[str, str]
    """Entries of the session's configuration, beside those that every accelerator gets."""


def provider_devices(name: str, library: str) -> list[Any]:
    """The `OrtEpDevice`s of a provider.

    Args:
        name: The provider's.
        library: Path of the library that has it.

    Raises:
        EdgetuneError: The library cannot be loaded.
    """
    _register(name, library)
    return [device for device in ort.get_ep_devices() if device.ep_name == name]


@cache
def _register(name: str, library: str) -> None:
    """Load a provider's library into the process; it stays."""
    ort.disable_telemetry_events()
    try:
        ort.register_execution_provider_library(name, library)
    except Exception as error:  # the bindings raise what they like, RuntimeError mostly
        raise EdgetuneError(f"{library} cannot be loaded ({first_line(error)}); install its package again") from error


class PluginCompiler:
    """See `edgetune.runtimes.whole.compiled.Compiler`.

    Args:
        bundle: Has the graphs.
        plugin: The provider.
        require: Refuse a graph of which a node falls back to the CPU.
    """

    def __init__(self, bundle: Bundle, plugin: Plugin, *, require: bool) -> None:
        self._bundle, self._plugin, self._require = bundle, plugin, require
        self._store = ContextStore(bundle.path)

    def compile(self, role: str, batch: int, length: int) -> PluginGraph:
        """See `Compiler.compile`. A compiled context is taken where there is one, and kept where there was none.

        Raises:
            IncompatibleError: The provider takes none of the nodes, or not all where that was asked for.
            VerificationError: The compiled context would read another file.
        """
        key = ContextKey.of(
            self._bundle.manifest,
            role,
            batch,
            length,
            runtime=f"onnxruntime {ort.__version__}, {self._plugin.version}",
            device=self._plugin.device,
            options={**self._plugin.options, **self._plugin.session, "provider": self._plugin.name},
        )
        if (kept := self._store.load(key)) is not None:
            placement = self._placement(role, batch, length, kept, cached=True)
            # A driver may have changed that no version tells of.
            with suppress(IncompatibleError):
                return PluginGraph(self._open(kept), placement)
        session, context = self._build(self._bundle.file(role), batch, length, strict=self._require)
        placement = self._placement(role, batch, length, context, cached=False)
        if context.data:
            self._store.save(key, context.data, context.partitions)
        return PluginGraph(session, placement)

    def _build(self, path: Path, batch: int, length: int, *, strict: bool) -> tuple[ort.InferenceSession, Context]:
        options = self._options(strict=strict)
        options.add_free_dimension_override_by_name("batch", batch)
        options.add_free_dimension_override_by_name("sequence", length)
        with TemporaryDirectory() as scratch:
            compiled = Path(scratch) / "context.onnx"
            options.add_session_config_entry(RECORD_PLACEMENT, "1")
            options.add_session_config_entry("ep.context_enable", "1")
            options.add_session_config_entry("ep.context_embed_mode", "1")
            options.add_session_config_entry("ep.context_file_path", str(compiled))
            try:
                session = self._session(str(path), options)
            except IncompatibleError:
                if not strict:
                    raise
                # Once more with the CPU's help, to see which nodes it is that need it.
                return self._build(path, batch, length, strict=False)
            # Nothing is written where the provider took nothing; with weights outside, a context is not kept.
            alone = sorted(Path(scratch).iterdir()) == [compiled]
            data = compiled.read_bytes() if alone else b""
        partitions = partitions_of(session)
        if any(part.provider != self._plugin.name for part in partitions):
            reasons = self._reasons(path, batch, length)
            partitions = [_explained(part, reasons) for part in partitions]
        return session, Context(data, partitions)

    def _reasons(self, path: Path, batch: int, length: int) -> dict[str, str]:
        """Why the provider does not take a node, by its name: it says so in its log and nowhere else."""
        options = self._options(strict=False)
        options.log_severity_level = _ALL
        options.add_free_dimension_override_by_name("batch", batch)
        options.add_free_dimension_override_by_name("sequence", length)
        with TemporaryFile() as log:
            with _redirected(log.fileno(), 1, 2):
                ort.InferenceSession(str(path), options, enable_fallback=0)
            log.seek(0)
            text = log.read().decode(errors="replace")
        return dict(_REASON.findall(text))

    def _open(self, context: Context) -> ort.InferenceSession:
        check_ep_context(context.data)
        return self._session(context.data, self._options(strict=self._require))

    def _options(self, *, strict: bool) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.add_session_config_entry(_NO_CPU, "1" if strict else "0")
        options.log_severity_level = _NO_LOG
        options.intra_op_num_threads = thread_count() or 0
        for name, value in self._plugin.session.items():
            options.add_session_config_entry(name, value)
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_provider_for_devices([self._plugin.hardware], self._plugin.options)
        return options

    def _session(self, model: str | bytes, options: ort.SessionOptions) -> ort.InferenceSession:
        try:
            # Without this, a provider that fails is left out and everything runs on the CPU.
            with _stdout_for_results():
                session = ort.InferenceSession(model, options, enable_fallback=0)
        except Exception as error:  # the bindings' own classes, and RuntimeError
            raise IncompatibleError(
                f"{self._plugin.name} cannot compile the graph ({first_line(error)}); train with --runtime onnxruntime"
            ) from error
        session.disable_fallback()
        return session

    def _placement(self, role: str, batch: int, length: int, context: Context, *, cached: bool) -> Placement:
        name, device = self._plugin.name, self._plugin.device
        placement = Placement(role, batch, length, name, device, context.partitions, cached=cached)
        if not placement.accelerated:
            chip = self._plugin.options.get("soc_model")
            cause = "" if chip is None else f"perhaps it does not know the chip {chip} (--soc-model); "
            raise IncompatibleError(
                f"{name} takes none of the {len(placement.fallen_back)} nodes of the graph {role!r} for "
                f"{batch}x{length}; {cause}train with --runtime onnxruntime"
            )
        if self._require and placement.fallen_back:
            raise IncompatibleError(
                f"{len(placement.fallen_back)} nodes of the graph {role!r} fall back to the CPU, and --require-npu "
                f"allows none: {named(placement.fallen_back)}; leave it away to train with the CPU's help"
            )
        return placement


class PluginGraph:
    """See `edgetune.runtimes.whole.compiled.CompiledGraph`."""

    def __init__(self, session: ort.InferenceSession, placement: Placement) -> None:
        self._session = session
        self._providers = session.get_providers()
        self.placement = placement

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> list[NDArray[Any]]:
        """See `CompiledGraph.run`."""
        try:
            results: list[NDArray[Any]] = self._session.run(list(outputs), dict(inputs))
        except Exception as error:  # the bindings' own classes, and RuntimeError
            raise EdgetuneError(
                f"{self.placement.provider} failed in the graph {self.placement.graph!r} ({first_line(error)}); the "
                "step was not applied, and the CPU did not take its place; train with --runtime onnxruntime"
            ) from error
        if self._session.get_providers() != self._providers:
            raise EdgetuneError(f"ONNX Runtime left {self.placement.provider} for {self._session.get_providers()}")
        return results


@contextmanager
def _stdout_for_results() -> Iterator[None]:
    """What libraries print to stdout meanwhile goes to stderr afterwards, but for the line that says nothing.

    stderr itself stays as it is: what a library says last before it ends the process is told.
    """
    with TemporaryFile() as printed:
        try:
            with _redirected(printed.fileno(), 1):
                yield
        finally:
            printed.seek(0)
            lines = [line for line in printed if _NOTICE not in line]
            # A stderr that nobody reads any more ends nothing.
            with suppress(OSError):
                os.write(2, b"".join(lines))


@contextmanager
def _redirected(target: int, *descriptors: int) -> Iterator[None]:
    """What libraries print to these descriptors goes to another one meanwhile."""
    sys.stdout.flush()
    sys.stderr.flush()
    own = [os.dup(descriptor) for descriptor in descriptors]
    for descriptor in descriptors:
        os.dup2(target, descriptor)
    try:
        yield
    finally:
        for saved, descriptor in zip(own, descriptors, strict=True):
            os.dup2(saved, descriptor)
            os.close(saved)


def _explained(part: Partition, reasons: dict[str, str]) -> Partition:
    return replace(part, nodes=[replace(node, reason=reasons.get(node.name, "")) for node in part.nodes])
