"""Names that the platforms take."""

from __future__ import annotations

import re

_AZURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,254}")
_KUBERNETES = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def azure_name_problems(name: str, compute: str | None = None) -> list[str]:
    """What of the names of a job and of a compute Azure Machine Learning does not take."""
    problems = []
    if not _AZURE.fullmatch(name):
        problems.append(
            f"--name {name!r:.80}: Azure Machine Learning takes letters, digits, - and _, 255 at most, and no - or _ "
            "first"
        )
    if compute is not None and not _AZURE.fullmatch(compute):
        problems.append(f"--compute {compute!r:.80}: expected the name of a cluster in the workspace, or serverless")
    return problems


def kubernetes_name_problems(given: dict[str, str | None]) -> list[str]:
    """What of names by their options Kubernetes does not take (RFC 1123 labels)."""
    return [
        f"{option} {name!r:.80}: Kubernetes takes lower-case letters, digits and -, 63 at most, and no - at an end"
        for option, name in given.items()
        if name is not None and not _KUBERNETES.fullmatch(name)
    ]
