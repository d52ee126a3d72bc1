"""Which options of a run can be meant, and go together, whatever the bundle and the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from edgetune.config import TrainConfig, check_config
from edgetune.devices.place import Place
from edgetune.errors import UsageError
from edgetune.machine.threads import check_threads
from edgetune.planning.accelerator import ACCELERATED, apply_profile, is_accelerated
from edgetune.planning.candidates import require_runtime
from edgetune.planning.run import RunRequest, run_request
from edgetune.runtimes.execution import ACCELERATING

_WHOLE_ALONE = ("ort-training", "qnn", "openvino-ep", "torch")
"""Runtimes that have the whole step and no other form."""
_OWN_GRADIENTS = ("ort-training", "torch")
"""Those that keep gradients to themselves."""
_OF_BACKWARD = ("keep", "recompute")


@dataclass(frozen=True)
class Resolved:
    """A run's options as they hold at a place."""

    config: TrainConfig
    """With what the device's profile says of its accelerator; for the record of the run."""
    request: RunRequest
    """The same, parsed."""
    notes: tuple[str, ...]
    """Why the CPU computes instead of the device's accelerator, where it does."""


@dataclass(frozen=True)
class _Requirement:
    """Options that mean nothing without another."""

    options: tuple[str, ...]
    """Fields of `TrainConfig`."""
    needed: str
    """As people ask for it."""
    holds: Callable[[TrainConfig, bool], bool]
    """Whether it is given, in the configuration; the boolean says whether the whole step runs in static shapes."""


_REQUIREMENTS = (
    _Requirement(
        ("require_npu", "buckets", "device_type"),
        f"a runtime that compiles the whole step, {ACCELERATED}",
        lambda _, accelerated: accelerated,
    ),
    _Requirement(("sharding",), "--runtime torch", lambda config, _: config.runtime == "torch"),
    _Requirement(("soc_model",), "--runtime qnn", lambda config, _: config.runtime == "qnn"),
    _Requirement(
        ("lower_layers_cache",), "--layers or --trunk", lambda config, _: config.trunk or config.layers is not None
    ),
    _Requirement(
        ("vitisai_config",),
        "--trunk on another runtime than fpga-hls",
        lambda config, _: config.trunk and config.runtime != "fpga-hls",
    ),
    _Requirement(
        ("queries", "perturbation_size"),
        "--method forward-only",
        lambda config, _: config.method == "forward-only",
    ),
)


def resolve(config: TrainConfig, place: Place) -> Resolved:
    """What a run asks for at a place. What is wrong whatever the bundle is refused.

    Args:
        config: How to train.
        place: Where.

    Raises:
        IncompatibleError: The device's accelerator is not here, and the configuration takes nothing else.
        MissingDependencyError: The package of the runtime that was asked for is not installed.
        UsageError: Options that cannot be meant, or not together; a runtime that does not execute the plan.
    """
    check_config(config)
    applied, notes = apply_profile(config, place)
    # The name alone: a path of this machine is nobody else's business.
    config = replace(applied, device=place.name)
    accelerated = is_accelerated(config.runtime, config.plan)
    request = run_request(config, place, accelerated=accelerated)
    if problems := [*_without_effect(config, accelerated), *_contradictions(config, accelerated)]:
        # Why the CPU computes explains what means nothing there.
        raise UsageError("\n".join([*notes, *problems]))
    if place.here:
        if config.threads is not None:
            check_threads(config.threads)
        require_runtime(request)
    return Resolved(config, request, notes)


def _without_effect(config: TrainConfig, accelerated: bool) -> Iterator[str]:
    """Options that were given without what they belong to."""
    default = TrainConfig()
    for requirement in _REQUIREMENTS:
        if requirement.holds(config, accelerated):
            continue
        for option in requirement.options:
            if (value := getattr(config, option)) != getattr(default, option):
                flag = f"--{option.replace('_', '-')}"
                given = flag if value is True else f"{flag} {value}"
                yield f"{given} means nothing without {requirement.needed}; give that as well, or leave {flag} out"


def _contradictions(config: TrainConfig, accelerated: bool) -> Iterator[str]:
    """Options that exclude each other."""
    name, facts = config.runtime, ACCELERATING.get(config.runtime)
    if facts is not None and not facts.takes(config.device_type):
        devices = " or ".join(facts.device_types)
        yield f"--runtime {name} trains on an {devices}, not on --device-type {config.device_type}; leave that out"
    if facts is not None and facts.alone and config.plan not in facts.plans:
        yield f"--runtime {name} does not execute --plan {config.plan}, only {', '.join(facts.plans)}"
    if config.plan == "whole" and not accelerated and config.precision != "auto":
        yield f"--precision {config.precision} is for training layer by layer; leave --plan whole out, or the precision"
    if facts is not None and accelerated and config.precision not in facts.precisions:
        yield f"--runtime {name} does not execute the whole step in --precision {config.precision}; leave that out"
    if config.trunk and (accelerated or config.plan == "whole"):
        yield "--trunk trains the layers above the trunk layer by layer, not as one graph; leave --plan at auto"
    as_one_graph = accelerated or config.plan == "whole" or name in _WHOLE_ALONE
    if config.layers is not None and as_one_graph:
        yield (
            f"--layers {config.layers} trains layer by layer, and the whole step as one graph has every gradient; "
            "leave --plan and --runtime at auto, or --layers out"
        )
    if config.lora_plus_ratio != 1 and as_one_graph:
        yield (
            f"--lora-plus-ratio {config.lora_plus_ratio:g} trains layer by layer, and the whole step as one graph has "
            "one learning rate; leave --plan and --runtime at auto, or --lora-plus-ratio out"
        )
    if config.optimizer_states == "8bit" and as_one_graph:
        yield (
            "--optimizer-states 8bit trains layer by layer, and the whole step as one graph keeps its states in 32 "
            "bits; leave --plan and --runtime at auto, or --optimizer-states out"
        )
    if config.optimizer_states != "auto" and config.method == "forward-only":
        yield (
            f"--optimizer-states {config.optimizer_states} is for AdamW's moments, and --method forward-only has none; "
            "leave it out"
        )
    if config.init == "gradient" and (name in _OWN_GRADIENTS or config.method == "forward-only"):
        runtimes = " and ".join(f"--runtime {each}" for each in _OWN_GRADIENTS)
        yield (
            f"--init gradient needs gradients of A and B by name, and {runtimes} and --method forward-only give none; "
            "leave it out"
        )
    if config.init == "gradient" and config.init_adapter is not None:
        yield f"--init gradient makes a first adapter, --init-adapter {config.init_adapter} is one; give one of them"
    if config.lora_plus_ratio != 1 and config.method == "forward-only":
        yield (
            f"--lora-plus-ratio {config.lora_plus_ratio:g} is for A and B matrices, and --method forward-only trains "
            "B alone; leave it out"
        )
    if config.trunk and config.precision != "auto":
        yield f"--trunk trains the layers above the trunk exactly; leave --precision {config.precision} out"
    if facts is not None and accelerated and config.require_npu and facts.device(config.device_type) != "NPU":
        device = facts.device(config.device_type)
        yield f"--require-npu means nothing on OpenVINO's {device}; give --device-type NPU as well, or leave it out"
    if config.memory_budget is not None and (config.plan == "whole" or name in _WHOLE_ALONE or accelerated):
        yield (
            "the whole step as one graph keeps all activations and takes no --memory-budget; "
            "use --plan auto with --runtime auto"
        )
    if config.method == "forward-only" and config.plan in _OF_BACKWARD:
        yield (
            f"--plan {config.plan} says what a backward pass needs, and --method forward-only has none; "
            "use --plan auto, whole or stream"
        )
