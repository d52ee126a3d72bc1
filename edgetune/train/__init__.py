"""Training on the device: rows in, adapter out."""

from edgetune.train.loop import train
from edgetune.train.observer import Observer, StartInfo, StepMetrics, TrainResult

__all__ = ["Observer", "StartInfo", "StepMetrics", "TrainResult", "train"]
