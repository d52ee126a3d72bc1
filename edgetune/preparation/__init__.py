"""From a checkpoint to a bundle: export, differentiate, lower, quantise, seal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from edgetune import __version__
from edgetune.config import PrepareConfig, check_config
from edgetune.data.encode import Example, load_encoder
from edgetune.data.examples import load_examples
from edgetune.data.source import Source, kept
from edgetune.errors import DataError, UsageError, VerificationError
from edgetune.formats.bundle import MANIFEST, Bundle, list_files, seal_bundle
from edgetune.formats.frozen_weights import FrozenWeights, stored_bytes, write_index
from edgetune.formats.manifest import BUNDLE_FORMAT, BUNDLE_VERSION, BaseModel, BundleManifest, Graph, Tokenizer
from edgetune.formats.roles import HALF_LOSS, HALF_STEP, INDEX, LOSS, STEP
from edgetune.formats.row_norms import write_row_norms
from edgetune.formats.storage import atomic_folder, sha256_of
from edgetune.host.checkpoint import Checkpoint, copy_chat_template, open_checkpoint, refuse_non_finite
from edgetune.host.versions import version_of
from edgetune.model.architecture import Architecture, frozen_weights
from edgetune.model.blocks import BITS
from edgetune.model.lora import Lora
from edgetune.preparation.builder_view import builder_view
from edgetune.preparation.slots import check_slots, lora_of
from edgetune.side_environment import ensure_side_environment
from edgetune.text.pulse import silent

if TYPE_CHECKING:
    import onnx_ir as ir

HOST_TOOLS = ("torch", "transformers", "optimum-onnx", "olive-ai", "onnxruntime-genai", "onnxruntime", "onnx", "peft")
"""Packages whose versions the manifest records."""


def prepare(
    checkpoint: str | PathLike[str],
    output: str | PathLike[str],
    config: PrepareConfig = PrepareConfig(),
    *,
    say: Callable[[str], None] = silent,
) -> Bundle:
    """Make a bundle of a Phi-3 checkpoint. This is work for a host.

    Args:
        checkpoint: A local Hugging Face folder, or a hub id.
        output: The bundle to write; it appears whole or not at all.
        config: Slots, base and limits.
        say: Called with one line of text as each stage begins.

    Returns:
        The bundle, as `load_bundle` gives it.

    Raises:
        UsageError: A value of the configuration that cannot be meant; there is no checkpoint, no file of calibration
            rows or none for gptq, targets or patterns name what there is not, a rank is above the features of the
            model's widest slot, or the output exists.
        DataError: Calibration rows that cannot be used; raised before anything is built.
        IncompatibleError: Another family, a broken chat template, or an operator without gradient.
        VerificationError: The checkpoint is incomplete or broken, holds NaN or infinity, or names no end-of-text token.
        MissingDependencyError: A host package is not installed, or the side environment cannot be made.
        ResourceError: The disk has less room than the bundle needs, or memory ran out.
        LockedError: Another process writes the output.
        EdgetuneError: Olive failed.
    """
    check_config(config)
    lora_of(config)
    if config.quantiser == "gptq":
        if config.base != "int4":
            raise UsageError(f"quantiser gptq belongs to base int4; base is {config.base}")
        if config.calibration is None:
            raise UsageError(
                "quantiser gptq rounds on rows, and there are none: give some with --calibration, such as those to "
                "train on; least-squares needs none"
            )
    if config.dora and config.npu != "none":
        raise UsageError(
            f"the step for NPUs (npu {config.npu}) takes no magnitudes; leave dora out for it, or make a bundle of each"
        )
    rows = nullcontext() if config.calibration is None else kept(config.calibration)
    with rows as calibration:
        return _prepare(fspath(checkpoint), Path(output), config, calibration, say)


def _prepare(
    checkpoint: str, output: Path, config: PrepareConfig, calibration: Source | None, say: Callable[[str], None]
) -> Bundle:
    provenance = {"edgetune": __version__, **{name: version_of(name) for name in HOST_TOOLS}}
    source = open_checkpoint(checkpoint, download=config.download, blocks=config.base in BITS)
    check_slots(source.architecture, config)
    positions = source.architecture.max_position_embeddings
    if config.max_length > positions:
        say(f"The longest row is {positions} tokens, the model's positions, not {config.max_length}")
        config = replace(config, max_length=positions)
    bos, eos = _special_tokens(source)
    _check_rows(source, config, calibration, bos, eos, say)
    refuse_non_finite(source)
    from edgetune.preparation.gptq import round_on_rows
    from edgetune.preparation.graphs.layered import build_layers
    from edgetune.preparation.rewrites.frozen_weights import index_weights

    # First what may need the network, then what takes long.
    ensure_side_environment(say)
    # Graphs, which hold no weights, and what lies there on the way take little beside them.
    needed = stored_bytes(source.architecture, config.base) + _int8_bytes(source.architecture, config)
    with atomic_folder(output, replace=config.force, marker=MANIFEST, needed=needed) as folder:
        # Inside the folder: what a killed process leaves goes with it.
        with TemporaryDirectory(prefix=".scratch-", dir=folder) as scratch:
            view = builder_view(source, Path(scratch) / "source")
            say(f"Building the {config.base} GenAI model (Olive) …")
            _build_inference_model(source, view, folder, config)
            tokenizer = _tokenizer(source, folder, bos, eos)
            rows = [] if calibration is None else _encoded(calibration, folder, tokenizer, config.max_length)
            if config.quantiser == "gptq":
                round_on_rows(view, folder, source.architecture, rows, say)
            (folder / INDEX).parent.mkdir(parents=True)
            (folder / INDEX).write_bytes(write_index(index_weights(folder, source.architecture, config.base)))
            say("Exporting the forward graph (Optimum) …")
            lora, coverage, lowered = _build_training_graphs(source, view, Path(scratch), folder, config, say)
            say("Exporting and differentiating the sublayers …")
            roles = build_layers(view, Path(scratch), folder, source, config, say)
        # NPUs, for which it is said, do not train magnitudes.
        if rows and not config.dora:
            say("Looking for what float16 does not hold …")
            provenance["float16"] = _in_float16(source, folder, config, lora, lowered[STEP], rows)
            say(f"In float16: {provenance['float16']}")
        if config.npu != "none":
            say(f"Writing the step with int8 weights ({config.npu}) …")
            roles += _build_int8_step(source, folder, config, rows, lora, lowered)
        _learn_ends(folder, tokenizer, say)
        say("Hashing …")
        manifest = _manifest(source, folder, config, tokenizer, lora, coverage, roles, provenance)
        sealed = seal_bundle(folder, manifest)
    return Bundle(output, sealed)


def _int8_bytes(architecture: Architecture, config: PrepareConfig) -> int:
    """Bytes of the step with int8 weights, at least: each weight as it is, and transposed in one term or two."""
    copies = {"none": 0, "blocks": 2, "qdq": 3}[config.npu]
    return copies * architecture.num_hidden_layers * sum(frozen_weights(architecture).values())


def _build_inference_model(source: Checkpoint, view: Path, folder: Path, config: PrepareConfig) -> None:
    from edgetune.preparation.genai_model import build_genai_model

    build_genai_model(view, folder, config.base, config.quantiser)
    copy_chat_template(source, folder)


def _learn_ends(folder: Path, tokenizer: Tokenizer, say: Callable[[str], None]) -> None:
    """Let the model stop where training ends an answer, and say what the chat template means for training."""
    from edgetune.preparation.conversations import try_conversations
    from edgetune.preparation.genai_model import stop_at

    if tokenizer.chat_template_sha256 is None:
        say("The model has no chat template: rows are prompt/completion or text")
        return
    encoder = load_encoder(folder, tokenizer)
    found = try_conversations(encoder)
    if found.end is not None:
        name = encoder.decode([found.end], skip_special_tokens=False)
        added = ", where the model did not stop until now" if stop_at(folder, found.end) else ""
        say(f"Answers end with {name}{added}")
        if found.closed_by_text:
            say(f"The chat template closes turns with text alone: {name} is trained after a row's last answer only")
    if not found.shows_system:
        say("The chat template leaves the system's text out: rows are trained without it, generate refuses --system")


def _build_training_graphs(
    source: Checkpoint, view: Path, scratch: Path, folder: Path, config: PrepareConfig, say: Callable[[str], None]
) -> tuple[Lora, dict[str, int], dict[str, ir.Model]]:
    """Slots, gradient coverage, and the step and the loss for float16 whose frozen weights are still inputs.

    There are none for magnitudes, which nothing trains in float16.
    """
    import numpy as np
    import onnx_ir as ir

    from edgetune.model.lora import initial_parameters
    from edgetune.preparation.gradient import ARTIFACTS, differentiate
    from edgetune.preparation.graphs.adamw import build_adamw
    from edgetune.preparation.graphs.evaluation import evaluation_graph
    from edgetune.preparation.graphs.forward import export_forward
    from edgetune.preparation.rewrites.frozen_weights import absorb_transposes, attach_weights
    from edgetune.preparation.rewrites.lowering import lower
    from edgetune.preparation.rewrites.magnitudes import put_magnitudes
    from edgetune.preparation.rewrites.shapes import resolve_shapes

    lora = export_forward(view, scratch / "forward.onnx", config)
    if lora.dora:
        write_row_norms(folder, lora, FrozenWeights(folder, source.architecture))
    forward = resolve_shapes(ir.load(scratch / "forward.onnx"))
    parameters = {name: np.zeros(shape, np.float32) for name, shape in lora.differentiated().items()}
    if not lora.dora:  # what ONNX Runtime Training's own graphs begin with
        parameters = initial_parameters(lora, seed=0)
    names = list(parameters)
    graphs = {LOSS: evaluation_graph(forward, names)}
    if not lora.dora:
        graphs[HALF_LOSS] = evaluation_graph(forward, names, half=True)
    say("Differentiating (ONNX Runtime Training) …")
    coverage = differentiate(forward, parameters, scratch, say)
    say(f"Gradient coverage: {sum(coverage.values())} operators of {len(coverage)} kinds, all have a gradient")
    say("Lowering to standard operators …")
    gradient = scratch / ARTIFACTS["training_model"]
    graphs[STEP] = lower(ir.load(gradient), names)
    lowered: dict[str, ir.Model] = {}
    if lora.dora:
        for role in (STEP, LOSS):
            put_magnitudes(graphs[role], folder, lora)
    else:
        graphs[HALF_STEP] = lower(ir.load(gradient), names, half=True)
        halves = {STEP: HALF_STEP, LOSS: HALF_LOSS}
        lowered = {role: ir.from_proto(ir.to_proto(graphs[half])) for role, half in halves.items()}
        graphs |= {name: ir.load(scratch / file) for name, file in ARTIFACTS.items()}
    for role, graph in graphs.items():
        if role != "optimizer_model":
            attach_weights(graph, folder, source.architecture, config.base)
        if role in ("training_model", "eval_model"):
            absorb_transposes(graph)
    graphs["adamw"] = build_adamw(lora)
    for role, graph in graphs.items():
        ir.save(graph, folder / f"{role}.onnx")
    if not lora.dora:
        (folder / "checkpoint").write_bytes((scratch / "checkpoint").read_bytes())
    return lora, coverage, lowered


def _build_int8_step(
    source: Checkpoint,
    folder: Path,
    config: PrepareConfig,
    rows: Sequence[Example],
    lora: Lora,
    lowered: dict[str, ir.Model],
) -> list[str]:
    """Write the graphs for NPUs; returns their roles. Without rows ranges are measured on random tokens."""
    from edgetune.preparation.rewrites.int8_step import write_int8_graphs
    from edgetune.preparation.rewrites.ranges import calibrate, synthetic_rows

    architecture, base = source.architecture, config.base
    rows = rows or synthetic_rows(architecture, config.max_length)
    ranges = calibrate(lowered[STEP], folder, architecture, base, lora, rows)
    return write_int8_graphs(lowered, folder, architecture, base, config.npu, ranges)


def _in_float16(
    source: Checkpoint, folder: Path, config: PrepareConfig, lora: Lora, step: ir.Model, rows: Sequence[Example]
) -> str:
    """Whether an NPU that computes in half precision holds the step's tensors on these rows, in words."""
    from edgetune.preparation.rewrites.ranges import largest_magnitudes
    from edgetune.runtimes.whole.first_batch import LARGEST_HALF

    found = largest_magnitudes(step, folder, source.architecture, config.base, lora, rows)
    beyond = {name: largest for name, largest in found.items() if not largest <= LARGEST_HALF}
    name = next(iter(beyond), None) or max(found, key=lambda each: found[each])
    which = f"{name!r} reaches {found[name]:,.0f} of {LARGEST_HALF:,.0f}"
    return f"{len(beyond)} tensors are not held, the first {which}" if beyond else f"every tensor is held, {which}"


def _check_rows(
    source: Checkpoint,
    config: PrepareConfig,
    calibration: Source | None,
    bos: str | None,
    eos: str,
    say: Callable[[str], None],
) -> None:
    """Read tokenizer, chat template and calibration rows before the long stages: a bad one does not cost their work."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shutil.copyfile(source.path / "tokenizer.json", folder / "tokenizer.json")
        copy_chat_template(source, folder)
        tokenizer = _tokenizer(source, folder, bos, eos)
        encoder = load_encoder(folder, tokenizer)
        if encoder.template is not None:
            encoder.template.compile()
        if calibration is not None:
            rows = load_examples(calibration, encoder, config.max_length, truncate=True)
            for line in rows.notices:
                say(line)
            if not rows.examples:
                raise DataError([f"{config.calibration}: no row can be used"])


def _encoded(rows: Source, folder: Path, tokenizer: Tokenizer, max_length: int) -> Sequence[Example]:
    """Rows as token ids, long ones cut.

    By the folder's tokenizer.json, as in training: the model builder may have written another than the checkpoint's.
    """
    return load_examples(rows, load_encoder(folder, tokenizer), max_length, truncate=True).examples


def _manifest(
    source: Checkpoint,
    folder: Path,
    config: PrepareConfig,
    tokenizer: Tokenizer,
    lora: Lora,
    coverage: dict[str, int],
    more: list[str],
    provenance: dict[str, str],
) -> BundleManifest:
    from edgetune.preparation.graphs.evaluation import describe_graph

    revision = {"revision": source.revision} if source.revision else {}
    quantiser = {"quantiser": config.quantiser} if config.base == "int4" else {}
    artifacts = () if lora.dora else (HALF_STEP, HALF_LOSS, "training_model", "eval_model", "optimizer_model")
    roles = (STEP, LOSS, "adamw", *artifacts, "model", *more)
    graphs = [Graph(role, f"{role}.onnx", *describe_graph(folder / f"{role}.onnx")) for role in roles]
    return BundleManifest(
        format=BUNDLE_FORMAT,
        format_version=BUNDLE_VERSION,
        base=BaseModel(source.name, source.sha256(), config.base),
        architecture=source.architecture,
        tokenizer=tokenizer,
        lora=lora,
        max_length=config.max_length,
        graphs=graphs,
        gradient_coverage=coverage,
        provenance={**provenance, **revision, **quantiser},
        files=list_files(folder, without=MANIFEST),
    )


def _special_tokens(source: Checkpoint) -> tuple[str | None, str]:
    """Texts of the beginning- and the end-of-text token."""
    path = source.path / "tokenizer_config.json"
    described = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    bos, eos = (_token_text(described.get(key)) for key in ("bos_token", "eos_token"))
    if eos is None:
        raise VerificationError(f"{path}: names no eos_token; add one, training ends every row with it")
    return bos, eos


def _tokenizer(source: Checkpoint, folder: Path, bos: str | None, eos: str) -> Tokenizer:
    template = folder / "chat_template.jinja"
    return Tokenizer(
        sha256=sha256_of(folder / "tokenizer.json"),
        chat_template_sha256=sha256_of(template) if template.is_file() else None,
        bos_token=bos,
        eos_token=eos,
        pad_token_id=source.config.get("pad_token_id") or 0,
    )


def _token_text(token: object) -> str | None:
    """A special token is written as its text, or as an object whose `content` is the text."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
