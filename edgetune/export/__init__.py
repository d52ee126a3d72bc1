"""From bundle and adapter to a model folder for ONNX Runtime GenAI: merged, or base and adapter side by side."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

from edgetune import __version__
from edgetune.adapter import MANIFEST as ADAPTER_MANIFEST
from edgetune.adapter import VALIDATION_DATA, VALIDATION_SHA256, read_adapter
from edgetune.adapter import WEIGHTS as ADAPTER_WEIGHTS
from edgetune.bundle import Bundle, load_manifest
from edgetune.config import ExportConfig, Precision
from edgetune.data.encode import Example, load_encoder, load_examples
from edgetune.errors import VerificationError
from edgetune.export.keep import add_lora_inputs, graph_values, write_onnx_adapter
from edgetune.export.measure import Measured
from edgetune.export.merge import merge_adapter
from edgetune.export.quantise import quantise_layers
from edgetune.genai import MANIFEST, MODEL, SIDE_FILES, WEIGHTS
from edgetune.manifest import FORMAT_VERSION, MODEL_FORMAT, AdapterManifest, File, ModelManifest
from edgetune.manifest_json import write_manifest
from edgetune.provenance import version_of
from edgetune.pulse import Pulse
from edgetune.runtimes import Parameters
from edgetune.storage import CHUNK, atomic_folder, sha256_of, write_file
from edgetune.threads import computing_with

ADAPTER = "adapters/adapter.onnx_adapter"
"""Where a kept adapter lies in the model folder."""

_TOOLS = ("onnx", "onnxruntime")
"""Packages whose versions the manifest records."""

Kind = Literal["merged", "base + adapter"]


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote."""

    path: Path
    kind: Kind
    losses: dict[str, float]
    """Answer loss on the validation rows of `base`, `base + adapter` and `merged`; empty when there were no rows."""
    bytes: int
    """Size of all files."""


def export(
    bundle: Bundle,
    adapter: Path,
    output: Path,
    config: ExportConfig,
    say: Callable[[str], None],
    valid: Path | None = None,
) -> ExportReport:
    """Write a model folder; it appears whole or not at all.

    Args:
        bundle: The verified bundle that the adapter was trained on.
        adapter: The adapter folder.
        output: The folder to write.
        config: Merged or kept apart, and in which precision.
        say: Called with a line of text as each stage begins.
        valid: Rows to measure on; without them, those that the adapter's training was validated on.

    Raises:
        UsageError: There is no adapter, or `output` is there already.
        DataError: `valid` has bad rows.
        IncompatibleError: The adapter does not fit the bundle.
        VerificationError: A file of adapter or bundle was changed.
        MissingDependencyError: A host package is not installed.
        ResourceError: The disk is full.
        LockedError: Another process writes `output`.
        EdgetuneError: Olive failed.
    """
    parameters = read_adapter(adapter, bundle.manifest.lora, bundle.manifest.base, bundle.manifest.tokenizer)
    examples = _examples(bundle, valid or _validation_rows(adapter, say))
    versions = {name: version_of(name) for name in _TOOLS}
    with computing_with(config.threads), atomic_folder(output, replace=config.force, marker=MANIFEST) as folder:
        listed = {file.path: file for file in bundle.manifest.files}
        files = [_copy(bundle.path, folder, listed[name]) for name in SIDE_FILES if name in listed]
        if config.merge:
            say(f"merging the adapter into {config.precision} weights")
            _write_merged(bundle, folder, config.precision, parameters)
            losses = _merged_losses(bundle, folder, parameters, examples, say)
        else:
            say(f"putting the adapter beside the {bundle.manifest.base.weights} base")
            files.append(_copy(bundle.path, folder, listed[WEIGHTS]))
            _write_kept(bundle, folder, parameters)
            losses = _kept_losses(bundle, folder, examples, say)
        written = [] if config.merge else [ADAPTER]
        written += [name for name in (MODEL, WEIGHTS) if name not in {file.path for file in files}]
        files += [File(name, (folder / name).stat().st_size, sha256_of(folder / name)) for name in written]
        manifest = _manifest(bundle, adapter, config, losses, versions, files)
        write_file(folder / MANIFEST, write_manifest(manifest))
    kind: Kind = "merged" if config.merge else "base + adapter"
    return ExportReport(output, kind, losses, sum(file.size for file in files))


def _manifest(
    bundle: Bundle,
    adapter: Path,
    config: ExportConfig,
    losses: dict[str, float],
    versions: dict[str, str],
    files: list[File],
) -> ModelManifest:
    source = bundle.manifest
    return ModelManifest(
        format=MODEL_FORMAT,
        format_version=FORMAT_VERSION,
        base=source.base,
        tokenizer=source.tokenizer,
        lora=source.lora,
        weights=config.precision if config.merge else source.base.weights,
        adapter=None if config.merge else ADAPTER,
        losses=losses,
        provenance={
            "bundle_manifest_sha256": source.manifest_sha256,
            "adapter_sha256": sha256_of(adapter / ADAPTER_WEIGHTS),
            "edgetune": __version__,
            **versions,
        },
        files=sorted(files, key=lambda file: file.path),
    )


def _copy(source: Path, folder: Path, file: File) -> File:
    """Copy a file of the bundle, hashing what is copied."""
    digest = hashlib.sha256()
    with (source / file.path).open("rb") as reader, (folder / file.path).open("wb") as writer:
        while piece := reader.read(CHUNK):
            digest.update(piece)
            writer.write(piece)
    if digest.hexdigest() != file.sha256:
        raise VerificationError(f"{source / file.path} was changed while it was copied; verify {source} and try again")
    return file


def _write_merged(bundle: Bundle, folder: Path, precision: Precision, parameters: Parameters) -> None:
    if precision == "fp32":
        merge_adapter(bundle.path, folder, bundle.manifest.lora, parameters)
        return
    with tempfile.TemporaryDirectory(prefix=".merged-", dir=folder) as scratch:
        merge_adapter(bundle.path, Path(scratch), bundle.manifest.lora, parameters)
        quantise_layers(Path(scratch), folder)


def _write_kept(bundle: Bundle, folder: Path, parameters: Parameters) -> None:
    import onnx

    model = onnx.load(str(bundle.path / MODEL), load_external_data=False)
    add_lora_inputs(model, bundle.manifest.lora)
    onnx.save(model, str(folder / MODEL))
    (folder / ADAPTER).parent.mkdir()
    write_onnx_adapter(folder / ADAPTER, bundle.manifest.lora, parameters)


def _validation_rows(adapter: Path, say: Callable[[str], None]) -> Path | None:
    """The rows that the adapter's training was validated on, where they lie unchanged beside the adapter or here."""
    source = adapter / ADAPTER_MANIFEST
    if not source.is_file():
        return None
    provenance = load_manifest(source, AdapterManifest).provenance
    if VALIDATION_DATA not in provenance:
        return None
    told = PurePath(provenance[VALIDATION_DATA])
    # An adapter may come from anywhere.
    name = told if not told.is_absolute() and ".." not in told.parts else PurePath(told.name)
    for rows in (adapter.resolve().parent / name, Path(name)):
        if rows.is_file() and sha256_of(rows) == provenance.get(VALIDATION_SHA256):
            return rows
    say(f"the validation rows {name} are neither beside the adapter nor here, unchanged; --valid names them")
    return None


def _examples(bundle: Bundle, rows: Path | None) -> list[Example]:
    if rows is None:
        return []
    encoder = load_encoder(bundle.path, bundle.manifest.tokenizer)
    # Whatever is left of a long row says as much about what quantising changes.
    return load_examples(rows, encoder, bundle.manifest.max_length, truncate=True).examples


def _merged_losses(
    bundle: Bundle, folder: Path, parameters: Parameters, examples: list[Example], say: Callable[[str], None]
) -> dict[str, float]:
    import onnx

    if not examples:
        return {}
    say(f"measuring the answer loss on {len(examples)} validation rows")
    graph = onnx.load(str(bundle.path / MODEL), load_external_data=False)
    add_lora_inputs(graph, bundle.manifest.lora)
    rope = bundle.manifest.architecture.rope
    apart = Measured(bundle.path, rope, graph)
    values = graph_values(bundle.manifest.lora, parameters)
    pulse = _pulse(examples, say, 3)
    losses = {
        "base": apart.answer_loss(examples, pulse),
        "base + adapter": apart.answer_loss(examples, pulse, values=values),
    }
    del apart  # two big models in memory would be one too many
    return losses | {"merged": Measured(folder, rope).answer_loss(examples, pulse)}


def _kept_losses(
    bundle: Bundle, folder: Path, examples: list[Example], say: Callable[[str], None]
) -> dict[str, float]:
    if not examples:
        return {}
    say(f"measuring the answer loss on {len(examples)} validation rows")
    model = Measured(folder, bundle.manifest.architecture.rope)
    pulse = _pulse(examples, say, 2)
    return {
        "base": model.answer_loss(examples, pulse),
        "base + adapter": model.answer_loss(examples, pulse, adapter=folder / ADAPTER),
    }


def _pulse(examples: list[Example], say: Callable[[str], None], models: int) -> Pulse:
    """Of rows that are measured with several models, one after the other."""
    return Pulse(say, f"measured {{}} of {models * len(examples):,} rows ({models} models)")
