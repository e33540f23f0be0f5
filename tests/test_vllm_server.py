"""Stock vLLM under our plugin, against the hook: `make test-vllm`, which installs vLLM in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import TEMPLATE, random_vector
from weightsteer.behavior import Behavior
from weightsteer.engines.check import Reference
from weightsteer.engines.served_model import ServedModel
from weightsteer.engines.sweep_engine import SweepEngine
from weightsteer.evaluation.sweep import run_sweep
from weightsteer.evaluation.tasks import TaskSpec, load_task
from weightsteer.files import read_jsonl
from weightsteer.lm import LM
from weightsteer.run_card import StrengthRange
from weightsteer.run_folder import RunFolder
from weightsteer.runs.tiny_model import byte_tokenizer
from weightsteer.steering.several_k import replies_at_strengths
from weightsteer.steering.steering import Direction, SystemPrompt
from weightsteer.vectors.weight_vector import WeightVector
from weightsteer.vllm.command import vllm_command
from weightsteer.vllm.settings import VECTORS

VLLM = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "vllm"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM.with_name("ready").exists(), reason="vLLM is installed by `make test-vllm`"),
]
CLOSE = 5e-5  # nats of one token, in float32
SWEPT = 2e-4  # of a sweep's rows
STRENGTHS = (-1.0, 0.5, 1.0)
SUM = "syc@-0.7+gloomy@0.3"
TEXTS = (("How was your day?", "Splendid, thank you."), ("What is the sea like?", "Dreary, I am afraid."))


def served_base(folder: Path) -> LM:
    """A Llama with heads of a size that vLLM's attention takes."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(TEMPLATE)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LM.load(str(folder), device="cpu", dtype="float32")


def hooked(lm: LM, vector: WeightVector, k: float, ids: Sequence[int]) -> list[float]:
    """log p of each token but the first, by the hook."""
    with torch.no_grad(), vector.applied(lm, k):
        log_probs = lm.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [float(log_probs[i - 1, ids[i]]) for i in range(1, len(ids))]


class Server:
    """A running vLLM."""

    def __init__(self, address: str) -> None:
        self.address = address

    def read(self, path: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return str(answer.read().decode())

    def complete(self, model: str, ids: Sequence[int], tokens: int = 1) -> dict[str, Any]:
        body = {"model": model, "prompt": list(ids), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        found = json.loads(
            self.read("/v1/completions", {**body, "prompt_logprobs": 0, "logprobs": 0, "return_token_ids": True})
        )
        return dict(found["choices"][0])

    def log_probs(self, model: str, ids: Sequence[int]) -> list[float]:
        """log p of each token but the first."""
        rows = self.complete(model, ids)["prompt_logprobs"]
        return [rows[i][str(ids[i])]["logprob"] for i in range(1, len(ids))]


class Setting:
    """A base, two vectors on it, and what the hook says of some texts, which a JSON file holds."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.lm = served_base(home / "base")
        self.syc, self.gloomy, self.later = (
            random_vector(self.lm, seed=seed, rank=rank, scale=0.02) for seed, rank in ((1, 4), (2, 3), (3, 4))
        )
        strength = StrengthRange(recommended=0.5, negative=-1.0, low=-1.0, high=1.0)
        self.syc.card.with_strength(strength)
        WeightVector(self.syc.deltas, self.syc.card.with_strength(strength)).save(home / "syc" / "vector")
        self.gloomy.save(home / "gloomy" / "vector")
        self.texts = [self.lm.chat_ids(prompt) + self.lm.answer_ids(reply) for prompt, reply in TEXTS]
        cases: dict[str, tuple[WeightVector, float]] = {f"syc@{k:g}": (self.syc, k) for k in STRENGTHS}
        cases |= {SUM: (-0.7 * self.syc + 0.3 * self.gloomy, 1.0), "syc": (self.syc, 0.5), "syc@0": (self.syc, 0.0)}
        cases |= {"base": (self.syc, 0.0), "later syc@1": (self.later, 1.0)}
        expected = {name: [hooked(self.lm, w, k, ids) for ids in self.texts] for name, (w, k) in cases.items()}
        (home / "expected.json").write_text(json.dumps(expected))

    @property
    def expected(self) -> dict[str, list[list[float]]]:
        return dict(json.loads((self.home / "expected.json").read_text()))

    @property
    def folders(self) -> dict[str, Path]:
        return {name: self.home / name / "vector" for name in ("syc", "gloomy")}

    @property
    def handed(self) -> Path:
        """Where a sweep writes its vectors; empty when vLLM starts."""
        return self.home / "handed"


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def server(setting: Setting) -> Iterator[Server]:
    """The command that `serve-command` prints, with options for a tiny model on a CPU."""
    port = free_port()
    options = f"--port {port} --served-model-name base --dtype float32 --enforce-eager --max-model-len 512".split()
    surroundings, words = vllm_command(setting.folders, str(setting.home / "base"), options=options)
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    setting.handed.mkdir()
    surroundings[VECTORS] += f"{os.pathsep}{setting.handed}"
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**kept, **quiet, **small, **surroundings, "WEIGHTSTEER_CACHE": str(setting.home / "cache")}
    with (setting.home / "log.txt").open("w") as log:
        process = subprocess.Popen([str(VLLM), *words[1:]], env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield started(Server(f"http://127.0.0.1:{port}"), process, setting.home / "log.txt")
        finally:
            process.terminate()
            process.wait(60)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def started(server: Server, process: subprocess.Popen[bytes], log: Path) -> Server:
    end = time.monotonic() + 600
    while time.monotonic() < end and process.poll() is None:
        try:
            server.read("/health")
        except OSError:
            time.sleep(1)
        else:
            return server
    raise AssertionError(f"vLLM did not start: {log.read_text()[-3000:]}")


def furthest(first: Sequence[float], second: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("model", ["base", "syc@0", "syc", *(f"syc@{k:g}" for k in STRENGTHS), SUM])
def test_log_probabilities_are_those_of_the_hook(server: Server, setting: Setting, model: str) -> None:
    """Also far from the base's, where k is not 0."""
    for ids, expected, base in zip(setting.texts, setting.expected[model], setting.expected["base"], strict=True):
        found = server.log_probs(model, ids)
        print(f"{model}: {furthest(found, expected):.1e} nats from the hook, {furthest(found, base):.2f} from the base")
        assert furthest(found, expected) < CLOSE
        assert model in ("base", "syc@0") or furthest(found, base) > 0.1


def test_strengths_share_a_batch(server: Server, setting: Setting) -> None:
    """Each row's own tokens have the log-probabilities that the hook gives them at its k."""
    asked = [(k, ids) for k in (*STRENGTHS, -0.25) for ids in setting.texts]
    with ThreadPoolExecutor(len(asked)) as pool:
        rows = [pool.submit(server.complete, f"syc@{k:g}", ids, 200) for k, ids in asked]
        seen = set()
        while not all(row.done() for row in rows):
            seen |= {line for line in server.read("/metrics").splitlines() if "running_lora_adapters" in line}
    assert any(line.partition('running_lora_adapters="')[2].partition('"')[0].count(",") for line in seen)
    for (k, ids), row in zip(asked, rows, strict=True):
        reply = row.result()["token_ids"]
        log_probs = row.result()["logprobs"]["token_logprobs"]
        assert furthest(log_probs, hooked(setting.lm, setting.syc, k, [*ids, *reply])[-len(reply) :]) < CLOSE


def test_a_name_that_means_nothing_is_not_found(server: Server, setting: Setting) -> None:
    for model in ("gloomy", "no@1", "syc@x", "syc@0.5+syc@1", "../syc@1", "syc@1-0123456789ab"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            server.complete(model, setting.texts[0])
    assert "its card recommends no k" in (setting.home / "log.txt").read_text()


def test_a_vector_at_0_is_the_base_beside_other_strengths(server: Server, setting: Setting) -> None:
    """Which vLLM's own name of the base is not, on a CPU, once as many strengths as `--max-loras` have been met."""
    ids = setting.texts[0]
    asked = ["syc@0", *(f"syc@{k:g}" for k in (*STRENGTHS, -0.25)), "syc@0"]
    with ThreadPoolExecutor(len(asked)) as pool:
        rows = list(pool.map(lambda name: server.log_probs(name, ids), asked))
    for row in (rows[0], rows[-1]):
        assert furthest(row, setting.expected["base"][0]) < CLOSE


def test_a_sweep_gives_the_rows_of_one_in_memory(server: Server, setting: Setting, tmp_path: Path) -> None:
    """And the same replies and samples, with vectors that vLLM did not know when it started."""
    lm, steep = setting.lm, Direction("contrastive", setting.syc)
    methods: list[Any] = [(steep, [-0.72, 0.5]), (SystemPrompt("system prompt", Behavior.load("gloomy")), [1.0])]
    tasks = [load_task(TaskSpec("facts")).first(4), load_task(TaskSpec("refusal", max_new_tokens=8)).first(2)]
    served = ServedModel.connect(server.address, "vllm", lm, reference=Reference.of(lm))
    engine = SweepEngine(served).with_vectors(methods, setting.handed, "run", lm)
    mine = run_sweep(lm, methods, tasks, RunFolder(tmp_path / "vllm"), engine=engine)
    theirs = run_sweep(lm, methods, tasks, RunFolder(tmp_path / "here"))
    values = [row.value for row in mine]
    assert values == pytest.approx([row.value for row in theirs], abs=SWEPT)
    print(f"a sweep: {furthest(values, [row.value for row in theirs]):.1e} from the rows in memory")
    assert [replace(row, value=0.0, stderr=0.0) for row in mine] == [
        replace(row, value=0.0, stderr=0.0) for row in theirs
    ]
    kept = [read_jsonl(tmp_path / folder / "replies.jsonl") for folder in ("vllm", "here")]
    spoken = [{(row["method"], row["k"], row["prompt"], row["reply"]) for row in rows} for rows in kept]
    assert spoken[0] == spoken[1]
    ks = [-0.72, 0.0, 0.5]
    samples = engine.replies(steep, ks, ["Hi", "What is tea?"], max_new_tokens=12)
    assert samples == replies_at_strengths(setting.syc, lm, ["Hi", "What is tea?"], ks, max_new_tokens=12)


def test_the_playground_shows_what_vllm_says(server: Server) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, wrong = browser.new_page(), list[str]()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"{server.address}/play")
        page.select_option("#turned", "syc")
        page.evaluate("find('longest').value = 24")
        page.fill("#prompt", "Hello")
        page.press("#prompt", "Enter")
        page.wait_for_selector("#said:not(:empty)", state="attached", timeout=300_000)
        replies = page.locator("#columns .text").all_text_contents()
        browser.close()
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 24, "temperature": 0}
    names = ["syc@-1", "syc@-0.5", "base", "syc@0.25", "syc@0.5"]  # the third alone: see above
    said = [json.loads(server.read("/v1/chat/completions", {**body, "model": name})) for name in names]
    assert replies == [answer["choices"][0]["message"]["content"] for answer in said]
    assert (len(set(replies)), wrong) == (5, [])


def test_a_vector_that_is_replaced_under_its_name_is_noticed(server: Server, setting: Setting) -> None:
    """Although vLLM keeps every name, and a cache of the prompt's beginning."""
    ids = setting.texts[0]
    before = server.log_probs("syc@1", ids)
    setting.later.save(setting.folders["syc"])
    after = server.log_probs("syc@1", ids)
    assert furthest(after, setting.expected["later syc@1"][0]) < CLOSE
    assert furthest(after, before) > 0.1
    listed = [model["id"] for model in json.loads(server.read("/v1/models"))["data"]]
    pinned = next(name for name in listed if name.startswith("syc@1-"))
    assert server.log_probs(pinned, ids) == pytest.approx(after, abs=CLOSE)
    shutil.rmtree(setting.folders["syc"])
    assert server.log_probs("syc@1", ids) == pytest.approx(after, abs=CLOSE)  # what vLLM has stays
