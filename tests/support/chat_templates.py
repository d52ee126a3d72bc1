"""Chat templates in the forms that Phi-3 models have them, with and without the tag that marks answers."""

from __future__ import annotations

ENDED = "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
TEMPLATES = {
    # Phi-3-mini and Phi-3.5: every header on a line of its own
    "headed": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}"
        f"{ENDED}{{{{ '\\n' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    # the first Phi-3 of 128k: the user's turn opens the answer, system prompts are dropped
    "opened": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '<|user|>\\n' + message['content'] + '<|end|>\\n<|assistant|>\\n' }}"
        f"{{% elif message['role'] == 'assistant' %}}{ENDED}{{{{ '\\n' }}}}{{% endif %}}{{% endfor %}}"
    ),
    # Phi-4-mini: no white space at all
    "dense": (
        "{%- for message in messages %}\n  {%- if message['role'] == 'system' and 'tools' in message %}\n"
        "    {{- message['tools'] }}\n  {%- endif %}\n"
        f"  {{{{- '<|' + message['role'] + '|>' }}}}{ENDED}\n{{%- endfor %}}\n"
        "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- else %}{{- eos_token }}{%- endif %}"
    ),
}

BARE_TEMPLATES = {
    name: template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    for name, template in TEMPLATES.items()
}
"""As a model has them: only transformers knows the tag that marks answers."""
