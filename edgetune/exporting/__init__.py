"""From bundle and adapter to a model folder for ONNX Runtime GenAI: merged, or base and adapter side by side.

Or to a merged Hugging Face folder, of the checkpoint that the bundle was made from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

from edgetune import __version__
from edgetune.config import ExportConfig, check_config
from edgetune.data.encode import Example, load_encoder
from edgetune.data.examples import load_examples
from edgetune.errors import UsageError, VerificationError
from edgetune.exporting.adapters import AdapterPaths, NamedAdapter, read_adapters
from edgetune.exporting.gains import adapter_gains
from edgetune.exporting.keep import add_lora_inputs, graph_values, write_onnx_adapter
from edgetune.exporting.merged_checkpoint import MERGE, checkpoint_of, stored_types, write_merged_checkpoint
from edgetune.exporting.survival import (
    Merge,
    measure_checkpoint,
    measure_merges,
    pulse_of,
    refuse_what_lost_too_much,
    share_kept,
    written_as,
)
from edgetune.exporting.validation import validation_rows_of
from edgetune.formats.adapter import WEIGHTS as ADAPTER_WEIGHTS
from edgetune.formats.adapter import most_bytes
from edgetune.formats.bundle import Bundle, as_bundle
from edgetune.formats.frozen_weights import stored_bytes
from edgetune.formats.genai import MANIFEST, MODEL, SIDE_FILES, WEIGHTS, adapter_file
from edgetune.formats.manifest import FORMAT_VERSION, MODEL_FORMAT, File, ModelManifest, RowEncoding
from edgetune.formats.manifest_json import write_manifest
from edgetune.formats.storage import CHUNK, atomic_folder, sha256_of, write_file
from edgetune.generation.measure import Measured
from edgetune.host.versions import version_of
from edgetune.machine.threads import computing_with
from edgetune.text.pulse import silent

_TOOLS = ("onnx", "onnxruntime")
"""Packages whose versions the manifest records."""

Kind = Literal["merged", "base + adapter"]


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote."""

    path: Path
    """The model folder."""
    kind: Kind
    """Whether the adapter is in the weights or beside them."""
    weights: str
    """How the model stores its weights: `fp32`, `int8` or `int4` when merged, as the checkpoint does in a Hugging Face
    folder (`bf16`), otherwise as the bundle does."""
    losses: dict[str, float]
    """Answer loss on the validation rows of `base`, `base + adapter`, and `merged fp32`, `merged int8`, `merged int4`,
    or of a Hugging Face folder `merged checkpoint`; empty when there were no rows. Of several adapters, `base, rows of
    NAME` and `base + NAME` for each that has rows."""
    bytes: int
    """Size of all files."""
    kept: float | None
    """The share of what was learnt that the merged model keeps which was written; see `share_kept`."""

    @property
    def shares(self) -> dict[str, float | None]:
        """Of each merged model that was measured, the share of what was learnt that it keeps; see `share_kept`."""
        return {name: share_kept(self.losses, name) for name in self.losses if name.startswith("merged ")}


def export(
    bundle: Bundle | str | PathLike[str],
    adapter: AdapterPaths,
    output: str | PathLike[str],
    config: ExportConfig = ExportConfig(),
    *,
    valid: str | PathLike[str] | None = None,
    say: Callable[[str], None] = silent,
) -> ExportReport:
    """Write a model folder for ONNX Runtime GenAI, or a merged Hugging Face folder. This is work for a host.

    Args:
        bundle: What the adapter was trained on: its path, or what `load_bundle` gave.
        adapter: The adapter folder, of `train` or of PEFT. Beside the base there may be several, by name; the first of
            them answers unless another is asked for.
        output: The folder to write; it appears whole or not at all.
        config: Merged or kept apart, in which format and precision.
        valid: Rows to measure on; without them, those that the adapter's training was validated on.
        say: Called with one line of text as each stage begins.

    Returns:
        Where the model is, how large, and the answer losses that were measured, in nats a trained token.

    Raises:
        UsageError: A value of the configuration that cannot be meant, there is no adapter, or its name cannot be a
            file's, several are to be merged, `output` is there already, or a merge into int4 has no rows to measure on.
        DataError: `valid` has bad rows.
        IncompatibleError: The adapter does not fit the bundle, the merged model keeps too little of it, or the
            checkpoint is not the bundle's.
        VerificationError: A file of adapter or bundle was changed.
        MissingDependencyError: A host package is not installed.
        NoRoomError: The disk has less room than the model needs.
        LockedError: Another process writes `output`.
    """
    check_config(config)
    _check_format(config)
    bundle, output = as_bundle(bundle), Path(output)
    valid = None if valid is None else Path(valid)
    adapters = read_adapters(bundle, adapter)
    if config.merge and len(adapters) > 1:
        names = ", ".join(each.name for each in adapters)
        raise UsageError(f"one adapter is merged into the weights, not {names}; keep several beside the base")
    rows = [None if config.unmeasured else valid or validation_rows_of(each.path, say) for each in adapters]
    if rows == [None] and config.merge and config.precision == "int4" and not config.unmeasured:
        raise UsageError(
            "a merge into int4 can lose what was learnt, and there are no rows to measure that on: give some with "
            "--valid, or ask for it with --unmeasured"
        )
    examples = [_examples(bundle, path, each.encoding) for path, each in zip(rows, adapters, strict=True)]
    write = _export_checkpoint if config.format == "safetensors" else _export_model
    with computing_with(config.threads):
        return write(bundle, adapters, output, config, examples, say)


def _check_format(config: ExportConfig) -> None:
    if config.format == "genai":
        if config.checkpoint is not None:
            raise UsageError(f"checkpoint ({config.checkpoint}) is for format safetensors; give that as well")
        return
    if not config.merge:
        raise UsageError("format safetensors is for a merge; an adapter beside its base is for format genai")
    if config.checkpoint is None:
        raise UsageError("format safetensors adds the adapter to the checkpoint that the bundle was made from; give it")
    if config.precision != ExportConfig.precision:
        raise UsageError(
            f"precision {config.precision} is for format genai; a Hugging Face folder has the checkpoint's type"
        )


def _export_model(
    bundle: Bundle,
    adapters: list[NamedAdapter],
    output: Path,
    config: ExportConfig,
    examples: list[list[Example]],
    say: Callable[[str], None],
) -> ExportReport:
    versions = {name: version_of(name) for name in _TOOLS}
    listed = {file.path: file for file in bundle.manifest.files}
    needed = _needed(bundle, config, len(adapters), sum(listed[name].size for name in SIDE_FILES if name in listed))
    with atomic_folder(output, replace=config.force, marker=MANIFEST, needed=needed) as folder:
        files = [_copy(bundle.path, folder, listed[name]) for name in SIDE_FILES if name in listed]
        if config.merge:
            say(f"merging the adapter into {config.precision} weights")
            merge = _merge_of(bundle, adapters)
            merge.write(folder, config.precision)
            losses = measure_merges(merge, folder, config, examples[0], say)
            refuse_what_lost_too_much(losses, config, bundle.manifest.base.weights)
        else:
            what = "the adapter" if len(adapters) == 1 else f"{len(adapters)} adapters"
            say(f"putting {what} beside the {bundle.manifest.base.weights} base")
            files.append(_copy(bundle.path, folder, listed[WEIGHTS]))
            _write_kept(bundle, folder, adapters)
            losses = _kept_losses(bundle, folder, adapters, examples, say)
        written = [] if config.merge else [adapter_file(each.name) for each in adapters]
        written += [name for name in (MODEL, WEIGHTS) if name not in {file.path for file in files}]
        files += [File(name, (folder / name).stat().st_size, sha256_of(folder / name)) for name in written]
        manifest = _manifest(bundle, adapters, config, losses, versions, files)
        write_file(folder / MANIFEST, write_manifest(manifest))
    kind: Kind = "merged" if config.merge else "base + adapter"
    kept = share_kept(losses, written_as(config)) if config.merge else None
    return ExportReport(output, kind, manifest.weights, losses, sum(file.size for file in files), kept)


def _export_checkpoint(
    bundle: Bundle,
    adapters: list[NamedAdapter],
    output: Path,
    config: ExportConfig,
    examples: list[list[Example]],
    say: Callable[[str], None],
) -> ExportReport:
    say(f"verifying the checkpoint {config.checkpoint}")
    checkpoint = checkpoint_of(bundle, str(config.checkpoint))
    merge = _merge_of(bundle, adapters)
    needed = sum(file.stat().st_size for file in checkpoint.weights)
    with atomic_folder(output, replace=config.force, marker=MERGE, needed=needed) as folder:
        written = write_merged_checkpoint(checkpoint, folder, bundle, merge.parameters, say)
        losses = measure_checkpoint(merge, folder, examples[0], say)
        refuse_what_lost_too_much(losses, config, bundle.manifest.base.weights)
        size = sum((folder / name).stat().st_size for name in written)
        made_of = {
            "base": {"name": bundle.manifest.base.name, "sha256": bundle.manifest.base.sha256},
            "bundle_manifest_sha256": bundle.manifest.manifest_sha256,
            "adapter_sha256": adapters[0].sha256,
            "edgetune": __version__,
            "losses": losses,
        }
        write_file(folder / MERGE, f"{json.dumps(made_of, indent=2)}\n".encode())
    weights = stored_types(checkpoint, bundle.manifest.lora)
    return ExportReport(output, "merged", weights, losses, size, share_kept(losses, written_as(config)))


def _merge_of(bundle: Bundle, adapters: list[NamedAdapter]) -> Merge:
    (only,) = adapters
    return Merge(bundle, only.parameters, adapter_gains(bundle, only.parameters))


def _needed(bundle: Bundle, config: ExportConfig, adapters: int, beside: int) -> int:
    """Bytes that the model takes at least; `beside` are those of the files that are copied whatever it is."""
    manifest = bundle.manifest
    if not config.merge:
        weights = next(file.size for file in manifest.files if file.path == WEIGHTS)
        return beside + weights + adapters * most_bytes(manifest.lora)[ADAPTER_WEIGHTS]
    return beside + stored_bytes(manifest.architecture, config.precision)


def _manifest(
    bundle: Bundle,
    adapters: list[NamedAdapter],
    config: ExportConfig,
    losses: dict[str, float],
    versions: dict[str, str],
    files: list[File],
) -> ModelManifest:
    source, (first, *others) = bundle.manifest, adapters
    return ModelManifest(
        format=MODEL_FORMAT,
        format_version=FORMAT_VERSION,
        base=source.base,
        tokenizer=source.tokenizer,
        lora=source.lora,
        weights=config.precision if config.merge else source.base.weights,
        adapter=None if config.merge else adapter_file(first.name),
        losses=losses,
        provenance={
            "bundle_manifest_sha256": source.manifest_sha256,
            "adapter_sha256": first.sha256,
            **{f"adapter_sha256 {each.name}": each.sha256 for each in others},
            "edgetune": __version__,
            **versions,
        },
        files=sorted(files, key=lambda file: file.path),
        encoding=first.encoding,
        adapters={each.name: each.encoding for each in adapters} if others else {},
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


def _write_kept(bundle: Bundle, folder: Path, adapters: list[NamedAdapter]) -> None:
    import onnx

    model = onnx.load(str(bundle.path / MODEL), load_external_data=False)
    add_lora_inputs(model, bundle.manifest.lora)
    onnx.save(model, str(folder / MODEL))
    for each in adapters:
        file = folder / adapter_file(each.name)
        file.parent.mkdir(exist_ok=True)
        values = graph_values(bundle.manifest.lora, each.parameters, adapter_gains(bundle, each.parameters))
        write_onnx_adapter(file, values)


def _examples(bundle: Bundle, rows: Path | None, encoding: RowEncoding) -> list[Example]:
    if rows is None:
        return []
    encoder = load_encoder(bundle.path, bundle.manifest.tokenizer, encoding)
    # Whatever is left of a long row says as much about what quantising changes.
    return list(load_examples(rows, encoder, bundle.manifest.max_length, truncate=True).examples)


def _kept_losses(
    bundle: Bundle,
    folder: Path,
    adapters: list[NamedAdapter],
    examples: list[list[Example]],
    say: Callable[[str], None],
) -> dict[str, float]:
    losses: dict[str, float] = {}
    if not any(examples):
        return losses
    model = Measured(folder, bundle.manifest.architecture.rope)
    for each, rows in zip(adapters, examples, strict=True):
        if rows:
            say(f"measuring the answer loss on {len(rows)} validation rows")
            pulse = pulse_of(rows, say, 2)
            base, adapted = "base", "base + adapter"
            if len(adapters) > 1:
                base, adapted = f"base, rows of {each.name}", f"base + {each.name}"
            losses[base] = model.answer_loss(rows, pulse)
            losses[adapted] = model.answer_loss(rows, pulse, adapter=folder / adapter_file(each.name))
    return losses
