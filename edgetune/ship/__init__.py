"""What an app ships to train on the device: portable graphs, weights in files that stores take, and a description.

    SHIPPED/
      target.json       everything that a training loop has to know; every file with its size and SHA-256
      model/            step.onnx, loss.onnx, adamw.onnx, weights-00.bin, weights-01.bin, …
      adapter/          the LoRA parameters to start from, in PEFT's format, apart from the base
      tokenizer.json, tokenizer_config.json, chat_template.jinja, …

For Android the same files lie in asset packs, `PACK/src/main/assets/…`; ONNX Runtime wants a graph's weights beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgetune import __version__
from edgetune.config import ENOUGH_STEPS, PlatformName, ShipConfig, TrainConfig, check_config
from edgetune.data.encode import TEMPLATE_FILE, TOKENIZER_FILE
from edgetune.errors import IncompatibleError, VerificationError
from edgetune.formats.adapter import PREFIX, WEIGHTS, read_adapter, write_adapter
from edgetune.formats.bundle import Bundle, list_files
from edgetune.formats.genai import CONFIG, SIDE_FILES, end_tokens
from edgetune.formats.manifest import FORMAT_VERSION
from edgetune.formats.manifest_json import read_manifest, write_manifest
from edgetune.formats.storage import atomic_folder, write_file
from edgetune.model import adamw
from edgetune.model.learning_rate import suitable_rate
from edgetune.model.lora import initial_parameters
from edgetune.ship.budget import SizedFile, budgets, refuse_what_is_too_large, sizes
from edgetune.ship.external_data import Span, external_spans, redirect
from edgetune.ship.manifest import KINDS, Adapter, Optimizer, ShippedFile, ShippedManifest, Text, describe_graph
from edgetune.ship.packs import ASSETS, MODEL_PACK, assign_packs, move_into_packs
from edgetune.ship.platforms import PLATFORMS, Content, Platform
from edgetune.ship.shards import Shard, moved, plan_shards, write_shard
from edgetune.text.byte_size import bytes_text
from edgetune.text.pulse import silent

MANIFEST = "target.json"
ROLES = ("step", "loss", "adamw")
"""The portable graphs."""

_GRAPHS, _ADAPTER = "model", "adapter"
"""Folders of a shipped folder; what lies beside them is text."""
_CONTENTS: dict[str, Content] = {_GRAPHS: "graphs", _ADAPTER: "adapter"}
_TEXT = set(SIDE_FILES) - {CONFIG}
"""Files that are copied from the bundle, where it has them."""
_LARGEST_GRAPH = 256 << 20
"""Bytes; a graph without weights has some megabytes."""


@dataclass(frozen=True)
class ShippedFolder:
    """What an app ships, on the disk."""

    path: Path
    manifest: ShippedManifest


def lay_out(
    bundle: Bundle,
    name: PlatformName,
    output: Path,
    config: ShipConfig = ShipConfig(),
    *,
    say: Callable[[str], None] = silent,
    platform: Platform | None = None,
) -> ShippedFolder:
    """Lay out what an app ships.

    Args:
        bundle: The verified bundle.
        name: The platform that the app goes to.
        output: The folder to write.
        config: What to start from.
        say: Called with one line of text as each stage begins.
        platform: Limits other than those of `name`.

    Raises:
        UsageError: The output exists, or there is no adapter.
        IncompatibleError: The adapter is of another bundle.
        VerificationError: A graph refers to what the bundle does not have.
        ResourceError: A file or the whole is larger than the platform takes, or the disk has no room for it.
    """
    check_config(config)
    if bundle.manifest.lora.dora:
        raise IncompatibleError(
            f"{bundle.path}: its slots have magnitudes (DoRA), which the loops of an app do not train yet; ship a "
            "bundle that was prepared without --dora"
        )
    platform = platform or PLATFORMS[name]
    graphs = {role: _read_graph(bundle, role) for role in ROLES}
    weights = _weights(bundle, graphs)
    shards = plan_shards(weights, platform.shard)
    texts = sum(file.size for file in bundle.manifest.files if file.path in _TEXT)
    needed = sum(map(len, graphs.values())) + texts + sum(shard.size for shard in shards)
    with atomic_folder(output, replace=config.force, marker=MANIFEST, needed=needed) as folder:
        (folder / _GRAPHS).mkdir()
        for role, graph in graphs.items():
            write_file(_graph_file(folder, role), redirect(graph, lambda span: moved(span, shards)))
        _write_adapter(bundle, folder / _ADAPTER, config)
        _write_text(bundle, name, folder)
        files = _sized(folder, shards, platform)
        refuse_what_is_too_large(name, platform, files, weights)
        for shard in shards:
            say(f"Writing {shard.name}, {bytes_text(shard.size)} …")
            write_shard(shard, bundle.path, folder / _GRAPHS / shard.name)
        say("Hashing …")
        data = write_manifest(_describe(bundle, name, platform, folder, files))
        if platform.packs:
            move_into_packs(folder, files)
            write_file(folder / MODEL_PACK / ASSETS / MANIFEST, data)
        write_file(folder / MANIFEST, data)
    return ShippedFolder(output, read_manifest(data, ShippedManifest, str(output / MANIFEST)))


def _graph_file(folder: Path, role: str) -> Path:
    return folder / _GRAPHS / f"{role}.onnx"


def _read_graph(bundle: Bundle, role: str) -> bytes:
    path = bundle.file(role)
    if (size := path.stat().st_size) > _LARGEST_GRAPH:
        raise VerificationError(f"{path} has {size:,} bytes, a graph without weights at most {_LARGEST_GRAPH:,}")
    return path.read_bytes()


def _weights(bundle: Bundle, graphs: Mapping[str, bytes]) -> dict[Span, str]:
    """What the graphs take from other files of the bundle, with a tensor's name."""
    listed = {file.path: file.size for file in bundle.manifest.files}
    weights: dict[Span, str] = {}
    problems = []
    for role, graph in graphs.items():
        try:
            references = external_spans(graph)
        except ValueError as error:
            raise VerificationError(f"{bundle.file(role)}: {error}; make the bundle anew") from error
        for tensor, span in references:
            weights[span] = tensor
            if not 0 <= span.offset <= span.end <= listed.get(span.file, -1):
                where = f"bytes {span.offset:,} to {span.end:,} of {span.file!r:.80}"
                problems.append(f"{bundle.file(role)}: {tensor!r:.80} lies in {where}, which are not the bundle's")
    if problems:
        raise VerificationError("\n".join([*problems, "make the bundle anew"]))
    return weights


def _write_adapter(bundle: Bundle, folder: Path, config: ShipConfig) -> None:
    """Write the parameters that the app starts from."""
    manifest = bundle.manifest
    if config.adapter is not None:
        parameters = read_adapter(config.adapter, manifest.lora, manifest.base, manifest.tokenizer)
    else:
        parameters = initial_parameters(manifest.lora, seed=TrainConfig().seed)
    folder.mkdir()
    write_adapter(
        folder,
        base=manifest.base,
        tokenizer=manifest.tokenizer,
        lora=manifest.lora,
        parameters=parameters,
        provenance={"edgetune": __version__},
    )


def _write_text(bundle: Bundle, name: PlatformName, folder: Path) -> None:
    """Copy what turns text into token ids; a board also gets what to install."""
    for file in bundle.manifest.files:
        if file.path in _TEXT:
            shutil.copyfile(bundle.path / file.path, folder / file.path)
    if name == "linux-arm64":
        pins = (Path(__file__).parent / "device_requirements.txt").read_text(encoding="utf-8")
        write_file(folder / "requirements.txt", f"{pins}edgetune=={__version__}\n".encode())


def _sized(folder: Path, shards: Iterable[Shard], platform: Platform) -> list[SizedFile]:
    """Every file of the shipped folder, those that are written and the weights that are not yet."""
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        content = _CONTENTS.get(name.partition("/")[0], "text")
        files.append(SizedFile(name, path.stat().st_size, content))
    files += [SizedFile(f"{_GRAPHS}/{shard.name}", shard.size, "weights") for shard in shards]
    return assign_packs(files) if platform.packs else files


def _describe(
    bundle: Bundle, name: PlatformName, platform: Platform, folder: Path, files: list[SizedFile]
) -> ShippedManifest:
    manifest, defaults = bundle.manifest, TrainConfig()
    packs = {file.path: file.pack for file in files}
    return ShippedManifest(
        format=ShippedManifest.FORMAT,
        format_version=FORMAT_VERSION,
        target=name,
        base=manifest.base,
        architecture=manifest.architecture,
        tokenizer=_text(bundle),
        lora=manifest.lora,
        max_length=manifest.max_length,
        kinds=KINDS,
        graphs=[describe_graph(manifest.graph(role), f"{_GRAPHS}/{role}.onnx", manifest.lora) for role in ROLES],
        weights=[file.path for file in files if file.content == "weights"],
        optimizer=Optimizer(
            beta1=adamw.BETA1,
            beta2=adamw.BETA2,
            epsilon=adamw.EPSILON,
            learning_rate=suitable_rate(manifest.architecture.hidden_size, manifest.lora, ENOUGH_STEPS),
            weight_decay=defaults.weight_decay,
            max_grad_norm=defaults.max_grad_norm,
        ),
        adapter=Adapter(f"{_ADAPTER}/{WEIGHTS}", PREFIX),
        sizes=sizes(files),
        budgets=budgets(platform, files),
        provenance=manifest.provenance | {"edgetune": __version__},
        files=[
            ShippedFile(file.path, file.size, file.sha256, packs[file.path])
            for file in list_files(folder, without=MANIFEST)
        ],
    )


def _text(bundle: Bundle) -> Text:
    from tokenizers import Tokenizer

    tokens = bundle.manifest.tokenizer
    tokenizer = Tokenizer.from_file(str(bundle.path / TOKENIZER_FILE))
    eos = tokenizer.token_to_id(tokens.eos_token)
    if eos is None:
        raise VerificationError(f"{bundle.path / TOKENIZER_FILE}: has no token {tokens.eos_token!r}; prepare it anew")
    return Text(
        file=TOKENIZER_FILE,
        chat_template=TEMPLATE_FILE if tokens.chat_template_sha256 else None,
        bos_token=tokens.bos_token,
        bos_token_id=None if tokens.bos_token is None else tokenizer.token_to_id(tokens.bos_token),
        eos_token=tokens.eos_token,
        eos_token_id=eos,
        stop_token_ids=list(end_tokens(bundle.path)),
        pad_token_id=tokens.pad_token_id,
    )
