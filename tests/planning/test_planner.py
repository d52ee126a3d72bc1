"""Plans and their memory: what fits, what is fastest, what is refused with what advice."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from edgetune.config import PlanName, TrainConfig
from edgetune.errors import IncompatibleError, ResourceError, UsageError
from edgetune.formats.manifest import BundleManifest, TensorSpec
from edgetune.formats.roles import sublayer_role
from edgetune.planning.choice import Choice, choose
from edgetune.planning.memory import Sizes, Work, peak_memory
from edgetune.planning.planner import Planner, Prediction
from edgetune.runtimes.execution import ExecutionPlan, LayeredPlan, WholePlan
from edgetune.runtimes.footprint import Footprint
from edgetune.text.byte_size import parse_bytes
from support.fake_runtime import FOOTPRINT, INT8, FakeRuntime, runtimes
from support.prepared_bundles import Prepared
from support.run_requests import request_of

WORK = Work(positions=256, scores=256 * 64)


@pytest.fixture
def manifest(prepared: Prepared) -> BundleManifest:
    return prepared("grouped-query", "int4").manifest


@pytest.fixture
def planner(manifest: BundleManifest) -> Planner:
    return Planner(manifest, FOOTPRINT, WORK, LayeredPlan())


def best(planner: Planner, name: PlanName = "auto", budget: int | None = None) -> Prediction:
    found = planner.choose(name, budget)
    assert found is not None
    return found


def test_with_enough_memory_nothing_is_computed_twice(planner: Planner, manifest: BundleManifest) -> None:
    plan = best(planner).plan
    assert (plan.precision, plan.resident) == ("fp32", True)
    assert plan.kept_layers == manifest.architecture.num_hidden_layers
    assert plan == best(planner, "keep").plan


def test_less_memory_takes_more_time_and_never_more_than_there_is(planner: Planner) -> None:
    largest = best(planner).peak_memory_bytes
    smallest = planner.smallest("auto").peak_memory_bytes
    assert smallest < largest
    found = [best(planner, "auto", budget) for budget in range(smallest, largest + 1, (largest - smallest) // 20)]
    assert all(p.peak_memory_bytes <= smallest + i * ((largest - smallest) // 20) for i, p in enumerate(found))
    costs = [prediction.cost for prediction in found]
    assert costs == sorted(costs, reverse=True)
    assert not found[0].plan.resident
    assert len({prediction.plan for prediction in found}) >= 2


def test_names_hold_to_what_they_say(planner: Planner, manifest: BundleManifest) -> None:
    keep, recompute, stream = (best(planner, name).plan for name in ("keep", "recompute", "stream"))
    layers = manifest.architecture.num_hidden_layers
    assert [(p.kept_layers, p.resident) for p in (keep, recompute, stream)] == [(layers, True), (0, True), (0, False)]
    assert planner.smallest("auto").peak_memory_bytes >= planner.smallest("stream").peak_memory_bytes


def in_two_widths(manifest: BundleManifest) -> BundleManifest:
    """A manifest as if its graphs were those of wide pieces, and there were others of half their channels."""

    def halved(spec: TensorSpec) -> TensorSpec:
        axes = {"q_proj.weight": 0, "gate_proj.weight": 0, "gate": 2, "up": 2}
        axes |= dict.fromkeys(("query", "key", "value", "context"), 1)
        if spec.name not in axes:
            return spec
        shape = [s // 2 if place == axes[spec.name] and isinstance(s, int) else s for place, s in enumerate(spec.shape)]
        return replace(spec, shape=shape)

    graphs = []
    for graph in manifest.graphs:
        if graph.role in ("layers/attention", "layers/mlp"):
            graphs.append(replace(graph, role=sublayer_role("layers", graph.role.removeprefix("layers/"), wide=True)))
            ins, outs = ([halved(spec) for spec in specs] for specs in (graph.inputs, graph.outputs))
            graph = replace(graph, inputs=ins, outputs=outs)
        graphs.append(graph)
    return replace(manifest, graphs=graphs)


def test_wide_pieces_are_taken_where_there_is_room(manifest: BundleManifest) -> None:
    planner = Planner(in_two_widths(manifest), FOOTPRINT, WORK, LayeredPlan())
    assert best(planner).plan.wide
    assert not planner.smallest("auto").plan.wide
    assert not best(planner, "stream").plan.wide
    narrow, wide = (planner.predict(LayeredPlan(resident=False, wide=wide)) for wide in (False, True))
    assert narrow.peak_memory_bytes < wide.peak_memory_bytes
    assert narrow.cost > wide.cost
    assert best(planner, "auto", wide.peak_memory_bytes - 1).cost > wide.cost


def test_lean_plans_are_exact_where_16_bits_are_all_there_is(manifest: BundleManifest) -> None:
    def lean(footprint: Footprint, name: PlanName = "auto") -> set[bool]:
        return {plan.lean for plan in Planner(manifest, footprint, WORK, LayeredPlan())._plans(name)}

    assert lean(FOOTPRINT) == {False}
    assert lean(replace(FOOTPRINT, storage_bytes=2)) == lean(INT8) == lean(FOOTPRINT, "stream") == {False, True}
    deep = replace(manifest, architecture=replace(manifest.architecture, num_hidden_layers=32))
    assert best(Planner(deep, FOOTPRINT, WORK, LayeredPlan()), "stream").plan.lean


def test_every_term_counts(manifest: BundleManifest) -> None:
    """Differences between plans are the bytes of what they hold more."""
    sizes = Sizes(manifest)
    a = manifest.architecture
    plan = best(Planner(manifest, FOOTPRINT, WORK, LayeredPlan()), "recompute").plan

    def peak(**changes: int | bool) -> int:
        return peak_memory(sizes, FOOTPRINT, WORK, replace(plan, **changes))

    channels = 2 * a.num_attention_heads * a.head_dim + 2 * a.num_key_value_heads * a.head_dim + 2 * a.intermediate_size
    assert peak(kept_layers=1) - peak() == 4 * WORK.positions * channels
    weights = sum(sizes.weights.values())
    saved = peak() - peak(resident=False)
    everything = 4 * (a.num_hidden_layers * weights + sizes.head)
    assert everything - 4 * (sizes.head + max(sizes.weights.values())) < saved < everything - 4 * sizes.head
    assert peak_memory(sizes, FOOTPRINT, replace(WORK, row_bytes=12_345), plan) - peak() == 12_345
    more = peak_memory(sizes, FOOTPRINT, replace(WORK, positions=2 * WORK.positions), plan) - peak()
    assert more >= 4 * WORK.positions * a.hidden_size * (2 * a.num_hidden_layers + 1)


@pytest.mark.parametrize(("layers", "exact"), [(2, 0), (12, 0), (15, 1), (32, 6), (40, 9)])
def test_deep_models_have_exact_layers_below_int8_ones(manifest: BundleManifest, layers: int, exact: int) -> None:
    deep = replace(manifest, architecture=replace(manifest.architecture, num_hidden_layers=layers))
    assert best(Planner(deep, FOOTPRINT, WORK, LayeredPlan())).plan.exact_layers == 0
    plan = best(Planner(deep, INT8, WORK, LayeredPlan())).plan
    assert plan.exact_layers == exact
    assert ("above layer" in str(plan)) == bool(exact)
    sizes = Sizes(deep)
    further = peak_memory(sizes, INT8, WORK, plan) - peak_memory(sizes, INT8, WORK, replace(plan, exact_layers=0))
    assert further == 4 * exact * sum(sizes.weights.values()), "float32 ones beside int8"


@pytest.mark.parametrize(
    ("changes", "larger"), [({}, False), ({"kept_layers": 32}, True), ({"forward_only": True}, True)]
)
def test_where_exact_weights_are_streamed_they_count_if_nothing_later_needs_more(
    manifest: BundleManifest, changes: dict[str, int | bool], larger: bool
) -> None:
    deep = replace(manifest, architecture=replace(manifest.architecture, num_hidden_layers=32))
    plan = LayeredPlan(precision="int8", resident=False, exact_layers=6, head_tokens=64)
    with_exact = replace(plan, **changes)
    sizes, without = Sizes(deep), replace(with_exact, exact_layers=0)
    found = [peak_memory(sizes, INT8, WORK, each) for each in (with_exact, without)]
    assert (found[0] > found[1]) == larger


def test_what_was_kept_saves_attention_scores(manifest: BundleManifest) -> None:
    """A layer that is computed again holds more of them than one that kept its activations, or a lean one."""
    planner = Planner(
        manifest, replace(FOOTPRINT, attention_score_bytes=800.0, kept_score_bytes=500.0), WORK, LayeredPlan()
    )
    recompute = best(planner, "recompute").plan
    more = replace(WORK, scores=WORK.scores + 1000)
    heads = Sizes(manifest).heads
    for plan, each in (
        (recompute, 800),
        (replace(recompute, lean=True), 500),
        (best(planner, "keep").plan, 500),
        (replace(recompute, kept_layers=1), 800),
    ):
        sizes = Sizes(manifest)
        found = [peak_memory(sizes, planner._footprint, work, plan) for work in (WORK, more)]
        # Beside them the mask, of two batches.
        assert found[1] - found[0] == each * 1000 * heads + 2 * 4 * 1000


def test_the_head_takes_rows_in_powers_of_two(manifest: BundleManifest) -> None:
    rows = {plan.head_rows for plan in Planner(manifest, FOOTPRINT, WORK, LayeredPlan())._plans("auto")}
    assert rows == {1 << (count.bit_length() - 1) for count in rows}


def layered(choice: Choice) -> LayeredPlan:
    assert isinstance(choice.plan, LayeredPlan)
    return choice.plan


STOCK = FakeRuntime(int8=INT8)
LAYERED_ONLY = FakeRuntime(whole=False, exact=replace(FOOTPRINT, precision="bf16", storage_bytes=2))


def chosen(manifest: BundleManifest, config: TrainConfig) -> tuple[str, str]:
    choice = choose(manifest, request_of(config), WORK)
    assert (choice.predicted_peak_bytes is None) == (choice.plan == WholePlan())
    return choice.name, choice.plan.precision


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ("auto", ("fast", "bf16")),
        ("stream", ("fast", "bf16")),
        ("whole", ("stock", "fp32")),
    ],
)
def test_auto_takes_the_first_runtime_that_can(manifest: BundleManifest, plan: str, expected: tuple[str, str]) -> None:
    others = {"absent": FakeRuntime(installed=False), "slow": FakeRuntime(preferred=False)}
    with runtimes(**others, fast=LAYERED_ONLY, stock=STOCK):
        assert chosen(manifest, TrainConfig(plan=plan)) == expected  # type: ignore[arg-type]


def test_a_precision_is_what_the_first_runtime_with_it_multiplies_in(manifest: BundleManifest) -> None:
    with runtimes(fast=LAYERED_ONLY, stock=STOCK):
        assert chosen(manifest, TrainConfig(precision="int8")) == ("stock", "int8")
        for plan in ("keep", "recompute", "stream"):
            assert chosen(manifest, TrainConfig(plan=plan, precision="int8")) == ("stock", "int8")


def test_a_bundle_without_layers_is_trained_as_a_whole(manifest: BundleManifest) -> None:
    old = replace(manifest, graphs=[graph for graph in manifest.graphs if not graph.role.startswith("layers/")])
    with runtimes(fast=LAYERED_ONLY, stock=STOCK):
        assert chosen(old, TrainConfig()) == ("stock", "fp32")
        for config in (
            TrainConfig(plan="stream"),
            TrainConfig(memory_budget="3GB"),
            TrainConfig(optimizer_states="8bit"),
        ):
            with pytest.raises(IncompatibleError, match="no graphs under layers/"):
                chosen(old, config)


def test_what_a_runtime_cannot_do_is_refused(manifest: BundleManifest) -> None:
    with runtimes(**{"openvino": LAYERED_ONLY, "onnxruntime": STOCK, "ort-training": FakeRuntime(exact=None)}):
        with pytest.raises(UsageError, match="--runtime openvino does not execute --precision int8"):
            request_of(TrainConfig(runtime="openvino", precision="int8"))
        with pytest.raises(UsageError, match="--runtime ort-training does not execute --trunk"):
            request_of(TrainConfig(runtime="ort-training", trunk=True))
        with pytest.raises(UsageError, match="--runtime ort-training does not execute --plan stream"):
            request_of(TrainConfig(runtime="ort-training", plan="stream"))
        assert chosen(manifest, TrainConfig(runtime="ort-training")) == ("ort-training", "fp32")
        for config in (TrainConfig(plan="whole"), TrainConfig(runtime="ort-training")):
            with pytest.raises(UsageError, match="takes no --memory-budget"):
                request_of(replace(config, memory_budget="3GB"))
        with pytest.raises(UsageError, match="is no size"):
            request_of(TrainConfig(memory_budget="much"))


def test_a_budget_that_is_too_small_is_answered_with_one_that_works(manifest: BundleManifest) -> None:
    with runtimes(stock=STOCK):
        with pytest.raises(ResourceError, match=r"a memory budget of 1\.0 MB is too small") as caught:
            chosen(manifest, TrainConfig(memory_budget="1MB"))
        advice = re.search(r"--memory-budget (\S+MB);", str(caught.value))
        assert advice is not None
        choice = choose(manifest, request_of(TrainConfig(memory_budget=advice[1])), WORK)
        assert choice.predicted_peak_bytes is not None
        # Predictions are a few per cent off.
        assert choice.predicted_peak_bytes * 1.05 <= parse_bytes(advice[1])
        with pytest.raises(ResourceError):
            chosen(manifest, TrainConfig(memory_budget=f"{parse_bytes(advice[1]) - 10**6}B"))


def test_auto_goes_on_to_a_runtime_with_room(manifest: BundleManifest) -> None:
    large = replace(LAYERED_ONLY, exact=replace(FOOTPRINT, precision="bf16", storage_bytes=2, base_bytes=10**9))
    with runtimes(openvino=large, onnxruntime=STOCK):
        assert chosen(manifest, TrainConfig(memory_budget="2GB"))[0] == "openvino"
        assert chosen(manifest, TrainConfig(memory_budget="500MB"))[0] == "onnxruntime"
        with pytest.raises(ResourceError, match="too small"):
            chosen(manifest, TrainConfig(runtime="openvino", memory_budget="500MB"))


def test_without_a_budget_the_free_memory_decides(manifest: BundleManifest, monkeypatch: pytest.MonkeyPatch) -> None:
    with runtimes(stock=STOCK):
        monkeypatch.setattr("edgetune.planning.choice.free_memory_bytes", lambda: 1_000_000)
        tight = choose(manifest, request_of(TrainConfig()), WORK)
        assert not layered(tight).resident
        (note,) = tight.notes
        assert "has 1.0 MB of memory free" in note
        monkeypatch.setattr("edgetune.planning.choice.free_memory_bytes", lambda: None)
        ample = choose(manifest, request_of(TrainConfig()), WORK)
        assert layered(ample).resident and not ample.notes


@pytest.mark.parametrize("name", ["auto", "stream"])
def test_forward_alone_takes_less_memory_and_work(manifest: BundleManifest, name: PlanName) -> None:
    forward = best(Planner(manifest, FOOTPRINT, WORK, LayeredPlan(forward_only=True)), name)
    whole = best(Planner(manifest, FOOTPRINT, WORK, LayeredPlan()), name)
    assert forward.plan.forward_only
    assert (forward.plan.kept_layers, forward.plan.lean) == (0, False)
    assert forward.peak_memory_bytes < whole.peak_memory_bytes - 1_000_000
    assert forward.cost < 0.6 * whole.cost


def test_graphs_for_other_shapes_count_as_far_as_they_are_held(manifest: BundleManifest) -> None:
    footprint = replace(FOOTPRINT, together=True, shapes_held=3, shape_bytes=1_000_000, graph_weight_bytes=1.0)
    footprint = replace(footprint, kept_score_bytes=footprint.attention_score_bytes)
    sizes = Sizes(manifest)
    again = replace(best(Planner(manifest, footprint, WORK, LayeredPlan()), "keep").plan, kept_layers=0)
    keep = replace(again, kept_layers=sizes.layers)

    def added(plan: ExecutionPlan, *others: tuple[int, int]) -> int:
        work = replace(WORK, others=others)
        return peak_memory(sizes, footprint, work, plan) - peak_memory(sizes, footprint, WORK, plan)

    one, other = (64, 64 * 64), (32, 32 * 32)
    for plan in (again, keep):
        assert added(plan, one) > added(plan, other)
        assert added(plan, one, other) == pytest.approx(added(plan, one) + added(plan, other), abs=2)
        # Two of three are held beside the largest.
        held = (added(plan, one) + 2 * added(plan, other)) * 2 / 3
        assert added(plan, one, other, other) == pytest.approx(held, abs=2)
    assert added(again, other) > 1_000_000
    assert added(keep, one) == pytest.approx(0.75 * added(again, one), abs=2)
