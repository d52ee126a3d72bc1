"""Which options of a run go together, whatever the bundle and the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from edgetune.config import TrainConfig
from edgetune.data.buckets import parse_buckets
from edgetune.devices.profile import Profile
from edgetune.errors import UsageError
from edgetune.machine.threads import check_threads
from edgetune.planning.accelerator import ACCELERATED, apply_profile, is_accelerated
from edgetune.planning.candidates import footprint_of
from edgetune.planning.schedule import check_options
from edgetune.runtimes import find_runtime
from edgetune.runtimes.execution import ACCELERATING
from edgetune.text.byte_size import parse_bytes

_OF_BACKWARD = ("keep", "recompute")


@dataclass(frozen=True)
class _Requirement:
    """Options that mean nothing without another."""

    options: tuple[str, ...]
    """Fields of `TrainConfig`."""
    needed: str
    """As people ask for it."""
    holds: Callable[[TrainConfig], bool]


_REQUIREMENTS = (
    _Requirement(
        ("require_npu", "buckets", "device_type"),
        f"a runtime that compiles the whole step, {ACCELERATED}",
        lambda config: is_accelerated(config.runtime, config.plan),
    ),
    _Requirement(("soc_model",), "--runtime qnn", lambda config: config.runtime == "qnn"),
    _Requirement(("trunk_cache",), "--plan split", lambda config: config.plan == "split"),
    _Requirement(
        ("vitisai_config",),
        "--plan split on another runtime than fpga-hls",
        lambda config: config.plan == "split" and config.runtime != "fpga-hls",
    ),
    _Requirement(
        ("queries", "perturbation_size"),
        "--method forward-only",
        lambda config: config.method == "forward-only",
    ),
)


def resolve_config(
    config: TrainConfig, profile: Profile | None, notice: Callable[[str], None], *, elsewhere: bool = False
) -> TrainConfig:
    """The configuration as it holds on a device. What is wrong whatever the bundle is refused.

    Args:
        config: How to train.
        profile: The device's, where one was given.
        notice: Hears why the CPU computes instead of the device's accelerator.
        elsewhere: The device is not this machine: what is installed here does not count.

    Raises:
        IncompatibleError: The device's accelerator is not here, and the configuration takes nothing else.
        MissingDependencyError: The package of the runtime that was asked for is not installed.
        UsageError: Options that cannot be meant, or not together; a runtime that does not execute the plan.
    """
    check_options(config)
    if profile is not None:
        # The name alone: a path of this machine is nobody else's business.
        config = replace(apply_profile(profile, config, notice, elsewhere=elsewhere), device=profile.name)
    check_plan(config)
    if not elsewhere:
        if config.threads is not None:
            check_threads(config.threads)
        _check_runtime(config)
    return config


def check_plan(config: TrainConfig) -> None:
    """Refuse options that do not go together, whatever is installed.

    Raises:
        UsageError: Naming each of them, and what to do; a size or a list of shapes that is none.
    """
    parse_bytes(config.trunk_cache)
    if config.memory_budget is not None:
        parse_bytes(config.memory_budget)
    if config.buckets is not None:
        parse_buckets(config.buckets)
    problems = [*_without_effect(config), *_contradictions(config)]
    if problems:
        raise UsageError("\n".join(problems))


def _without_effect(config: TrainConfig) -> Iterator[str]:
    """Options that were given without what they belong to."""
    default = TrainConfig()
    for requirement in _REQUIREMENTS:
        if requirement.holds(config):
            continue
        for option in requirement.options:
            if (value := getattr(config, option)) != getattr(default, option):
                flag = f"--{option.replace('_', '-')}"
                given = flag if value is True else f"{flag} {value}"
                yield f"{given} means nothing without {requirement.needed}; give that as well, or leave {flag} out"


def _contradictions(config: TrainConfig) -> Iterator[str]:
    """Options that exclude each other."""
    name, facts = config.runtime, ACCELERATING.get(config.runtime)
    accelerated = is_accelerated(name, config.plan)
    if facts is not None and not facts.takes(config.device_type):
        devices = " or ".join(facts.device_types)
        yield f"--runtime {name} trains on an {devices}, not on --device-type {config.device_type}; leave that out"
    if facts is not None and facts.alone and config.plan not in facts.plans:
        yield f"--runtime {name} does not execute --plan {config.plan}, only {', '.join(facts.plans)}"
    if facts is not None and accelerated and config.require_npu and facts.device(config.device_type) != "NPU":
        device = facts.device(config.device_type)
        yield f"--require-npu means nothing on OpenVINO's {device}; give --device-type NPU as well, or leave it out"
    if config.memory_budget is not None and (config.plan == "whole" or config.runtime == "ort-training" or accelerated):
        yield (
            "the whole step as one graph keeps all activations and takes no --memory-budget; "
            "use --plan auto with --runtime auto"
        )
    if config.method == "forward-only" and config.plan in _OF_BACKWARD:
        yield (
            f"--plan {config.plan} says what a backward pass needs, and --method forward-only has none; "
            "use --plan auto, whole, stream or int8"
        )


def _check_runtime(config: TrainConfig) -> None:
    """Refuse a runtime that is not here, or does not execute the plan."""
    if is_accelerated(config.runtime, config.plan):
        find_runtime(config.runtime).abilities()
    elif config.runtime != "auto":
        footprint_of(config.runtime, config.plan, config.method)
