"""Which Phi models the hosted platforms still train, and what replaces the others.

Azure's list of retired models (of 23 April 2026) and its regions of serverless fine-tuning (of 17 February 2026).
"""

from __future__ import annotations

from edgetune.errors import IncompatibleError, UsageError

RETIRED_ON = "30 August 2025"
RETIRED: dict[str, str] = {
    "Phi-3-mini-4k-instruct": "Phi-4-mini-instruct",
    "Phi-3-mini-128k-instruct": "Phi-4-mini-instruct",
    "Phi-3-small-8k-instruct": "Phi-4-mini-instruct",
    "Phi-3-small-128k-instruct": "Phi-4-mini-instruct",
    "Phi-3-medium-4k-instruct": "Phi-4",
    "Phi-3-medium-128k-instruct": "Phi-4",
    "Phi-3.5-mini-instruct": "Phi-4-mini-instruct",
    "Phi-3.5-MoE-instruct": "Phi-4-mini-instruct",
    "Phi-3.5-vision-instruct": "Phi-4-multimodal-instruct",
}
"""What Azure AI Foundry does not serve any more, and what it serves instead."""
SERVED = ("Phi-4-mini-instruct", "Phi-4", "Phi-4-multimodal-instruct")
"""What it fine-tunes without compute of one's own."""


def require_served(model: str) -> None:
    """Refuse a model that Azure AI Foundry does not fine-tune.

    Raises:
        IncompatibleError: It was retired.
        UsageError: It is none that Foundry has.
    """
    if model in RETIRED:
        raise IncompatibleError(
            f"--model {model}: Azure AI Foundry retired it on {RETIRED_ON}; give --model {RETIRED[model]}, or train on "
            "compute of your own with `edgetune jobs azure-ml`"
        )
    if model not in SERVED:
        raise UsageError(f"--model {model}: Azure AI Foundry fine-tunes {', '.join(SERVED)}")
