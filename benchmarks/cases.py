"""What is measured, and what it must show: tables, no code.

A case holds edgetune's contestants, what they are held against, and goals. An experiment that several cases name is
measured once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args, get_type_hints

from benchmarks.experiments import (
    DemoLoss,
    Dtype,
    Edgetune,
    Epochs,
    Experiment,
    GemmLibrary,
    GemmLimit,
    GradientCosine,
    Job,
    Precision,
    Preparing,
    PyTorch,
    RaggedTraining,
    Ranges,
    RealLoss,
    RowLosses,
    StartUp,
    Training,
    Workload,
)
from benchmarks.models import FULL, REAL, SMALL, Model, with_layers
from edgetune.config import PlanName, PrepareConfig, TrainingPrecision


@dataclass(frozen=True)
class Goal:
    """A bound on one quantity."""

    quantity: str
    direction: Literal["≥", "≤"]
    bound: float
    relative: bool = False
    """The bound is on the ratio to what the case holds against it."""


@dataclass(frozen=True)
class Case:
    """One row of the goals. It is met when one of `ours` meets all goals; the first goal decides between several."""

    name: str
    title: str
    ours: tuple[Experiment, ...]
    goals: tuple[Goal, ...]
    against: tuple[Experiment, ...] = ()
    """Of these the one counts that is best in the first goal's quantity."""
    beside: tuple[Experiment, ...] = ()
    """Measured and shown, but not held against anything."""
    every: bool = False
    """All of `ours` have to meet the goals; then the worst one counts."""


@dataclass(frozen=True)
class Line:
    """One line of a plot: how far along x, and what is measured there."""

    label: str
    points: tuple[tuple[float, Experiment], ...]


@dataclass(frozen=True)
class Series:
    """A plot of a quantity that must grow in a straight line."""

    name: str
    title: str
    x_label: str
    quantity: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Reference:
    """A figure from another sitting, shown beside this one's and never compared with it by the program."""

    label: str
    workload: Workload
    tokens_per_second: float
    peak_rss: float
    note: str


MINIMUM_FIT = 0.99
"""Coefficient of determination (R²) that counts as a straight line."""

SMALL_1024 = Workload(SMALL, 4, 256)
FULL_512 = Workload(FULL, 1, 512)
FULL_1024 = Workload(FULL, 1, 1024)

PEERS = tuple(PyTorch(dtype, checkpointing) for dtype in ("fp32", "bf16") for checkpointing in (False, True))
TORCH_FP32, _, TORCH_BF16, TORCH_BF16_LEAN = PEERS
TORCH_BF16_ADAPTER = PyTorch("bf16", checkpointing=False, bf16_adapter=True)

STOCK = Edgetune("onnxruntime")
STOCK_FP32 = Edgetune("onnxruntime", base="fp32")
STOCK_RECOMPUTED = Edgetune("onnxruntime", plan="recompute")
STOCK_STREAMED = Edgetune("onnxruntime", plan="stream")
STOCK_INT8 = Edgetune("onnxruntime", precision="int8")
STOCK_IN_LITTLE = Edgetune("onnxruntime", memory_budget="660MB")
STOCK_SPLIT = Edgetune("onnxruntime", trunk=True)
OPENVINO = Edgetune("openvino")
OPENVINO_STREAMED = Edgetune("openvino", plan="stream")
OPENVINO_INT8 = Edgetune("openvino", precision="int8")
OPENVINO_FP32_BASE = Edgetune("openvino", base="fp32")
ORT_TRAINING = Edgetune("ort-training", base="fp32")

SMALL_GEMM = (1024, 768, 4096)
FULL_GEMM = (512, 3072, 16384)
"""The largest product of each model's layers: gate and up projection at the tokens of a step."""


def _trainings(workload: Workload, contestants: tuple[Edgetune | PyTorch, ...], steps: int) -> tuple[Training, ...]:
    return tuple(Training(contestant, workload, steps) for contestant in contestants)


def _small(*contestants: Edgetune | PyTorch) -> tuple[Training, ...]:
    return _trainings(SMALL_1024, contestants, steps=3)


def _full(workload: Workload, *contestants: Edgetune | PyTorch) -> tuple[Training, ...]:
    return _trainings(workload, contestants, steps=2)


def _within(budget: str) -> tuple[Edgetune, ...]:
    """OpenVINO in both precisions, as fast as it can be in so much memory."""
    return tuple(Edgetune("openvino", precision=precision, memory_budget=budget) for precision in ("auto", "int8"))


_MULTIPLIERS: tuple[tuple[GemmLibrary, Dtype], ...] = (
    ("torch", "fp32"),
    ("onnxruntime", "fp32"),
    ("torch", "bf16"),
    ("openvino", "bf16"),
    ("onnxruntime", "int8"),
)
LIMITS = tuple(GemmLimit(*multiplier, *shape) for multiplier in _MULTIPLIERS for shape in (SMALL_GEMM, FULL_GEMM))
"""Measured in every sitting."""
SGEMM = tuple(limit for limit in LIMITS if limit.dtype == "fp32")

_ALL_SMALL = _small(STOCK, STOCK_FP32, STOCK_INT8, OPENVINO, OPENVINO_INT8, OPENVINO_FP32_BASE, ORT_TRAINING)


def _demo_int8(name: str, learning_rate: float | None) -> Case:
    """int8 against fp32, and beside them fp32's sums in another order: what those differ by is no precision's doing."""
    at = "" if learning_rate is None else f" at a learning rate of {learning_rate:g}"
    return Case(
        name,
        f"validation loss on the demo's rows{at}, int8 plan against fp32",
        ours=(DemoLoss(STOCK_INT8, learning_rate),),
        against=(DemoLoss(STOCK, learning_rate),),
        goals=(Goal("validation_loss", "≤", 1.02, relative=True),),
        beside=(DemoLoss(STOCK_RECOMPUTED, learning_rate),),
    )


WHOLE = Edgetune("onnxruntime", plan="whole")
"""Float32, as one graph: what is exact where a step's precision is measured."""
PHI3_MINI = with_layers(FULL, 2)
"""Two layers in Phi-3-mini's width, with random weights."""
EMULATED = with_layers(REAL, 16)
"""As many of the real model's layers as the emulated NPU takes in bearable time; from the 12th on states are large."""
LAYERED: tuple[PlanName, ...] = ("keep", "recompute", "stream")
ON_NPU = Edgetune("qnn")
NPU_INT8 = tuple(Edgetune("qnn", precision="int8", npu=kind) for kind in ("qdq", "blocks"))
QUANTISERS: tuple[str, ...] = get_args(get_type_hints(PrepareConfig).get("quantiser"))
"""All that `prepare` offers for an int4 base."""
REAL_FLOAT = RealLoss(Edgetune("onnxruntime", base="fp32"), REAL, steps=0)
STEP_LOSS = 5e-3
"""Bound on the relative difference of a step's loss."""


def _precision(model: Model, *contestants: Edgetune) -> tuple[Precision, ...]:
    return tuple(Precision(each, replace(WHOLE, base=each.base), model) for each in contestants)


def _layered(runtime: str, precision: TrainingPrecision) -> tuple[Edgetune, ...]:
    return tuple(Edgetune(runtime, plan=plan, precision=precision) for plan in LAYERED)


_EXACT_PLANS = (*_layered("onnxruntime", "auto"), *_layered("openvino", "auto"))
_INT8_PLANS = (*_layered("onnxruntime", "int8"), *_layered("openvino", "int8"))
_REAL_TRAININGS = (STOCK, STOCK_INT8, OPENVINO, OPENVINO_INT8, STOCK_SPLIT)
PRECISION_CASES = (
    Case(
        "precision",
        "real model, loss and gradients of every plan against float32, worst tensor",
        ours=_precision(REAL, *_EXACT_PLANS),
        every=True,
        goals=(Goal("worst_cosine", "≥", 0.999), Goal("loss_difference", "≤", STEP_LOSS)),
        beside=(
            *_precision(REAL, Edgetune("openvino", plan="whole"), Edgetune("ort-training", base="fp32")),
            *_precision(PHI3_MINI, *_EXACT_PLANS, *_INT8_PLANS),
            Ranges(REAL),
            *(RealLoss(each, REAL) for each in _REAL_TRAININGS),
        ),
    ),
    Case(
        "precision-int8",
        "the same in int8",
        ours=_precision(REAL, *_INT8_PLANS),
        every=True,
        goals=(Goal("worst_cosine", "≥", 0.99),),
    ),
    Case(
        "precision-npu",
        "16 layers of the real model, whole step in float16 on the emulated NPU",
        ours=_precision(EMULATED, ON_NPU),
        goals=(Goal("worst_cosine", "≥", 0.999), Goal("loss_difference", "≤", STEP_LOSS)),
    ),
    Case(
        "precision-npu-int8",
        "the same with int8 weights",
        ours=_precision(EMULATED, *NPU_INT8),
        every=True,
        goals=(Goal("mean_cosine", "≥", 0.998),),
    ),
    Case(
        "precision-split",
        "real model, int8 trunk of half the layers: validation loss before training against the bundle's own",
        ours=(RealLoss(STOCK_SPLIT, REAL),),
        against=(RealLoss(STOCK, REAL),),
        goals=(Goal("first_validation_loss", "≤", 1.05, relative=True),),
    ),
    Case(
        "precision-split-drop",
        "its drop of the validation loss against LoRA on all layers",
        ours=(RealLoss(STOCK_SPLIT, REAL),),
        against=(RealLoss(STOCK, REAL),),
        goals=(Goal("loss_drop", "≥", 0.9, relative=True),),
    ),
    Case(
        "precision-base",
        "real model, validation loss of the int4 base by quantiser, against float32",
        ours=tuple(RealLoss(replace(STOCK, quantiser=each), REAL, steps=0) for each in (None, *QUANTISERS)),
        against=(REAL_FLOAT,),
        goals=(Goal("first_validation_loss", "≤", 1.041, relative=True),),
    ),
)

DORA_CASES = tuple(
    Case(
        f"dora-{each.runtime}" + ("" if each.precision == "auto" else f"-{each.precision}"),
        f"98 M, a step with DoRA against one with LoRA: {each}",
        ours=_small(replace(each, dora=True)),
        against=_small(each),
        goals=(Goal("tokens_per_second", "≥", 1 / 1.1, relative=True), Goal("peak_rss", "≤", 1.1, relative=True)),
    )
    for each in (STOCK, OPENVINO, OPENVINO_INT8)
)


def _epochs(name: str, contestant: Edgetune) -> tuple[Case, Case]:
    """The upper half of the layers over five epochs, against the same with nothing kept, and against all layers."""
    layers = SMALL.size.layers
    ours = Epochs(contestant, SMALL_1024, f"{layers // 2}-{layers - 1}")
    title = f"98 M, {contestant}, upper half of the layers, five epochs, the lower half computed once"
    goals = (Goal("seconds", "≤", 0.6, relative=True),)
    every_epoch, everything = replace(ours, kept=False), replace(ours, layers=None)
    return (
        Case(f"epochs-{name}", f"{title}, against in every epoch", (ours,), goals, (every_epoch,)),
        Case(f"epochs-{name}-all", f"{title}, against all layers trained", (ours,), goals, (everything,)),
    )


JOB_RATES = (5e-4, 1e-3, 2e-3)
"""Of which PyTorch has its best one."""
JOB_CASE = Case(
    "job",
    "real model, 140 rows, edgetune's defaults: time to the lowest held-out loss, against PyTorch at its best rate",
    ours=tuple(Job(each, REAL) for each in (STOCK, STOCK_INT8, OPENVINO, OPENVINO_INT8)),
    against=tuple(Job(each, REAL, rate) for each in (TORCH_FP32, TORCH_BF16) for rate in JOB_RATES),
    goals=(Goal("validation_loss", "≤", 1.0, relative=True), Goal("seconds", "≤", 1 / 3, relative=True)),
)

EPOCHS_CASES = (*_epochs("stock", STOCK), *_epochs("openvino", OPENVINO), *_epochs("int8", OPENVINO_INT8))

CASES: tuple[Case, ...] = (
    Case(
        "small-best",
        "98 M, best runtime, against PyTorch at its best dtype",
        ours=_ALL_SMALL,
        against=_small(*PEERS),
        beside=_small(TORCH_BF16_ADAPTER),
        goals=(Goal("tokens_per_second", "≥", 3.0, relative=True),),
    ),
    Case(
        "small-lean",
        "98 M, leanest plan that is still twice as fast, against PyTorch's leanest",
        ours=_small(OPENVINO_STREAMED, OPENVINO_INT8, *_within("740MB"), *_within("440MB")),
        against=_small(TORCH_BF16_LEAN),
        goals=(Goal("peak_rss", "≤", 0.7, relative=True), Goal("tokens_per_second", "≥", 2.0, relative=True)),
    ),
    Case(
        "small-stock",
        "98 M, stock onnxruntime, against PyTorch fp32",
        ours=_small(STOCK, STOCK_FP32, STOCK_IN_LITTLE),
        against=_small(TORCH_FP32),
        goals=(Goal("tokens_per_second", "≥", 1.3, relative=True), Goal("peak_rss", "≤", 0.6, relative=True)),
    ),
    Case(
        "small-gemm-share",
        "share of the machine's sgemm limit that this whole fp32 step reaches",
        ours=_small(STOCK, STOCK_FP32),
        against=SGEMM,
        goals=(Goal("flops_per_second", "≥", 0.8, relative=True),),
    ),
    Case(
        "full-512",
        "3.8 B, int4 base, 512 tokens, best runtime, against PyTorch bf16",
        ours=_full(FULL_512, *_within("2.5GB")),
        against=_full(FULL_512, TORCH_BF16, TORCH_BF16_LEAN),
        goals=(Goal("tokens_per_second", "≥", 1.6, relative=True), Goal("peak_rss", "≤", 2.5e9)),
    ),
    Case(
        "full-1024",
        "the same at 1,024 tokens",
        ours=_full(FULL_1024, *_within("2.8GB")),
        against=_full(FULL_1024, TORCH_BF16, TORCH_BF16_LEAN),
        goals=(Goal("tokens_per_second", "≥", 1.4, relative=True), Goal("peak_rss", "≤", 2.8e9)),
    ),
    Case(
        "full-streaming",
        "3.8 B, weights streamed, stock onnxruntime, 512 tokens",
        ours=_full(FULL_512, STOCK_STREAMED, Edgetune("onnxruntime", precision="int8", memory_budget="980MB")),
        goals=(Goal("tokens_per_second", "≥", 10.0), Goal("peak_anonymous", "≤", 0.75e9)),
    ),
    Case(
        "small-int8",
        "98 M, int8 products, stock onnxruntime, against its fp32 plan",
        ours=_small(STOCK_INT8),
        against=_small(STOCK),
        goals=(Goal("tokens_per_second", "≥", 2.0, relative=True),),
    ),
    Case(
        "full-int8",
        "3.8 B, int8 products, stock onnxruntime, 512 tokens, against its fp32 plan",
        ours=_full(FULL_512, STOCK_INT8),
        against=_full(FULL_512, STOCK_STREAMED),
        goals=(Goal("tokens_per_second", "≥", 2.0, relative=True),),
    ),
    Case(
        "small-int8-gradients",
        "98 M, gradients of the int8 plan against the fp32 plan's, worst tensor",
        ours=tuple(GradientCosine(each, STOCK, SMALL_1024) for each in (STOCK_INT8, OPENVINO_INT8)),
        goals=(Goal("worst_cosine", "≥", 0.99),),
    ),
    Case(
        "full-int8-gradients",
        "3.8 B, gradients of the int8 plan against the fp32 plan's, worst tensor",
        ours=tuple(GradientCosine(each, STOCK_STREAMED, FULL_512) for each in (STOCK_INT8, OPENVINO_INT8)),
        goals=(Goal("worst_cosine", "≥", 0.99),),
    ),
    Case(
        "ragged",
        "98 M, rows of 20 to 500 tokens, packed against padded",
        ours=(RaggedTraining(STOCK, SMALL, "packed"),),
        against=(RaggedTraining(STOCK, SMALL, "padded"),),
        goals=(Goal("trained_tokens_per_second", "≥", 2.0, relative=True),),
    ),
    Case(
        "ragged-losses",
        "98 M, loss of every row, packed against padded",
        ours=(RowLosses(STOCK, SMALL),),
        goals=(Goal("row_loss_difference", "≤", 1e-4),),
    ),
    Case(
        "prefixes",
        "98 M, rows of 260 tokens of which 200 are a common prefix, computed once against in every row",
        ours=(RaggedTraining(STOCK, SMALL, "shared", "prefixed"),),
        against=(RaggedTraining(STOCK, SMALL, "packed", "prefixed"),),
        goals=(Goal("trained_tokens_per_second", "≥", 2.5, relative=True),),
    ),
    Case(
        "prefixes-losses",
        "98 M, loss of every row, the common prefix computed once against padded",
        ours=(RowLosses(STOCK, SMALL, "shared", "prefixed"),),
        goals=(Goal("row_loss_difference", "≤", 1e-4),),
    ),
    _demo_int8("demo-int8", None),
    _demo_int8("demo-int8-slower", 1e-3),
    Case(
        "demo-split",
        "drop of the validation loss on the demo's rows, int8 trunk of half the layers against LoRA on all",
        ours=(DemoLoss(STOCK_SPLIT),),
        against=(DemoLoss(STOCK),),
        goals=(Goal("loss_drop", "≥", 0.9, relative=True),),
    ),
    Case(
        "prepare-full",
        "`prepare` of the 3.8 B model from a local checkpoint",
        ours=(Preparing(FULL),),
        goals=(Goal("peak_rss", "≤", 12e9), Goal("bundle_ratio", "≤", 1.15)),
    ),
    Case(
        "start-up",
        "second `train` on the 98 M model: first step done after",
        ours=tuple(StartUp(contestant, SMALL_1024) for contestant in (STOCK, OPENVINO)),
        goals=(Goal("first_step_after", "≤", 2.0),),
    ),
    *PRECISION_CASES,
    *DORA_CASES,
    *EPOCHS_CASES,
    JOB_CASE,
)

_ROW_LENGTH = 128
SERIES = (
    Series(
        "tokens",
        "Step time against tokens per step (98 M model)",
        "tokens per step",
        "step_seconds",
        tuple(
            Line(
                str(contestant),
                tuple(
                    (rows * _ROW_LENGTH, Training(contestant, Workload(SMALL, rows, _ROW_LENGTH), steps=3))
                    for rows in (1, 2, 4, 8, 16)
                ),
            )
            for contestant in (STOCK, OPENVINO)
        ),
    ),
    Series(
        "layers",
        "Peak memory against layers (width of the 98 M model, recompute on)",
        "layers",
        "peak_rss",
        tuple(
            Line(
                str(contestant),
                tuple(
                    (layers, Training(contestant, Workload(with_layers(SMALL, layers), 4, 256), steps=1))
                    for layers in (4, 8, 16, 24, 32)
                ),
            )
            for contestant in (STOCK_STREAMED, OPENVINO_STREAMED)
        ),
    ),
)

ONNXSIM = Reference(
    "onnxsim 0.8.1 step graph, after hand surgery, on onnxruntime CPU",
    SMALL_1024,
    tokens_per_second=247.0,
    peak_rss=3.8e9,
    note="from another sitting on a machine of the same kind; not run by this benchmark; 11 GB through its own API",
)
