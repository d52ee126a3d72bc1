"""Rows from pipes, from standard input, and packed with gzip."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgetune.cli import main
from edgetune.data import source as sources
from edgetune.data.problems import Problems
from edgetune.data.rows import Row, TextRow, read_rows
from edgetune.data.source import STDIN, kept, name_of, open_source, refuse_shared
from edgetune.errors import DataError, UsageError
from edgetune.formats.adapter import MANIFEST, VALIDATION_DATA, VALIDATION_SHA256
from edgetune.formats.bundle import Bundle, load_manifest
from edgetune.formats.manifest import AdapterManifest
from support.golden import GOLDEN
from support.prepared_bundles import Prepared
from support.tiny_bundle import make_bundle

LINES = [json.dumps({"text": f"row {number}"}).encode() + b"\n" for number in range(1, 6)]
ROWS = [TextRow(number, f"row {number}") for number in range(1, 6)]
PACKED = gzip.compress(b"".join(LINES))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def rows_of(path: Path) -> list[Row]:
    problems = Problems(path)
    rows = list(read_rows(path, problems))
    problems.raise_if_any()
    return rows


def problems_of(path: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        rows_of(path)
    return caught.value.problems


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@contextmanager
def fifo(path: Path, content: bytes) -> Iterator[Path]:
    """A named pipe that gives this once."""
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(content,), daemon=True)
    writer.start()
    yield path
    writer.join(10)


def edgetune(*arguments: object, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)], input=stdin)


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What bash makes of a command in which `edgetune` is ours."""
    script = f'edgetune() {{ "{sys.executable}" -m edgetune "$@"; }}; set -o pipefail; {command}'
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )


# gzip


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl"])
def test_packed_rows_are_read_whatever_their_name(tmp_path: Path, name: str) -> None:
    assert rows_of(write(tmp_path / name, PACKED)) == ROWS


@pytest.mark.parametrize("padding", [b"", b"\0" * 700])
def test_several_members_and_what_fills_a_tape(tmp_path: Path, padding: bytes) -> None:
    members = b"".join(gzip.compress(line) for line in (*LINES[:2], b"", *LINES[2:]))
    assert rows_of(write(tmp_path / "rows.gz", members + padding)) == ROWS


def test_a_member_that_ends_within_a_row(tmp_path: Path) -> None:
    content = b"".join(LINES)
    assert rows_of(write(tmp_path / "rows.gz", gzip.compress(content[:25]) + gzip.compress(content[25:]))) == ROWS


def test_a_file_whose_end_only_looks_packed_is_plain(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "rows.gz", b"".join(LINES))) == ROWS


@pytest.mark.parametrize("cut", range(2, len(PACKED)))
def test_packed_rows_that_end_too_early(tmp_path: Path, cut: int) -> None:
    problems = problems_of(path := write(tmp_path / "rows.gz", PACKED[:cut]))
    assert problems[-1].startswith(f"{path}:")
    assert "the gzip data ends too early" in problems[-1]


@pytest.mark.parametrize("place", range(2, len(PACKED), 3))
def test_packed_rows_that_are_damaged(tmp_path: Path, place: int) -> None:
    changed = bytearray(PACKED)
    changed[place] ^= 0xFF
    path = write(tmp_path / "rows.gz", bytes(changed))
    if place in (4, 5, 6, 7, 8, 9):
        assert rows_of(path) == ROWS  # time, flags for the compressor and system tell nothing of the content
        return
    assert all(problem.startswith(f"{path}:") for problem in problems_of(path))


def test_the_place_of_the_damage_is_the_line(tmp_path: Path) -> None:
    damaged = bytearray(gzip.compress(LINES[1]))
    damaged[-6] ^= 1  # of the checksum
    path = write(tmp_path / "rows.gz", gzip.compress(LINES[0]) + gzip.compress(LINES[1]) + damaged)
    assert problems_of(path) == [f"{path}:3: the gzip data is damaged (incorrect data check); pack the rows again"]


def test_what_follows_the_last_member_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.gz", PACKED + b"{}")
    assert "the gzip data is damaged (incorrect header check)" in problems_of(path)[0]


def test_nothing_packed_is_no_rows(tmp_path: Path) -> None:
    assert "has no rows" in problems_of(write(tmp_path / "rows.gz", gzip.compress(b"")))[0]


@pytest.mark.parametrize("unit", [b"\n" * 1024, b"x" * 1024, b'{"text": "' + b"a" * 1000 + b'"}\n'])
def test_a_bomb_takes_neither_memory_nor_long(tmp_path: Path, unit: bytes) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    with (path := tmp_path / "rows.gz").open("wb") as file:
        for _ in range(64):
            file.write(packer.compress(unit * ((1 << 20) // len(unit))))
        file.write(packer.flush())
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    problems = Problems(path)
    for _ in read_rows(path, problems):
        pass
    with pytest.raises(DataError, match="holds more than 200 times its size"):
        problems.raise_if_any()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_packed_line_that_is_too_long(tmp_path: Path) -> None:
    noise = os.urandom(1 << 20).hex().encode()
    path = write(tmp_path / "rows.gz", gzip.compress(b'{"text": "' + noise + b'"}\n' + LINES[0], 1))
    assert problems_of(path) == [f"{path}:1: is longer than 1,048,576 bytes; split it into several rows"]


def test_what_has_no_size_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MOST_BYTES", 60)
    with fifo(tmp_path / "pipe", b"".join(LINES)) as pipe:
        assert "more than 60 bytes came until here" in problems_of(pipe)[0]
    assert "more than 60 bytes" in problems_of(write(tmp_path / "rows.gz", PACKED))[0]
    assert rows_of(write(tmp_path / "rows.jsonl", b"".join(LINES))) == ROWS
    refused = pytest.raises(DataError, match=r"other: more than 60")
    with fifo(tmp_path / "other", b"".join(LINES)) as pipe, refused, kept(pipe):
        pass


# Pipes


@pytest.mark.parametrize("content", [b"".join(LINES), PACKED], ids=["plain", "packed"])
def test_a_named_pipe(tmp_path: Path, content: bytes) -> None:
    with fifo(tmp_path / "pipe", content) as pipe:
        assert rows_of(pipe) == ROWS


def test_a_pipe_that_gives_a_byte_at_a_time(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "pipe")

    def give() -> None:
        with path.open("wb", buffering=0) as file:
            for byte in PACKED:
                file.write(bytes([byte]))

    writer = threading.Thread(target=give, daemon=True)
    writer.start()
    assert rows_of(path) == ROWS
    writer.join(10)


def test_rows_are_read_as_they_come(tmp_path: Path) -> None:
    """Nothing waits for the end of a pipe, so that `preview` shows what is there."""
    os.mkfifo(path := tmp_path / "pipe")
    seen = threading.Event()

    def give() -> None:
        with path.open("wb", buffering=0) as file:
            file.write(LINES[0] + LINES[1])
            assert seen.wait(10)
            file.write(b"".join(LINES[2:]))

    writer = threading.Thread(target=give, daemon=True)
    writer.start()
    rows = read_rows(path, Problems(path))
    first = next(rows)
    seen.set()
    assert [first, *rows] == ROWS
    writer.join(10)


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_kept_can_be_read_again(tmp_path: Path, packed: bool) -> None:
    before = set(tmp_path.iterdir())
    with fifo(tmp_path / "pipe", PACKED if packed else b"".join(LINES)) as pipe, kept(pipe) as again:
        for _ in range(2):
            problems = Problems(again)
            assert list(read_rows(again, problems)) == ROWS
            problems.add(3, "is odd")
            with pytest.raises(DataError, match=f"{pipe}:3: is odd"):
                problems.raise_if_any()
        assert set(tmp_path.iterdir()) == before | {pipe}
    file = write(tmp_path / "rows.jsonl", b"".join(LINES))
    with kept(file) as same:
        assert same == file


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/urandom", "/dev/null", "/dev/full"])
def test_devices_are_refused(device: str) -> None:
    with pytest.raises(UsageError, match=f"{device} is neither a file nor a pipe"), open_source(Path(device)):
        pass


def test_names() -> None:
    assert name_of(STDIN) == "<stdin>"
    assert name_of(Path("/dev/fd/63")) == "/dev/fd/63"


# Commands


COMMANDS = {
    "train": ("--output", "{}/adapter", "--steps", 1, "--runtime", "onnxruntime"),
    "preview": ("--json",),
    "eval": ("--json",),
    "plan": ("--json",),
}


@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize("way", ["-", "/dev/stdin", "<(cat rows.jsonl)", "rows.jsonl.gz", "pipe"])
def test_every_way_gives_what_the_file_gives(tmp_path: Path, verb: str, way: str) -> None:
    rows = (GOLDEN / "train.jsonl").read_bytes()
    write(tmp_path / "rows.jsonl", rows)
    write(tmp_path / "rows.jsonl.gz", gzip.compress(rows))
    more = " ".join(str(each).format(tmp_path) for each in COMMANDS[verb])
    before = "mkfifo pipe; cat rows.jsonl > pipe &" if way == "pipe" else ""
    done = shell(f"{before} cat rows.jsonl | edgetune {verb} {GOLDEN}/bundle --data {way} {more}", tmp_path)
    assert done.returncode == 0, done.stderr
    if verb == "train":
        assert (tmp_path / "adapter").is_dir()
    elif verb == "plan":
        assert json.loads(done.stdout)["longest_row"] > 0
    else:
        assert done.stdout == shell(f"edgetune {verb} {GOLDEN}/bundle --data rows.jsonl {more}", tmp_path).stdout


def test_problems_have_the_name_that_was_given(bundle: Bundle, tmp_path: Path) -> None:
    bad = b'{"prompt": "a", "completion": " b"}\n\n[]\n'
    for verb in ("preview", "eval", "plan"):
        done = edgetune(verb, bundle.path, "--data", "-", stdin=bad)
        assert done.exit_code == 3
        assert "<stdin>:3: expected an object" in done.stderr
    long = json.dumps({"prompt": "a", "completion": " b" * 5000}).encode()
    done = edgetune("eval", bundle.path, "--data", "-", stdin=long)
    assert "<stdin>:1: all 1 rows are longer" in done.stderr
    assert edgetune("preview", bundle.path, "--data", "-", stdin=bad[:37]).stdout.startswith("<stdin>:1: ")
    write(tmp_path / "bad.jsonl", bad)
    done = shell(f"edgetune eval {bundle.path} --data <(cat bad.jsonl)", tmp_path)
    assert done.returncode == 3
    assert done.stderr.startswith("error: /dev/fd/")
    assert ":3: expected an object" in done.stderr


def test_nothing_on_standard_input_is_no_rows(bundle: Bundle) -> None:
    done = edgetune("eval", bundle.path, "--data", "-")
    assert done.exit_code == 3
    assert "<stdin>:1: the file has no rows" in done.stderr


@pytest.mark.parametrize(("verb", "more"), [("train", ("--output", "o")), ("plan", ())])
def test_a_pipe_cannot_be_both(bundle: Bundle, tmp_path: Path, verb: str, more: tuple[str, ...]) -> None:
    done = edgetune(verb, bundle.path, "--data", "-", "--valid", "-", *more, stdin=b"".join(LINES))
    assert done.exit_code == 2
    assert "--data and --valid are both <stdin>, which can be read only once" in done.stderr
    os.mkfifo(pipe := tmp_path / "pipe")
    done = edgetune(verb, bundle.path, "--data", pipe, "--valid", pipe, *more)
    assert done.exit_code == 2
    assert f"--data and --valid are both {pipe}" in done.stderr
    both = f"--data - --valid /dev/stdin {' '.join(more)}"
    done = shell(f"cat /dev/null | edgetune {verb} {bundle.path} {both}", tmp_path)
    assert done.returncode == 2
    assert "--data and --valid are both <stdin>" in done.stderr


def test_a_file_can_be_both(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", b"".join(LINES))
    refuse_shared(file, file, "--data and --valid")


def test_validation_rows_of_a_pipe_are_measured_and_not_recorded(tmp_path: Path) -> None:
    arguments = ("train", GOLDEN / "bundle", "--data", GOLDEN / "train.jsonl", "--steps", 1, "--runtime", "onnxruntime")
    rows = (GOLDEN / "valid.jsonl").read_bytes()
    done = edgetune(*arguments, "--valid", "-", "--output", tmp_path / "piped", "--json", stdin=rows)
    assert done.exit_code == 0, done.output
    provenance = load_manifest(tmp_path / "piped" / MANIFEST, AdapterManifest).provenance
    assert {VALIDATION_DATA, VALIDATION_SHA256}.isdisjoint(provenance)
    packed = write(tmp_path / "valid.jsonl.gz", gzip.compress(rows))
    other = edgetune(*arguments, "--valid", packed, "--output", tmp_path / "packed", "--json")
    assert json.loads(other.stdout)["first_validation_loss"] == json.loads(done.stdout)["first_validation_loss"]
    provenance = load_manifest(tmp_path / "packed" / MANIFEST, AdapterManifest).provenance
    assert provenance[VALIDATION_DATA] == "valid.jsonl.gz"


def test_a_pipe_whose_reads_do_not_wait(tmp_path: Path) -> None:
    """Whoever shares standard input may have it non-blocking; a read that finds nothing yet is not the end."""
    code = "import os, subprocess, sys; os.set_blocking(0, False); sys.exit(subprocess.call(sys.argv[1:]))"
    rows = GOLDEN / "train.jsonl"
    halves = f"(head -n 2 {rows}; sleep 3; tail -n +3 {rows})"
    count = len(rows.read_text().splitlines())
    inner = f'"{sys.executable}" -c "{code}" "{sys.executable}" -m edgetune'
    done = shell(f"{halves} | {inner} preview {GOLDEN}/bundle --data - --json", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == count


def test_export_measures_on_rows_of_a_pipe(tmp_path: Path) -> None:
    from support.tiny_phi3 import bundle, save_adapter

    source = bundle("grouped-query", "int4")
    adapter = save_adapter(tmp_path / "adapter", source)
    rows = write(tmp_path / "rows.jsonl", b"".join(LINES))
    losses = []
    for number, valid in enumerate((rows, "-")):
        arguments = ("--adapter", adapter, "--output", tmp_path / f"model-{number}", "--keep-adapter", "--valid", valid)
        done = edgetune("export", source.path, *arguments, "--json", stdin=b"".join(LINES))
        assert done.exit_code == 0, done.output
        losses.append(json.loads(done.stdout)["losses"])
    assert losses[0] == losses[1] != {}


def test_prepare_reads_the_calibration_rows_of_a_pipe_twice(tmp_path: Path) -> None:
    from edgetune.formats.bundle import list_files
    from support.prepared_bundles import CONFIG, prepare_tiny

    rows = write(tmp_path / "rows.jsonl", b"".join(LINES))
    config = replace(CONFIG, npu="qdq", calibration=rows)
    from_file = prepare_tiny("grouped-query", tmp_path / "file", config)
    with fifo(tmp_path / "pipe", PACKED) as pipe:
        from_pipe = prepare_tiny("grouped-query", tmp_path / "piped", replace(config, calibration=pipe))
    int8 = [
        {file.path: file.sha256 for file in list_files(made.path, without="bundle.json") if "int8" in file.path}
        for made in (from_file, from_pipe)
    ]
    assert int8[0] == int8[1] != {}


def test_split_reads_rows_of_a_pipe(prepared: Prepared, tmp_path: Path) -> None:
    source = prepared("grouped-query", "int4")
    done = edgetune("split", source.path, "--data", "-", "--output", tmp_path / "split", "--json", stdin=PACKED)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("given", ["-", "/dev/stdin"])
def test_rows_are_typed_at_a_terminal_until_its_end(given: str) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "edgetune", "preview", str(GOLDEN / "bundle"), "--data", given, "--json"]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        os.write(ours, b'{"text": "a lamp"}\n{"text": "a hall"}\n\x04')
        stdout, stderr = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0, stderr
    assert len(stdout.splitlines()) == 2


@pytest.mark.parametrize(
    "command",
    [
        "train {bundle} --data {golden}/train.jsonl --valid {golden}/valid.jsonl --output {out}/a --steps 1",
        "eval {bundle} --data {golden}/valid.jsonl",
        "plan {bundle} --data {golden}/train.jsonl",
        "preview {bundle} --data {golden}/train.jsonl",
        "inspect {bundle}",
        "bundle {bundle} --target linux-arm64 --output {out}/target",
        "doctor",
    ],
)
def test_nothing_waits_for_a_standard_input_that_stays_open(tmp_path: Path, command: str) -> None:
    arguments = command.format(bundle=GOLDEN / "bundle", golden=GOLDEN, out=tmp_path).split()
    ours, theirs = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "edgetune", *arguments], stdin=ours, capture_output=True, timeout=120, text=True
        )
    finally:
        os.close(theirs)
        os.close(ours)
    assert done.returncode == 0 or command == "doctor", done.stderr
