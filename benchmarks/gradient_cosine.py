"""How well forward-only training estimates a gradient: `python -m benchmarks.gradient_cosine BUNDLE --data FILE`.

Printed is the cosine of the first step's estimate with the exact gradient of the same rows, and what theory expects it
to be. The exact one is read off a step with a backward pass, which takes the memory of that. `make demo DEMO=offline`
leaves a bundle in `demo/offline/bundle`, and its rows are in `examples/device_assistant/`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from benchmarks.edgetune_worker import cosine, fit, gradients_at
from benchmarks.experiments import Edgetune
from edgetune.config import TrainConfig
from edgetune.data.encode import load_encoder
from edgetune.data.examples import load_examples
from edgetune.errors import EdgetuneError
from edgetune.formats.bundle import load_bundle
from edgetune.model.lora import initial_parameters
from edgetune.runtimes.contract import OptimizerConfig
from edgetune.runtimes.forward_only import ForwardOnlySession, QueryConfig

_NO_CHANGE = OptimizerConfig(weight_decay=0.0, max_grad_norm=0.0)


@dataclass(frozen=True)
class EstimateCosine:
    """Of an estimated and the exact gradient of one step."""

    measured: float
    expected: float
    """Root mean square over all perturbations."""
    parameters: int
    """Those that forward-only trains: the dimension of the gradient."""

    @property
    def noise(self) -> float:
        """By how much a single estimate is off: about one by the root of the dimension."""
        return 1 / math.sqrt(self.parameters)

    def __str__(self) -> str:
        """In one line."""
        return (
            f"gradient cosine of a forward-only step with the exact gradient: {self.measured:.4f} "
            f"(expected {self.expected:.4f} ± {self.noise:.4f} for {self.parameters:,} parameters)"
        )


def expected_cosine(queries: int, parameters: int) -> float:
    """Of an estimate by random directions: √(n / (n + d)); the comparison with the other queries costs one of them."""
    return math.sqrt((queries - 1) / (queries - 1 + parameters))


def measure_estimate(
    contestant: Edgetune, folder: Path, data: Path, batch_size: int, config: QueryConfig
) -> EstimateCosine:
    """Estimate the gradient of the first rows where training starts, and differentiate there.

    Args:
        contestant: Says runtime, plan and memory budget of both.
        folder: The bundle.
        data: JSONL rows, of which the first are taken.
        batch_size: How many of them.
        config: How the gradient is estimated; its seed also draws the first A.

    Raises:
        EdgetuneError: The bundle or the rows cannot be taken, or the runtime does not run both ways.
    """
    bundle = load_bundle(folder)
    manifest = bundle.manifest
    rows = load_examples(data, load_encoder(bundle.path, manifest.tokenizer), manifest.max_length, truncate=False)
    estimating, exact = (
        fit(contestant, bundle, rows.examples, batch_size, packing=True, method=method)
        for method in ("forward-only", "backpropagation")
    )
    # A backward pass takes more memory: where a batch is divided for it, the estimate has room as well.
    batches = next(exact.workload.steps())
    parameters = initial_parameters(manifest.lora, config.seed)
    open_forward = estimating.choice.runtime.open_forward
    assert open_forward is not None, "planning chose it for forward-only training"
    with open_forward(bundle, parameters, estimating.choice.plan) as forward:
        estimate = ForwardOnlySession(forward, parameters, _NO_CHANGE, config).gradient(batches)
    gradients = gradients_at(parameters, exact.choice, bundle, batches)
    found, wanted = (
        np.concatenate([np.asarray(each[name], np.float64).ravel() for name in estimate])
        for each in (estimate, gradients)
    )
    return EstimateCosine(cosine(found, wanted), expected_cosine(config.queries, found.size), found.size)


_DEFAULT = TrainConfig()
_FILE = click.Path(exists=True, path_type=Path)


@click.command()
@click.argument("bundle", type=_FILE)
@click.option("--data", type=_FILE, required=True, help="JSONL rows, of which the first are taken.")
@click.option("--runtime", default=_DEFAULT.runtime, show_default=True, help="Runs both; as in `edgetune train`.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Rows that are taken.")
@click.option("--queries", type=click.IntRange(min=2), default=_DEFAULT.queries, show_default=True, help="Of the step.")
@click.option(
    "--perturbation-size",
    type=click.FloatRange(min=0, min_open=True),
    default=_DEFAULT.perturbation_size,
    show_default=True,
    help="By how much an element of B is moved.",
)
@click.option("--seed", type=click.IntRange(min=0), default=_DEFAULT.seed, show_default=True, help="Of what is drawn.")
def main(
    bundle: Path, data: Path, runtime: str, batch_size: int, queries: int, perturbation_size: float, seed: int
) -> None:
    """Compare the gradient that a forward-only step estimates with the exact one."""
    config = QueryConfig(queries, perturbation_size, seed)
    try:
        click.echo(measure_estimate(Edgetune(runtime), bundle, data, batch_size, config))
    except EdgetuneError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
