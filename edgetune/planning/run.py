"""What a run asks of planning: its options, parsed once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edgetune.config import Method, OptimizerStates, PlanName, RuntimeName, Sharding, TrainConfig, TrainingPrecision
from edgetune.data.buckets import Bucket, parse_buckets
from edgetune.devices.place import Place
from edgetune.errors import UsageError
from edgetune.formats.manifest import RowEncoding
from edgetune.machine.torchrun import process_count
from edgetune.runtimes.contract import OptimizerConfig
from edgetune.runtimes.execution import Accelerator
from edgetune.runtimes.forward_only import QueryConfig
from edgetune.text.byte_size import parse_bytes
from edgetune.text.time_span import parse_seconds

_LAYERS = re.compile(r"(\d{1,6})(-(\d{1,6})?)?")


@dataclass(frozen=True)
class Batching:
    """Which rows make a step, and in which order."""

    batch_size: int
    """Rows of a batch."""
    gradient_accumulation_steps: int
    """Batches of a step."""
    packing: bool
    """Put several rows into one sequence."""
    share_prefixes: bool
    """There, compute once what rows begin with in common."""
    shuffle: bool
    """Draw a new order every epoch."""
    seed: int


@dataclass(frozen=True)
class RunLength:
    """How far a run goes."""

    steps: int | None
    epochs: float | None
    """Counts where `steps` is none; where both are, the number of rows decides."""
    warmup_steps: int
    eval_steps: int | None = None
    """Steps after which the validation rows are measured; none where they are after every epoch."""


@dataclass(frozen=True)
class TrunkRequest:
    """That the trunk of a split bundle computes the lowest layers."""

    vitisai_config: Path | None


@dataclass(frozen=True)
class LayerSpan:
    """Decoder layers that follow each other, whatever the model's number of them."""

    first: int
    last: int | None
    """None is the model's last."""

    def of(self, count: int) -> range:
        """The layers of a model with so many."""
        return range(self.first, count if self.last is None else self.last + 1)

    def __str__(self) -> str:
        """As `--layers` takes it."""
        if self.last is None:
            return f"{self.first}-"
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class LayerSpans:
    """Which decoder layers are to be trained."""

    spans: tuple[LayerSpan, ...]

    def __str__(self) -> str:
        """As `--layers` takes it."""
        return ",".join(map(str, self.spans))


def parse_layers(text: str) -> LayerSpans:
    """Read `16-31`, `16-`, `16`, or several of them with commas between.

    Raises:
        UsageError: It is none of them.
    """
    spans = []
    for word in text.split(","):
        found = _LAYERS.fullmatch(word.strip())
        if found is None or (found[3] and int(found[3]) < int(found[1])):
            raise UsageError(
                f"--layers {text!r:.40}: expected layers counted from 0, such as 16-31, 16-, 16 or 0-3,16-31"
            )
        first = int(found[1])
        spans.append(LayerSpan(first, int(found[3]) if found[3] else None if found[2] else first))
    return LayerSpans(tuple(spans))


@dataclass(frozen=True)
class RunRequest:
    """A run, as planning sees it: every option is checked and has its own type."""

    place: Place
    runtime: RuntimeName
    accelerator: Accelerator | None
    """What executes the whole step in static shapes; none on a runtime that takes any shape."""
    plan: PlanName
    sharding: Sharding
    """What several processes of the torch runtime divide between them."""
    processes: int
    """That share the rows of each step."""
    precision: TrainingPrecision
    trunk: TrunkRequest | None
    """None where the plan runs all layers itself."""
    layers: LayerSpans | None
    """None where all layers above the trunk are trained."""
    lower_layers_cache_bytes: int
    """Most bytes on disk of what enters the lowest trained layer."""
    queries: QueryConfig | None
    """How forward-only training estimates the gradient; none where a backward pass computes it."""
    memory_budget_bytes: int | None
    """Most memory of the process; none where what the machine has free, or the device has, is what counts."""
    shapes: tuple[Bucket, ...]
    """The only shapes of batches on an accelerator that were asked for; empty where none were."""
    threads: int | None
    optimizer: OptimizerConfig
    optimizer_states: OptimizerStates
    batching: Batching
    length: RunLength
    truncate: bool
    """Cut rows that are longer than the bundle takes, or than the device does; otherwise those that the bundle does not
    take are left out, and those that the device does not take are refused."""
    encoding: RowEncoding
    time_budget_seconds: float | None = None
    """Wall time after which the run pauses; none for as long as it takes."""
    free_memory_bytes: int | None = None
    """Memory to take as free here: what was free when a run that goes on was planned. None where it is asked for."""

    @property
    def needs_layers(self) -> bool:
        """Whether only the layered form does what is asked for, whatever the plan."""
        in_steps = self.optimizer.lora_plus_ratio != 1 or self.optimizer_states == "8bit"
        return self.precision != "auto" or self.trunk is not None or self.layers is not None or in_steps

    @property
    def forward_only(self) -> bool:
        """Whether there is no backward pass."""
        return self.queries is not None

    @property
    def method(self) -> Method:
        """As `--method` takes it."""
        return "forward-only" if self.forward_only else "backpropagation"

    def device_shapes(self) -> list[Bucket]:
        """The only shapes that the device takes of this run, the shortest first; empty where any will do."""
        return [] if self.accelerator is None else self.place.shapes()


def run_request(config: TrainConfig, place: Place, *, accelerated: bool) -> RunRequest:
    """Parse the options of a run.

    Args:
        config: How to train, as it holds at that place.
        place: Where.
        accelerated: Whether the runtime executes the whole step in static shapes.

    Raises:
        UsageError: A size, a list of shapes or layers that are none.
    """
    accelerator = Accelerator(config.device_type, config.soc_model, config.require_npu)
    queries = QueryConfig(config.queries, config.perturbation_size, config.seed)
    return RunRequest(
        place=place,
        runtime=config.runtime,
        accelerator=accelerator if accelerated else None,
        plan=config.plan,
        sharding=config.sharding,
        processes=process_count() if config.runtime == "torch" else 1,
        precision=config.precision,
        trunk=TrunkRequest(config.vitisai_config) if config.trunk else None,
        layers=None if config.layers is None else parse_layers(config.layers),
        lower_layers_cache_bytes=parse_bytes(config.lower_layers_cache),
        queries=queries if config.method == "forward-only" else None,
        memory_budget_bytes=None if config.memory_budget is None else parse_bytes(config.memory_budget),
        shapes=() if config.buckets is None else tuple(parse_buckets(config.buckets)),
        threads=config.threads,
        optimizer=OptimizerConfig(config.weight_decay, config.max_grad_norm, config.lora_plus_ratio),
        optimizer_states=config.optimizer_states,
        batching=Batching(
            config.batch_size,
            config.gradient_accumulation_steps,
            config.packing,
            config.share_prefixes,
            config.shuffle,
            config.seed,
        ),
        length=RunLength(config.steps, config.epochs, config.warmup_steps, config.eval_steps),
        truncate=config.truncate,
        encoding=RowEncoding(raw_prompts=config.raw_prompts, content_as_text=config.content_as_text),
        time_budget_seconds=None if config.time_budget is None else parse_seconds(config.time_budget),
    )
