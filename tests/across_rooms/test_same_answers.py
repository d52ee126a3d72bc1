"""What is trained on is what answers: GenAI's greedy tokens are those of the bundle's own evaluation graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.config import Base, ExportConfig
from edgetune.data.batches import make_batch
from edgetune.data.encode import Example
from edgetune.exporting import export
from edgetune.formats.bundle import Bundle
from edgetune.formats.genai import open_model
from edgetune.generation import generate_ids
from edgetune.runtimes.onnx_session import open_graph
from support.prepared_bundles import Prepared
from support.tiny_phi3 import VARIANTS, parameters, save_adapter

pytestmark = pytest.mark.own
PROMPT = [5, 17, 200, 33, 90, 41, 7]
NEW_TOKENS = 12


def greedy_by_loss_graph(bundle: Bundle, adapter: Mapping[str, Any], ends: tuple[int, ...]) -> list[int]:
    """Append the graph's prediction at the last position, again and again."""
    architecture = bundle.manifest.architecture
    session = open_graph(bundle.file("loss"))
    ids = list(PROMPT)
    while len(ids) < len(PROMPT) + NEW_TOKENS:
        example = Example(1, ids, ids)
        batch = make_batch([example], architecture.rope, 0, multiple_of=1, sliding_window=architecture.sliding_window)
        token = int(session.run(["predictions"], {**batch.tensors(), **adapter})[0][0, -1])
        if token in ends:
            break
        ids.append(token)
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("base", ["int4", "fp32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_genai_answers_with_the_tokens_of_the_evaluation_graph(
    prepared: Prepared, variant: str, base: Base, tmp_path: Path
) -> None:
    bundle = prepared(variant, base)
    adapter = save_adapter(tmp_path / "adapter", bundle)
    trained = parameters(variant)
    untrained = {name: value if ".lora_A." in name else np.zeros_like(value) for name, value in trained.items()}
    kept = export(bundle, adapter, tmp_path / "kept", ExportConfig(merge=False)).path
    merged = export(bundle, adapter, tmp_path / "merged", ExportConfig(merge=True)).path
    ends = open_model(bundle.path).eos_token_ids

    wanted = greedy_by_loss_graph(bundle, trained, ends)
    plain = greedy_by_loss_graph(bundle, untrained, ends)

    assert wanted != plain, "an adapter that changes nothing shows nothing"
    assert generate_ids(bundle.path, PROMPT, NEW_TOKENS) == plain
    assert generate_ids(kept, PROMPT, NEW_TOKENS) == wanted
    assert generate_ids(merged, PROMPT, NEW_TOKENS) == wanted
