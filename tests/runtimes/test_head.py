"""The head of the layered form against cross entropy in float64, where answers are all but certain."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetune.config import PrepareConfig
from edgetune.formats.bundle import Bundle
from edgetune.formats.frozen_weights import FrozenWeights
from edgetune.runtimes.execution import LayeredPlan
from edgetune.runtimes.layered.backend import Backend
from edgetune.runtimes.layered.channels import Channels
from edgetune.runtimes.layered.head import NORM, WEIGHT, Head
from edgetune.runtimes.layered.onnxruntime.backend import OrtBackend
from edgetune.runtimes.layered.weights import LinearWeights, ReusedMemory
from edgetune.runtimes.openvino_core import core
from support.prepared_bundles import prepare_checkpoint
from support.tiny_phi3 import save_checkpoint

Doubles = NDArray[np.float64]
ROWS = 48
SHARPENED = 30
"""By this a random head is multiplied, so that it is as sure of some tokens as a trained one."""
LOSS, WORST_LOSS, ROW_COSINE = 1e-4, 0.03, 0.99
"""The worst is that of a state that lies between two bfloat16 numbers, and that float32 and float64 round apart."""
EPSILON = 1e-5


@pytest.fixture(scope="module")
def sharp(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from transformers import Phi3ForCausalLM

    folder = tmp_path_factory.mktemp("sharp")
    source = save_checkpoint(folder / "checkpoint", {"num_hidden_layers": 1})
    model = Phi3ForCausalLM.from_pretrained(source)
    model.lm_head.weight.data *= SHARPENED
    model.save_pretrained(source)
    return prepare_checkpoint(source, folder / "bundle", PrepareConfig(base="fp32", rank=4, alpha=8.0, max_length=64))


def backend_of(name: str, bundle: Bundle) -> Backend:
    if name == "onnxruntime":
        return OrtBackend(bundle, "fp32")
    if find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    shared = core()
    from edgetune.runtimes.layered.openvino.backend import OpenVinoBackend

    return OpenVinoBackend(shared, "CPU", None, LayeredPlan(), Channels())


def as_multiplied(backend: Backend, values: Doubles) -> Doubles:
    """As a product of the backend takes them."""
    stored = np.empty(values.shape, backend.storage)
    backend.store(values.astype(np.float32), stored)
    return backend.restore(stored).astype(np.float64)


def cross_entropy(states: Doubles, weight: Doubles, labels: NDArray[np.int64]) -> tuple[Doubles, Doubles]:
    """Losses, and their gradients by the states that the weight is multiplied with."""
    logits = states @ weight.T
    largest = logits.max(axis=-1, keepdims=True)
    logsumexp = largest + np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True))
    probabilities = np.exp(logits - logsumexp)
    losses = (logsumexp - np.take_along_axis(logits, labels[:, None], -1))[:, 0]
    return losses, probabilities @ weight - weight[labels]


@pytest.mark.parametrize("tokens", [None, 100], ids=["whole vocabulary", "pieces of it"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_losses_are_those_of_the_products_numbers_and_never_negative(
    sharp: Bundle, runtime: str, tokens: int | None
) -> None:
    backend = backend_of(runtime, sharp)
    frozen = FrozenWeights(sharp.path, sharp.manifest.architecture)
    weight = frozen.rows(WEIGHT, np.arange(frozen.shape(WEIGHT)[0])).astype(np.float64)
    norm = frozen.plain(NORM).astype(np.float64)
    hidden = np.random.default_rng(0).standard_normal((ROWS, weight.shape[1])).astype(np.float32)
    inverse = 1 / np.sqrt((hidden.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + EPSILON)
    normal = hidden * inverse
    taken = as_multiplied(backend, weight)
    labels = (normal * norm @ weight.T).argmax(axis=-1)
    labels[::4] = np.arange(len(labels[::4]))
    expected, d_states = cross_entropy(as_multiplied(backend, normal * norm), taken, labels)
    d_normal = d_states * norm
    d_hidden = inverse * (d_normal - normal * (d_normal * normal).mean(axis=-1, keepdims=True))
    assert np.median(expected) < 0.05, "most answers are all but certain"

    plan = LayeredPlan(resident=False, head_rows=16, head_tokens=tokens)
    head = Head(sharp, backend, frozen, LinearWeights(frozen, backend, False, ReusedMemory()), plan)
    losses, gradient = head.step(hidden, labels, 1.0)

    for found in (losses, head.losses(hidden, labels)):
        assert found.min() >= 0
        error = np.abs(found - expected)
        assert np.median(error) <= LOSS
        assert error.max() <= WORST_LOSS
    # A row whose label has all but all probability moves nothing.
    moving = np.linalg.norm(d_hidden, axis=-1) > 1e-3 * np.linalg.norm(d_hidden, axis=-1).max()
    products = (gradient * d_hidden).sum(axis=-1)
    cosines = products / np.linalg.norm(gradient, axis=-1) / np.linalg.norm(d_hidden, axis=-1)
    assert cosines[moving].min() >= ROW_COSINE
