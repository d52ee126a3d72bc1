"""How edgetune opens graphs on stock ONNX Runtime: quietly, without telemetry, on the CPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.errors import MissingDependencyError
from edgetune.machine.threads import thread_count
from edgetune.runtimes.placement import Node, Partition

if TYPE_CHECKING:
    import onnxruntime

RECORD_PLACEMENT = "session.record_ep_graph_assignment_info"
"""Entry of a session's configuration, for `partitions_of`."""
_ERRORS_ONLY = 3
_AS_REQUESTED = 1


def open_graph(
    model: Path | bytes,
    weights_folder: Path | None = None,
    *,
    exact_int8: bool = False,
    provider: tuple[str, dict[str, str]] | None = None,
    record_placement: bool = False,
) -> onnxruntime.InferenceSession:
    """Load a graph.

    Args:
        model: The file, or the graph itself.
        weights_folder: Where the external data of a graph lies that is not beside it.
        exact_int8: Let no 8-bit product saturate, as it otherwise may on older x86 processors.
        provider: An execution provider and its options, asked before the CPU.
        record_placement: Let `partitions_of` say where the nodes run; with a provider it always can.

    Raises:
        MissingDependencyError: The provider could not be used, or takes no node.
    """
    import onnxruntime

    _share_memory()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = thread_count() or 0
    # Threads of one graph that wait for more work would take the processor from the next graph.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.use_env_allocators", "1")
    # A plan for the memory of one shape is not worth what it holds: batches differ in shape.
    options.enable_mem_pattern = False
    # Masked attention scores leave denormal numbers, with which processors are slow.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if weights_folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(weights_folder.absolute())
        )
    if exact_int8:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if record_placement or provider is not None:
        options.add_session_config_entry(RECORD_PLACEMENT, "1")
    asked = [] if provider is None else [provider]
    session = onnxruntime.InferenceSession(model, options, providers=[*asked, "CPUExecutionProvider"])
    if provider is not None:
        _require_use(session, *provider)
    return session


def partitions_of(session: onnxruntime.InferenceSession) -> list[Partition]:
    """Which provider executes which nodes of a graph that was opened with `RECORD_PLACEMENT`.

    Returns:
        Nothing where onnxruntime is too old to say it; a vendor's often is.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return []
    return [
        Partition(part.ep_name, [Node(node.op_type, node.name) for node in part.get_nodes()])
        for part in session.get_provider_graph_assignment_info()
    ]


def _require_use(session: onnxruntime.InferenceSession, name: str, options: dict[str, str]) -> None:
    """See to it that a provider is used: without it, onnxruntime runs everything on the CPU and says nothing."""
    if name not in session.get_providers():
        raise MissingDependencyError(f"{name} is installed but cannot be used with {options}; see its log")
    partitions = partitions_of(session)
    if partitions and all(part.provider != name for part in partitions):
        count = sum(len(part.nodes) for part in partitions)
        raise MissingDependencyError(
            f"{name} is installed but takes none of the graph's {count} nodes with {options}; see its log, or use an "
            "onnxruntime without it to train on the CPU"
        )


@cache
def _share_memory() -> None:
    """One allocator for all graphs of the process: each of its own would hold what its graph once needed."""
    import onnxruntime as ort

    ort.disable_telemetry_events()
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"arena_extend_strategy": _AS_REQUESTED}))
