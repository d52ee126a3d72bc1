"""From a bundle to a split one: its lower layers become a quantised graph for an accelerator."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path

import numpy as np

from edgetune.config import SplitConfig, check_config
from edgetune.data.batches import MASKED, make_batch
from edgetune.data.encode import Example, load_encoder
from edgetune.data.examples import load_examples
from edgetune.data.source import name_of
from edgetune.errors import DataError, IncompatibleError, UsageError
from edgetune.formats.bundle import MANIFEST, Bundle, as_bundle, list_files, seal_bundle
from edgetune.formats.frozen_weights import EMBEDDING, FrozenWeights
from edgetune.formats.manifest import BundleManifest, Graph, TensorSpec
from edgetune.formats.storage import atomic_folder, write_file
from edgetune.formats.trunk import FOLDER, GRAPH, INDEX, TrunkInfo, has_trunk, write_trunk_info
from edgetune.host.versions import version_of
from edgetune.machine.disk import require_room
from edgetune.machine.threads import check_threads, computing_with
from edgetune.model.architecture import frozen_weights
from edgetune.text.pulse import silent

_BYTES_A_WEIGHT = 8
"""Of the trunk, while it is quantised: measured, it is written in float32 twice, and in int8."""


_TOOLS = ("onnx", "onnx-ir", "onnxruntime")
"""Packages that this needs."""


def split(
    bundle: Bundle | str | PathLike[str],
    data: str | PathLike[str],
    output: str | PathLike[str],
    config: SplitConfig = SplitConfig(),
    *,
    say: Callable[[str], None] = silent,
) -> Bundle:
    """Make a bundle with a trunk: everything that `bundle` holds, and its lower layers as an int8 graph.

    Args:
        bundle: What `prepare` made: its path, or what `load_bundle` gave.
        data: JSONL rows that the int8 scales are chosen on, such as the training rows.
        output: The split bundle to write.
        config: Where to split, and for which length.
        say: Called with one line of text as each stage begins.

    Returns:
        The split bundle, as `load_bundle` gives it.

    Raises:
        UsageError: A value of the configuration that cannot be meant; a path is not there, the output exists, or there
            is no such split point.
        DataError: Rows that cannot be read, or none that fits the length.
        IncompatibleError: The trunk breaks a rule of Vitis AI, or is too far from float.
        MissingDependencyError: A host package is not installed.
        ResourceError: The trunk is larger than an ONNX file can be, or the disk has no room.
        LockedError: Another process writes the output.
        VerificationError: A file of the bundle was changed.
    """
    check_config(config)
    versions = {name: version_of(name) for name in _TOOLS}
    from edgetune.split.conformance import require_conformance
    from edgetune.split.fidelity import described, layer_errors, require_fidelity
    from edgetune.split.graph import build_trunk
    from edgetune.split.quantise import observe, quantise
    from edgetune.split.scaling import even_channels, even_positions, largest_results

    if config.threads is not None:
        check_threads(config.threads)
    data, output = Path(data), Path(output)
    source = as_bundle(bundle)
    manifest = source.manifest
    if manifest.lora.dora:
        raise IncompatibleError(
            f"{source.path}: its slots have magnitudes (DoRA), and a trunk has none yet; split a bundle that was "
            "prepared without --dora"
        )
    layers, length = _split_point(manifest, config), config.length or manifest.max_length
    copied = [file for file in manifest.files if not file.path.startswith(f"{FOLDER}/")]
    trunk_weights = layers * sum(frozen_weights(manifest.architecture).values())
    needed = sum(file.size for file in copied) + _BYTES_A_WEIGHT * trunk_weights
    # Choosing scales takes long; the folder is begun after it.
    require_room(output, needed)
    examples = _calibration_rows(source, data, length, config.calibration_rows)
    say(f"Putting {layers} of {manifest.architecture.num_hidden_layers} layers together …")
    trunk = build_trunk(source, layers)
    even_positions(trunk)
    say(f"Choosing scales on {len(examples)} rows …")
    with computing_with(config.threads):
        results = largest_results(trunk, (_feed(source, example) for example in examples))
        even_channels(trunk, results)
        seen = observe(trunk, (_feed(source, example) for example in examples))
    with atomic_folder(output, replace=config.force, marker=MANIFEST, needed=needed) as folder:
        for file in copied:
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / file.path, folder / file.path)
        (folder / FOLDER).mkdir()
        say(f"Quantising for {length} positions (ONNX Runtime) …")
        quantise(trunk, seen, _feed(source, examples[0], length), length, folder / f"{GRAPH}.onnx")
        require_conformance(folder / f"{GRAPH}.onnx")
        say("Comparing with float …")
        rows = ((_feed(source, example), _feed(source, example, length)) for example in examples)
        with computing_with(config.threads):
            errors = layer_errors(trunk, folder / f"{GRAPH}.onnx", rows)
        require_fidelity(errors, config.largest_error)
        say(described(errors))
        gains: dict[str, float] = {}
        for product, module in trunk.modules.items():
            gains[module] = max(gains.get(module, 0.0), float(results[product].max()))
        write_file(folder / INDEX, write_trunk_info(TrunkInfo(layers, length, gains, errors)))
        say("Hashing …")
        sealed = seal_bundle(folder, _manifest(manifest, folder, length, versions["onnxruntime"]))
    return Bundle(output, sealed)


def _split_point(manifest: BundleManifest, config: SplitConfig) -> int:
    layers = manifest.architecture.num_hidden_layers
    if layers < 2:
        raise UsageError("a model of one layer cannot be split; use a deeper one")
    chosen = config.layers or layers // 2
    if chosen >= layers:
        raise UsageError(f"--layers {chosen} leaves no layer to train of {layers}; use at most {layers - 1}")
    if config.length is not None and config.length > manifest.architecture.max_position_embeddings:
        raise UsageError(
            f"--length {config.length} is more than the model's {manifest.architecture.max_position_embeddings} "
            "positions"
        )
    return chosen


def _calibration_rows(bundle: Bundle, data: Path, length: int, count: int) -> list[Example]:
    """At most `count` rows, taken from the file at regular intervals."""
    encoder = load_encoder(bundle.path, bundle.manifest.tokenizer)
    rows = load_examples(data, encoder, length, truncate=True).examples
    if not rows:
        raise DataError([f"{name_of(data)}: no row to choose int8 scales on"])
    return rows[:: -(-len(rows) // count)]


def _feed(bundle: Bundle, example: Example, length: int | None = None) -> dict[str, np.ndarray]:
    """The trunk's inputs for one row, padded to a length where one is given."""
    architecture = bundle.manifest.architecture
    batch = make_batch(
        [example], architecture.rope, bundle.manifest.tokenizer.pad_token_id, multiple_of=length or 1,
        sliding_window=architecture.sliding_window,
    )  # fmt: skip
    return {
        "hidden": FrozenWeights(bundle.path, architecture).rows(EMBEDDING, batch.input_ids),
        "attn_bias": np.maximum(batch.attn_bias, MASKED),
        "rope_cos": batch.rope_cos,
        "rope_sin": batch.rope_sin,
    }


def _manifest(manifest: BundleManifest, folder: Path, length: int, onnxruntime: str) -> BundleManifest:
    graphs = [graph for graph in manifest.graphs if graph.role != GRAPH] if has_trunk(manifest) else manifest.graphs
    a = manifest.architecture
    hidden: list[int | str] = [1, length, a.hidden_size]
    table: list[int | str] = [1, length, a.rope.dim]
    inputs = [
        TensorSpec("hidden", "float", hidden),
        TensorSpec("attn_bias", "float", [1, 1, length, length]),
        TensorSpec("rope_cos", "float", table),
        TensorSpec("rope_sin", "float", table),
    ]
    graph = Graph(GRAPH, f"{GRAPH}.onnx", inputs, [TensorSpec("output", "float", hidden)])
    return replace(
        manifest,
        graphs=[*graphs, graph],
        provenance={**manifest.provenance, "trunk": f"onnxruntime {onnxruntime} quantize_static"},
        files=list_files(folder, without=MANIFEST),
    )
