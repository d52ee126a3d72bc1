"""OpenVINO through ONNX Runtime: the whole step on the provider of the `onnxruntime-ep-openvino` plugin.

It brings an OpenVINO of its own, and finds Intel's devices alone, the processor included.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgetune.errors import IncompatibleError
from edgetune.machine.threads import thread_count
from edgetune.runtimes.execution import ACCELERATING, Accelerator
from edgetune.runtimes.whole.plugin_runtime import PluginRuntime

if TYPE_CHECKING:
    from edgetune.runtimes.whole.plugin import Plugin

PROVIDER = "OpenVINOExecutionProvider"


class _OpenVino(PluginRuntime):
    def plugin(self, package: Any, version: str, accelerator: Accelerator) -> Plugin:
        """See `PluginRuntime.plugin`."""
        from edgetune.runtimes.whole.plugin import UNPACKED, Plugin

        kind = ACCELERATING["openvino-ep"].device(accelerator.device_type)
        devices = _devices(package, kind)
        if not devices:
            raise IncompatibleError(
                f"{PROVIDER} finds no {kind} of Intel's here; install its driver, choose another --device-type, or use "
                "--runtime onnxruntime"
            )
        if accelerator.require and kind != "NPU":
            raise IncompatibleError(f"--require-npu asks for an NPU, not for a {kind}; give --device-type NPU")
        facts = devices[0].ep_metadata
        device = f"{kind} {facts.get('FULL_DEVICE_NAME', '')}, {facts.get('OPTIMIZATION_CAPABILITIES', '')}"
        # Its pass for packed weights does not take their backward product.
        return Plugin(PROVIDER, version, devices[0], device, _options(kind), UNPACKED)


def _options(kind: str) -> dict[str, str]:
    threads = thread_count() if kind == "CPU" else None
    return {} if threads is None else {"load_config": json.dumps({kind: {"INFERENCE_NUM_THREADS": str(threads)}})}


def has_device(kind: str) -> bool:
    """Whether the provider finds a device of a kind, such as `NPU`.

    Raises:
        MissingDependencyError: The package `onnxruntime-ep-openvino` is not installed.
    """
    return bool(_devices(PLUGIN.imported_package(), kind))


def _devices(package: Any, kind: str) -> list[Any]:
    from edgetune.runtimes.whole.plugin import provider_devices

    found = provider_devices(PROVIDER, package.get_library_path())
    # Of several GPUs each has a number behind a point.
    return [device for device in found if device.ep_metadata.get("ov_device", "").partition(".")[0] == kind]


PLUGIN = _OpenVino("openvino-ep", "onnxruntime-ep-openvino")
RUNTIME = replace(PLUGIN.record(), has_device=has_device)
