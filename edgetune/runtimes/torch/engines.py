"""How the processes share a step: which of them hold what, and how gradients come together.

| engine | frozen weights | adapter, gradients and moments |
| --- | --- | --- |
| `none` | one process has all | one process has all |
| `ddp` | every process has all | every process has all |
| `fsdp2` | divided, gathered a layer at a time | every process has all |
| `zero1` | every process has all | moments divided |
| `zero2` | every process has all | moments and gradients divided |
| `zero3` | divided, gathered a layer at a time | divided |
| `zero3-offload` | as `zero3`, in the memory of the host | divided, in the memory of the host |

The first three are PyTorch's (`DistributedDataParallel`, `fully_shard`), the others DeepSpeed's (Rajbhandari et al.
2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models").
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from edgetune.config import Sharding
from edgetune.errors import MissingDependencyError
from edgetune.machine.torchrun import LEADER
from edgetune.model.adamw import BETA1, BETA2, EPSILON
from edgetune.runtimes.contract import OptimizerConfig
from edgetune.runtimes.torch.network import Network, Source
from edgetune.runtimes.torch.processes import Processes

MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}
"""Names in a saved state, and in torch's AdamW."""
Arrays = dict[str, NDArray[np.float32]]


class Engine(ABC):
    """A network in training, in one of several processes. All of them call the same methods, with their own batches."""

    network: nn.Module
    """Takes a batch and gives its summed loss."""
    adapter: dict[str, nn.Parameter]
    """The trained parameters by the names of `Lora.shapes`."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of a loss; after the last of a step all processes have the sum, or their share of it."""

    @abstractmethod
    def norm(self) -> float:
        """The 2-norm of the whole gradient."""

    @abstractmethod
    def update(self, learning_rate: float, norm: float) -> None:
        """Clip the gradient, whose norm was found, step AdamW, and forget the gradient."""

    @abstractmethod
    def arrays(self, kind: str) -> Arrays:
        """The adapter's parameters (`p`), or first (`m`) or second moments (`v`), whole, in every process."""

    @abstractmethod
    def set_arrays(self, kind: str, values: Mapping[str, NDArray[np.float32]], steps: int) -> None:
        """Take them over; `steps` updates were done by then."""


class Replicated(Engine):
    """Every process has the whole adapter; frozen weights are whole or, with FSDP2, divided.

    Args:
        sharding: `none`, `ddp` or `fsdp2`.
        source: What the network is made of.
        optimizer: Weight decay and clipping.
        processes: Those that train together.
    """

    def __init__(self, sharding: Sharding, source: Source, optimizer: OptimizerConfig, processes: Processes) -> None:
        self._processes, self._max_norm = processes, optimizer.max_grad_norm
        network = Network(source, _divided if sharding == "fsdp2" else _whole)
        self.adapter = network.adapter()
        if sharding == "fsdp2":
            fully_shard(network, ignored_params=set(self.adapter.values()))
        self.network = DistributedDataParallel(network) if sharding == "ddp" else network
        self._optimizer = adamw(self.adapter, optimizer)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Engine.backward`."""
        averaging = self.network if isinstance(self.network, DistributedDataParallel) else None
        with nullcontext() if averaging is None or last else averaging.no_sync():
            loss.backward()  # type: ignore[no-untyped-call]
        if last and averaging is None:
            for parameter in self.adapter.values():
                assert parameter.grad is not None
                self._processes.total(parameter.grad).div_(self._processes.count)

    def norm(self) -> float:
        """See `Engine.norm`."""
        gradients = [value.grad for value in self.adapter.values() if value.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def update(self, learning_rate: float, norm: float) -> None:
        """See `Engine.update`."""
        if self._max_norm:
            torch.nn.utils.clip_grads_with_norm_(self.adapter.values(), self._max_norm, torch.tensor(norm))
        (group,) = self._optimizer.param_groups
        group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()

    def arrays(self, kind: str) -> Arrays:
        """See `Engine.arrays`."""
        if kind == "p":
            return {name: value.detach().cpu().numpy() for name, value in self.adapter.items()}
        moments = {name: self._optimizer.state[value].get(MOMENTS[kind]) for name, value in self.adapter.items()}
        return {
            name: np.zeros(self.adapter[name].shape, np.float32) if moment is None else moment.cpu().numpy()
            for name, moment in moments.items()
        }

    def set_arrays(self, kind: str, values: Mapping[str, NDArray[np.float32]], steps: int) -> None:
        """See `Engine.set_arrays`."""
        for name, parameter in self.adapter.items():
            array = torch.from_numpy(np.array(values[name])).to(parameter.device)
            if kind == "p":
                parameter.data.copy_(array)
            elif steps:
                state = self._optimizer.state[parameter]
                state["step"] = torch.tensor(float(steps))
                state[MOMENTS[kind]] = array


class Zero(Engine):
    """DeepSpeed's ZeRO: what the table above says is divided between the processes.

    Args:
        sharding: `zero1`, `zero2`, `zero3` or `zero3-offload`.
        source: What the network is made of.
        optimizer: Weight decay and clipping.
        processes: Those that train together.

    Raises:
        MissingDependencyError: DeepSpeed is not installed.
    """

    def __init__(self, sharding: Sharding, source: Source, optimizer: OptimizerConfig, processes: Processes) -> None:
        self._deepspeed = deepspeed = _import_deepspeed(processes)
        self._device, self._rotated = processes.device, source.bundle.manifest.architecture.rope.dim
        self._has_moments = False
        stage, offloads = int(sharding[4]), sharding.endswith("-offload")
        zero: dict[str, Any] = {"stage": stage}
        if offloads:
            zero["offload_param"] = zero["offload_optimizer"] = {"device": "cpu"}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optimizer.max_grad_norm,
            "steps_per_print": 10**9,
            "bf16": {"enabled": source.dtype == torch.bfloat16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
        }
        with deepspeed.zero.Init(config_dict_or_path=config) if stage == 3 else nullcontext():
            network = Network(source, _whole)
        self.adapter = network.adapter()
        # One group of the adapter's parameters alone: what is frozen is none of an optimizer's business.
        self.network, self._optimizer, _, _ = deepspeed.initialize(
            model=network, optimizer=adamw(self.adapter, optimizer), config=config
        )

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Engine.backward`."""
        self.network.set_gradient_accumulation_boundary(last)  # type: ignore[operator]
        self.network.backward(loss)  # type: ignore[operator]
        if not last:
            self.network.step()  # type: ignore[operator]

    def norm(self) -> float:
        """See `Engine.norm`."""
        get = self._deepspeed.utils.safe_get_full_grad
        gradients = (get(parameter) for parameter in self.adapter.values())
        return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))

    def update(self, learning_rate: float, norm: float) -> None:
        """See `Engine.update`; DeepSpeed clips by a norm that it finds itself."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self.network.step()  # type: ignore[operator]
        self._has_moments = True

    def arrays(self, kind: str) -> Arrays:
        """See `Engine.arrays`."""
        utils = self._deepspeed.utils
        found: Arrays = {}
        for name, parameter in self.adapter.items():
            if kind == "p":
                value = utils.safe_get_full_fp32_param(parameter)
            else:
                value = utils.safe_get_full_optimizer_state(parameter, MOMENTS[kind])
            shape = getattr(parameter, "ds_shape", parameter.shape)
            found[name] = np.zeros(shape, np.float32) if value is None else value.detach().cpu().float().numpy()
        return found

    def set_arrays(self, kind: str, values: Mapping[str, NDArray[np.float32]], steps: int) -> None:
        """See `Engine.set_arrays`."""
        utils = self._deepspeed.utils
        if steps and not self._has_moments:
            self._make_moments()
        for name, parameter in self.adapter.items():
            array = torch.from_numpy(np.array(values[name])).to(parameter.device)
            if kind == "p":
                utils.safe_set_full_fp32_param(parameter, array)
                # What the network computes with is a copy of that, which would follow only after the next update.
                with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=LEADER):
                    parameter.data.copy_(array)
            elif steps:
                utils.safe_set_full_optimizer_state(parameter, array, MOMENTS[kind])
        for state in self._optimizer.optimizer.state.values():
            state["step"] = torch.tensor(float(steps))

    def _make_moments(self) -> None:
        """AdamW makes them in its first step: one whose gradient and learning rate are nothing."""
        shape, device = (1, 1), self._device
        tables = torch.zeros(*shape, self._rotated, device=device)
        batch = {
            "input_ids": torch.zeros(shape, dtype=torch.int64, device=device),
            "labels": torch.zeros(shape, dtype=torch.int64, device=device),
            "attn_bias": torch.zeros(1, *shape, 1, device=device),
            "rope_cos": tables,
            "rope_sin": tables,
        }
        self.backward(self.network(batch) * 0.0, last=True)
        self.update(0.0, 0.0)


def adamw(adapter: Mapping[str, nn.Parameter], optimizer: OptimizerConfig) -> torch.optim.AdamW:
    """torch's own AdamW over the adapter, with edgetune's constants."""
    return torch.optim.AdamW(
        list(adapter.values()), lr=0.0, betas=(BETA1, BETA2), eps=EPSILON, weight_decay=optimizer.weight_decay
    )


def open_engine(sharding: Sharding, source: Source, optimizer: OptimizerConfig, processes: Processes) -> Engine:
    """The engine of this name.

    Raises:
        MissingDependencyError: Its package is not installed.
    """
    kind = Zero if sharding.startswith("zero") else Replicated
    return kind(sharding, source, optimizer, processes)


def _whole(module: nn.Module) -> nn.Module:
    return module


def _divided(module: nn.Module) -> nn.Module:
    """A layer of which each process has its share; the slots' parameters stay whole."""
    trained = {parameter for parameter in module.parameters() if parameter.requires_grad}
    fully_shard(module, ignored_params=trained)
    return module


def _import_deepspeed(processes: Processes) -> Any:
    """DeepSpeed, connected through the processes' own group.

    Raises:
        MissingDependencyError: It is not installed.
    """
    on_cpu = processes.device.type == "cpu"
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    os.environ.setdefault("LOCAL_RANK", "0")  # which it asks of whoever started it
    try:
        import deepspeed
        import deepspeed.ops
        import deepspeed.utils
    except ImportError as error:
        raise MissingDependencyError(
            'DeepSpeed is not installed; use --sharding ddp or fsdp2, or pip install "edgetune[deepspeed]"'
        ) from error
    if on_cpu:
        # Otherwise it compiles an operator of its own, and ends where there is no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo" if on_cpu else "nccl", verbose=False)
    return deepspeed
