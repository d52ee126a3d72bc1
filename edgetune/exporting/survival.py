"""What survives a merge: the answer losses of all that an export can write, and the gate that they open or shut.

Measured are base, base + adapter, and the merged model in every precision. The one that was asked for lies in the model
folder; the others are trials, written beside it one at a time, measured and removed. They say what would keep more, and
what would do with less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

from edgetune.config import ExportConfig, MergedPrecision
from edgetune.data.encode import IGNORED, Example
from edgetune.errors import IncompatibleError, NoRoomError
from edgetune.exporting.keep import add_lora_inputs, graph_values
from edgetune.exporting.merge import merge_adapter
from edgetune.formats.bundle import Bundle
from edgetune.formats.frozen_weights import stored_bytes
from edgetune.formats.genai import MODEL
from edgetune.formats.json_file import read_object
from edgetune.generation.measure import Measured
from edgetune.host.checkpoint import CONFIG
from edgetune.host.rope_config import with_older_rope_keys
from edgetune.machine.disk import require_room
from edgetune.model.lora import Parameters
from edgetune.text.pulse import Pulse

BASE, ADAPTED = "base", "base + adapter"
"""What losses are called that no merge has."""
MERGED_CHECKPOINT = "merged checkpoint"
"""What that of a merged Hugging Face folder is called."""
_PRECISIONS: tuple[MergedPrecision, ...] = get_args(MergedPrecision)


@dataclass(frozen=True)
class Merge:
    """A bundle and what is merged into it."""

    bundle: Bundle
    parameters: Parameters
    """The adapter, as `Lora.shapes` names it."""
    gains: Parameters
    """Of every slot (out_features,), as `Slot.gain` names them, where slots have magnitudes."""

    def write(self, folder: Path, precision: MergedPrecision) -> None:
        """Write graph and weights of the merged model into `folder`.

        Raises:
            IncompatibleError: The graph is not what GenAI's builder makes of a Phi-3, or a weight fills no blocks.
        """
        source = self.bundle
        merge_adapter(source.path, folder, source.manifest.lora, self.parameters, precision, self.gains)


def merged(precision: MergedPrecision) -> str:
    """What the loss of a merged model is called."""
    return f"merged {precision}"


def written_as(config: ExportConfig) -> str:
    """What the loss of the merged model is called that a configuration asks for."""
    return MERGED_CHECKPOINT if config.format == "safetensors" else merged(config.precision)


def share_kept(losses: Mapping[str, float], of: str) -> float | None:
    """How much of the adapter's gain over the base a model has: 1 for all of it, 0 where it answers as the base.

    Args:
        losses: Answer loss of `base`, `base + adapter` and others.
        of: Whose share it is.

    Returns:
        The share; None where it was not measured, or the adapter is no better than the base.
    """
    if not {BASE, ADAPTED, of} <= losses.keys():
        return None
    gain = losses[BASE] - losses[ADAPTED]
    return (losses[BASE] - losses[of]) / gain if gain > 0 else None


def measure_merges(
    merge: Merge, folder: Path, config: ExportConfig, examples: list[Example], say: Callable[[str], None]
) -> dict[str, float]:
    """The answer losses on held-out rows, in nats a trained token.

    Args:
        merge: What was merged.
        folder: Holds the merged model of the precision that the configuration asks for; trials are made in it.
        config: The precision, and whether there are trials.
        examples: The rows; without any, nothing is measured.
        say: Called with a line of text as each model begins, and for each trial that is left out.

    Returns:
        Of `base`, `base + adapter`, and `merged PRECISION` of each that was written.
    """
    if not examples:
        return {}
    say(f"measuring the answer loss on {len(examples)} validation rows")
    tried = [each for each in _PRECISIONS if config.trials or each == config.precision]
    pulse = pulse_of(examples, say, 2 + len(tried))
    losses = _losses_apart(merge, examples, pulse)
    for precision in tried:
        if precision == config.precision:
            losses[merged(precision)] = _loss_of(merge, folder, examples, pulse)
        elif (loss := _loss_of_trial(merge, folder, precision, examples, pulse, say)) is not None:
            losses[merged(precision)] = loss
    return losses


def measure_checkpoint(
    merge: Merge, folder: Path, examples: list[Example], say: Callable[[str], None]
) -> dict[str, float]:
    """The same of a merged Hugging Face folder, which transformers computes in the folder's own type.

    Args:
        merge: What was merged.
        folder: The Hugging Face folder.
        examples: The rows; without any, nothing is measured.
        say: Called with a line of text as it begins.

    Returns:
        Of `base`, `base + adapter` and `merged checkpoint`.
    """
    if not examples:
        return {}
    say(f"measuring the answer loss on {len(examples)} validation rows")
    pulse = pulse_of(examples, say, 3)
    return _losses_apart(merge, examples, pulse) | {MERGED_CHECKPOINT: _loss_of_checkpoint(folder, examples, pulse)}


def refuse_what_lost_too_much(losses: Mapping[str, float], config: ExportConfig, base: str) -> None:
    """The gate: a merged model that keeps too little of what was learnt is not written.

    Args:
        losses: What `measure_merges` or `measure_checkpoint` gave.
        config: The least share, and what was asked for.
        base: How the bundle stores its weights.

    Raises:
        IncompatibleError: It keeps less. The message has all losses, and names what keeps enough.
    """
    written = written_as(config)
    kept = share_kept(losses, written)
    if kept is None or kept >= config.least_kept or config.least_kept == 0:
        return
    measured = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    ways = [
        f"--precision {precision} ({share:.1%})"
        for precision in reversed(_PRECISIONS)
        if (share := share_kept(losses, merged(precision))) is not None and share >= config.least_kept
    ]
    if written != merged("fp32") and merged("fp32") not in losses:
        ways.append("--format genai --precision fp32")
    ways.append("--keep-adapter (100.0%)")
    if config.precision == "int4" and base != "int4":
        ways.append("an adapter that was trained on an int4 base (prepare --base int4)")
    model = written if written == MERGED_CHECKPOINT else f"model merged into {config.precision}"
    raise IncompatibleError(
        f"the {model} keeps {kept:.1%} of what was learnt, expected "
        f"{config.least_kept:.1%} or more (answer loss: {measured}), so it was not written; what keeps it: "
        f"{', '.join(ways)}; or write it all the same with a lower --least-kept (0 accepts any)"
    )


def pulse_of(examples: list[Example], say: Callable[[str], None], models: int) -> Pulse:
    """Of rows that are measured with several models, one after the other."""
    return Pulse(say, f"measured {{}} of {models * len(examples):,} rows ({models} models)")


def _losses_apart(merge: Merge, examples: list[Example], pulse: Pulse) -> dict[str, float]:
    """Of the base, and of the adapter beside it."""
    import onnx

    source = merge.bundle
    graph = onnx.load(str(source.path / MODEL), load_external_data=False)
    add_lora_inputs(graph, source.manifest.lora)
    # It is gone before a merged model is loaded: two big ones in memory would be one too many.
    apart = Measured(source.path, source.manifest.architecture.rope, graph.SerializeToString())
    values = graph_values(source.manifest.lora, merge.parameters, merge.gains)
    return {BASE: apart.answer_loss(examples, pulse), ADAPTED: apart.answer_loss(examples, pulse, values=values)}


def _loss_of_trial(
    merge: Merge,
    folder: Path,
    precision: MergedPrecision,
    examples: list[Example],
    pulse: Pulse,
    say: Callable[[str], None],
) -> float | None:
    """The loss of a model that is written for this alone; None where it cannot be."""
    # Inside of the folder: what a killed process leaves goes with it.
    with TemporaryDirectory(prefix=".trial-", dir=folder) as trial:
        try:
            require_room(Path(trial), stored_bytes(merge.bundle.manifest.architecture, precision))
            merge.write(Path(trial), precision)
        except (NoRoomError, IncompatibleError) as error:
            say(f"the merge into {precision} is not measured: {error}")
            return None
        return _loss_of(merge, Path(trial), examples, pulse)


def _loss_of(merge: Merge, folder: Path, examples: list[Example], pulse: Pulse) -> float:
    return Measured(folder, merge.bundle.manifest.architecture.rope).answer_loss(examples, pulse)


def _loss_of_checkpoint(folder: Path, examples: list[Example], pulse: Pulse) -> float:
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    # transformers 4 would take a rotary embedding that transformers 5 described for none.
    config = Phi3Config.from_dict(with_older_rope_keys(read_object(folder / CONFIG, "export again")))
    model = Phi3ForCausalLM.from_pretrained(folder, config=config, dtype="auto", local_files_only=True).eval()
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for example in examples:
            labels = torch.tensor(example.labels[1:])
            scores = model(torch.tensor([example.input_ids]), use_cache=False).logits[0, :-1].double()
            total += float(torch.nn.functional.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="sum"))
            tokens += int((labels != IGNORED).sum())
            pulse.add(1)
    return total / tokens
