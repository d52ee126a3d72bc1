"""The measured quantities: what they are called, and how they are written for people."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.record import Spread


@dataclass(frozen=True)
class Quantity:
    """One kind of figure."""

    title: str
    """With the unit in which it is shown."""
    unit: float
    """What is shown as 1, in seconds, bytes, tokens or operations."""
    digits: int
    """Behind the point."""

    def text(self, value: float) -> str:
        """The figure, without its unit."""
        return f"{value / self.unit:,.{self.digits}f}"

    def spread_text(self, spread: Spread | None) -> str:
        """Median, and the range where it shows; a dash where nothing was measured."""
        if spread is None:
            return "–"
        least, middle, most = map(self.text, (spread.least, spread.median, spread.most))
        return middle if least == most else f"{middle} ({least}–{most})"


QUANTITIES = {
    "tokens_per_second": Quantity("tokens/s", 1, 1),
    "step_seconds": Quantity("s a step", 1, 2),
    "first_step_seconds": Quantity("first step, s", 1, 2),
    "open_seconds": Quantity("opening, s", 1, 1),
    "flops_per_second": Quantity("GFLOP/s", 1e9, 0),
    "first_loss": Quantity("loss of the first step", 1, 4),
    "peak_rss": Quantity("peak RSS, GB", 1e9, 2),
    "predicted_peak": Quantity("predicted peak RSS, GB", 1e9, 2),
    "peak_largest": Quantity("largest process, GB", 1e9, 2),
    "peak_anonymous": Quantity("anonymous, GB", 1e9, 2),
    "peak_file": Quantity("file-backed, GB", 1e9, 2),
    "trained_tokens_per_second": Quantity("trained tokens/s", 1, 1),
    "row_loss_difference": Quantity("largest difference of a row's loss", 1, 7),
    "worst_cosine": Quantity("worst cosine", 1, 4),
    "mean_cosine": Quantity("mean cosine", 1, 4),
    "whole_cosine": Quantity("cosine of all in one", 1, 4),
    "validation_loss": Quantity("validation loss", 1, 4),
    "first_validation_loss": Quantity("validation loss before", 1, 4),
    "loss_drop": Quantity("drop of the validation loss", 1, 4),
    "loss": Quantity("loss", 1, 4),
    "loss_difference": Quantity("relative difference of the loss", 1, 5),
    "norm_ratio": Quantity("ratio of the gradients' norms", 1, 3),
    "largest_state": Quantity("largest hidden state", 1, 0),
    "median_state": Quantity("median hidden state", 1, 2),
    "largest_inner": Quantity("largest input of a down projection", 1, 0),
    "bundle_ratio": Quantity("bundle / its inference model", 1, 3),
    "bundle_bytes": Quantity("bundle, GB", 1e9, 2),
    "first_step_after": Quantity("first step done after, s", 1, 2),
    "seconds": Quantity("s in all", 1, 1),
    "processor_seconds": Quantity("s of all processors", 1, 1),
}
"""Every quantity that an experiment may yield."""
