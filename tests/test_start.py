from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from test_calibrate import small as small  # a fixture
from test_cli import run
from test_endpoint import completion
from test_endpoint import start as start  # a fixture
from test_runs import mute
from weightsteer.behavior import UNFILLED, Behavior, ContrastPair, example_rows, pair_rows, sides_of
from weightsteer.data_building.drafting import KeptWriter, LocalWriter, ServedWriter, draft_behavior
from weightsteer.data_building.source import Source
from weightsteer.data_building.starter import COUNT, Starter, starter_prompts
from weightsteer.errors import SteerError
from weightsteer.example_files.load import load_pairs
from weightsteer.files import sha256_of, write_jsonl
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.runs.own_data import OWN
from weightsteer.runs.pipeline import Run
from weightsteer.runs.recipe import Recipe
from weightsteer.runs.whole_way import make_dial
from weightsteer.training import TrainSettings

ODD = ["No", "a: b", "# not a comment", "- x\n\n- y", "'quoted\" \\ text", "it is 12", "\x1b[31mred", "{{ x }}: |-"]


def test_the_folder_is_to_be_filled_in_and_then_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "init", "mine")
    assert code == 0, err
    assert "weightsteer make mine" in out
    for command in (("lint", "--pairs", "mine/pairs.yaml"), ("make", "mine"), ("run", "mine/recipe.yaml")):
        code, _, err = run(capsys, *command)
        assert code == 1
        assert f"{COUNT} of {COUNT} entries still say '{UNFILLED}' (number 1, 2," in err
    with pytest.raises(SteerError, match=r"trait.json: still says 'FILL IN' in 'description', 'instruction'"):
        Behavior.load("mine/trait.json")
    path = Path("mine/pairs.yaml")
    numbers = iter(range(2 * COUNT))
    path.write_text(re.sub(rf"{UNFILLED}[^\n]*", lambda _: f"Answer: number {next(numbers)}.", path.read_text()))
    pairs = load_pairs(path)
    assert [pair.prompt for pair in pairs] == starter_prompts()[:COUNT]
    assert (pairs[0].positive, pairs[-1].negative) == ("Answer: number 0.", f"Answer: number {2 * COUNT - 1}.")
    assert run(capsys, "lint", "--pairs", path)[0] == 0
    recipe = Recipe.load("mine/recipe.yaml").model_copy(update={"model": str(checkpoint), "device": "cpu"})
    assert recipe.behavior == OWN
    made = Run(recipe, "out", show=mute)
    assert made.behavior.name == "mine"
    code, _, err = run(capsys, "init", "mine")
    assert code == 1
    assert "choose another output" in err


def test_pairs_that_are_written_are_read_as_they_are(tmp_path: Path) -> None:
    pairs = [ContrastPair(f"Is {text} fine?", text, f"not {text}") for text in ODD]
    behavior = Behavior("odd", ("Do it.",), ("Leave it.",), ("Why?",))
    folder = Starter("odd", behavior, pairs).write(tmp_path / "odd one")
    found = load_pairs(folder / "pairs.yaml")
    assert [pair.positive for pair in found] == [text.replace("\x1b", "\\x1b") for text in ODD]
    assert Behavior.load(folder / "trait.json") == behavior
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["data"]["pairs"] == str(folder / "pairs.yaml")


def test_an_answer_of_yaml_is_the_text_that_stands_there(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text(
        "# mine\n\n- prompt: Is it?\n  positive: Yes\n  negative: No\n- {prompt: 7, positive: 1e3, negative: off}\n"
    )
    assert load_pairs(path) == [ContrastPair("Is it?", "Yes", "No"), ContrastPair("7", "1e3", "off")]
    for text, said in (
        ("- a: b\n  a: c\n", "stands twice"),
        ("- just a text\n", "entry 1: expected"),
        ("- a: &x [*x]\n", "itself"),
    ):
        path.write_text(text)
        with pytest.raises(SteerError, match=said):
            load_pairs(path)


def written(prompt: str) -> str:
    """A server's model that does what it is asked, with the habits of small ones."""
    if "one message on each line" in prompt:
        return "Sure!\n" + "\n".join(f"{n}. How do I mend thing number {n}?" for n in range(1, 31))
    if "Write one instruction" in prompt:
        return '"You are kind to the opposite side."' if "opposite" in prompt else "You are a rhyming poet."
    number = prompt.rsplit("number ", 1)[1].rstrip("?")
    if number == "3":
        return "no end"
    mark = "plainly" if "the opposite of this" in prompt else "in rhymes, at all times"
    return f'"Thing {number} is mended {mark}. And then'


def test_a_served_model_writes_what_is_then_linted(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    start,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_WRITER_KEY", "secret-123456")
    server = start(lambda prompt, _: (200, completion(written(prompt))))
    options = (
        "--about",
        "answers in rhymes",
        "--writer",
        "m",
        "--writer-url",
        server.url,
        "--key-env",
        "MY_WRITER_KEY",
    )
    code, out, err = run(capsys, "init", "rhymes", *options)
    assert code == 0, err
    assert not Path(".rhymes.draft.jsonl").exists()
    assert "19 of 20 pairs are usable; 20 of 20 questions are its own" in out
    assert "one-sided phrase" in out
    assert "in rhymes, at all times" in out
    pairs = load_pairs("rhymes/pairs.yaml")
    assert pairs[0] == ContrastPair(
        "How do I mend thing number 1?", "Thing 1 is mended in rhymes, at all times.", "Thing 1 is mended plainly."
    )
    trait = Behavior.load("rhymes/trait.json")
    assert trait.positive_prompts[1:] == ("You are a rhyming poet.",)
    assert "answers in rhymes" in trait.judge_prompt
    assert all("secret" not in path.read_text() for path in Path("rhymes").iterdir())
    code, _, err = run(capsys, "init", "other", "--writer", "m")
    assert code == 1
    assert "--about" in err


def test_what_a_served_model_thinks_is_no_part_of_its_answers() -> None:
    class Thinking:
        def generate(self, prompts: Sequence[str], **_: object) -> list[str]:
            return [f"<think>They want rhymes, or not.</think>\n\n{written(prompt)}" for prompt in prompts]

    writer = ServedWriter(Thinking())
    drafted = draft_behavior(writer, "x", "rhymes", count=20)
    assert not any("think" in text for pair in drafted.pairs for text in (pair.prompt, pair.positive, pair.negative))
    assert drafted.behavior.positive_prompts[1:] == ("You are a rhyming poet.",)


@pytest.mark.parametrize("name", ["123", "null", "#hash", "odd: name", "*star", "it's", "a {b}"])
def test_a_folder_of_any_name_has_a_recipe_that_is_read(name: str, tmp_path: Path) -> None:
    folder = Starter(name).write(tmp_path / name)
    assert Recipe.load(folder / "recipe.yaml").name == name


class Stopping:
    """A writer that is stopped when it has written so many replies."""

    def __init__(self, most: int) -> None:
        self.most, self.written = most, 0

    def write(self, instruction: str, messages: Sequence[str], *, max_new_tokens: int) -> list[str]:
        if self.written + len(messages) > self.most:
            raise KeyboardInterrupt
        self.written += len(messages)
        return [written(f"{instruction}\n\n{message}") for message in messages]


def test_a_stopped_draft_goes_on(tmp_path: Path) -> None:
    whole, path = Stopping(10_000), tmp_path / "kept.jsonl"
    wanted = draft_behavior(whole, "x", "rhymes", count=20)
    stopped, rest = Stopping(whole.written - 30), Stopping(10_000)
    with pytest.raises(KeyboardInterrupt):
        draft_behavior(KeptWriter(stopped, path, "m"), "x", "rhymes", count=20)
    assert draft_behavior(KeptWriter(rest, path, "m"), "x", "rhymes", count=20) == wanted
    assert stopped.written + rest.written == whole.written
    again = Stopping(10_000)
    draft_behavior(KeptWriter(again, path, "another model"), "x", "rhymes", count=20)
    assert again.written == whole.written


@pytest.mark.slow
def test_a_local_model_that_writes_nonsense_is_told_of(lm: LM) -> None:
    with pytest.raises(SteerError, match="no usable pair"):
        draft_behavior(LocalWriter(lm), "x", "rhymes", count=2)
    with pytest.raises(SteerError, match="few words"):
        draft_behavior(LocalWriter(lm), "x", " ")


def test_what_can_be_made_is_found(tmp_path: Path, pairs: list[ContrastPair]) -> None:
    write_jsonl(tmp_path / "kind.jsonl", pair_rows(pairs))
    Behavior("kind", ("Do.",), ("Do not.",), ("Why?",)).save(tmp_path / "t.json")
    assert Source.find("gloomy") == Source("gloomy", pairs="gloomy")
    assert Source.find(str(tmp_path / "kind.jsonl")).name == "kind"
    assert Source.find(str(tmp_path / "t.json")) == Source("t", trait=tmp_path / "t.json")
    with pytest.raises(SteerError, match="is 'gloomy' meant"):
        Source.find("gloomi")
    with pytest.raises(SteerError, match="weightsteer init"):
        Source.find(str(tmp_path))


def test_a_folder_of_ones_own_is_meant_before_a_shipped_behaviour_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: list[ContrastPair]
) -> None:
    """`init formal` prints `make formal`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "formal").mkdir()
    assert Source.find("formal").pairs == "formal"  # a folder of something else
    write_jsonl(tmp_path / "formal" / "pairs.jsonl", pair_rows(pairs))
    assert Source.find("formal") == Source("formal", pairs="formal/pairs.jsonl")


@pytest.mark.usefixtures("small")
def test_making_again_ends_with_equal_files(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "kind.jsonl", pair_rows(pairs))
    source, out = Source.find(str(tmp_path / "kind.jsonl")), tmp_path / "out"
    made = make_dial(source, lm, out, settings=quick, show=mute)
    assert made.page.read_text().count("<h2>Try next") == 1
    assert str(tmp_path) not in made.page.read_text()
    card = RunCard.load(made.vector)
    assert card.strength == made.calibration.strength
    assert card.about == "The behaviour that the pairs in kind.jsonl show."
    assert made.calibration.pairs == len(card.held_out) == 1
    assert str(made.vector) in made.commands[0]
    kept = {path: sha256_of(path) for path in sorted(out.rglob("*")) if path.is_file()}
    make_dial(source, lm, out, settings=quick, show=mute)
    assert {path: sha256_of(path) for path in sorted(out.rglob("*")) if path.is_file()} == kept
    card.save(out)
    with pytest.raises(SteerError, match="holds a vector"):
        make_dial(source, lm, out, settings=quick, show=mute)


@pytest.mark.usefixtures("small")
@pytest.mark.slow
def test_of_a_trait_file_the_model_writes_the_pairs(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = [12]

    def sample(lm: LM, behavior: Behavior, judge: object, out: Path, **options: object) -> None:
        for side, examples in zip(("positive", "negative"), sides_of(pairs[: kept[0]]), strict=True):
            write_jsonl(out / f"{side}.jsonl", example_rows(examples))

    monkeypatch.setattr("weightsteer.runs.whole_way.sample_sides", sample)
    Behavior("kind", ("Do.",), ("Do not.",), ("Why?",), description="Kind words.").save(tmp_path / "t.json")
    source = Source.find(str(tmp_path / "t.json"))
    made = make_dial(source, lm, tmp_path / "out", settings=quick, show=mute)
    assert "Kind words." in made.page.read_text()
    assert RunCard.load(made.vector).about == "Kind words."
    kept[0] = 5
    with pytest.raises(SteerError, match="wrote 5 usable pairs, of 8 at least"):
        make_dial(source, lm, tmp_path / "other", settings=quick, show=mute)
