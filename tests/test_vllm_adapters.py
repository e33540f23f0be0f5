"""The folders that the vLLM plugin makes, read by PEFT; what vLLM itself does with them is in test_vllm_server.py."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from conftest import random_vector, tiny_lm, tiny_model
from weightsteer.errors import SteerError
from weightsteer.named_folders import named_folders, vectors_within
from weightsteer.packs.pack import write_pack
from weightsteer.run_card import StrengthRange
from weightsteer.vectors.delta import to_dense
from weightsteer.vectors.weight_vector import WeightVector
from weightsteer.vllm.adapters import AdapterCache, hash_of
from weightsteer.vllm.command import RankError, rank_for, vllm_command
from weightsteer.vllm.limits import allowed_rank, require_servable
from weightsteer.vllm.playground import add_playground
from weightsteer.vllm.settings import served_vectors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def changes(folder: Path) -> dict[str, Tensor]:
    """What an adapter adds to each weight, as PEFT computes it."""
    model = PeftModel.from_pretrained(tiny_model(), folder)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def assert_is(folder: Path, expected: WeightVector) -> None:
    found = changes(folder)
    assert len(found) == len(expected.deltas)
    for name, delta in expected.deltas.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        torch.testing.assert_close(found[key], to_dense(delta), atol=1e-6, rtol=1e-5)


@pytest.fixture
def vectors(tmp_path: Path) -> dict[str, Path]:
    lm = tiny_lm()
    syc = random_vector(lm, seed=1, rank=3)
    card = syc.card.with_strength(StrengthRange(recommended=0.75, negative=-0.72, low=-1.8, high=1.0))
    WeightVector(syc.deltas, card).save(tmp_path / "syc" / "vector")
    random_vector(lm, seed=2, rank=2).filter(modules="mlp").save(tmp_path / "gloomy")
    return named_folders([str(tmp_path / "syc" / "vector"), str(tmp_path / "gloomy")])


@pytest.fixture
def cache(tmp_path: Path) -> AdapterCache:
    return AdapterCache(tmp_path / "cache")


@pytest.mark.parametrize("k", [-0.72, 0.001, 3.0])
def test_the_adapter_is_k_times_the_vector(cache: AdapterCache, vectors: dict[str, Path], k: float) -> None:
    assert_is(cache.adapter(f"syc@{k:g}", vectors), k * WeightVector.load(vectors["syc"]))


def test_a_bare_name_is_the_recommended_k(cache: AdapterCache, vectors: dict[str, Path]) -> None:
    assert cache.adapter("syc", vectors) == cache.adapter("syc@0.75", vectors)
    with pytest.raises(SteerError, match="gloomy: its card recommends no k; say which, as in gloomy@0.5"):
        cache.adapter("gloomy", vectors)


def test_k_0_adds_zeros(cache: AdapterCache, vectors: dict[str, Path]) -> None:
    for name in ("syc@0", "syc@-0.0001", "gloomy@0+syc@0"):
        assert not any(delta.any() for delta in changes(cache.adapter(name, vectors)).values())


def test_a_sum_is_one_adapter(cache: AdapterCache, vectors: dict[str, Path]) -> None:
    folder = cache.adapter("syc@-0.7+gloomy@0.3", vectors)
    syc, gloomy = (WeightVector.load(vectors[name]) for name in ("syc", "gloomy"))
    assert_is(folder, -0.7 * syc + 0.3 * gloomy)
    assert json.loads((folder / CONFIG).read_text())["r"] == 5
    assert folder.name.startswith("gloomy@0.3+syc@-0.7-")
    assert cache.adapter("gloomy@.30+syc@-.70", vectors) == folder
    assert cache.adapter("gloomy@0+syc@-.70", vectors).name.startswith("syc@-0.7-")


def test_alphas_and_ranks_of_single_modules_count(cache: AdapterCache, tmp_path: Path) -> None:
    """An adapter of PEFT's own, with patterns and with the square root of rsLoRA; alone and in a sum."""
    folders = {}
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["q_proj", "up_proj"],
            rank_pattern={"up_proj": 2},
            alpha_pattern={"layers.1.*up_proj": 5},
            use_rslora=bool(seed),
            init_lora_weights=False,
        )
        get_peft_model(tiny_model(), config).save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
    single, plain = changes(cache.adapter("a@-0.5", folders)), changes(folders["a"])
    total, other = changes(cache.adapter("a@-0.5+b@2", folders)), changes(folders["b"])
    for name, delta in plain.items():
        torch.testing.assert_close(single[name], -0.5 * delta)
        torch.testing.assert_close(total[name], -0.5 * delta + 2 * other[name], atol=1e-6, rtol=1e-5)
    written = json.loads((cache.adapter("a@-0.5", folders) / "adapter_config.json").read_text())
    assert not written.get("alpha_pattern"), "vLLM does not read it"
    assert not written.get("rank_pattern"), "vLLM does not read it"


def test_a_pack_that_was_changed_is_not_served(cache: AdapterCache, vectors: dict[str, Path], tmp_path: Path) -> None:
    write_pack(vectors["syc"], tmp_path / "pack", name="syc")
    packed = {"syc": tmp_path / "pack"}
    cache.adapter("syc@1", packed)
    config = tmp_path / "pack" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    with pytest.raises(SteerError, match="was changed after packing"):
        cache.adapter("syc@1", packed)


def test_who_may_read_a_vector_stays(cache: AdapterCache, vectors: dict[str, Path]) -> None:
    """The cache links to its tensors."""
    tensors = vectors["syc"] / TENSORS
    tensors.chmod(0o600)
    cache.adapter("syc@0.5", vectors)
    assert tensors.stat().st_mode & 0o777 == 0o600


def test_strengths_lie_on_the_grid_and_share_one_copy(cache: AdapterCache, vectors: dict[str, Path]) -> None:
    first = cache.adapter("syc@-0.72", vectors)
    assert cache.adapter("syc@-0.7204", vectors) == first
    second = cache.adapter("syc@-0.721", vectors)
    assert second != first
    for folder in (first, second):
        assert (folder / TENSORS).samefile(vectors["syc"] / TENSORS)


def test_where_links_fail_one_copy_serves_all_k(
    cache: AdapterCache, vectors: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As between two disks: within the cache there are links, and they do not follow a vector that is replaced."""
    link = os.link

    def across(source: Path, target: Path) -> None:
        if not Path(source).is_relative_to(cache.folder):
            raise OSError(18, "Invalid cross-device link")
        link(source, target)

    monkeypatch.setattr(os, "link", across)
    first, second = (cache.adapter(name, vectors) for name in ("syc@1", "syc@2"))
    assert (first / TENSORS).samefile(second / TENSORS)
    assert not (first / TENSORS).samefile(vectors["syc"] / TENSORS)
    assert not (first / TENSORS).is_symlink()
    assert_is(first, WeightVector.load(vectors["syc"]))


def test_a_replaced_vector_has_another_hash_and_leaves_the_old_adapter(
    cache: AdapterCache, vectors: dict[str, Path]
) -> None:
    old, before = cache.adapter("syc@1", vectors), WeightVector.load(vectors["syc"])
    after = random_vector(tiny_lm(), seed=7)
    after.save(vectors["syc"])
    new = cache.adapter("syc@1", vectors)
    assert hash_of(new) != hash_of(old)
    assert_is(new, after)
    assert len(before.deltas) == len(changes(old))
    assert cache.adapter(new.name, vectors) == new
    with pytest.raises(SteerError, match=f"was replaced, and is {hash_of(new)} now; ask for syc@1"):
        cache.adapter(old.name, vectors)


def test_a_vector_that_is_written_over_in_place_is_noticed(cache: AdapterCache, vectors: dict[str, Path]) -> None:
    """`cp` writes into the file that the cache is linked to; what lies there under the old hash is made anew."""
    kept = shutil.copytree(vectors["syc"], vectors["syc"].with_name("kept"))
    old = cache.adapter("syc@1", vectors)
    later = random_vector(tiny_lm(), seed=7).save(vectors["syc"].with_name("later"))
    shutil.copyfile(later / TENSORS, vectors["syc"] / TENSORS)
    assert_is(cache.adapter("syc@1", vectors), WeightVector.load(later))
    assert cache.adapter("syc@1", {"syc": kept}) == old
    assert_is(old, WeightVector.load(kept))


def make(folder: str, vectors: dict[str, Path], names: list[str], found: object) -> None:
    found.put([str(AdapterCache(Path(folder)).adapter(name, vectors)) for name in names])  # type: ignore[attr-defined]


def test_two_processes_make_the_same_adapters_at_once(cache: AdapterCache, vectors: dict[str, Path]) -> None:
    names = ["syc@1", "syc@-1+gloomy@1", "syc@2", "gloomy@2"]
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    workers = [context.Process(target=make, args=(str(cache.folder), vectors, names, found)) for _ in range(2)]
    for worker in workers:
        worker.start()
    first, second = found.get(timeout=60), found.get(timeout=60)
    for worker in workers:
        worker.join()
    assert first == second
    assert sorted(path.name for path in (cache.folder / "adapters").iterdir()) == sorted(Path(p).name for p in first)
    assert_is(Path(first[0]), WeightVector.load(vectors["syc"]))


def test_nothing_is_left_of_an_adapter_that_cannot_be_made(cache: AdapterCache, vectors: dict[str, Path]) -> None:
    path = vectors["gloomy"] / TENSORS
    path.write_bytes(path.read_bytes()[:-10])
    for name in ("gloomy@1", "gloomy@1+syc@1"):
        with pytest.raises(SteerError, match="cannot be read"):
            cache.adapter(name, vectors)
    assert not [*cache.folder.rglob("*gloomy*")]


def test_the_plugin_imports_no_torch() -> None:
    """All but the two modules that import vLLM."""
    modules = ("adapters", "limits", "settings", "command", "sums", "playground")
    code = f"import sys, importlib\nfor m in {modules}: importlib.import_module(f'weightsteer.vllm.{{m}}')\n"
    code += "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_playground_reads_the_vectors_that_there_are(
    vectors: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = FastAPI()
    add_playground(app)
    app.state.openai_serving_models = SimpleNamespace(base_model_paths=[SimpleNamespace(name="the base")])
    client = TestClient(app)
    assert "script-src 'sha256-" in client.get("/play").headers["content-security-policy"]
    monkeypatch.setenv("WEIGHTSTEER_VECTORS", f"mild={vectors['syc']}")
    dial = client.get("/dial").json()
    assert (dial["base"], dial["server"]) == ("the base", "vllm")
    assert [vector["name"] for vector in dial["vectors"]] == ["mild"]
    assert str(tmp_path) not in json.dumps(dial)
    monkeypatch.setenv("WEIGHTSTEER_VECTORS", "none")
    wrong = client.get("/dial")
    assert (wrong.status_code, "no saved vector" in wrong.json()["error"]["message"]) == (500, True)


def test_what_vllm_refuses_is_refused(vectors: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((vectors["syc"] / CONFIG).read_text())
    for change, word in (
        ({"use_dora": True}, "has DoRA"),
        ({"lora_bias": True}, "has biases in its LoRA"),
        ({"bias": "all"}, "has trained biases"),
        ({"modules_to_save": ["lm_head"]}, "has whole modules"),
    ):
        (vectors["syc"] / CONFIG).write_text(json.dumps({**config, **change}))
        with pytest.raises(SteerError, match=f"{word}.*weightsteer export merged"):
            require_servable(vectors["syc"])
    lm = tiny_lm()
    dense = WeightVector({**random_vector(lm).deltas, "model.norm.weight": torch.ones(32)}, random_vector(lm).card)
    with pytest.raises(SteerError, match="has dense parts"):
        require_servable(dense.save(tmp_path / "dense"))


def test_the_rank_takes_the_sum_of_all_vectors(vectors: dict[str, Path], tmp_path: Path) -> None:
    assert rank_for({"syc": vectors["syc"]}) == 8
    assert [allowed_rank(rank) for rank in (1, 2, 64, 65, 512, 513)] == [1, 8, 64, 128, 512, None]
    surroundings, words = vllm_command(vectors, "base", max_loras=2)
    assert words[:7] == ["vllm", "serve", "base", "--host", "127.0.0.1", "--enable-lora", "--max-lora-rank"]
    assert words[words.index("--lora-target-modules") + 1 :] == sorted(
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    )
    assert served_vectors(surroundings["WEIGHTSTEER_VECTORS"]) == vectors
    large = random_vector(tiny_lm(), rank=300).save(tmp_path / "large")
    assert rank_for({"large": large, "syc": vectors["syc"]}) == 320
    assert rank_for({"large": large, "again": large}) == 320  # their sum fits nowhere
    with pytest.raises(RankError, match="large: its rank is 513, and vLLM takes 512 at most"):
        vllm_command({"large": random_vector(tiny_lm(), rank=513).save(tmp_path / "larger")}, "base")


def test_vectors_go_by_their_folders_names(vectors: dict[str, Path], tmp_path: Path) -> None:
    assert vectors_within(tmp_path) == vectors == served_vectors(str(tmp_path))
    assert list(named_folders([f"mild={vectors['syc']}"])) == ["mild"]
    with pytest.raises(SteerError, match="syc: is the name of two vectors; name one of them otherwise, as NAME=FOLDER"):
        named_folders([str(vectors["syc"]), f"syc={vectors['gloomy']}"])
    with pytest.raises(SteerError, match="no saved vector is there"):
        named_folders([str(tmp_path / "none")])
    odd = shutil.copytree(vectors["gloomy"], tmp_path / "a@b")
    with pytest.raises(SteerError, match="'a@b', cannot stand in syc@-0.72"):
        named_folders([str(odd)])
    (empty := tmp_path / "empty").mkdir()  # where a run is yet to write its vectors
    assert served_vectors(f"{vectors['syc']}:{empty}") == {"syc": vectors["syc"]}
    with pytest.raises(SteerError, match="none: no saved vector is there"):
        served_vectors(f"{tmp_path}:none")
