"""Qualcomm's Hexagon NPU: the whole step through the `onnxruntime-qnn` plugin, in float16.

Where there is no such NPU, the plugin's Linux x86-64 wheel compiles for one and emulates it: the same compiler and the
same numbers, at the speed of an emulation.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from edgetune.bundle import Bundle
from edgetune.errors import IncompatibleError, MissingDependencyError, UsageError
from edgetune.execution import INT8_LOSS, INT8_STEP, WHOLE_STEP, Accelerator, ExecutionPlan
from edgetune.placement import Placement
from edgetune.runtimes import Abilities, Forward, OptimizerConfig, Parameters, Session

if TYPE_CHECKING:
    from edgetune.runtimes.accelerator.graphs import AcceleratorGraphs
    from edgetune.runtimes.accelerator.plugin import Plugin, PluginCompiler

PROVIDER = "QNNExecutionProvider"
_PACKAGE = "onnxruntime-qnn"
_SNAPDRAGON_X_ELITE = 60


def abilities() -> Abilities:
    """See `edgetune.runtimes.Runtime.abilities`.

    Raises:
        MissingDependencyError: The package `onnxruntime-qnn` is not installed.
    """
    _require_package()
    # On x86-64 the package has the emulation, and no computer with such a processor has the NPU.
    emulation = platform.machine().lower() in ("x86_64", "amd64")
    return Abilities(whole=False, exact=None, int8=None, preferred=False, forward=True, emulation=emulation)


def version() -> str:
    """See `edgetune.runtimes.Runtime.version`."""
    return f"onnxruntime {ort.__version__}, {_package_version()}"


@contextmanager
def open_session(
    bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig, plan: ExecutionPlan = WHOLE_STEP
) -> Iterator[Session]:
    """Load the plugin; see `edgetune.runtimes.Runtime`. Each shape is compiled when its first batch comes.

    Raises:
        IncompatibleError: There is neither an NPU nor the plugin's emulation of one.
        MissingDependencyError: The package `onnxruntime-qnn` is not installed.
        UsageError: The plan is not the whole step.
    """
    from edgetune.runtimes.accelerator.session import AcceleratorSession

    yield AcceleratorSession(bundle, parameters, optimizer, _graphs(bundle, plan))


@contextmanager
def open_forward(bundle: Bundle, parameters: Parameters, plan: ExecutionPlan) -> Iterator[Forward]:
    """Load the plugin for the forward pass alone; see `edgetune.runtimes.Runtime`.

    Raises:
        IncompatibleError: There is neither an NPU nor the plugin's emulation of one.
        MissingDependencyError: The package `onnxruntime-qnn` is not installed.
        UsageError: The plan is not the whole step.
    """
    from edgetune.runtimes.accelerator.session import AcceleratorForward

    yield AcceleratorForward(parameters, _graphs(bundle, plan))


def _graphs(bundle: Bundle, plan: ExecutionPlan) -> AcceleratorGraphs:
    if plan.form != "whole":
        raise UsageError("the qnn runtime takes no plan but `whole`; use --runtime onnxruntime for the others")
    from edgetune.runtimes.accelerator.graphs import AcceleratorGraphs

    return AcceleratorGraphs(_compiler(bundle, plan), *_roles(plan))


def place(bundle: Bundle, plan: ExecutionPlan, batch: int, length: int) -> list[Placement]:
    """See `edgetune.runtimes.PlacingRuntime.place`."""
    compiler = _compiler(bundle, plan)
    return [compiler.compile(role, batch, length).placement for role in _roles(plan)]


def _roles(plan: ExecutionPlan) -> tuple[str, str]:
    """The graphs with the loss and the gradients, and with the loss alone."""
    return (INT8_STEP, INT8_LOSS) if plan.products == "int8" else ("step", "loss")


def _compiler(bundle: Bundle, plan: ExecutionPlan) -> PluginCompiler:
    from edgetune.runtimes.accelerator.plugin import PluginCompiler

    accelerator = plan.accelerator or Accelerator()
    plugin = _plugin(accelerator)
    if plan.products == "int8":
        plugin = replace(plugin, session={})
    return PluginCompiler(bundle, plugin, require=accelerator.require)


def _plugin(accelerator: Accelerator) -> Plugin:
    from edgetune.runtimes.accelerator.plugin import Plugin, provider_devices

    package = _package()
    options = {"backend_path": package.get_qnn_htp_path()}
    devices = provider_devices(PROVIDER, package.get_library_path())
    if not devices:
        raise IncompatibleError(
            f"{PROVIDER} finds no NPU and no emulator here; install the NPU's driver, or use --runtime onnxruntime"
        )
    device = "HTP"
    if devices[0].device.type != ort.OrtHardwareDeviceType.NPU:
        # Without a model to emulate, the compiler makes float32 code, which lacks Gather and Where.
        soc_model = accelerator.soc_model or _SNAPDRAGON_X_ELITE
        options["soc_model"] = str(soc_model)
        device = f"HTP emulation, soc {soc_model}"
    # The int4 weights of a bundle are unpacked before the graph is divided: the HTP has no DequantizeLinear in blocks.
    session = {"session.disable_quant_qdq": "1"}
    return Plugin(PROVIDER, package.get_library_path(), _package_version(), device, options, session)


def _package() -> Any:
    """The plugin's Python package: it knows where its libraries are.

    Raises:
        MissingDependencyError: It is not installed.
    """
    _require_package()
    import onnxruntime_qnn

    return onnxruntime_qnn


def _require_package() -> None:
    if find_spec("onnxruntime_qnn") is None:
        raise MissingDependencyError(f'{_PACKAGE} is not installed; pip install "edgetune[qnn]"')


def _package_version() -> str:
    return f"{_PACKAGE} {metadata.version(_PACKAGE)}"
