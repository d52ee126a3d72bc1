"""Versions of the tools that make a folder, for its manifest."""

from __future__ import annotations

from importlib import metadata

from edgetune.errors import MissingDependencyError


def version_of(package: str) -> str:
    """The installed version of a package of the host.

    A stage looks its packages up before it does any work, so that none is lost to a missing one.

    Args:
        package: Name of the distribution. ONNX Runtime has several (`onnxruntime-gpu`, `onnxruntime-vitisai`, …);
            whichever is installed counts as `onnxruntime`.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        if package == "onnxruntime":
            import onnxruntime

            return str(onnxruntime.__version__)
        return metadata.version(package)
    except (ModuleNotFoundError, metadata.PackageNotFoundError) as error:
        raise MissingDependencyError(
            f'{package} is not installed; this is work for a host: pip install "edgetune[host]"'
        ) from error
