"""edgetune: take a Phi-3 model to an edge device and let it learn there.

    from edgetune import TrainConfig, train

What can be imported from here is looked up when it is asked for: `import edgetune` imports nothing else.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

# ONNX Runtime reads this when it is imported, and reports its use to its maker unless it is set.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

_OFFERED = {
    "edgetune.config": (
        "AnswersConfig",
        "EvaluateConfig",
        "ExportConfig",
        "GenerateConfig",
        "ImportConfig",
        "PrepareConfig",
        "TrainConfig",
    ),
    "edgetune.errors": (
        "DataError",
        "EdgetuneError",
        "IncompatibleError",
        "InterruptedRunError",
        "LockedError",
        "MissingDependencyError",
        "NoRoomError",
        "PausedRunError",
        "ResourceError",
        "TemplateStoppedError",
        "UsageError",
        "VerificationError",
    ),
    "edgetune.evaluation": ("Evaluation", "evaluate"),
    "edgetune.evaluation.answers": ("AnswersEvaluation", "evaluate_answers"),
    "edgetune.exporting": ("ExportReport", "export"),
    "edgetune.formats.bundle": ("Bundle", "load_bundle"),
    "edgetune.generation": ("generate",),
    "edgetune.importing": ("ImportReport", "import_adapter"),
    "edgetune.preparation": ("prepare",),
    "edgetune.training": ("Observer", "StartInfo", "StepMetrics", "TrainResult", "train"),
}
"""What each module gives to those who import from here."""
_MODULE_OF = {name: module for module, names in _OFFERED.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]

if TYPE_CHECKING:
    # Type checkers and editors read this, and do not run what is below.
    from edgetune.config import AnswersConfig as AnswersConfig
    from edgetune.config import EvaluateConfig as EvaluateConfig
    from edgetune.config import ExportConfig as ExportConfig
    from edgetune.config import GenerateConfig as GenerateConfig
    from edgetune.config import ImportConfig as ImportConfig
    from edgetune.config import PrepareConfig as PrepareConfig
    from edgetune.config import TrainConfig as TrainConfig
    from edgetune.errors import DataError as DataError
    from edgetune.errors import EdgetuneError as EdgetuneError
    from edgetune.errors import IncompatibleError as IncompatibleError
    from edgetune.errors import InterruptedRunError as InterruptedRunError
    from edgetune.errors import LockedError as LockedError
    from edgetune.errors import MissingDependencyError as MissingDependencyError
    from edgetune.errors import NoRoomError as NoRoomError
    from edgetune.errors import PausedRunError as PausedRunError
    from edgetune.errors import ResourceError as ResourceError
    from edgetune.errors import TemplateStoppedError as TemplateStoppedError
    from edgetune.errors import UsageError as UsageError
    from edgetune.errors import VerificationError as VerificationError
    from edgetune.evaluation import Evaluation as Evaluation
    from edgetune.evaluation import evaluate as evaluate
    from edgetune.evaluation.answers import AnswersEvaluation as AnswersEvaluation
    from edgetune.evaluation.answers import evaluate_answers as evaluate_answers
    from edgetune.exporting import ExportReport as ExportReport
    from edgetune.exporting import export as export
    from edgetune.formats.bundle import Bundle as Bundle
    from edgetune.formats.bundle import load_bundle as load_bundle
    from edgetune.generation import generate as generate
    from edgetune.importing import ImportReport as ImportReport
    from edgetune.importing import import_adapter as import_adapter
    from edgetune.preparation import prepare as prepare
    from edgetune.training import Observer as Observer
    from edgetune.training import StartInfo as StartInfo
    from edgetune.training import StepMetrics as StepMetrics
    from edgetune.training import TrainResult as TrainResult
    from edgetune.training import train as train
else:

    def __getattr__(name: str) -> object:
        """What is offered from here, from its module, which is imported now (PEP 562)."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    """What is offered is listed before it was asked for."""
    return sorted({*globals(), *__all__})
