"""A bundle on disk: opening it verifies every byte, sealing it writes the manifest."""

from __future__ import annotations

import re
import stat
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

from edgetune.errors import UsageError, VerificationError
from edgetune.formats.git_lfs import FETCH, refuse_pointers, size_behind
from edgetune.formats.manifest import ROW_NORMS, BundleManifest, File
from edgetune.formats.manifest_json import ManifestT, read_manifest, write_manifest
from edgetune.formats.storage import recover, sha256_of, write_file
from edgetune.model.architecture import Architecture
from edgetune.model.lora import Lora

MANIFEST = "manifest.json"
_READ_ELSEWHERE = {".jinja", ".safetensors", ".bin", ".data"}
"""Kinds that a bundle may list no file of, and that are looked for in a model's folder."""
LARGEST_MANIFEST = 16 << 20
"""Bytes; a model with 40 layers has some 300,000."""
_LARGEST_SIZE = 2**31 - 1
"""Of a model's dimensions; indices of tensors are 32 bits wide here and there."""
_MOST_PARAMETERS = 1 << 40
"""Numbers in all slots together: four terabytes."""
_LONGEST_PATH = 255
"""Characters of a listed path."""
_PARAMETER = re.compile(r"model\..*\.lora_([AB]\.weight|magnitude_vector)")
"""An input of the graphs that hold a whole step; those of the layered form say no layer."""
_PLAIN_NAME = re.compile(r"(?!\.{1,2}$)[^/\\:\0]+")
"""A name that leads nowhere else, on Windows neither."""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were all verified when it was loaded."""

    path: Path
    """Its folder."""
    manifest: BundleManifest
    """What it is made of: the base, the sizes of the model, the slots, the tokenizer, and every file with its hash."""

    def file(self, role: str) -> Path:
        """Path of the graph that plays `role`: `step`, `loss`, `adamw`, `training_model` and so on."""
        return self.path / self.manifest.graph(role).file


def load_bundle(path: str | PathLike[str]) -> Bundle:
    """Verify every file of a bundle, and say what it is.

    Reading all of a bundle takes time, so that whoever uses one often loads it once: all functions that take a bundle
    take what this gives as well as a path.

    Args:
        path: The folder that `prepare` or `split` made.

    Raises:
        UsageError: There is no bundle at `path`.
        LockedError: It is being replaced right now.
        IncompatibleError: A format or version that this edgetune does not read.
        VerificationError: A file is missing, changed, not listed or not a regular file, or the manifest contradicts
            itself.
    """
    path = Path(path)
    recover(path)
    if not is_there(path / MANIFEST):
        raise UsageError(
            f"{path}: no bundle here (no {MANIFEST}); make one with `edgetune prepare CHECKPOINT --output {path}`"
        )
    manifest = load_manifest(path / MANIFEST, BundleManifest)
    if problems := _contradictions(manifest) + _strangers(path, manifest):
        raise VerificationError("\n".join(f"{path / MANIFEST}: {problem}" for problem in problems))
    verify_files(path, manifest.files)
    return Bundle(path, manifest)


def as_bundle(bundle: Bundle | str | PathLike[str]) -> Bundle:
    """A bundle that was given as one, as it is; or the one at a path, verified.

    Raises:
        EdgetuneError: As `load_bundle` does, where it was a path.
    """
    return bundle if isinstance(bundle, Bundle) else load_bundle(bundle)


def is_there(path: Path) -> bool:
    """Whether a file has that name, or a link, wherever it leads: it is refused as a link, not missed as a file."""
    return path.is_file() or path.is_symlink()


def load_manifest(path: Path, kind: type[ManifestT]) -> ManifestT:
    """Read and verify the manifest of a folder.

    Raises:
        IncompatibleError: A format or version that this edgetune does not read.
        VerificationError: It was changed, is not a regular file, or is far too large.
    """
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise VerificationError(f"{_link_told(path)}; {_without_links(path.parent, lost=not path.exists())}")
    if not stat.S_ISREG(status.st_mode):
        raise VerificationError(f"{path} is not a regular file; copy the folder again from its source")
    if status.st_size > LARGEST_MANIFEST:
        raise VerificationError(f"{path} has {status.st_size:,} bytes, a manifest has at most {LARGEST_MANIFEST:,}")
    refuse_pointers([path])
    return read_manifest(path.read_bytes(), kind, str(path))


def verify_files(folder: Path, files: list[File]) -> None:
    """Check every listed file: inside the folder, regular, of the right size and hash; report all that fail.

    Hard links pass: whatever other names a file has, its bytes are the listed ones, and systems that keep images in an
    object store (OSTree) install every file as one.

    Raises:
        VerificationError: Naming each file that fails, what was expected and what was found.
    """
    problems = {entry.path: problem for entry in files if (problem := _problem(folder, entry))}
    if problems:
        linked = [name for name in problems if _leads_inside(name) and _linked(folder, name)]
        lost = not all((folder / name).exists() for name in linked)
        fixes = [_without_links(folder, lost=lost)] if linked else []
        if len(linked) < len(problems):
            fixes.append(f"copy {folder} again from its source, or make it anew")
        raise VerificationError("\n".join([*problems.values(), *fixes]))


def _leads_inside(path: str) -> bool:
    return len(path) <= _LONGEST_PATH and all(_PLAIN_NAME.fullmatch(part) for part in path.split("/"))


def _linked(folder: Path, name: str) -> bool:
    """Whether a file is a link, or lies behind one."""
    parts = name.split("/")
    with suppress(OSError):  # of a name that no file system takes
        return any(folder.joinpath(*parts[:depth]).is_symlink() for depth in range(1, len(parts) + 1))
    return False


def _link_told(path: Path) -> str:
    return f"{path} is a link" if path.exists() else f"{path} is a link that leads nowhere"


def _without_links(folder: Path, *, lost: bool) -> str:
    """What to do about a folder of links, as the hub's cache and `cp -rs` make them; `lost` when one leads nowhere."""
    copy = f"copy {folder} again from its source with `cp -rL`" if lost else f"copy it with `cp -rL {folder} COPY`"
    return f"only files are opened, so none changes from elsewhere: {copy}, or fetch it from the hub with `--local-dir`"


def _problem(folder: Path, entry: File) -> str | None:
    if not _leads_inside(entry.path):
        return f"{entry.path!r:.80} is not the path of a file inside {folder}"
    path = folder / entry.path
    try:
        if _linked(folder, entry.path):
            return _link_told(path) if path.is_symlink() else f"{path} lies behind a link"
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return f"{path} is not a regular file"
        if status.st_size != entry.size:
            if (behind := size_behind(path)) is not None:
                return f"{path} is a Git LFS pointer in the place of {behind:,} bytes: {FETCH}"
            return f"{path} has {status.st_size:,} bytes, its manifest says {entry.size:,}"
        if (found := sha256_of(path)) != entry.sha256:
            return f"{path} was changed: SHA-256 is {found[:16]}…, its manifest says {entry.sha256[:16]}…"
    except (FileNotFoundError, NotADirectoryError):
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None


def _contradictions(manifest: BundleManifest) -> list[str]:
    """What no bundle can have, and what a manifest says twice and not alike.

    All that is loaded has to be a file that is verified.
    """
    paths = [file.path for file in manifest.files]
    listed = {file.path: file.sha256 for file in manifest.files}
    pinned = {
        "tokenizer.json": manifest.tokenizer.sha256,
        "chat_template.jinja": manifest.tokenizer.chat_template_sha256,
    }
    problems = [
        f"the {graph.role} graph is {graph.file!r}, which is not a listed file"
        for graph in manifest.graphs
        if graph.file not in listed
    ]
    problems += _impossible_sizes(manifest.architecture) + _impossible_rows(manifest)
    problems += _impossible_parameters(manifest.lora) + _other_inputs(manifest)
    if manifest.lora.dora and ROW_NORMS not in listed:
        problems.append(f"the slots have magnitudes, and {ROW_NORMS}, with which these begin, is not a listed file")
    layers = manifest.architecture.num_hidden_layers
    # The upper layers of a divided model keep their numbers.
    if (adapted := manifest.lora.layers()) and adapted[-1] != layers - 1:
        problems.append(f"num_hidden_layers is {layers}, and the highest layer with LoRA parameters is {adapted[-1]}")
    problems += [f"{name} is listed {count} times" for name, count in Counter(paths).items() if count > 1]
    return problems + [
        f"{name} has SHA-256 {listed[name]} among the files, {sha256} with the tokenizer"
        for name, sha256 in pinned.items()
        if name in listed and listed[name] != sha256
    ]


def _impossible_sizes(architecture: Architecture) -> list[str]:
    sizes = {name: value for name, value in asdict(architecture).items() if type(value) is int}
    if wrong := {name: value for name, value in sizes.items() if not 1 <= value <= _LARGEST_SIZE}:
        return [f"{name} is {value}, expected 1 to {_LARGEST_SIZE:,}" for name, value in wrong.items()]
    problems = []
    heads, shared, rope = architecture.num_attention_heads, architecture.num_key_value_heads, architecture.rope
    if heads % shared:
        problems.append(f"num_attention_heads is {heads}, which is no multiple of num_key_value_heads {shared}")
    if not 2 <= rope.dim <= architecture.head_dim or rope.dim % 2:
        problems.append(f"rope.dim is {rope.dim}, expected an even number from 2 to head_dim {architecture.head_dim}")
    factors = {"short_factor": rope.short_factor, "long_factor": rope.long_factor}
    given = {name: values for name, values in factors.items() if values is not None}
    problems += [
        f"rope.{name} has {len(values)} numbers, expected {rope.dim // 2}"
        for name, values in given.items()
        if len(values) != rope.dim // 2
    ]
    numbers = {"theta": [rope.theta], "attention_factor": [rope.attention_factor], **given}
    return problems + [
        f"rope.{name} is {low[0]:g}, expected a number above 0"
        for name, values in numbers.items()
        if (low := [value for value in values if value <= 0])
    ]


def _impossible_rows(manifest: BundleManifest) -> list[str]:
    problems = []
    tokens, pad = manifest.architecture.vocab_size, manifest.tokenizer.pad_token_id
    if pad >= tokens:
        problems.append(f"pad_token_id is {pad}, expected a token of the vocabulary: 0 to {tokens - 1}")
    positions, longest = manifest.architecture.max_position_embeddings, manifest.max_length
    if not 2 <= longest <= positions:
        problems.append(f"max_length is {longest}, expected 2 to max_position_embeddings {positions}")
    return problems


def _impossible_parameters(lora: Lora) -> list[str]:
    """What no slots can be; a bundle without any opens, as its rows can be looked at."""
    counts = Counter(slot.name for slot in lora.slots)
    problems = [f"slot {name!r:.80} is there {count} times" for name, count in counts.items() if count > 1]
    problems += [
        f"slot {slot.name!r:.80} takes {slot.in_features} and gives {slot.out_features} features, "
        f"expected 1 to {_LARGEST_SIZE:,}"
        for slot in lora.slots
        if not all(1 <= size <= _LARGEST_SIZE for size in (slot.in_features, slot.out_features))
    ]
    widest = lora.highest_rank
    ranks = {"rank": lora.rank, **{f"rank_pattern.{module}": rank for module, rank in lora.rank_pattern.items()}}
    problems += [
        f"lora.{name:.80} is {rank}, expected at most the {widest} features of the widest slot"
        for name, rank in ranks.items()
        if rank > widest
    ]
    problems += [
        f"lora has a pattern for {module!r:.80}, expected one of target_modules {', '.join(lora.target_modules):.80}"
        for module in (*lora.rank_pattern, *lora.alpha_pattern)
        if module not in lora.target_modules
    ]
    if (count := lora.parameters) > _MOST_PARAMETERS:
        problems.append(f"the slots have {count:,} parameters, expected at most {_MOST_PARAMETERS:,}")
    return problems


def _other_inputs(manifest: BundleManifest) -> list[str]:
    """Graphs that take other parameters than those of the slots, or tables of another width."""
    slots = {name: list(shape) for name, shape in manifest.lora.shapes().items()}
    width = [manifest.architecture.rope.dim]
    problems = []
    for graph in manifest.graphs:
        taken = {spec.name: spec.shape for spec in graph.inputs}
        given = {name: shape for name, shape in taken.items() if _PARAMETER.fullmatch(name)}
        if given and given != slots:
            name = min(name for name in slots | given if slots.get(name) != given.get(name))
            problems.append(
                f"the {graph.role} graph takes {name:.80} of shape {given.get(name)!s:.40}, "
                f"the slots' is {slots.get(name)}"
            )
        problems += [
            f"the {graph.role} graph takes {name} of shape {taken[name]!s:.40}, rope.dim is {width[0]}"
            for name in ("rope_cos", "rope_sin")
            if name in taken and taken[name][-1:] != width
        ]
    return problems


def _strangers(folder: Path, manifest: BundleManifest) -> list[str]:
    """Files that were put among the listed ones and are of their kinds, so that something might read them.

    A README, the rows for training or a folder with nothing that is listed harm nobody.
    """
    listed = {file.path for file in manifest.files} | {MANIFEST}
    kinds = {Path(name).suffix for name in listed} | _READ_ELSEWHERE
    folders = {(folder / name).parent for name in listed if _leads_inside(name)}
    found = sorted(path for each in folders if each.is_dir() for path in each.iterdir())
    return [
        f"{name} is in the folder and not listed; move it elsewhere"
        for path in found
        if (name := path.relative_to(folder).as_posix()) not in listed
        and path.suffix in kinds - {""}
        and not path.name.startswith(".")
    ]


def list_files(folder: Path, *, without: str) -> list[File]:
    """Every file under `folder` but the manifest called `without`, hashed."""
    paths = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).as_posix() != without
    )
    return [File(path.relative_to(folder).as_posix(), path.stat().st_size, sha256_of(path)) for path in paths]


def seal_bundle(folder: Path, manifest: BundleManifest) -> BundleManifest:
    """Write the manifest of a folder whose files are complete; returns it with its own hash filled in."""
    data = write_manifest(manifest)
    write_file(folder / MANIFEST, data)
    return read_manifest(data, BundleManifest, str(folder / MANIFEST))
