"""What is said of where a graph's nodes run."""

from __future__ import annotations

from edgetune.runtimes.placement import Node, Partition, Placement, placement_record

NPU, CPU = "QNNExecutionProvider", "CPUExecutionProvider"
LEFT = Node("Gather", "rows", "not supported")
PARTITIONS = [
    Partition(NPU, [Node("MatMul", "query"), Node("Add", "sum"), Node("MatMul", "key")]),
    Partition(CPU, [LEFT]),
    Partition(NPU, [Node("MatMul", "value")]),
]


def placed(*partitions: Partition, provider: str = NPU, device: str = "HTP") -> Placement:
    return Placement("step", 4, 128, provider, device, list(partitions), cached=False)


def test_a_record_has_the_operators_of_each_partition() -> None:
    assert placement_record(placed(*PARTITIONS)) == {
        "graph": "step",
        "batch": 4,
        "length": 128,
        "provider": NPU,
        "device": "HTP",
        "accelerated_nodes": 4,
        "accelerator_partitions": 2,
        "partitions": [
            {"provider": NPU, "nodes": 3, "operators": {"Add": 1, "MatMul": 2}},
            {"provider": CPU, "nodes": 1, "operators": {"Gather": 1}},
            {"provider": NPU, "nodes": 1, "operators": {"MatMul": 1}},
        ],
        "fallen_back": [{"operator": "Gather", "name": "rows", "reason": "not supported"}],
        "cached": False,
    }


def test_a_place_does_not_contradict_itself() -> None:
    assert placed(*PARTITIONS).place == f"{NPU} (HTP), 1 node on the CPU"
    assert placed(PARTITIONS[0]).place == f"{NPU} (HTP), all nodes"
    on_cpu = placed(Partition(CPU, [LEFT]), provider=CPU, device="no accelerator")
    assert on_cpu.place == f"{CPU} (no accelerator), all nodes"
    assert placed(device="this onnxruntime does not say").place == f"{NPU} (this onnxruntime does not say)"
