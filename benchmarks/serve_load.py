"""Load on the server: many streams at once with mixed strengths, each reply compared with the same one asked for alone.

Prints how many replies were lost or mixed up, the server's memory at the start, in the middle and at the end, tokens
per second, and the ratio to plain `generate` that takes one request, and so one k, at a time. Then more requests come
at once than the batch and the queue take, and clients go away in the middle of long replies.

    python benchmarks/serve_load.py --seconds 120
    python benchmarks/serve_load.py --seconds 30 --model smollm2-135m-instruct --vector VECTOR --dtype float32
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0)  # shares of the largest k
LEAVING = 16  # clients that go away while their replies are written
BEYOND = 16  # requests more than the batch and the queue take
LONG = 4000  # tokens of a reply that nobody waits for
TOPICS = ("bread", "the sea", "a long winter", "trains", "the moon", "old maps", "a good walk", "rain")
PROMPTS = tuple(
    f"Write two sentences about {topic}, for a {reader}." for topic in TOPICS for reader in ("child", "clerk")
)


@dataclass
class Tally:
    """What came back."""

    replies: int = 0
    tokens: int = 0
    lost: int = 0
    mixed_up: int = 0
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def ask(url: str, prompt: str, k: float, tokens: int) -> tuple[str, int]:
    """The greedy reply as a stream, put together, and its tokens."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "k": k,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    text, count, ended = "", 0, False
    with urlopen(request, timeout=600) as reply:
        for line in reply:
            event = line.decode().removeprefix("data: ").strip()
            if event == "[DONE]":
                ended = True
            elif event:
                found = json.loads(event)
                if "error" in found:
                    raise RuntimeError(found["error"]["message"])
                text += "".join(choice["delta"].get("content", "") for choice in found["choices"])
                count = (found.get("usage") or {}).get("completion_tokens", count)
    if not ended:
        raise RuntimeError("the stream broke off")
    return text, count


def stream_until(
    end: float, url: str, number: int, alone: dict[tuple[str, float], str], tokens: int, tally: Tally
) -> None:
    """One client: asks again and again, and compares."""
    cases = list(alone)
    while time.monotonic() < end:
        number += 1
        prompt, k = cases[(number * 7919) % len(cases)]
        try:
            text, count = ask(url, prompt, k, tokens)
        except Exception as error:
            with tally.lock:
                tally.lost += 1
                tally.problems.append(f"{type(error).__name__}: {error}")
            continue
        with tally.lock:
            tally.replies += 1
            tally.tokens += count
            if text != alone[prompt, k]:
                tally.mixed_up += 1
                tally.problems.append(f"k = {k:g}, {prompt!r}: {text!r}, alone {alone[prompt, k]!r}")


def memory(pid: int) -> float:
    """Resident MiB of a process (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024  # type: ignore[union-attr]


def tiny_run(folder: Path) -> tuple[str, Path]:
    """A tiny random model and a random vector for it, in files."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from conftest import random_vector, tiny_lm

    lm = tiny_lm(layers=4)
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    return str(folder / "model"), random_vector(lm, scale=0.03).save(folder / "w")


def one_at_a_time(
    model: str, vector: Path, dtype: str, cases: Sequence[tuple[str, float]], tokens: int, most: float
) -> float:
    """Tokens per second of `generate` under `applied`, one prompt and one k after the other."""
    from weightsteer import LM, WeightVector

    lm, w = LM.load(model, dtype=dtype, device="cpu"), WeightVector.load(vector)
    written, start = 0, 0.0
    with w.applied(lm, 0.0) as handle:
        for number, (prompt, k) in enumerate(cases * 100):
            handle.k = k
            ids, _ = lm._writer.write([lm.chat_ids(prompt)], tokens)
            if number == 0:  # the first warms up
                start = time.perf_counter()
                continue
            written += len(ids[0])
            if time.perf_counter() - start > most:
                break
    return written / (time.perf_counter() - start)


def load(url: str, pid: int, cases: Sequence[tuple[str, float]], given: argparse.Namespace) -> dict[str, Any]:
    """Run the streams, and say what came of them."""
    alone = {case: ask(url, *case, given.tokens)[0] for case in cases}
    tally, start = Tally(), time.monotonic()
    end = start + given.seconds
    threads = [
        threading.Thread(target=stream_until, args=(end, url, n, alone, given.tokens, tally))
        for n in range(given.streams)
    ]
    sizes = [memory(pid)]
    for thread in threads:
        thread.start()
    for share in (0.25, 0.5, 0.75):
        time.sleep(max(0.0, start + share * given.seconds - time.monotonic()))
        sizes.append(memory(pid))
    for thread in threads:
        thread.join()
    took = time.monotonic() - start
    sizes.append(memory(pid))
    return {
        "seconds": round(took, 1),
        "replies": tally.replies,
        "lost": tally.lost,
        "mixed up": tally.mixed_up,
        "memory MiB, start to end": [round(size) for size in sizes],
        "tokens per second": round(tally.tokens / took, 1),
        "different replies alone": len(set(alone.values())),
        "problems": tally.problems[:3],
    }


def stay_or_leave(url: str, answers: list[int], gone: threading.Event) -> None:
    """One long request: notes the status, and goes away when `gone` is set."""
    body = {"prompt": "Once", "max_tokens": LONG, "ignore_eos": True, "stream": True, "model": "w@0.5"}
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=600) as reply:
            answers.append(reply.status)
            gone.wait()
    except HTTPError as error:
        answers.append(error.code)


def running(url: str) -> int:
    """Rows that run and requests that wait."""
    with urlopen(f"{url}/health", timeout=60) as reply:
        found = json.load(reply)
    return int(found["running"]) + int(found["waiting"])


def crowd(url: str, count: int) -> dict[str, Any]:
    """So many long requests at once; then all clients go away: the statuses, and the time until their rows are free."""
    answers: list[int] = []
    gone = threading.Event()
    threads = [threading.Thread(target=stay_or_leave, args=(url, answers, gone)) for _ in range(count)]
    for thread in threads:
        thread.start()
    start = time.monotonic()
    # one that waits has no status yet
    while (busy := running(url)) + sum(status != 200 for status in answers) < count and time.monotonic() - start < 60:
        time.sleep(0.05)
    gone.set()
    start = time.monotonic()
    while running(url) and time.monotonic() - start < 60:
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    freed = round(time.monotonic() - start, 2)
    counts = {str(status): answers.count(status) for status in sorted(set(answers))}
    return {"answers": counts, "rows and waiting": busy, "left after they went": running(url), "seconds": freed}


def main() -> None:
    """Start a server, load it, stop it, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=40, help="of a reply at most")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many different prompts")
    parser.add_argument("--max-batch", type=int, default=64)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--model", help="default: a tiny random model")
    parser.add_argument("--vector", type=Path)
    parser.add_argument("--most-k", type=float, default=1.0, help="strengths go up to this k on either side")
    parser.add_argument("--dtype", default="float32", help="float32: 16 bits round otherwise in another batch")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, vector = (given.model, given.vector) if given.model else tiny_run(Path(folder))
        cases = [(prompt, share * given.most_k) for prompt in PROMPTS[: given.prompts] for share in STRENGTHS]
        command = [sys.executable, "-m", "weightsteer.cli", "serve", f"w={vector}", "-m", model, "--port", "0"]
        command += ["--dtype", given.dtype, "--max-batch", str(given.max_batch), "--device", "cpu"]
        command += ["--queue", str(given.queue)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
            assert server.stdout is not None
            url = re.search(r"http://[\d.:]+", server.stdout.readline()).group(0)  # type: ignore[union-attr]
            try:
                found = load(url, server.pid, cases, given)
                found["clients that go away"] = crowd(url, LEAVING)
                found["more than the queue takes"] = crowd(url, given.max_batch + given.queue + BEYOND)
                found["memory MiB, in the end"] = round(memory(server.pid))
            finally:
                server.terminate()
        plain = one_at_a_time(str(model), vector, given.dtype, cases, given.tokens, min(20.0, given.seconds / 2))
        found["tokens per second, generate, one at a time"] = round(plain, 1)
        found["ratio"] = round(found["tokens per second"] / plain, 2)
    with suppress(BrokenPipeError):
        print(json.dumps(found, indent=2))
    sys.exit(bool(found["lost"] or found["mixed up"]))


if __name__ == "__main__":
    main()
