"""Chat templates of our own making in the manner of the known families, with the control tokens that each uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A template, its control tokens, and what is special about it."""

    text: str
    tokens: tuple[str, ...]  # the last of them ends a text
    parts: bool = False  # takes content as parts only
    system: bool = True  # has a system role
    agrees: bool = True  # a finished answer stands where the generation prompt asks for one


def _turns(user: str, assistant: str, end: str = "", before: str = "", system: str = "{{ m['content'] }}\n") -> str:
    """A template of three kinds of turns; `end` asks for the answer."""
    return (
        f"{before}{{% for m in messages %}}{{% if m['role'] == 'user' %}}{user}{{% elif m['role'] == 'assistant' %}}"
        f"{assistant}{{% else %}}{system}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{end}{{% endif %}}"
    )


C = "{{ m['content'] }}"
TRIMMED = "{{ m['content'] | trim }}"
NO_SYSTEM = "{{ raise_exception('this model takes no system prompt') }}"
IM = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
THINKING = _turns(
    f"<|im_start|>user\n{C}<|im_end|>\n",
    "<|im_start|>assistant\n{% set words = m['content'] %}{% set thought = '' %}{% if '</think>' in words %}"
    "{% set thought = words.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set words = words.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last or thought %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ words }}<|im_end|>\n",
    "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
    system=f"<|im_start|>system\n{C}<|im_end|>\n",
)

FAMILIES = {
    "chatml": Family(CHATML, IM),
    "chatml with a default system prompt": Family(
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help people.<|im_end|>\n{% endif %}" + CHATML,
        IM,
    ),
    "thinking": Family(THINKING, (*IM[:1], "<think>", "</think>", IM[1])),
    "reasoning that the prompt opens": Family(
        _turns(
            f"<|User|>{C}",
            "<|Assistant|>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}",
            "<|Assistant|><think>\n",
            "{{ bos_token }}",
        ),
        ("<|begin|>", "<|User|>", "<|Assistant|>", "<|finish|>"),
        agrees=False,
    ),
    "deepseek v2": Family(
        _turns(f"User: {C}\n\n", f"Assistant: {C}{{{{ eos_token }}}}", "Assistant:", "{{ bos_token }}"),
        ("<|begin|>", "<|finish|>"),
    ),
    "llama 2": Family(
        "{% if messages[0]['role'] == 'system' %}"
        "{% set order = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set order = '' %}{% endif %}{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ bos_token }}[INST] "
        "{{ (order if loop.first else '') + m['content'] | trim }} [/INST]"
        "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
    ),
    "llama 3": Family(
        "{{ bos_token }}{% for m in messages %}" + HEADERS + "{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral v1": Family(
        _turns(f"[INST] {C} [/INST]", f" {C}{{{{ eos_token }}}}", before="{{ bos_token }}", system=NO_SYSTEM),
        ("<s>", "</s>"),
        system=False,
    ),
    "mistral v3": Family(
        _turns(f"[INST] {C}[/INST]", f" {TRIMMED}{{{{ eos_token }}}}", before="{{ bos_token }}", system=NO_SYSTEM),
        ("<s>", "[INST]", "[/INST]", "</s>"),
        system=False,
    ),
    "mistral tekken": Family(
        _turns(
            f"[INST]{C}[/INST]",
            f"{C}{{{{ eos_token }}}}",
            before="{{ bos_token }}",
            system=f"[SYSTEM_PROMPT]{C}[/SYSTEM_PROMPT]",
        ),
        ("<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "</s>"),
    ),
    "gemma": Family(
        _turns(
            f"<start_of_turn>user\n{TRIMMED}<end_of_turn>\n",
            f"<start_of_turn>model\n{TRIMMED}<end_of_turn>\n",
            "<start_of_turn>model\n",
            "{{ bos_token }}",
            NO_SYSTEM,
        ),
        ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"),
        system=False,
    ),
    "phi 3": Family(
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
    ),
    "zephyr": Family(
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("</s>",),
    ),
    "vicuna": Family(
        _turns(f"USER: {C} ", f"ASSISTANT: {C}{{{{ eos_token }}}}", "ASSISTANT:", system=f"{C} "), ("<s>", "</s>")
    ),
    "alpaca": Family(
        _turns(
            f"### Instruction:\n{TRIMMED}\n\n",
            f"### Response:\n{TRIMMED}\n\n",
            "### Response:\n",
            "Below is a task. Answer it.\n\n",
        ),
        ("</s>",),
    ),
    "command r": Family(
        _turns(
            f"<|START|><|USER|>{TRIMMED}<|END|>",
            f"<|START|><|CHATBOT|>{TRIMMED}<|END|>",
            "<|START|><|CHATBOT|>",
            "{{ bos_token }}",
            f"<|START|><|SYSTEM|>{C}<|END|>",
        ),
        ("<BOS>", "<|START|>", "<|USER|>", "<|CHATBOT|>", "<|SYSTEM|>", "<|END|>"),
    ),
    "tulu": Family(
        "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% if not loop.last or m['role'] != 'assistant' %}"
        "\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("<|endoftext|>",),
    ),
    "granite": Family(
        "{% for m in messages %}<|start_of_role|>{{ m['role'] }}<|end_of_role|>{{ m['content'] }}<|end_of_text|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    ),
    "channels": Family(
        _turns(
            f"<|start|>user<|message|>{C}<|end|>",
            f"<|start|>assistant<|channel|>final<|message|>{C}{{{{ '<|return|>' if loop.last else '<|end|>' }}}}",
            "<|start|>assistant",
            system=f"<|start|>developer<|message|>{C}<|end|>",
        ),
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
    ),
    "yi": Family(CHATML.replace("{% for", "{{ bos_token }}{% for", 1), ("<|startoftext|>", *IM)),
    "internlm": Family(
        _turns(f"<|User|>:{C}<eoh>\n", f"<|Bot|>:{C}<eoa>\n", "<|Bot|>:", "{{ bos_token }}", f"<|System|>:{C}\n"),
        ("<s>", "<eoh>", "<eoa>", "</s>"),
    ),
    "parts only": Family(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        IM,
        parts=True,
    ),
    "no generation prompt": Family(CHATML.partition("{% if add")[0], IM),
    "a system prompt that is dropped": Family(
        _turns(f"<|user|>{C}", f"<|bot|>{C}{{{{ eos_token }}}}", "<|bot|>", system=""),
        ("<|user|>", "<|bot|>", "</s>"),
        system=False,
    ),
    "marked for training": Family(
        _turns(f"Q: {C}\n", f"A:{{% generation %}} {C}{{{{ eos_token }}}}{{% endgeneration %}}\n", "A:"), ("</s>",)
    ),
}
