"""Training on the device: rows in, adapter out."""

from edgetune.training.observer import Observer, StartInfo, StepMetrics, TrainResult
from edgetune.training.run import train

__all__ = ["Observer", "StartInfo", "StepMetrics", "TrainResult", "train"]
