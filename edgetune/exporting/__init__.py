"""From bundle and adapter to a model folder for ONNX Runtime GenAI: merged, or base and adapter side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

from edgetune import __version__
from edgetune.config import ExportConfig, check_config
from edgetune.data.encode import Example, load_encoder
from edgetune.data.examples import load_examples
from edgetune.errors import IncompatibleError, UsageError, VerificationError
from edgetune.exporting.adapters import AdapterPaths, NamedAdapter, read_adapters
from edgetune.exporting.gains import adapter_gains
from edgetune.exporting.keep import add_lora_inputs, graph_values, write_onnx_adapter
from edgetune.exporting.merge import merge_adapter
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
from edgetune.model.lora import Parameters
from edgetune.text.pulse import Pulse, silent

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
    losses: dict[str, float]
    """Answer loss on the validation rows of `base`, `base + adapter` and `merged`; empty when there were no rows. Of
    several adapters, `base, rows of NAME` and `base + NAME` for each that has rows."""
    bytes: int
    """Size of all files."""

    @property
    def kept(self) -> float | None:
        """Share of what was learnt that the merged model keeps; see `share_kept`."""
        return share_kept(self.losses)


def share_kept(losses: Mapping[str, float]) -> float | None:
    """How much of the adapter's gain over the base a merged model has: 1 for all of it, 0 where it answers as the base.

    Args:
        losses: Answer loss of `base`, `base + adapter` and `merged`.

    Returns:
        The share; None where nothing was merged or measured, or the adapter is no better than the base.
    """
    if "merged" not in losses:
        return None
    gain = losses["base"] - losses["base + adapter"]
    return (losses["base"] - losses["merged"]) / gain if gain > 0 else None


def export(
    bundle: Bundle | str | PathLike[str],
    adapter: AdapterPaths,
    output: str | PathLike[str],
    config: ExportConfig = ExportConfig(),
    *,
    valid: str | PathLike[str] | None = None,
    say: Callable[[str], None] = silent,
) -> ExportReport:
    """Write a model folder for ONNX Runtime GenAI. This is work for a host.

    Args:
        bundle: What the adapter was trained on: its path, or what `load_bundle` gave.
        adapter: The adapter folder, of `train` or of PEFT. Beside the base there may be several, by name; the first of
            them answers unless another is asked for.
        output: The folder to write; it appears whole or not at all.
        config: Merged or kept apart, and in which precision.
        valid: Rows to measure on; without them, those that the adapter's training was validated on.
        say: Called with one line of text as each stage begins.

    Returns:
        Where the model is, how large, and the answer losses that were measured, in nats a trained token.

    Raises:
        UsageError: A value of the configuration that cannot be meant, there is no adapter, or its name cannot be a
            file's, several are to be merged, `output` is there already, or a merge into int4 has no rows to measure on.
        DataError: `valid` has bad rows.
        IncompatibleError: The adapter does not fit the bundle, or the merged model keeps too little of it.
        VerificationError: A file of adapter or bundle was changed.
        MissingDependencyError: A host package is not installed.
        NoRoomError: The disk has less room than the model needs.
        LockedError: Another process writes `output`.
    """
    check_config(config)
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
    versions = {name: version_of(name) for name in _TOOLS}
    listed = {file.path: file for file in bundle.manifest.files}
    needed = _needed(bundle, config, len(adapters), sum(listed[name].size for name in SIDE_FILES if name in listed))
    with (
        computing_with(config.threads),
        atomic_folder(output, replace=config.force, marker=MANIFEST, needed=needed) as folder,
    ):
        files = [_copy(bundle.path, folder, listed[name]) for name in SIDE_FILES if name in listed]
        if config.merge:
            say(f"merging the adapter into {config.precision} weights")
            (only,) = adapters
            gains = adapter_gains(bundle, only.parameters)
            merge_adapter(bundle.path, folder, bundle.manifest.lora, only.parameters, config.precision, gains)
            values = graph_values(bundle.manifest.lora, only.parameters, gains)
            losses = _merged_losses(bundle, folder, values, examples[0], say)
            _refuse_what_lost_too_much(losses, config)
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
    return ExportReport(output, kind, losses, sum(file.size for file in files))


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


def _refuse_what_lost_too_much(losses: Mapping[str, float], config: ExportConfig) -> None:
    kept = share_kept(losses)
    if kept is None or kept >= config.least_kept or config.least_kept == 0:
        return
    measured = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    raise IncompatibleError(
        f"the model merged into {config.precision} keeps {kept:.1%} of what was learnt, expected "
        f"{config.least_kept:.1%} or more (answer loss: {measured}), so it was not written; use --precision fp32 or "
        "--keep-adapter, or accept it with a lower --least-kept"
    )


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


def _merged_losses(
    bundle: Bundle, folder: Path, values: Parameters, examples: list[Example], say: Callable[[str], None]
) -> dict[str, float]:
    import onnx

    if not examples:
        return {}
    say(f"measuring the answer loss on {len(examples)} validation rows")
    graph = onnx.load(str(bundle.path / MODEL), load_external_data=False)
    add_lora_inputs(graph, bundle.manifest.lora)
    rope = bundle.manifest.architecture.rope
    apart = Measured(bundle.path, rope, graph.SerializeToString())
    pulse = _pulse(examples, say, 3)
    losses = {
        "base": apart.answer_loss(examples, pulse),
        "base + adapter": apart.answer_loss(examples, pulse, values=values),
    }
    del apart  # two big models in memory would be one too many
    return losses | {"merged": Measured(folder, rope).answer_loss(examples, pulse)}


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
            pulse = _pulse(rows, say, 2)
            base, adapted = "base", "base + adapter"
            if len(adapters) > 1:
                base, adapted = f"base, rows of {each.name}", f"base + {each.name}"
            losses[base] = model.answer_loss(rows, pulse)
            losses[adapted] = model.answer_loss(rows, pulse, adapter=folder / adapter_file(each.name))
    return losses


def _pulse(examples: list[Example], say: Callable[[str], None], models: int) -> Pulse:
    """Of rows that are measured with several models, one after the other."""
    return Pulse(say, f"measured {{}} of {models * len(examples):,} rows ({models} models)")
