"""An FPGA emulation: the trunk's frozen projections in hls4ml's C simulation, everything else on the CPU.

What an FPGA would compute, bit for bit, for models that are small enough for one. With `--trunk` the trunk's layers
have no adapters, and each row goes through them once. Without it they have: adapters are added to the products on the
CPU, which also has all gradients, and every step goes through the simulation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from edgetune.errors import UsageError
from edgetune.formats.bundle import Bundle
from edgetune.formats.frozen_weights import FrozenWeights
from edgetune.formats.trunk import FOLDER, read_trunk_info
from edgetune.model.lora import Parameters
from edgetune.runtimes import onnxruntime as stock
from edgetune.runtimes.contract import Abilities, OptimizerConfig, Runtime, Session
from edgetune.runtimes.execution import ExecutionPlan, WholePlan
from edgetune.runtimes.fpga_hls.core import require_compiler, require_hls4ml, simulate
from edgetune.runtimes.fpga_hls.cores import trunk_cores
from edgetune.runtimes.fpga_hls.decoder import DecoderLayers
from edgetune.runtimes.fpga_hls.resources import KV260, CoreSize, Fpga, estimate
from edgetune.runtimes.layered.lower_layers import CPU, Trunk
from edgetune.runtimes.layered.onnxruntime.backend import OrtBackend
from edgetune.runtimes.layered.session import LayeredSession
from edgetune.runtimes.placement import Node, Partition, Placement

NAME = "fpga-hls"
_ON_CPU = {"self_attn": ("RMSNorm", "Attention"), "mlp": ("RMSNorm", "SwiGLU")}
"""What else than projections a decoder layer computes, by the module of the checkpoint."""
_EMULATION = 25_000_000
"""Bytes that hls4ml and the compiled cores take: 17 to 33 MB were found, for 41 to 852 thousand weights."""


def abilities() -> Abilities:
    """See `edgetune.runtimes.contract.Runtime`."""
    require_hls4ml()
    require_compiler()
    cpu = stock.abilities()
    exact = cpu.exact and replace(cpu.exact, base_bytes=cpu.exact.base_bytes + _EMULATION)
    return replace(cpu, whole=False, exact=exact, int8=None, preferred=False, emulation=True)


def version() -> str:
    """See `edgetune.runtimes.contract.Runtime`."""
    import hls4ml

    return f"FPGA emulation (hls4ml {hls4ml.__version__} C simulation), {stock.version()}"


@contextmanager
def open_session(
    bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig, plan: ExecutionPlan
) -> Iterator[Session]:
    """Write and compile a simulation for each projection; see `edgetune.runtimes.contract.Runtime`.

    Raises:
        IncompatibleError: The bundle has no trunk, or an FPGA does not hold its weights.
        MissingDependencyError: hls4ml or g++ is not installed.
        EdgetuneError: The compiler gave up.
        UsageError: The plan is the whole step, and only layers are simulated.
    """
    if isinstance(plan, WholePlan):
        raise UsageError(f"the {NAME} runtime takes no plan `whole`; leave --plan at auto")
    info = read_trunk_info(bundle)
    cores = trunk_cores(bundle, info, KV260)
    # Nothing that was compiled before is loaded: a library runs whatever it holds.
    with TemporaryDirectory(prefix="edgetune-hls-") as folder:
        simulations = simulate(cores, Path(folder), KV260)
        products = {core.size.name: each.run for core, each in zip(cores, simulations, strict=True)}
        layers = DecoderLayers(bundle, info.layers, products, emulation([core.size for core in cores], KV260))
        backend = OrtBackend(bundle, "fp32")
        if plan.trunk is not None:
            trunk = Trunk(FrozenWeights(bundle.path, bundle.manifest.architecture), layers)
            opened = LayeredSession(bundle, parameters, optimizer, plan, backend, trunk)
        else:
            opened = LayeredSession(bundle, parameters, optimizer, plan, backend, lowest=layers.with_adapters)
        with closing(opened) as session:
            yield session


def emulation(cores: Sequence[CoreSize], fpga: Fpga) -> Placement:
    """What is emulated, what it would take of the FPGA, and what the CPU computes in the trunk's layers.

    Args:
        cores: Of whole layers; each takes one position of one row at a time.
        fpga: What is emulated.
    """
    total = estimate(cores, fpga)
    device = (
        f"FPGA emulation (hls4ml C simulation); estimate for a {fpga.name}, not synthesised: {total.of(fpga)}, for "
        f"{total.multiplications:,} of at most {fpga.weights():,} weights"
    )
    modules = list(dict.fromkeys(core.name.rpartition(".")[0] for core in cores))
    reason = "only frozen projections are emulated"
    others = [Node(operator, module, reason) for module in modules for operator in _ON_CPU[module.rpartition(".")[2]]]
    partitions = [Partition(NAME, [Node("Dense", core.name)]) for core in cores]
    return Placement(FOLDER, 1, 1, NAME, device, [*partitions, Partition(CPU, others)], cached=False)


RUNTIME = Runtime(abilities, version, open_session)
