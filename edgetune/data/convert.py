"""What `edgetune data convert` does: a file of any known form becomes rows that `train` takes as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from edgetune.config import ConvertConfig, FormName, check_config
from edgetune.data.containers import container_of, records_of
from edgetune.data.conversions import FORMS, Converter, converter_of
from edgetune.data.encode import load_encoder
from edgetune.data.json_lines import LINE_LIMIT
from edgetune.data.problems import FormError, Problems, RowError
from edgetune.data.rows import row_of
from edgetune.data.source import Source, kept, name_of
from edgetune.data.tool_calls import ModelTools, NoModel, ToolWriter
from edgetune.errors import DataError, UsageError
from edgetune.formats.bundle import Bundle, as_bundle
from edgetune.formats.storage import atomic_file
from edgetune.text.pulse import silent

_MOST_NAMES = 12
"""Of fields that are left out, which are named."""


@dataclass(frozen=True)
class Conversion:
    """What was converted."""

    path: Path
    """The JSONL file."""
    container: str
    """What held the records: JSONL, JSON, CSV or Parquet."""
    form: FormName
    """What they were."""
    rows: int
    """Rows that were written."""
    bad_rows: int
    """Records that were left out because of a problem."""
    left_out: list[str]
    """Names of fields that no row has any more."""


def convert(
    data: str | PathLike[str],
    output: str | PathLike[str],
    config: ConvertConfig = ConvertConfig(),
    *,
    form: FormName | None = None,
    bundle: Bundle | str | PathLike[str] | None = None,
    say: Callable[[str], None] = silent,
) -> Conversion:
    """Make rows of a file of training data. No more than one record is held, of a Parquet file a few hundred.

    Args:
        data: JSONL, JSON, CSV or Parquet, packed with gzip or not; `-` is standard input.
        output: The JSONL file to write; it appears when all is well.
        config: Which columns are what, and what becomes of bad records.
        form: What the records are; without it, the first one says it.
        bundle: The model for which tools and their calls are written.
        say: Called with one line of text on what was found, and what was left out.

    Returns:
        What was found and how many rows there are.

    Raises:
        UsageError: There is no such file, or the output cannot be written.
        DataError: Naming every record that is wrong; or the file holds nothing that can be converted.
        IncompatibleError: The bundle does not fit this edgetune.
        MissingDependencyError: The file needs a package that is not installed.
        VerificationError: A file of the bundle was changed.
    """
    check_config(config)
    data, output = Path(data), Path(output)
    if output.exists() and data.exists() and output.samefile(data):
        raise UsageError(f"{output} is the file that is converted; choose another output")
    writer = _writer_of(bundle)
    with kept(data) as source, atomic_file(output, replace=config.force) as file:
        container = container_of(source)
        converter: Converter | None = None
        problems = Problems(source)
        rows = 0
        for record in records_of(source, container):
            try:
                if record.problem:
                    raise RowError(record.problem)
                if converter is None:
                    converter = converter_of(record.value, form, _columns(config), writer)
                    say(f"{name_of(source)}: {container}, {FORMS[converter.form]}{_mapped(converter)}")
                line = _line_of(converter, record.value, record.line)
            except FormError as error:
                raise DataError([f"{name_of(source)}:{record.line}: {error.told(source)}"]) from error
            except RowError as error:
                problems.add(record.line, str(error))
            else:
                file.write(line)
                rows += 1
        _settle(problems, rows, source, config, say)
    assert converter is not None, "there are rows"
    left_out = sorted(converter.left_out)
    if left_out:
        names = ", ".join(left_out[:_MOST_NAMES]) + (", …" if len(left_out) > _MOST_NAMES else "")
        say(f"{name_of(data)}: left out, because nothing is trained on them: {names}")
    return Conversion(output, container.value, converter.form, rows, problems.count, left_out)


def _line_of(converter: Converter, record: object, line: int) -> bytes:
    row = converter.row_of(record)
    row_of(row, line)  # whether it can be trained on
    written = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    if len(written) > LINE_LIMIT:
        raise RowError(f"makes a row of {len(written):,} bytes, and {LINE_LIMIT:,} are the most; split it")
    return written


def _settle(problems: Problems, rows: int, source: Source, config: ConvertConfig, say: Callable[[str], None]) -> None:
    """End with all problems, or, where bad records are to be left out, say them and go on."""
    if not rows or not config.skip_bad:
        problems.raise_if_any()
    if not rows:
        raise DataError([f"{name_of(source)}:1: the file has no rows"])
    if problems.count:
        say(str(DataError(problems.told())))
        say(f"{name_of(source)}: {problems.count:,} records were left out")


def _writer_of(bundle: Bundle | str | PathLike[str] | None) -> ToolWriter:
    if bundle is None:
        return NoModel()
    opened = as_bundle(bundle)
    return ModelTools(load_encoder(opened.path, opened.manifest.tokenizer), opened.path)


def _columns(config: ConvertConfig) -> dict[str, str | None]:
    return {"prompt": config.prompt_column, "completion": config.completion_column, "system": config.system_column}


def _mapped(converter: Converter) -> str:
    """Which columns are what, where that was to be found out."""
    columns = converter.columns
    if columns is None or (columns.prompt, columns.completion, columns.system) == ("prompt", "completion", None):
        return ""
    system = "" if columns.system is None else f", {columns.system!r} as the system's text"
    return f": {columns.prompt!r} as the prompt, {columns.completion!r} as the completion{system}"
