"""DoRA in the layered form: the gains that graphs take, and what their gradients mean for the magnitudes.

Magnitudes are parameters like A and B. The graphs take gains instead, which are found anew whenever parameters have
changed: once a step, since nothing changes within one. Gradients of gains are added up in the place of the magnitudes',
and divided by the norms when all are there (`edgetune.model.gains`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from edgetune.formats.bundle import Bundle
from edgetune.formats.row_norms import read_row_norms
from edgetune.model.gains import gains_of, row_norms
from edgetune.model.lora import GAIN, MAGNITUDE
from edgetune.runtimes.layered.channels import Channels
from edgetune.runtimes.layered.parameters import Array, FlatParameters

Project = Callable[[int, Mapping[str, Array]], None]
"""Adds A·Wᵀ (rank, out) of a layer's slots to the arrays with their gains' names."""


class Gains:
    """The gains of all slots that have magnitudes; without DoRA there are none, and nothing is done.

    Args:
        bundle: Says which slots there are, and holds their row norms.
        parameters: The adapter, its channels in the backend's order.
        channels: That order.
    """

    def __init__(self, bundle: Bundle, parameters: FlatParameters, channels: Channels) -> None:
        lora = bundle.manifest.lora
        norms = read_row_norms(bundle)
        self._slots = [slot for slot in lora.slots if lora.dora and slot.magnitude in parameters]
        self._lora = lora
        self._parameters = parameters
        self._frozen = {slot.gain: channels.put_adapter(slot.magnitude, norms[slot.name]) for slot in self._slots}
        self._norms = {name: norm.copy() for name, norm in self._frozen.items()}
        self._gains = {name: np.ones_like(norm) for name, norm in self._frozen.items()}
        self._current = False

    def __contains__(self, name: str) -> bool:
        return name in self._gains or name in self._parameters

    def parameter(self, name: str) -> Array:
        """What a graph takes under this name: a gain, or a parameter of the adapter."""
        return self._gains[name] if name in self._gains else self._parameters.parameter(name)

    def gradient_of(self, of: Callable[[str], Array]) -> Callable[[str], Array]:
        """Where gradients of graphs go, when `of` says where the parameters' go."""
        return lambda name: of(name.removesuffix(GAIN) + MAGNITUDE if name in self._gains else name)

    def forget(self) -> None:
        """Parameters have changed."""
        self._current = False

    def find(self, projects: Iterable[Project]) -> None:
        """Find the gains for the parameters as they are now, unless they are those already.

        Args:
            projects: Of both sublayers.
        """
        if self._current:
            return
        self._current = True
        projects = tuple(projects)
        for layer in sorted({slot.layer for slot in self._slots}):
            slots = [slot for slot in self._slots if slot.layer == layer]
            projected = {
                slot.gain: np.zeros((self._lora.rank_of(slot.module), slot.out_features), np.float32) for slot in slots
            }
            for project in projects:
                project(layer, projected)
            for slot in slots:
                a, b = self._parameters.parameter(slot.a), self._parameters.parameter(slot.b)
                scaling = self._lora.scaling_of(slot.module)
                norms = row_norms(self._frozen[slot.gain], projected[slot.gain], a, b, scaling)
                self._norms[slot.gain][...] = norms
                self._gains[slot.gain][...] = gains_of(self._parameters.parameter(slot.magnitude), norms)

    def to_magnitudes(self, gradient: Callable[[str], Array]) -> None:
        """Make gradients of the magnitudes of those of the gains, in their place, when all passes have added theirs."""
        for slot in self._slots:
            magnitudes = gradient(slot.magnitude)
            magnitudes /= self._norms[slot.gain]
