"""The frozen lower layers of a split bundle: what leaves them, computed row by row.

The states of a row depend on the row alone, not on the batch that it lies in and not on the adapters, so that they are
kept for the next epoch (`edgetune.runtimes.layered.cached_states`).
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgetune.data.batches import MASKED, Batch, causal_mask
from edgetune.errors import IncompatibleError, MissingDependencyError
from edgetune.formats.bundle import Bundle
from edgetune.formats.frozen_weights import EMBEDDING, FrozenWeights
from edgetune.formats.trunk import GRAPH, TrunkInfo, read_trunk_info
from edgetune.runtimes.execution import LayeredPlan
from edgetune.runtimes.layered.backend import Arrays
from edgetune.runtimes.onnx_session import open_graph, partitions_of
from edgetune.runtimes.placement import Partition, Placement
from edgetune.runtimes.verified_cache import CACHE

Floats = NDArray[np.float32]
VITIS_AI, CPU = "VitisAIExecutionProvider", "CPUExecutionProvider"
_CACHE = f"{CACHE}/vitisai"
"""In the bundle, where Vitis AI keeps what it compiled; not part of the bundle and not verified."""


class TrunkLayers(Protocol):
    """What computes the layers for one row."""

    placement: Placement | None
    """Where they run, if it is known."""

    def forward(self, hidden: Floats, rope_cos: Floats, rope_sin: Floats) -> Floats:
        """(positions, hidden_size) from the embedding to what enters the first layer above the trunk.

        Args:
            hidden: (positions, hidden_size), the embedded row.
            rope_cos: (positions, rotated).
            rope_sin: The same.
        """
        ...


class SublayerForward(Protocol):
    """The forward pass of one sublayer of every layer; `SublayerRunner` has it."""

    def forward(
        self, layer: int, tables: Arrays, hidden: NDArray[Any], output: NDArray[Any], kept_under: str | None
    ) -> None:
        """Write a layer's output; see `SublayerRunner.forward`."""
        ...


class LowestLayers(Protocol):
    """The lowest layers as another device computes them forward, with their adapters."""

    layers: int
    """How many."""
    placement: Placement | None
    """Where they run, if it is known."""
    sublayers: tuple[SublayerForward, SublayerForward]
    """Attention and the feed-forward network."""


class Trunk:
    """Hidden states of batches, from the trunk.

    Args:
        frozen: Holds the embedding.
        layers: Computes a row.
    """

    def __init__(self, frozen: FrozenWeights, layers: TrunkLayers) -> None:
        self._frozen, self._layers = frozen, layers
        self.placement = layers.placement
        self.computed = 0
        """Rows that went through the trunk."""

    def hidden(self, batch: Batch) -> Floats:
        """(batch, sequence, hidden_size); zeros where there is padding."""
        width = self._frozen.shape(EMBEDDING)[1]
        states = np.zeros((*batch.input_ids.shape, width), dtype=np.float32)
        for row in range(len(batch.examples)):
            places = batch.places(row)
            embedded = self._frozen.rows(EMBEDDING, batch.input_ids[places])
            states[places] = self._layers.forward(embedded, batch.rope_cos[places], batch.rope_sin[places])
            self.computed += 1
        return states


class QuantisedLayers:
    """The bundle's int8 graph on an execution provider.

    Without Vitis AI the CPU provider runs it.

    Args:
        bundle: A split bundle.
        vitisai_config: The `vaip_config.json` of an installed Vitis AI, where it wants one; then the provider has to
            be there.

    Raises:
        IncompatibleError: The bundle has no trunk.
        MissingDependencyError: There is no Vitis AI.
    """

    def __init__(self, bundle: Bundle, vitisai_config: Path | None = None) -> None:
        self._info = read_trunk_info(bundle)
        self._session = open_trunk_graph(bundle, vitisai_config)
        self.placement: Placement | None = trunk_placement(self._session, self._info.length)
        visible = causal_mask(self._info.length, bundle.manifest.architecture.sliding_window)
        # Rows lie at the start; what is behind them sees them, but nobody looks at it.
        self._bias = np.where(visible, np.float32(0), MASKED)[None, None]

    def forward(self, hidden: Floats, rope_cos: Floats, rope_sin: Floats) -> Floats:
        """See `TrunkLayers.forward`."""
        count = check_length(self._info, len(hidden))
        rows = {"hidden": hidden, "rope_cos": rope_cos, "rope_sin": rope_sin}
        padded = {name: self._padded(array) for name, array in rows.items()}
        (states,) = self._session.run(["output"], {**padded, "attn_bias": self._bias})
        return np.ascontiguousarray(states[0, :count])

    def _padded(self, rows: Floats) -> Floats:
        return np.pad(rows, ((0, self._info.length - len(rows)), (0, 0)))[None]


def check_length(info: TrunkInfo, count: int) -> int:
    """The number of positions of a row, if it fits.

    Raises:
        IncompatibleError: The row is longer than the trunk takes.
    """
    if count > info.length:
        raise IncompatibleError(
            f"a row has {count} tokens, the bundle's trunk takes {info.length}; leave it out, or split the bundle "
            f"again with --length {count} or more"
        )
    return count


def open_trunk_graph(bundle: Bundle, vitisai_config: Path | None = None) -> Any:
    """The trunk's graph as an ONNX Runtime session: on Vitis AI where its provider is installed, else on the CPU.

    The options are those that Vitis AI documents for Ryzen AI and for adaptive SoCs: `config_file`, and where what was
    compiled is kept (`cache_dir`, `cache_key`; releases for Zynq and Versal up to 3.5 call them `cacheDir` and
    `cacheKey`). What they compile to was not tried: no such device was there.

    Raises:
        MissingDependencyError: `vitisai_config` is given and there is no such provider, or it takes no node.
    """
    import onnxruntime

    path = bundle.file(GRAPH)
    if VITIS_AI not in onnxruntime.get_available_providers():
        if vitisai_config is not None:
            raise MissingDependencyError(
                f"{vitisai_config} configures {VITIS_AI}, which this onnxruntime does not have; install the one of "
                "Vitis AI (VOE) or Ryzen AI Software, or leave --vitisai-config away to use the CPU"
            )
        return open_graph(path, exact_int8=True, record_placement=True)
    with suppress(OSError):  # a bundle that cannot be written to has no cache
        (bundle.path / _CACHE).mkdir(parents=True, exist_ok=True)
    (sha256,) = (file.sha256 for file in bundle.manifest.files if file.path == f"{GRAPH}.onnx")
    return open_graph(path, provider=(VITIS_AI, vitisai_options(bundle.path, sha256, vitisai_config)))


def trunk_placement(session: Any, length: int) -> Placement:
    """Where a trunk's graph runs: a session of `open_trunk_graph`, and the positions that it takes."""
    provider, partitions = session.get_providers()[0], partitions_of(session)
    if provider == CPU:
        # onnxruntime makes a partition of every node there.
        nodes = [node for part in partitions for node in part.nodes]
        return Placement(GRAPH, 1, length, CPU, "no accelerator", [Partition(CPU, nodes)], cached=False)
    device = "Vitis AI" if partitions else "Vitis AI; this onnxruntime does not say which nodes it takes"
    return Placement(GRAPH, 1, length, provider, device, partitions, cached=False)


def vitisai_options(bundle: Path, sha256: str, config: Path | None) -> dict[str, str]:
    """Provider options of Vitis AI.

    Args:
        bundle: Its folder `.cache/vitisai` takes what is compiled.
        sha256: Of the graph; another graph is compiled anew.
        config: `vaip_config.json`, if there is one. The older names of the cache's options go with it.
    """
    place = {"dir": str((bundle / _CACHE).absolute()), "key": sha256[:32]}
    options = {f"cache_{name}": value for name, value in place.items()}
    if config is not None:
        options |= {f"cache{name.capitalize()}": value for name, value in place.items()}
        options["config_file"] = str(config.absolute())
    return options


def open_trunk(bundle: Bundle, plan: LayeredPlan) -> Trunk | None:
    """The trunk that a plan wants; none where it runs all layers itself."""
    if plan.trunk is None:
        return None
    layers = QuantisedLayers(bundle, plan.trunk.vitisai_config)
    return Trunk(FrozenWeights(bundle.path, bundle.manifest.architecture), layers)
