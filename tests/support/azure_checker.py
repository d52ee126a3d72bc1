"""Runs where azure-ai-ml is installed: loads job files, and prints of each what would be sent, or why it is refused."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any


def sent(path: Path) -> Any:
    from azure.ai.ml import load_job  # type: ignore[import-not-found, unused-ignore]

    job = load_job(path)
    result = job._validate() if hasattr(job, "_validate") else None  # fine-tuning jobs have none
    if result is not None and not result.passed:
        raise ValueError(str(result.error_messages))
    body = (job._to_job() if hasattr(job, "_to_job") else job)._to_rest_object()
    return body if isinstance(body, dict) else body.as_dict() if hasattr(body, "as_dict") else body.serialize()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    for name in sys.argv[1:]:
        try:
            print(json.dumps({"sent": sent(Path(name))}, default=str))
        except Exception as error:
            print(json.dumps({"refused": f"{type(error).__name__}: {error}"}))
