"""What runtimes have in common whose accelerator comes as a plugin of stock ONNX Runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from edgetune.config import RuntimeName
from edgetune.errors import MissingDependencyError, UsageError
from edgetune.formats.bundle import Bundle
from edgetune.formats.roles import INT8_LOSS, INT8_STEP, LOSS, STEP, roles_in_half
from edgetune.model.lora import Parameters
from edgetune.runtimes.contract import Abilities, Forward, OptimizerConfig, Runtime, Session
from edgetune.runtimes.execution import ACCELERATING, Accelerator, ExecutionPlan, WholePlan
from edgetune.runtimes.placement import Placement

if TYPE_CHECKING:
    from edgetune.runtimes.whole.compiled import AcceleratorGraphs
    from edgetune.runtimes.whole.plugin import Plugin, PluginCompiler


class PluginRuntime(ABC):
    """The whole step, or its forward pass alone, on an execution provider that a package of its own brings.

    The record of a module of `edgetune.runtimes` has the methods of one for its functions.

    Args:
        name: The runtime's, and the name of the extra that installs the package.
        package: Its module has the same name with underscores.
        emulation: Whether what it has here simulates the hardware.
    """

    def __init__(self, name: RuntimeName, package: str, *, emulation: bool = False) -> None:
        self._name, self._package, self._emulation = name, package, emulation
        self._module = package.replace("-", "_")

    @abstractmethod
    def plugin(self, package: Any, version: str, accelerator: Accelerator) -> Plugin:
        """The provider, for one device.

        Args:
            package: The module of the package, which knows where its libraries are.
            version: The package and its version.
            accelerator: What was asked for.

        Raises:
            IncompatibleError: There is no such device here.
        """

    def abilities(self) -> Abilities:
        """See `edgetune.runtimes.contract.Runtime`.

        Raises:
            MissingDependencyError: The package is not installed.
        """
        self._require_package()
        return Abilities(whole=False, exact=None, int8=None, preferred=False, emulation=self._emulation)

    def version(self) -> str:
        """See `edgetune.runtimes.contract.Runtime`."""
        return f"onnxruntime {ort.__version__}, {self._package_version()}"

    @contextmanager
    def open_session(
        self, bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig, plan: ExecutionPlan
    ) -> Iterator[Session]:
        """Load the plugin; see `edgetune.runtimes.contract.Runtime`. Each shape is compiled when its first batch comes.

        Raises:
            IncompatibleError: There is no such device here.
            MissingDependencyError: The package is not installed.
            UsageError: The plan is not the whole step.
        """
        from edgetune.runtimes.whole.compiled import AcceleratorSession

        yield AcceleratorSession(bundle, parameters, optimizer, self._graphs(bundle, plan))

    @contextmanager
    def open_forward(self, bundle: Bundle, parameters: Parameters, plan: ExecutionPlan) -> Iterator[Forward]:
        """Load the plugin for the forward pass alone; see `edgetune.runtimes.contract.Runtime`.

        Raises:
            IncompatibleError: There is no such device here.
            MissingDependencyError: The package is not installed.
            UsageError: The plan is not the whole step.
        """
        from edgetune.runtimes.whole.compiled import AcceleratorForward

        yield AcceleratorForward(parameters, self._graphs(bundle, plan))

    def place(self, bundle: Bundle, plan: WholePlan, batch: int, length: int) -> list[Placement]:
        """See `edgetune.runtimes.contract.Runtime`."""
        compiler = self._compiler(bundle, plan)
        return [compiler.compile(role, batch, length).placement for role in self._roles(bundle, plan)]

    def record(self) -> Runtime:
        """Its functions."""
        return Runtime(self.abilities, self.version, self.open_session, self.open_forward, self.place)

    def imported_package(self) -> Any:
        """The module of the package.

        Raises:
            MissingDependencyError: It is not installed.
        """
        self._require_package()
        return import_module(self._module)

    def _graphs(self, bundle: Bundle, plan: ExecutionPlan) -> AcceleratorGraphs:
        if not isinstance(plan, WholePlan):
            raise UsageError(
                f"the {self._name} runtime takes no plan but `whole`; use --runtime onnxruntime for the others"
            )
        from edgetune.runtimes.whole.compiled import AcceleratorGraphs
        from edgetune.runtimes.whole.first_batch import HALF, INT8, FirstBatch

        bounds = INT8 if plan.precision == "int8" else HALF
        first = FirstBatch(bundle, bounds) if self._is_in_half(plan) else None
        return AcceleratorGraphs(self._compiler(bundle, plan), *self._roles(bundle, plan), first)

    def _roles(self, bundle: Bundle, plan: WholePlan) -> tuple[str, str]:
        """The graphs with the loss and the gradients, and with the loss alone."""
        if plan.precision == "int8":
            return INT8_STEP, INT8_LOSS
        return roles_in_half(bundle.manifest) if self._is_in_half(plan) else (STEP, LOSS)

    def _is_in_half(self, plan: WholePlan) -> bool:
        """Whether the device computes in float16; a CPU has float32's range."""
        accelerator = plan.accelerator or Accelerator()
        return ACCELERATING[self._name].device(accelerator.device_type) != "CPU"

    def _compiler(self, bundle: Bundle, plan: WholePlan) -> PluginCompiler:
        from edgetune.runtimes.whole.plugin import PluginCompiler

        accelerator = plan.accelerator or Accelerator()
        plugin = self.plugin(self.imported_package(), self._package_version(), accelerator)
        if plan.precision == "int8":
            plugin = replace(plugin, session={})
        return PluginCompiler(bundle, plugin, require=accelerator.require)

    def _require_package(self) -> None:
        if find_spec(self._module) is None:
            raise MissingDependencyError(f'{self._package} is not installed; pip install "edgetune[{self._name}]"')

    def _package_version(self) -> str:
        return f"{self._package} {metadata.version(self._package)}"
