"""Training on the device: rows in, adapter out."""

from edgetune.training.loop import train
from edgetune.training.observer import Observer, StartInfo, StepMetrics, TrainResult

__all__ = ["Observer", "StartInfo", "StepMetrics", "TrainResult", "train"]
