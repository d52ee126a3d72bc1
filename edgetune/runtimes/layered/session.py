"""A model in the layered form: measured, or in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgetune.data.batches import Batch
from edgetune.data.encode import IGNORED
from edgetune.formats.bundle import Bundle
from edgetune.formats.frozen_weights import EMBEDDING, FrozenWeights
from edgetune.formats.roles import LAYERS
from edgetune.model.lora import Parameters
from edgetune.runtimes.contract import OptimizerConfig, SessionState, StepResult
from edgetune.runtimes.execution import LayeredPlan
from edgetune.runtimes.layered.backend import Arrays, Backend
from edgetune.runtimes.layered.cached_states import LowerStates, rows_alone
from edgetune.runtimes.layered.gains import Gains
from edgetune.runtimes.layered.head import Head
from edgetune.runtimes.layered.lower_layers import LowestLayers, SublayerForward, Trunk, open_trunk
from edgetune.runtimes.layered.optimizer import FlatAdamW
from edgetune.runtimes.layered.parameters import FlatParameters
from edgetune.runtimes.layered.sublayer import AGAIN, sublayer_runners
from edgetune.runtimes.layered.weights import LinearWeights, ReusedMemory
from edgetune.runtimes.layered.workspace import HiddenStates, Workspace
from edgetune.runtimes.placement import Placement


class LayeredForward:
    """Runs a bundle's layered forward graphs on a backend; see `edgetune.runtimes.contract.Forward`.

    Args:
        bundle: It has the layered form.
        parameters: LoRA parameters of the layers that are trained, their channels in the backend's order.
        plan: How it is executed, and how many of the lowest layers a trunk computes.
        backend: Runs the other layers.
        trunk: Computes the lowest ones; when it is not given, the bundle's int8 graph, if the plan wants a trunk.
        lowest: Gives, for these parameters, the lowest layers as another device computes their forward pass. What the
            backward pass computes again it computes as it does in other layers.
    """

    def __init__(
        self,
        bundle: Bundle,
        parameters: FlatParameters,
        plan: LayeredPlan,
        backend: Backend,
        trunk: Trunk | None = None,
        lowest: Callable[[FlatParameters], LowestLayers] | None = None,
    ) -> None:
        architecture = bundle.manifest.architecture
        layers = architecture.num_hidden_layers
        self._backend = backend
        self._lowest = None if lowest is None else lowest(parameters)
        self._first_kept, self._lean = layers - plan.kept_layers, plan.lean
        if self._lowest is not None:
            # Their graphs do not run, so that they keep nothing.
            self._first_kept = max(self._first_kept, self._lowest.layers)
        self._frozen = FrozenWeights(bundle.path, architecture)
        self._memory = ReusedMemory()
        linear = LinearWeights(self._frozen, backend, plan.resident, self._memory)
        self._weights = [linear]
        self._lora = parameters
        self._gains = Gains(bundle, parameters, backend.channels)
        self._workspace = Workspace(backend.storage)
        self._states = HiddenStates(self._workspace, backend, plan.lean)
        self._layers = range(plan.trunk_layers, layers)
        self._first_trained = plan.first_trained
        self._lower_layers, self._upper_layers = (
            range(plan.trunk_layers, plan.first_trained),
            range(plan.first_trained, layers),
        )
        shared = (bundle, plan.wide, self._gains, self._workspace)
        self._runners = sublayer_runners(*shared, backend, linear)
        self._attention, self._mlp = self._runners
        self._exact_layers = self._layers[: plan.exact_layers]
        if self._exact_layers:
            exact = backend.exact()
            exact_linear = LinearWeights(self._frozen, exact, plan.resident, self._memory)
            self._weights.append(exact_linear)
            self._exact_runners = sublayer_runners(*shared, exact, exact_linear)
        self._trunk = trunk or open_trunk(bundle, plan)
        self._head = Head(bundle, backend, self._frozen, linear, plan)
        self._kept_states: LowerStates | None = None
        if plan.states is not None:
            made_by = (bundle.manifest.manifest_sha256, *_lower_facts(plan, backend), lowest is not None)
            self._kept_states = LowerStates(plan.states, repr(made_by), architecture.hidden_size)

    def evaluate(self, batch: Batch) -> float:
        """See `edgetune.runtimes.contract.Session.evaluate`."""
        hidden = self._forward(batch, for_backward=False)
        positions, labels = _trained(batch)
        return float(self._head.losses(_rows(hidden)[positions], labels).mean())

    def placements(self) -> list[Placement]:
        """Where the lowest layers run, if another device computes them."""
        below = self._lowest or self._trunk
        return [] if below is None or below.placement is None else [below.placement]

    def set_parameter(self, name: str, values: NDArray[np.float32]) -> None:
        """See `edgetune.runtimes.contract.Forward.set_parameter`."""
        self._lora.parameter(name)[...] = self._backend.channels.put_adapter(name, values)
        self._gains.forget()

    def recall(self, batch: Batch) -> None:
        """See `edgetune.runtimes.contract.Recalling`."""
        if self._kept_states is not None:
            self._begin(batch)
            self._entering(batch, _tables(batch), for_backward=False)

    def notices(self) -> list[str]:
        """See `edgetune.runtimes.contract.Recalling`."""
        return [] if self._kept_states is None else self._kept_states.notices()

    def close(self) -> None:
        """Let go of what is kept on disk."""
        if self._kept_states is not None:
            self._kept_states.close()

    def _begin(self, batch: Batch) -> None:
        """Make room for a batch."""
        self._workspace.fit(batch.input_ids.shape)
        sequences, length = batch.input_ids.shape
        self._backend.begin(sequences * length, sequences * length**2)

    def _forward(self, batch: Batch, *, for_backward: bool) -> NDArray[np.float32]:
        """The last hidden state (batch, sequence, hidden_size)."""
        self._begin(batch)
        self._gains.find(runner.project for runner in self._runners)
        tables = _tables(batch)
        hidden = self._entering(batch, tables, for_backward=for_backward)
        return self._through(self._upper_layers, tables, hidden, for_backward=for_backward)

    def _entering(self, batch: Batch, tables: Arrays, *, for_backward: bool) -> NDArray[np.float32]:
        """What enters the lowest trained layer: kept from an earlier pass, or what the layers below it make."""
        if self._kept_states is None:
            return self._below(batch, tables, for_backward=for_backward)

        def compute(rows: Sequence[int]) -> NDArray[np.float32]:
            # Where graphs are compiled for shapes, fewer rows would cost more than they save.
            if len(rows) == len(batch.examples) or (self._backend.fixed_shapes and self._lower_layers):
                return self._below(batch, tables, for_backward=for_backward)
            alone, places = rows_alone(batch, rows)
            self._begin(alone)
            computed = self._below(alone, _tables(alone), for_backward=False)
            self._begin(batch)
            hidden = self._array(2 * self._first_trained, batch, for_backward=False)
            for row, place in zip(rows, places, strict=True):
                hidden[batch.places(row)] = computed[place]
            return hidden

        entering = self._kept_states.take(batch, compute)
        if self._kept_states.complete:
            # They are not needed any more.
            for weights in self._weights:
                weights.release(self._lower_layers)
        hidden = self._array(2 * self._first_trained, batch, for_backward=for_backward)
        hidden.fill(0)
        for place, halves in entering:
            states = np.empty(halves.numbers.shape, np.float32)
            halves.take(states)
            hidden[place] = states
        return hidden

    def _below(self, batch: Batch, tables: Arrays, *, for_backward: bool) -> NDArray[np.float32]:
        """What the layers below the lowest trained one make of a batch."""
        hidden = self._array(2 * self._layers.start, batch, for_backward=for_backward)
        hidden[...] = self._backend.channels.put(self._lowest_states(batch), -1)
        return self._through(self._lower_layers, tables, hidden, for_backward=for_backward)

    def _lowest_states(self, batch: Batch) -> NDArray[np.float32]:
        """What enters the first layer that the plan runs itself."""
        if self._trunk is not None:
            return self._trunk.hidden(batch)
        return self._frozen.rows(EMBEDDING, batch.input_ids)

    def _through(
        self, layers: range, tables: Arrays, hidden: NDArray[np.float32], *, for_backward: bool
    ) -> NDArray[np.float32]:
        """What leaves these layers (batch, sequence, hidden_size)."""
        for layer in layers:
            kept = layer >= max(self._first_kept, self._first_trained)
            for number, runner in enumerate(self._forward_runners(layer), start=2 * layer):
                if for_backward and self._is_kept(number):
                    self._states.keep(number, hidden)
                output = self._states.array(
                    number + 1, hidden.shape, kept=for_backward and self._is_kept(number + 1)
                )
                runner.forward(layer, tables, hidden, output, str(layer) if for_backward and kept else None)
                self._release()
                hidden = output
        return hidden

    def _array(self, number: int, batch: Batch, *, for_backward: bool) -> NDArray[np.float32]:
        """Where a state of a batch is computed."""
        shape = (*batch.input_ids.shape, self._frozen.shape(EMBEDDING)[1])
        return self._states.array(number, shape, kept=for_backward and self._is_kept(number))

    def _forward_runners(self, layer: int) -> tuple[SublayerForward, SublayerForward]:
        """Of attention and the feed-forward network, as the forward pass comes to a layer."""
        if self._lowest is not None and layer < self._lowest.layers:
            return self._lowest.sublayers
        exact = self._exact_layers
        if exact and layer in (exact.start, exact.stop):
            # Exact weights take more memory than int8 ones.
            self._memory.release()
        return self._exact_runners if layer in exact else self._runners

    def _is_kept(self, number: int) -> bool:
        """Whether the backward pass takes this hidden state; otherwise it computes it again."""
        if number < 2 * self._first_trained:
            return False
        return not self._lean or number % 2 == 0 or number // 2 >= self._first_kept

    def _release(self) -> None:
        """The system may take back the weights' pages: streamed weights are read again, resident ones are copied."""
        self._frozen.forget()



class LayeredSession(LayeredForward):
    """With the backward pass and AdamW; see `edgetune.runtimes.contract.Session`."""

    def __init__(
        self,
        bundle: Bundle,
        parameters: Parameters,
        optimizer: OptimizerConfig,
        plan: LayeredPlan,
        backend: Backend,
        trunk: Trunk | None = None,
        lowest: Callable[[FlatParameters], LowestLayers] | None = None,
    ) -> None:
        self._names = list(parameters)
        ordered = in_order_of(backend, parameters)
        graph = bundle.file(f"{LAYERS}/adamw_flat")
        self._optimizer = FlatAdamW(graph, ordered, optimizer, eight_bit=plan.eight_bit_states)
        # The optimizer holds the parameters: the next forward pass sees what a step made of them.
        super().__init__(bundle, self._optimizer, plan, backend, trunk, lowest)

    def step(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """See `edgetune.runtimes.contract.Session.step`."""
        total = sum(batch.trained_tokens for batch in batches)
        self._optimizer.forget_gradients()
        loss = sum(self._accumulate(batch, 1 / total) for batch in batches)
        self._gains.to_magnitudes(self._optimizer.gradient)
        norm, applied = self._optimizer.step(learning_rate, loss)
        self._gains.forget()
        return StepResult(loss, norm, applied)

    def adapter(self) -> Parameters:
        """See `edgetune.runtimes.contract.Session.adapter`."""
        return self._restored(self._optimizer.parameter)

    def state(self) -> SessionState:
        """See `edgetune.runtimes.contract.Session.state`; channels are in the backend's order."""
        return self._optimizer.state()

    def restore(self, state: SessionState) -> None:
        """See `edgetune.runtimes.contract.Session.restore`."""
        self._optimizer.restore(state)
        self._gains.forget()

    def gradients(self) -> Parameters:
        """The last step's gradients, before clipping, until the next step."""
        return self._restored(self._optimizer.gradient)

    def _restored(self, of: Callable[[str], NDArray[np.float32]]) -> Parameters:
        """With the channels where the checkpoint has them."""
        order = self._backend.channels
        return {name: order.restore_adapter(name, of(name)) for name in self._names}

    def _accumulate(self, batch: Batch, scale: float) -> float:
        """Add the gradient of scale · Σ losses to the optimizer's; returns scale · Σ losses."""
        loss, d_output = self._forward_and_head(batch, scale)
        self._backward(batch, d_output)
        return loss

    def _forward_and_head(self, batch: Batch, scale: float) -> tuple[float, NDArray[np.float32]]:
        """scale · Σ losses, and its gradient by the last hidden state; what else was made on the way is given back."""
        hidden = self._forward(batch, for_backward=True)
        positions, labels = _trained(batch)
        losses, d_trained = self._head.step(_rows(hidden)[positions], labels, scale)
        self._release()
        d_output = self._workspace.like("d_hidden.0", hidden)
        d_output.fill(0)
        _rows(d_output)[positions] = d_trained
        return scale * float(losses.sum(dtype=np.float64)), d_output

    def _backward(self, batch: Batch, d_output: NDArray[np.float32]) -> None:
        tables, shape, gradient_of = _tables(batch), d_output.shape, self._gains.gradient_of(self._optimizer.gradient)
        # `d_output` is the first of them already: a layer overwrites the gradient that it was given.
        d_hidden, d_middle = (self._workspace.like(f"d_hidden.{number}", d_output) for number in (0, 1))
        for layer in range(self._layers.stop - 1, self._first_trained - 1, -1):
            kept_under = str(layer) if layer >= self._first_kept else None
            attention_kept_under = kept_under
            hidden = self._states.take(2 * layer, shape)
            if self._is_kept(2 * layer + 1):
                middle = self._states.take(2 * layer + 1, shape)
            else:
                middle, attention_kept_under = self._states.array(2 * layer + 1, shape, kept=False), AGAIN
                # Int8 in every layer: what is rounded here goes no further.
                self._attention.forward(layer, tables, hidden, middle, attention_kept_under)
            self._mlp.backward(layer, tables, middle, d_output, d_middle, kept_under, gradient_of)
            self._release()
            self._attention.backward(layer, tables, hidden, d_middle, d_hidden, attention_kept_under, gradient_of)
            self._release()
            d_output = d_hidden
        # The head can use their memory.
        self._workspace.drop(AGAIN)


def in_order_of(backend: Backend, parameters: Parameters) -> dict[str, NDArray[np.float32]]:
    """LoRA parameters with their channels in the backend's order."""
    return {name: backend.channels.put_adapter(name, values) for name, values in parameters.items()}


def _lower_facts(plan: LayeredPlan, backend: Backend) -> tuple[object, ...]:
    """All of a plan that decides what its lower layers compute."""
    products = (type(backend).__name__, backend.storage.str, plan.precision, plan.exact_layers, plan.wide)
    return (*products, plan.trunk_layers, plan.first_trained)


def _tables(batch: Batch) -> Arrays:
    tables = {"attn_bias": batch.attn_bias, "rope_cos": batch.rope_cos, "rope_sin": batch.rope_sin}
    # A graph is given the address of an array, not its strides.
    return {name: np.ascontiguousarray(table) for name, table in tables.items()}


def _rows(states: NDArray[np.float32]) -> NDArray[np.float32]:
    """(positions of all sequences, hidden_size)."""
    return states.reshape(-1, states.shape[-1])


def _trained(batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the trained positions among all, and their labels."""
    labels = batch.labels.reshape(-1)
    positions = np.flatnonzero(labels != IGNORED)
    return positions, labels[positions]
