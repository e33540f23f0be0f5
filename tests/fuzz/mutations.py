"""Ways in which a file goes wrong: by a hand, a disk, a tool of another version, or on purpose."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 1.5, -0.0, 1e308, -1e308, float("nan"), float("inf"), 10**30, 10**400),
    *(2**31, 2**63, -(2**63), 10**9, "", "x", "1", "1e400", "NaN", "\0", "../../etc/passwd", "²", "é", "\ud800"),
    *("a" * 5000, "(a+)+$", "(a|a)*b", "[", "all", "<script>", "\x1b[2J", "true", "none"),
    *([], {}, [[]], [None], ["x"], [1] * 50, {"a": 1}, {"": ""}),
)
NAMES = (
    *("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out", "modules_to_save", "lora_bias", "r"),
    *(
        "lora_alpha",
        "target_modules",
        "init_lora_weights",
        "layers_to_transform",
        "exclude_modules",
        "bias",
        "strength",
    ),
    *("target_parameters", "kind", "base_model", "settings", "seed", "weight_map", "metadata", "shape", "dtype"),
    *("data_offsets", "__metadata__", "num_hidden_layers", "text_config", "quantization_config", "auto_map"),
)
ENDINGS = ("x", " ", "\0", ".", "é", "²", "s")


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*at, key)
        yield from places(part, (*at, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def mutate_json(rng: random.Random, value: Any, count: int | None = None) -> Any:
    """A copy with one to three changes: another type, a huge number, a name with a typo, a part moved or gone."""
    value = copy.deepcopy(value)
    for _ in range(count or rng.choice([1, 1, 1, 2, 3])):
        found = list(places(value))
        if not found:
            return rng.choice(ODD)
        path = rng.choice(found)
        _change(rng, value, at(value, path[:-1]), path[-1], found)
    return value


def _change(rng: random.Random, whole: Any, parent: Any, key: Any, found: list[tuple[Any, ...]]) -> None:
    kind, old = rng.random(), parent[key]
    if kind < 0.12 and isinstance(parent, dict):
        parent[rng.choice(NAMES)] = rng.choice(ODD)
    elif kind < 0.22 and isinstance(parent, dict):
        parent[_typo(rng, str(key))] = parent.pop(key)
    elif kind < 0.34 and isinstance(old, int | float) and not isinstance(old, bool):
        parent[key] = old * rng.choice([-1, 0, 2, 0.5, 1000, 10**10])
    elif kind < 0.44:
        del parent[key]
    elif kind < 0.52:
        parent[key] = copy.deepcopy(at(whole, rng.choice(found)))
    elif kind < 0.56:
        parent[key] = [old] * 3
    else:
        parent[key] = rng.choice(ODD)


def _typo(rng: random.Random, name: str) -> str:
    if len(name) > 3 and rng.random() < 0.6:
        i = rng.randrange(len(name) - 1)
        return rng.choice([name[:i] + name[i + 1 :], name[:i] + name[i + 1] + name[i] + name[i + 2 :], name.upper()])
    return name + rng.choice(ENDINGS)


def to_json(rng: random.Random, value: Any) -> bytes:
    """JSON, at times with a byte order mark, in another encoding, with a name twice, or far too deep."""
    text, kind = json.dumps(value), rng.random()
    if kind < 0.02:
        return b"\xef\xbb\xbf" + text.encode()
    if kind < 0.04:
        return text.encode("utf-16")
    if kind < 0.06 and isinstance(value, dict) and value:
        name = rng.choice(list(value))
        return (text[:-1] + f", {json.dumps(name)}: {json.dumps(rng.choice(ODD))}}}").encode()
    if kind < 0.07:
        return b"[" * 100_000
    if kind < 0.08:
        return (text[:-1] + ', "x": ' + '{"a":' * 5000 + "1" + "}" * 5001).encode()
    return text.encode()


def mutate_bytes(rng: random.Random, content: bytes, *, until: int | None = None) -> bytes:
    """One to four changes of bytes: flipped, cut, doubled, put in, or a length in its eight bytes replaced."""
    raw = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        if not raw:
            break
        i, kind = rng.randrange(min(until or len(raw), len(raw))), rng.random()
        if kind < 0.35:
            raw[i] = rng.randrange(256)
        elif kind < 0.5:
            del raw[i : i + rng.choice([1, 2, 4, 8, 100])]
        elif kind < 0.65:
            raw[i:i] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 2, 8])))
        elif kind < 0.75:
            del raw[i:]
        elif kind < 0.85:
            raw[i : i + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(raw)]))
        elif kind < 0.93:
            raw[i : i + 4] = struct.pack("<I", rng.choice([0, 1, 2**31, 2**32 - 1, 255, 7, 999]))
        else:
            j = rng.randrange(len(raw))
            raw[i:i] = raw[j : j + rng.choice([4, 16, 64])]
    return bytes(raw)


def mutate_json_file(rng: random.Random, content: bytes) -> bytes:
    """A file of one JSON value, changed as a value or as bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, content)
    return to_json(rng, mutate_json(rng, json.loads(content)))


def mutate_lines(rng: random.Random, content: bytes) -> bytes:
    """A file of one JSON object a line: a row changed, or lines gone, doubled, cut or exchanged, or bytes."""
    lines, kind = content.splitlines(), rng.random()
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    if kind < 0.6:
        lines[i] = to_json(rng, mutate_json(rng, json.loads(lines[i])))
    elif kind < 0.8:
        change = rng.choice(["twice", "gone", "cut", "blank", "exchanged"])
        if change == "exchanged":
            lines[i], lines[j] = lines[j], lines[i]
        else:
            lines[i : i + 1] = {
                "twice": [lines[i]] * 2,
                "gone": [],
                "cut": [lines[i][: len(lines[i]) // 2]],
                "blank": [b"", lines[i]],
            }[change]
    else:
        return mutate_bytes(rng, content)
    return b"\n".join(lines) + b"\n"


YAML_ENDS = (
    "\nseed: &a [*a]",
    "\n? [a]: b",
    "\n<<: *x",
    "\n<<: {seed: 5}",
    "\n--- \nb",
    "\n%YAML 1.3",
    "\nplot: !!set {a, b}",
    "\nplot: !!timestamp x",
    "\nplot: [2026-13-45]",
    "\nplot: !!python/object/apply:os.system [exit]",
    "\n\t",
    "\nseed: 0x10",
    "\nseed: 1:30",
    "\nseed: .nan",
    "\nbatch_size: .inf",
    "\nname: again",
    "\nsamples: {prompts: []}",
    "\nsampels: {count: 1}",
    "\nchat_template_kwargs: {a: .inf}",
    "\nchat_template_kwargs: {a: 2026-01-01}",
    "\nplot: " + "[" * 5000,
    "\n" + "- " * 3000 + "a",
    "\nplot: &b0 [x, x]\n" + "\n".join(f"l{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]" for i in range(1, 12)),
)
