"""What is read means one thing: JSON, YAML, numbers, patterns of names."""

from __future__ import annotations

import json
import re
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import random_vector, tiny_lm
from weightsteer.checkpoints.architecture import architecture_of
from weightsteer.checkpoints.gguf_header import check_gguf_header
from weightsteer.errors import SteerError
from weightsteer.evaluation.results import Measurement, measurements_by_key
from weightsteer.files import read_json, read_jsonl
from weightsteer.lm import LM
from weightsteer.run_card import RunCard, StrengthRange
from weightsteer.runs.recipe_file import read_recipe_fields
from weightsteer.schema import checked, parse_json, suggestion
from weightsteer.vectors.difference import task_vector
from weightsteer.vectors.expression import combine
from weightsteer.vectors.handle import SteeringHandle
from weightsteer.vectors.module_patterns import compile_pattern
from weightsteer.vectors.parameter_names import layer_numbers

BILLION = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
PLUS = Path(__file__).parent / "data" / "former_run" / "former" / "plus"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ("[" * 100_000, "nested too deeply"),
        ('"\\ud800"', "half of a surrogate pair"),
        ("9" * 5000, "not JSON"),
        ("{", "not JSON"),
    ],
)
def test_json_that_means_two_things_or_none_is_refused(text: str, said: str) -> None:
    with pytest.raises(SteerError, match=said):
        parse_json(text, "file")


def test_files_in_other_encodings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes('{"a": 1}'.encode("utf-16"))
    with pytest.raises(SteerError, match="not UTF-8"):
        read_json(path)
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}\r\n')
    assert read_json(path) == {"a": 1}
    assert read_jsonl(path) == [{"a": 1}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BILLION, "aliases are written out"),
        ("a: &a [*a]", "holds itself"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("a: 1\na: 2", "'a' stands twice"),
        ("a: .nan", "'a': expected a finite number"),
        ("a: {b: [1, -.inf]}", "'a.b.1': expected a finite number"),
        ("a: " + "9" * 400, "expected a finite number"),
        ("a: 2026-01-01", "expected a text, number, list or mapping"),
        ("a: 2026-13-45", "not YAML"),
        ("a: !!set {x}", "expected a text, number, list or mapping"),
        ("a: !!python/name:os.system x", "not YAML"),
        ('a: "\\0"', "no such characters"),
        ("1: x", "expected a text, number"),
        ("\ta: 1", "not YAML"),
        ("a: 1\n---\nb: 2", "not YAML"),
        ("x" * 300_000, "is larger than"),
    ],
)
def test_yaml_is_one_plain_mapping(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    started = time.monotonic()
    with pytest.raises(SteerError, match=re.escape(said)):
        read_recipe_fields(path)
    assert time.monotonic() - started < 10


def test_an_anchor_that_is_used_once_more_is_fine(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: &a {x: 1.0e-3}\nb: *a\nc: {<<: *a, y: 2}\n")
    assert read_recipe_fields(tmp_path / "r.yaml") == {"a": {"x": 1e-3}, "b": {"x": 1e-3}, "c": {"x": 1e-3, "y": 2}}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": 1}, "'kind'.*valid string; found 1"),
        ({"kind": "vector", "base_modle": "x"}, "'base_modle': is not known; is 'base_model' meant"),
        ({"kind": "vector", "base_model": ["x"]}, "'base_model'"),
        ({"kind": "vector", "strength": {"recommended": "2", "negative": 0, "low": 0, "high": 1}}, "recommended"),
        ({"kind": "vector", "strength": {"recommended": 10**400, "negative": 0, "low": 0, "high": 1}}, "finite"),
        ({"kind": "vector", "strength": {"recommended": 1}}, "'strength.negative'"),
        ({"kind": "vector", "settings": {"a": float("nan")}}, "settings.*finite"),
        ({"kind": "vector", "seed": "0"}, "'seed'"),
        ({"base_model": "x"}, "'kind'"),
        ([], "object"),
    ],
)
def test_a_cards_fields_have_their_types(fields: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "weightsteer.json").write_text(json.dumps(fields))
    with pytest.raises(SteerError, match=said) as raised:
        RunCard.load(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_card_is_itself_again(tmp_path: Path) -> None:
    card = RunCard("vector", "m", strength=StrengthRange(2, -2, -4, 4, {"prose/nll": 1e9}), measured={"a": 1}, seed=3)
    card.save(tmp_path)
    assert RunCard.load(tmp_path) == card


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"values": {"m": [1.0]}}, "one value for each of its items"),
        ({"values": {"m": ["1", "2"]}}, "valid number"),
        ({"ids": [0, 0]}, "one value for each of its items, once"),
        ({"k": float("inf")}, "'k'"),
        ({"mehtod": "x"}, "is 'method' meant"),
        ({"method": None}, "'method'"),
    ],
)
def test_a_measurement_is_whole(change: dict[str, Any], said: str) -> None:
    row = {"method": "m", "k": 1.0, "task": "t", "ids": [0, 1], "splits": ["test"] * 2, "values": {"m": [1.0, None]}}
    assert list(measurements_by_key([row], "file")) == [("m", 1.0, "t")]
    with pytest.raises(SteerError, match=said):
        measurements_by_key([{**row, **change}], "file")


def test_no_number_is_taken_for_another_type() -> None:
    for value in ("1", 1.5, True, None, [1]):
        with pytest.raises(SteerError, match="file"):
            checked(int, value, "file")
    assert checked(Measurement, {**vars(Measurement("m", 1, "t", (), (), {}))}, "file").k == 1.0


def test_a_name_that_is_nearly_right_is_suggested() -> None:
    assert suggestion("lora_alhpa", ["lora_alpha", "r"]) == "; is 'lora_alpha' meant?"
    assert suggestion("colour", ["lora_alpha", "r"]) == ""


@pytest.mark.parametrize("k", [1e308, 1e39, float("inf"), float("nan"), 10**400])
def test_no_k_beyond_float32(k: float) -> None:
    with pytest.raises(SteerError, match="k: expected a finite number"):
        SteeringHandle(k)


@pytest.mark.parametrize(
    "text",
    [
        "1e308*w",
        "1e400*w",
        "9" * 400 + "*w",
        "w/1e-300",
        "(" * 5000 + "w",
        "-" * 100_000 + "w",
        "w" + "+w" * 4000,
        "w\0",
    ],
)
def test_expressions_out_of_range_are_one_line(text: str) -> None:
    with pytest.raises(SteerError) as raised:
        combine(text, {"w": random_vector(tiny_lm())})
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("text", ["0-99999999999", "²", "5-2", "-1", "", "9" * 5000])
def test_layers_out_of_range(text: str) -> None:
    with pytest.raises(SteerError, match="layers"):
        layer_numbers(text)


@pytest.mark.parametrize(
    "text", ["(a+)+", "(a|a)*b", "(a?){40}", ".*.*.*.*.*.*x", "(a|a)(a|a)" * 20, r"(a)\1", "a?" * 40]
)
def test_patterns_that_explode_are_not_tried(text: str) -> None:
    assert compile_pattern(text, anywhere=True) is None


@pytest.mark.parametrize(
    "text", [r"model\.layers\.\d+\.mlp", "q_proj", r"^layers.[0-9]+.self_attn.(q|k|v)_proj", ".*q_proj"]
)
def test_patterns_of_people_are(text: str) -> None:
    assert compile_pattern(text, anywhere=True) is not None


SHORT = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]


def adapter_with(folder: Path, **fields: Any) -> Path:
    import shutil

    shutil.copytree(PLUS, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"r": 8}, "has rank 2, but r or rank_pattern gives it 8"),
        ({"rank_pattern": {"q_proj": 4}}, "gives it 4"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern"),
        ({"rank_pattern": []}, "rank_pattern"),
        ({"r": 1000000000}, "field r"),
        ({"r": 2.5}, "field r"),
        ({"target_modules": ["k_proj"]}, "target_modules does not name it"),
        ({"target_modules": "nothing"}, "target_modules does not fit it"),
        ({"target_modules": 5}, "field target_modules"),
        ({"target_modules": None}, "target_modules is not given"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules names it"),
        ({"exclude_modules": r".*\.q_proj"}, "exclude_modules fits it"),
        ({"exclude_modules": "("}, "field exclude_modules: expected module patterns"),
        ({"exclude_modules": "(a+)+x"}, "field exclude_modules: expected patterns that end soon"),
        ({"kasa_config": {}}, "has kasa_config={}, whose change"),
        ({"layers_to_transform": [7], "target_modules": SHORT}, "layers_to_transform has 7 alone"),
        ({"layers_to_transform": "0"}, "field layers_to_transform"),
        ({"use_dora": True}, "no magnitude, but use_dora is True"),
        ({"alpha_pattern": {"(a+)+$": 4}}, "end soon"),
        ({"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern"),
        ({"alpha_patern": {"q_proj": 4}}, "is 'alpha_pattern' meant"),
        ({"use_rslora": "true"}, "use_rslora"),
        ({"init_lora_weights": 5}, "init_lora_weights"),
    ],
)
def test_an_adapters_config_and_its_tensors_belong_together(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=re.escape(said)):
        task_vector(adapter_with(tmp_path / "a", **fields), base=PLUS.parents[1] / "former-model")


@pytest.mark.parametrize("field", ["num_hidden_layers", "vocab_size", "hidden_size"])
def test_a_config_of_a_billion_is_not_built(field: str, checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: 10**9}))
    started = time.monotonic()
    with pytest.raises(SteerError, match="asks for a model of more than|more than its files can hold"):
        architecture_of(checkpoint)
    with pytest.raises(SteerError, match=r"base"):
        LM.load(checkpoint, device="cpu")
    assert time.monotonic() - started < 30


def test_a_number_of_layers_below_0_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": -1}))
    with pytest.raises(SteerError, match="num_hidden_layers -1; expected how many"):
        LM.load(checkpoint, device="cpu")


def test_layers_that_are_stored_nowhere_are_not_made_up(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 3}))
    with pytest.raises(SteerError, match=r"asks for model.layers.2.*they would be random"):
        LM.load(checkpoint, device="cpu")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("content", ["[]", "{", "5", ""])
def test_damaged_files_of_a_model_are_one_line(name: str, content: str, checkpoint: Path) -> None:
    (checkpoint / name).write_text(content)
    with pytest.raises(SteerError, match="base") as raised:
        LM.load(checkpoint, device="cpu").generate(["hi"], max_new_tokens=1)
    assert "\n" not in str(raised.value)


def test_end_tokens_are_token_ids(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(SteerError, match="eos_token_id"):
        LM.load(checkpoint, device="cpu")
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": 1000000000000000000000000000000}')
    with pytest.raises(SteerError, match="eos_token_id"):
        LM.load(checkpoint, device="cpu")
    (checkpoint / "generation_config.json").unlink()
    path = checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": "x"}))
    with pytest.raises(SteerError, match="its tokenizer cannot be loaded"):
        LM.load(checkpoint, device="cpu")


def gguf_start(tensors: int, fields: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest


def named(name: bytes, kind: int, rest: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + rest


@pytest.mark.parametrize(
    "content",
    [
        gguf_start(2**60, 0),
        gguf_start(0, 2**60),
        gguf_start(0, 1, named(b"a", 9, struct.pack("<IQ", 4, 2**60))),
        gguf_start(0, 1, named(b"a", 9, struct.pack("<IQ", 8, 2**62))),
        gguf_start(0, 1, named(b"a", 8, struct.pack("<Q", 2**63))),
        gguf_start(0, 1, named(b"a", 99, b"\0" * 8)),
        gguf_start(0, 1, named(b"a", 9, struct.pack("<IQ", 9, 1) * 50)),
        gguf_start(0, 1, named(b"llama.block_count", 4, struct.pack("<I", 10**9))),
        gguf_start(1, 0, named(b"a", 4, struct.pack("<4QIQ", 2**40, 2**40, 1, 1, 0, 0))),
        gguf_start(1, 0, named(b"a", 2**31, b"\0" * 64)),
    ],
)
def test_a_gguf_that_states_more_than_it_holds(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(SteerError, match="damaged or cut short"):
        check_gguf_header(path)


def test_vectors_of_activations_are_finite_and_alike(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from weightsteer.steering.activations import ActivationVector

    RunCard("activations").save(tmp_path)
    for tensors, said in (
        ({"layer.0": torch.full((3,), float("nan"))}, "finite"),
        ({"layer.x": torch.ones(3)}, "called layer.0"),
        ({"layer.0": torch.ones(3), "layer.1": torch.ones(4)}, "one length"),
        ({"layer.0": torch.ones(3, 3)}, "one vector"),
        ({"layer.0": torch.ones(3, dtype=torch.int64)}, "one vector"),
        ({}, "one length"),
    ):
        save_file(tensors, tmp_path / "activations.safetensors")
        with pytest.raises(SteerError, match=said):
            ActivationVector.load(tmp_path)
