"""Sets of adapters for engines that know an adapter by its folder, and the commands that serve vectors."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from conftest import random_vector, tiny_lm
from weightsteer import cli
from weightsteer.errors import SteerError
from weightsteer.export.adapter_set import export_adapter_set, read_adapter_set
from weightsteer.export.set_commands import set_command
from weightsteer.vectors.difference import task_vector
from weightsteer.vectors.weight_vector import WeightVector


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    sys.argv = ["weightsteer", *map(str, args)]
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return random_vector(tiny_lm()).save(tmp_path / "syc" / "vector")


@pytest.mark.parametrize("layout", ["peft", "mlx"])
def test_each_adapter_of_a_set_is_k_times_the_vector(saved: Path, tmp_path: Path, layout: str) -> None:
    vector = WeightVector.load(saved)
    found = export_adapter_set(vector, tmp_path / "set", ks=[-1.0, 0.5, 1.0], layout=layout)  # type: ignore[arg-type]
    assert {k: folder.name for k, folder in found.items()} == {-1.0: "syc@-1", 0.5: "syc@0.5", 1.0: "syc@1"}
    for k, folder in found.items():
        back = task_vector(folder)
        assert (back - k * vector).norm() < 1e-6 * vector.norm()
        assert set(back.deltas) == set(vector.deltas)


def test_adapters_for_mlx_share_their_tensors(saved: Path, tmp_path: Path) -> None:
    found = export_adapter_set(WeightVector.load(saved), tmp_path / "set", ks=[-1.0, 0.5], layout="mlx")
    first, second = (folder / "adapters.safetensors" for folder in found.values())
    assert first.samefile(second)
    config = json.loads((found[-1.0] / "adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == -1.0
    assert config["num_layers"] == 2
    assert "model.layers.1.mlp.up_proj" in config["lora_parameters"]["keys"]


def test_a_set_refuses_what_no_engine_could_serve(saved: Path, tmp_path: Path) -> None:
    vector = WeightVector.load(saved)
    for ks, word in (([], "other than 0"), ([0.0], "other than 0"), ([0.5, 0.5001], "given twice")):
        with pytest.raises(SteerError, match=word):
            export_adapter_set(vector, tmp_path / "set", ks=ks)
    with pytest.raises(SteerError, match="cannot stand in syc@-0.72"):
        export_adapter_set(vector, tmp_path / "set", ks=[1.0], name="a b")
    with pytest.raises(SteerError, match="layout: expected peft or mlx, found 'gguf'"):
        export_adapter_set(vector, tmp_path / "set", ks=[1.0], layout="gguf")  # type: ignore[arg-type]
    assert not (tmp_path / "set").exists()
    with pytest.raises(SteerError, match="holds a vector, expected what `weightsteer export adapters` wrote"):
        read_adapter_set(saved)


def test_a_set_comes_with_its_commands(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    out = tmp_path / "set"
    code, text, _ = run(capsys, "export", "adapters", saved, "--k=-1,0.5", "-o", out, "--base", checkpoint)
    assert code == 0
    assert text.startswith(f"{out}: 2 adapters of rank 3: syc@-1, syc@0.5\n  sglang: python -m sglang.launch_server")
    code, text, note = run(capsys, "serve-command", "sglang", out, "-m", "owner/base")
    words = shlex.split(text)
    assert words[words.index("--lora-paths") + 1 :] == [f"syc@-1={out}/syc@-1", f"syc@0.5={out}/syc@0.5"]
    assert '{"model": "owner/base:syc@-1"}' in note
    code, text, note = run(capsys, "serve-command", "lorax", out, "-m", "owner/base")
    assert f'"adapter_id": "{out}/syc@-1"' in note
    code, _, error = run(capsys, "serve-command", "mlx", out, "-m", "owner/base")
    assert (code, error.count("\n")) == (1, 1)
    assert "reads the layout mlx, and the set is peft" in error
    card, adapters = read_adapter_set(out)
    assert set_command("sglang", "b", card, adapters).words[:3] == ["python", "-m", "sglang.launch_server"]


def test_the_command_for_vllm_can_be_pasted(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    code, text, note = run(capsys, "serve-command", "vllm", saved, f"mild={saved}", "-m", checkpoint)
    words = shlex.split(text)
    assert (code, words[:2]) == (0, ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "VLLM_PLUGINS=weightsteer"])
    assert words[2] == f"WEIGHTSTEER_VECTORS=syc={saved}:mild={saved}"
    assert words[3:6] == ["vllm", "serve", str(checkpoint)]
    assert words[words.index("--max-lora-rank") + 1] == "8"
    assert "syc@0.5" in note
    assert "GGUF file with --model" in run(capsys, "serve-command", "llama.cpp", saved)[2]
    code, text, _ = run(capsys, "serve-command", "weightsteer", saved)
    assert (code, text) == (0, f"weightsteer serve syc={saved}\n")


def test_a_rank_that_vllm_does_not_take_is_refused_with_the_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = random_vector(tiny_lm(), rank=520).save(tmp_path / "large")
    code, _, error = run(capsys, "serve-command", "vllm", saved, "-m", "base")
    assert code == 1
    assert "large: its rank is 520, and vLLM takes 512 at most; cut large to that, which loses 0.00% of it" in error
    command = shlex.split(error.partition("of it: ")[2])
    assert run(capsys, *command[1:])[0] == 0
    assert run(capsys, "serve-command", "vllm", tmp_path / "large-512", "-m", "base")[0] == 0


def test_an_unknown_engine_is_told_with_the_known_ones(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(capsys, "serve-command", "vlm", saved)
    assert code == 1
    assert "vlm: expected one of vllm, llama.cpp, sglang, lorax, mlx, weightsteer; is 'vllm' meant?" in error
    assert "--max-loras: is vLLM's" in run(capsys, "serve-command", "mlx", saved, "--max-loras", "2")[2]
