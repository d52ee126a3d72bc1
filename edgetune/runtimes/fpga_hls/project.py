"""The HLS project of a trunk, ready to be synthesised with Vitis."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgetune.formats.bundle import Bundle
from edgetune.formats.storage import atomic_folder, write_file
from edgetune.formats.trunk import read_trunk_info
from edgetune.runtimes.fpga_hls.core import Core, write_core
from edgetune.runtimes.fpga_hls.cores import trunk_cores
from edgetune.runtimes.fpga_hls.resources import KV260, Estimate, Fpga, estimate

DESCRIPTION = "hls.json"
_SCRIPT = """#!/bin/sh
# Synthesises every core with Vitis HLS, which has to be installed; the reports lie in cores/*/*_prj/solution1.
set -e
cd "$(dirname "$0")/cores"
for core in */; do
    if command -v vitis-run > /dev/null; then (cd "$core" && vitis-run --mode hls --tcl build_prj.tcl)
    else (cd "$core" && vitis_hls -f build_prj.tcl); fi
done
"""


@dataclass(frozen=True)
class HlsProject:
    """What was written."""

    path: Path
    fpga: Fpga
    layers: int
    """Number of decoder layers whose projections it holds."""
    cores: Sequence[Core]
    total: Estimate


def write_hls_project(bundle: Bundle, output: Path, say: Callable[[str], None], *, force: bool = False) -> HlsProject:
    """Write the HLS projects of a trunk's projections for a Kria KV260.

    Nothing is synthesised: what the cores take of the FPGA is an estimate.

    Args:
        bundle: A split bundle.
        output: The folder to write.
        say: Called with a line of text for each core.
        force: Replace a project that is already there.

    Raises:
        UsageError: The output exists.
        IncompatibleError: The bundle has no trunk, or the FPGA does not hold it.
        MissingDependencyError: hls4ml is not installed.
    """
    info = read_trunk_info(bundle)
    cores = trunk_cores(bundle, info, KV260)
    total = estimate((core.size for core in cores), KV260)
    project = HlsProject(output, KV260, info.layers, cores, total)
    with atomic_folder(output, replace=force, marker=DESCRIPTION) as folder:
        for core in cores:
            say(f"Writing {core.size.name} (hls4ml) …")
            place = folder / "cores" / core.size.name
            write_core(core, place, KV260)
            _forget_place(place)
        (folder / "synthesise.sh").write_text(_SCRIPT, encoding="ascii")
        (folder / "synthesise.sh").chmod(0o755)
        (folder / "README.md").write_text(_readme(bundle, project), encoding="utf-8")
        description = json.dumps(_description(bundle, project), indent=1)
        write_file(folder / DESCRIPTION, f"{description}\n".encode())
    return project


def _forget_place(folder: Path) -> None:
    """Let the project be moved: hls4ml notes where it was written."""
    path = folder / "hls4ml_config.yml"
    path.write_text(path.read_text(encoding="utf-8").replace(str(folder), "."), encoding="utf-8")


def _description(bundle: Bundle, project: HlsProject) -> dict[str, object]:
    fpga, total = project.fpga, project.total
    return {
        "base": asdict(bundle.manifest.base),
        "fpga": {"name": fpga.name, "part": fpga.part, "clock_ns": fpga.clock_ns},
        "layers": project.layers,
        "estimate": {**asdict(total), "synthesised": False},
        "cores": [
            {
                "name": core.size.name,
                "folder": f"cores/{core.size.name}",
                "inputs": core.size.inputs,
                "outputs": core.size.outputs,
                "reuse": core.size.reuse,
                "dsp": core.size.dsp,
                "columns": core.size.columns,
                "weight": str(core.weight_type),
                "input": str(core.input_type),
                "sum": core.sum_type.exactly(),
                "output": str(core.output_type),
            }
            for core in project.cores
        ],
    }


def _readme(bundle: Bundle, project: HlsProject) -> str:
    fpga, total = project.fpga, project.total
    rows = "\n".join(
        f"| {core.size.name} | {core.size.inputs} → {core.size.outputs} | {core.size.reuse} | {core.size.dsp} "
        f"| {core.size.columns} × {core.size.reuse:,} |"
        for core in project.cores
    )
    return f"""# HLS cores of {bundle.manifest.base.name}

The frozen projections of the {project.layers} lowest decoder layers, a core each, for the {fpga.name} ({fpga.part}).
Attention, norms, adapters and gradients stay on the processor.

Each vector has an exponent of its own, e, the power of two just above its largest magnitude. A core takes x · 2^-e,
which lies between -1 and 1, and gives y · 2^-e. Whatever feeds it finds e and shifts before and after; no core does.

Nothing here was synthesised and no FPGA was used: the figures are an estimate by counting. `./synthesise.sh` runs
Vitis HLS over every core.

| core | size | reuse | DSP | weight memory: columns of 72 bits × depth |
| --- | --- | --- | --- | --- |
{rows}

Together, with {total.multiplications:,} multiplications a token: {total.of(fpga)}.
A column is a 36 Kb block RAM for every 512 of depth, or an UltraRAM for every 4,096. UltraRAM starts with zeros, and
hls4ml asks for block RAM: columns that are counted as UltraRAM need a memory that is filled at start, which is left to
whoever builds the design.

Look-up tables and flip-flops are not estimated; synthesis reports them. A token takes at least {total.cycles:,} cycles
of {fpga.clock_ns:g} ns through the cores. The weights lie on the FPGA, {fpga.weights():,} of 16 bits at most: this is
for models of about a million weights a layer, not for Phi-3-mini, which has 113 million.
"""
