"""The playground in a real browser, on the real server with a tiny model whose every reply is hostile.

`PLAYGROUND_PICTURES=FOLDER,FOLDER` names saved vectors, with which one test makes the pictures of docs/playground.md.
"""

from __future__ import annotations

import copy
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import random_vector, tiny_lm
from served import Address, served
from weightsteer.lm import LM
from weightsteer.looping import loops, repeated_share
from weightsteer.run_card import RunCard, StrengthRange
from weightsteer.vectors.weight_vector import WeightVector

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
DOCS = Path(__file__).parents[1] / "docs"
HOSTILE = '<img src=x onerror="hit=1"><script>hit=1</script>\u202e'
ABOUT = '<b onclick="hit=1">joy</b><img src="http://192.0.2.1/x" onerror="hit=1">' + HOSTILE
NAME = "<img src=x onerror=hit=1>"
PROMPT = "Hello"
COPIED = 'It\'s "so": $(id) `id` ü'
LONGEST = 56
SLOW = 60_000  # ms, where much else runs beside
TESTED = StrengthRange(recommended=1.0, negative=-0.7, low=-1.4, high=1.5)
OUTSIDE = """() => [...document.querySelectorAll("main *:not(.hidden):not(#columns *)")]
  .filter((part) => part.getClientRects().length && part.getBoundingClientRect().right > innerWidth + 1)
  .map((part) => part.tagName + " " + part.className + " " + part.textContent.slice(0, 40))"""

NAMELESS = """() => [...document.querySelectorAll("button, input, textarea, select")]
  .filter((part) => !part.textContent.trim() && !part.labels?.length && !part.ariaLabel).length"""


def taught() -> LM:
    """A tiny model that has learned to answer with markup."""
    lm = tiny_lm()
    exchange = lm.exchange(PROMPT, HOSTILE)
    ids = torch.tensor([exchange.head + exchange.answer + exchange.end])
    labels = ids.masked_fill(torch.arange(ids.shape[1])[None] < len(exchange.head), -100)
    optimiser = torch.optim.Adam(lm.model.parameters(), lr=1e-2)
    for _ in range(400):
        loss = lm.model(input_ids=ids, labels=labels).loss
        if loss.item() < 0.01:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    lm.model.requires_grad_(False)
    return replace(lm, name=NAME)


@dataclass
class Site:
    """What the tests of this file share."""

    lm: LM  # never served itself: a server keeps its hooks on its model
    vectors: dict[str, WeightVector]
    server: Address
    browser: Any

    def copied(self) -> LM:
        return copied(self.lm)


def copied(lm: LM) -> LM:
    return replace(lm, model=copy.deepcopy(lm.model))


def described(vector: WeightVector, about: str) -> WeightVector:
    card = RunCard("vector", base_model="tiny", strength=TESTED, settings={"description": about})
    return WeightVector(vector.deltas, card)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    lm = taught()
    vectors = {
        "joyful": described(random_vector(lm, seed=1, scale=0.1), ABOUT),
        "odd": described(random_vector(lm, seed=2, scale=0.05), "Another one."),
    }
    with ExitStack() as stack:
        server = stack.enter_context(served(copied(lm), vectors))
        started = stack.enter_context(playwright.sync_playwright())
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield Site(lm, vectors, server, browser)
        browser.close()


@contextmanager
def opened(site: Site, address: str = "", *, quiet: bool = True, **options: Any) -> Iterator[Any]:
    """The page; afterwards no script of a model's has run, nothing else was asked for, and no script has failed."""
    address = address or site.server.url
    context = site.browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if quiet and message.type == "error" else None)
    page.on(
        "request", lambda request: None if request.url.startswith(address.split("#")[0]) else wrong.append(request.url)
    )
    page.goto(address)
    page.set_default_timeout(SLOW)
    yield page
    assert page.evaluate("typeof hit") == "undefined"
    assert page.evaluate("document.querySelectorAll('main img, main script, main b').length") == 0
    assert wrong == []
    context.close()


def spread(page: Any, prompt: str = PROMPT) -> list[str]:
    """Ask the fan, and wait until its replies are measured: their texts."""
    page.evaluate(f"find('longest').value = {LONGEST}")
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#said:not(:empty)", state="attached")
    return page.locator("#columns .text").all_text_contents()


def say(page: Any, text: str = PROMPT) -> str:
    page.evaluate(f"find('longest').value = {LONGEST}")
    page.fill("#message", text)
    page.press("#message", "Enter")
    return last_reply(page)


def last_reply(page: Any) -> str:
    page.wait_for_selector("#say [type=submit]:text('Send')")
    return page.locator("#log .text").last.text_content()


def greedy(site: Site, prompt: Any = PROMPT, **ks: float) -> str:
    with ExitStack() as stack:
        for name, k in ks.items():
            stack.enter_context(site.vectors[name].applied(site.lm, k))
        return site.lm.generate([prompt], max_new_tokens=LONGEST)[0]


def test_the_fan_answers_at_five_strengths_and_0_is_the_base(site: Site) -> None:
    with opened(site) as page:
        replies = spread(page)
        ks = [-0.7, -0.35, 0.0, 0.5, 1.0]
        assert page.evaluate("fan.columns.map(strengthOf)") == ks
        assert len(set(replies)) == 5
        assert replies == [greedy(site, joyful=k) for k in ks]
        assert replies[2] == HOSTILE  # as text: it is the base's own reply
        columns = page.locator("#columns .reply")
        assert "the base itself" in columns.nth(2).text_content()
        assert columns.locator(".kl").count() == 4
        page.click("#shade")
        tokens = columns.nth(0).locator(".token")
        assert tokens.count() > 10
        assert "".join(tokens.all_text_contents()).startswith(replies[0][:5])
        page.fill("#columns article:nth-child(1) input", "-0.2")
        assert "reply at joyful@-0.7" in columns.nth(0).text_content()  # what stands there was asked before
        columns.nth(4).locator("button", has_text="Continue").click()
        assert page.locator("#next code").text_content() == "joyful@1"
        assert page.locator("#log .text").text_content() == replies[4]
        turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": replies[4]}]
        assert say(page, "More") == greedy(site, [*turns, {"role": "user", "content": "More"}], joyful=1)
        page.evaluate("find('temperature').value = 0.9; find('seed').value = 5")
        assert (sampled := spread(page)) != replies
        assert spread(page) == sampled


def test_a_server_that_knows_names_alone_is_asked_five_times(site: Site) -> None:
    """As vLLM, which has no route for a fan or for KL."""
    with opened(site) as page:
        page.route("**/dial", lambda route: route.fulfill(json={**route.fetch().json(), "server": "vllm"}))
        page.reload()
        asked: list[Any] = []
        page.on("request", lambda request: asked.append(request.post_data_json) if request.post_data else None)
        replies = spread(page)
        assert replies == [greedy(site, joyful=k) for k in (-0.7, -0.35, 0.0, 0.5, 1.0)]
        names = ["joyful@-0.7", "joyful@-0.35", "joyful@0", "joyful@0.5", "joyful@1"]
        assert sorted(body["model"] for body in asked) == sorted(names)
        assert all(body["repetition_penalty"] == 1 and body["top_k"] == -1 for body in asked)
        page.click('[aria-label="Copy the fan as curl"]')
        words = shlex.split(page.locator("#code").input_value())
        assert sorted(json.loads(word)["model"] for word in words if word.startswith("{")) == sorted(names)
        page.click("#close")
        page.click('[aria-label="Copy the fan as Python"]')
        compile(page.locator("#code").input_value(), "copied", "exec")


def test_the_playground_runs_nothing_of_what_it_shows(site: Site) -> None:
    with opened(site, quiet=False) as page:
        assert NAME in page.locator("#base").text_content()
        assert ABOUT in page.locator(".about").first.text_content()
        assert say(page, HOSTILE) == greedy(site, HOSTILE)
        assert page.locator(".said").text_content() == HOSTILE
        for attempt in ("main.innerHTML = '<p>'", "made.text = 'hit = 1'", "main.setAttribute('onclick', 'hit = 1')"):
            prepared = "const main = document.querySelector('main'), made = document.createElement('script')"
            with pytest.raises(playwright.Error, match="requires 'Trusted"):
                page.evaluate(f"() => {{ {prepared}; {attempt}; }}")
        elsewhere = "fetch('http://192.0.2.1/').then(() => 'sent', () => 'refused')"
        assert page.evaluate(elsewhere) == "refused"


def test_the_slider_is_moved_by_keys_marks_and_numbers(site: Site) -> None:
    with opened(site) as page:
        slider, field, name = (
            page.locator("[type=range]").first,
            page.locator(".dial [type=number]").first,
            page.locator("#next code"),
        )
        assert name.text_content() == NAME
        slider.focus()
        for key, k in (("ArrowRight", 0.05), ("Shift+ArrowRight", 0.051), ("PageDown", -0.449), ("0", 0.0)):
            slider.press(key)
            assert float(field.input_value()) == float(slider.input_value()) == k
        page.get_by_role("button", name="Set joyful to the recommended 1 for more").click()
        assert name.text_content() == "joyful@1"
        page.locator(".dial [type=number]").nth(1).fill("-1.6")
        assert name.text_content() == "joyful@1+odd@-1.6"
        assert "odd was tested from -1.4 to 1.5: replies may break" in page.locator("#next").text_content()
        slider.dblclick()
        assert name.text_content() == "odd@-1.6"
        box = slider.bounding_box()
        page.mouse.click(box["x"] + box["width"] * 0.8, box["y"] + box["height"] / 2)
        assert float(slider.input_value()) > 0.5


def test_a_talk_goes_on_at_another_strength_and_comes_back(site: Site) -> None:
    with opened(site) as page:
        assert "Nothing has been said yet" in page.locator("#chat").inner_text()
        assert say(page) == HOSTILE
        page.locator(".dial [type=number]").first.fill("0.7")
        page.locator(".dial [type=number]").nth(1).fill("-0.4")
        page.click("text=Again at joyful@0.7+odd@-0.4")
        both = last_reply(page)
        assert both == greedy(site, joyful=0.7, odd=-0.4) != HOSTILE
        page.wait_for_selector("#log .kl")
        page.click("[aria-label='Earlier version']")
        assert page.locator("#log .text").text_content() == HOSTILE
        assert "1 of 2" in page.locator("#log").text_content()
        page.click("#clear")
        assert page.locator("#log").is_hidden()
        page.click("#back")
        assert page.locator("#log .text").text_content() == HOSTILE


def test_a_reply_is_stopped(site: Site) -> None:
    with opened(site) as page:
        page.evaluate("find('longest').value = 6000")
        page.locator(".dial [type=number]").first.fill("9")  # so strong that it does not end by itself
        page.fill("#message", PROMPT)
        page.press("#message", "Enter")
        page.wait_for_selector("#log .text:not(:empty)")
        page.click("#say [type=submit]")
        page.wait_for_selector("#log .reply:has-text('stopped')")
        page.locator(".dial [type=number]").first.fill("0")
        page.click("#clear")
        assert say(page) == HOSTILE  # the server goes on


def test_a_copy_asks_what_the_page_asks(site: Site) -> None:
    with opened(site) as page:
        page.locator(".dial [type=number]").first.fill("0.7")
        prompt = 'It\'s "so" \x1b[201~ \u202e $(id) `id`\n!'
        page.evaluate("(text) => { find('message').value = text; find('prompt').value = 'Hello'; }", prompt)
        page.evaluate(f"find('longest').value = {LONGEST}")
        texts = {}
        for kind, label in {"curl": "curl", "python": "Python", "command": "command"}.items():
            for part in ("the chat's request", "the fan"):
                page.click(f'[aria-label="Copy {part} as {label}"]')
                texts[kind, part] = page.locator("#code").input_value()
                page.click("#close")
        assert not any(sign in text for text in texts.values() for sign in "\x1b\u202e")
        words = shlex.split(texts["curl", "the chat's request"])
        asked = json.loads(words[-1])
        assert asked["messages"][-1]["content"] == prompt
        assert asked["model"] == "joyful@0.7"
        _, _, answer = site.server.ask(words[1].removeprefix(site.server.url), asked)
        assert answer["choices"][0]["message"]["content"] == greedy(site, prompt, joyful=0.7)
        for part in ("the chat's request", "the fan"):
            compile(texts["python", part], "copied", "exec")
        assert shlex.split(texts["command", "the fan"])[:5] == [
            *("weightsteer", "steer", "runs/joyful/vector", "Hello", "--k=-0.7,-0.35,0,0.5,1")
        ]


def test_what_is_copied_runs(site: Site, tmp_path: Path) -> None:
    """Each copy, pasted into a shell or an interpreter beside the usual folders, prints what the page shows."""
    base = tmp_path / "tiny"
    site.lm.model.save_pretrained(base)
    site.lm.tokenizer.save_pretrained(base)
    site.vectors["joyful"].save(tmp_path / "runs" / "joyful" / "vector")
    with opened(site) as page:
        page.locator(".dial [type=number]").first.fill("0.7")
        page.evaluate(f"find('longest').value = {LONGEST}")
        page.fill("#message", COPIED)
        copies = {}
        for label in ("curl", "Python", "command"):
            page.click(f'[aria-label="Copy the chat\'s request as {label}"]')
            copies[label] = page.locator("#code").input_value()
            page.click("#close")
    wanted = greedy(site, COPIED, joyful=0.7)
    said = json.loads(pasted(["bash", "-c", copies["curl"]], tmp_path))
    assert said["choices"][0]["message"]["content"] == wanted
    assert pasted([sys.executable, "-c", copies["Python"]], tmp_path) == wanted + "\n"
    found = pasted(
        ["bash", "-c", copies["command"].replace("weightsteer", f"{sys.executable} -m weightsteer.cli", 1)], tmp_path
    )
    assert plain_letters(wanted)[:20] in plain_letters(found)


def pasted(command: list[str], folder: Path) -> str:
    """What a command prints that somebody pastes in a folder."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def plain_letters(text: str) -> str:
    """Without what a table does to a text."""
    return "".join(sign for sign in text if sign.isalnum())


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_nothing_overflows(site: Site, width: int, scheme: str) -> None:
    with opened(site, viewport={"width": width, "height": 844}, color_scheme=scheme, reduced_motion="reduce") as page:
        say(page)
        spread(page)
        page.click("#settings summary")
        page.click("#shade")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(OUTSIDE) == []
        ink = page.evaluate("getComputedStyle(document.body).color")
        assert (ink == "rgb(227, 233, 239)") == (scheme == "dark")
        assert page.evaluate(NAMELESS) == 0


def test_a_key_is_asked_for_and_kept_out_of_the_address(site: Site) -> None:
    with served(site.copied(), site.vectors, api_key="s3cret+/=") as server:
        with opened(site, server.url, quiet=False) as page:
            page.fill("#key", "wrong")
            page.press("#key", "Enter")
            page.wait_for_selector("text=The server refused this key")
            page.fill("#key", "s3cret+/=")
            page.press("#key", "Enter")
            assert say(page) == HOSTILE
            assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
            page.click('[aria-label="Copy the fan as Python"]')
            assert "s3cret" not in page.locator("#code").input_value()
        with opened(site, server.url + "/#key=s3cret%2B%2F%3D") as page:
            assert say(page) == HOSTILE
            assert "s3cret" not in page.url


def test_mistakes_and_a_server_that_is_gone_are_told(site: Site) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(served(site.copied(), site.vectors, out_of_range="refuse"))
        with opened(site, server.url, quiet=False) as page:
            strength = page.locator(".dial [type=number]").first
            strength.fill("3")
            say(page)
            assert "outside the range that was tested" in page.locator("#log .problem").text_content()
            strength.fill("1")
            stack.close()
            page.click("#again")
            page.wait_for_selector("#log .problem:has-text('Is the server still running')")
            page.fill("#prompt", PROMPT)
            page.press("#prompt", "Enter")
            page.wait_for_selector("#columns .problem")
            assert page.locator("#columns .problem").count() == 5


def test_the_page_finds_loops_by_the_rule_of_the_reports(site: Site) -> None:
    texts = [
        "",
        "a b c",
        "I am so very glad. " * 6,
        "猫が好きです。" * 5,
        "it's fine, it_is Fine; IT'S FINE, it_is fine",
        HOSTILE,
    ]
    with opened(site) as page:
        for text in texts:
            found = page.evaluate("repetition", text)
            assert found["share"] == pytest.approx(repeated_share(text))
            assert found["loops"] == loops(text)
        assert page.evaluate("repetition", texts[2])["word"] == 7


@pytest.mark.embedded
@pytest.mark.skipif("PLAYGROUND_PICTURES" not in os.environ, reason="makes the docs' pictures when asked")
def test_pictures(site: Site) -> None:
    folders = [Path(text) for text in os.environ["PLAYGROUND_PICTURES"].split(",")]
    vectors = {folder.parent.name: WeightVector.load(folder) for folder in folders}
    looks = {"light": (1280, "light", False), "dark": (1280, "dark", True), "phone": (390, "light", False)}
    with served(LM.load(), vectors) as server:
        for name, (width, scheme, shaded) in looks.items():
            with opened(site, server.url, viewport={"width": width, "height": 844}, color_scheme=scheme) as page:
                make_picture(page, DOCS / f"playground-{name}.png", shaded=shaded, full=name != "phone")


def make_picture(page: Any, target: Path, *, shaded: bool, full: bool) -> None:
    page.set_default_timeout(10 * SLOW)
    page.evaluate("find('longest').value = 48; showSettings()")
    page.locator(".dial").first.locator(".marks button").last.click()
    if shaded:
        page.locator(".dial [type=number]").nth(1).fill("0.2")
    page.fill("#message", "How are you doing?")
    page.press("#message", "Enter")
    page.wait_for_selector("#log .kl")
    page.fill("#prompt", "It has been raining all week. What now?")
    page.press("#prompt", "Enter")
    page.wait_for_selector("#said:not(:empty)", state="attached")
    if shaded:
        page.click("#shade")
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.screenshot(path=target, full_page=full)
    assert target.stat().st_size < 300_000
