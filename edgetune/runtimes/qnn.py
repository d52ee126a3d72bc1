"""Qualcomm's Hexagon NPU: the whole step through the `onnxruntime-qnn` plugin, in float16.

Where there is no such NPU, the plugin's Linux x86-64 wheel compiles for one and emulates it: the same compiler and the
same numbers, at the speed of an emulation.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from edgetune.errors import IncompatibleError
from edgetune.runtimes.execution import Accelerator
from edgetune.runtimes.whole.plugin_runtime import PluginRuntime

if TYPE_CHECKING:
    from edgetune.runtimes.whole.plugin import Plugin

PROVIDER = "QNNExecutionProvider"
_SNAPDRAGON_X_ELITE = 60
_EMULATION = platform.machine().lower() in ("x86_64", "amd64")
"""On x86-64 the package has the emulation, and no computer with such a processor has the NPU."""


class _Qnn(PluginRuntime):
    def plugin(self, package: Any, version: str, accelerator: Accelerator) -> Plugin:
        """See `PluginRuntime.plugin`."""
        from edgetune.runtimes.whole.plugin import UNPACKED, Plugin, provider_devices

        options = {"backend_path": package.get_qnn_htp_path()}
        devices = provider_devices(PROVIDER, package.get_library_path())
        if not devices:
            raise IncompatibleError(
                f"{PROVIDER} finds no NPU and no emulator here; install the NPU's driver, or use --runtime onnxruntime"
            )
        npus = [device for device in devices if device.device.type == ort.OrtHardwareDeviceType.NPU]
        device = "HTP"
        if not npus:
            # Without a model to emulate, the compiler makes float32 code, which lacks Gather and Where.
            soc_model = accelerator.soc_model or _SNAPDRAGON_X_ELITE
            options["soc_model"] = str(soc_model)
            device = f"HTP emulation, soc {soc_model}"
        # The HTP has no DequantizeLinear in blocks.
        return Plugin(PROVIDER, version, (npus or devices)[0], device, options, UNPACKED)


PLUGIN = _Qnn("qnn", "onnxruntime-qnn", emulation=_EMULATION)
RUNTIME = PLUGIN.record()
