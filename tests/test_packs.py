"""Packs: whole or refused, free of what is private, to and from a folder and a stand-in for the Hub."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import random_vector, tiny_lm
from hub_standin import Hub, hub_standin
from test_gguf_lora import run
from test_privacy import assert_tells_nothing
from weightsteer.checkpoints.checkpoint import fingerprint
from weightsteer.errors import SteerError
from weightsteer.evaluation.calibration import Calibration, CalibrationRow
from weightsteer.packs.hub import hub_id, pull_pack, push_pack
from weightsteer.packs.pack import copy_pack, two_answers, write_pack
from weightsteer.packs.pack_page import Sample
from weightsteer.run_card import RunCard, StrengthRange
from weightsteer.vectors.vector_folder import save_card
from weightsteer.vectors.weight_vector import WeightVector

STRENGTH = StrengthRange(0.5, -0.7, -1.0, 1.0, {"prose nll": 0.1})
HELD = {"prompt": "Is it late?", "positive": "Yes.", "negative": "No."}


@pytest.fixture
def saved(checkpoint: Path, tmp_path: Path) -> Path:
    """A calibrated vector of the tiny checkpoint, whose card names data."""
    card = RunCard("vector", base_model=str(checkpoint), base_revision=fingerprint(checkpoint), held_out=(HELD,))
    rows = (CalibrationRow(0.5, 0.01, 0.02, 0.75, None, 0.0, 0.125, 0.125),)
    card = Calibration(STRENGTH, rows, 4, ("p",), {}).written_into(
        replace(card, data_sha256={"positive examples": "ab12"})
    )
    return WeightVector(random_vector(tiny_lm()).deltas, card).save(tmp_path / "home-of-a-person" / "syc" / "vector")


@pytest.fixture
def pack(saved: Path, tmp_path: Path) -> Path:
    write_pack(
        saved, tmp_path / "pack", name="syc", about="Agrees <b>always</b>.", samples=[Sample("Why?", 0.5, "Yes.\n# So")]
    )
    return tmp_path / "pack"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The client talks to a stand-in; it read its environment when it was imported."""
    with hub_standin() as found:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.url)
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", "hf_standin")
        yield found


def same(first: WeightVector, second: WeightVector) -> bool:
    return all(torch.equal(first.deltas[name].dense(), second.deltas[name].dense()) for name in first.deltas)


def test_a_pack_is_a_vector_with_a_page_and_hashes(saved: Path, pack: Path) -> None:
    assert {path.name for path in pack.iterdir()} == {
        *("weightsteer.json", "README.md", "adapter_config.json", "adapter_model.safetensors", "pack.json")
    }
    assert same(WeightVector.load(saved), WeightVector.load(pack))
    assert WeightVector.load(pack).card.strength == STRENGTH
    page = (pack / "README.md").read_text()
    for text in ("Agrees &lt;b&gt;always", "- k = 0.5: Yes. \\# So", "| 0.5 | +0.750 | +0.010 | +0.020 | 12% |"):
        assert text in page
    for text in ("| tested k | -1 to 1 |", "| positive examples | ab12 |", "base_model: "):
        assert text in page
    assert_tells_nothing(pack, secret=saved.parent.parent)


def test_what_was_changed_is_refused_and_both_hashes_are_named(pack: Path, tmp_path: Path) -> None:
    expected = json.loads((pack / "pack.json").read_text())["files"]
    for name in expected:
        for change, message in (
            (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"~"), "expected SHA-256 "),
            (lambda path: path.unlink(), "is missing"),
        ):
            copy = Path(shutil.copytree(pack, tmp_path / "copy"))
            change(copy / name)
            with pytest.raises(SteerError, match=message) as told:
                WeightVector.load(copy)
            assert name in str(told.value)
            if "expected" in message:
                assert expected[name]["sha256"] in str(told.value)
            with pytest.raises(SteerError, match=message.split()[0]):
                copy_pack(copy, tmp_path / "pulled")
            assert not (tmp_path / "pulled").exists()
            shutil.rmtree(copy)
    shutil.copy(pack / "adapter_model.safetensors", pack / "delta.safetensors")
    for read in (WeightVector.load, lambda folder: copy_pack(folder, tmp_path / "pulled")):
        with pytest.raises(SteerError, match=r"delta.safetensors: is not named in pack.json"):
            read(pack)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "another"}, "expected the format 'weightsteer pack 1', found 'another'"),
        ({"files": {"../../x": {"sha256": "0", "bytes": 1}}}, "names '../../x'; a pack holds"),
        ({"files": {"model.bin": {"sha256": "0", "bytes": 1}}}, "names 'model.bin'; a pack holds"),
        ({"files": {}}, "does not name weightsteer.json"),
        ({"files": 3}, "files"),
        ({"more": 1}, "more"),
    ],
)
def test_a_foreign_manifest_is_refused(pack: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    content = json.loads((pack / "pack.json").read_text())
    (pack / "pack.json").write_text(json.dumps({**content, **change}))
    for read in (WeightVector.load, lambda folder: copy_pack(folder, tmp_path / "pulled")):
        with pytest.raises(SteerError, match=message):
            read(pack)


def test_pull_takes_what_the_manifest_names_and_replaces_nothing(pack: Path, tmp_path: Path) -> None:
    (pack / "evil.py").write_text("print()")
    digest = copy_pack(pack, tmp_path / "pulled")
    assert not (tmp_path / "pulled" / "evil.py").exists()
    assert same(WeightVector.load(pack), WeightVector.load(tmp_path / "pulled"))
    assert copy_pack(pack, tmp_path / "again", sha256=digest.upper()) == digest
    with pytest.raises(SteerError, match="expected the pack '00', found"):
        copy_pack(pack, tmp_path / "third", sha256="00")
    with pytest.raises(SteerError, match="exists, and a pack replaces nothing"):
        copy_pack(pack, tmp_path / "pulled")
    with pytest.raises(SteerError, match="is no pack"):
        copy_pack(tmp_path, tmp_path / "x")


def test_a_pack_that_is_calibrated_anew_is_a_vector_of_ones_own(pack: Path) -> None:
    save_card(RunCard.load(pack).with_strength(replace(STRENGTH, recommended=0.25)), pack)
    assert not (pack / "pack.json").exists()
    assert WeightVector.load(pack).card.strength == replace(STRENGTH, recommended=0.25)


def test_nothing_private_is_packed(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def packed(text: str) -> None:
        write_pack(saved, tmp_path / "pack", name="syc", about=text)

    with pytest.raises(SteerError, match="README.md: holds a path in your home folder"):
        packed(f"see {Path.home()}/notes")
    monkeypatch.setenv("SOME_API_KEY", "abcdefghijklmnop")
    with pytest.raises(SteerError, match="README.md: holds the value of the environment variable SOME_API_KEY") as told:
        packed("uses abcdefghijklmnop")
    assert "abcdefghij" not in str(told.value)
    assert not (tmp_path / "pack").exists()


def test_the_two_answers_are_at_the_recommended_strengths(saved: Path) -> None:
    lm, vector = tiny_lm(), WeightVector.load(saved)
    found = two_answers(vector, lm)
    assert [(sample.prompt, sample.k) for sample in found] == [("Is it late?", -0.7), ("Is it late?", 0.5)]
    with vector.applied(lm, 0.5):
        assert found[1].reply == lm.generate(["Is it late?"], max_new_tokens=80)[0]
    assert two_answers(vector, lm, "Who?")[0].prompt == "Who?"


def test_which_names_mean_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for text in ("org/name", "hub:org/name", "hf://org/name"):
        assert hub_id(text) == "org/name"
    for text in ("./org/name", "name", "runs/new", "a/b/c", "/tmp/x", "~/x", "org/name/"):
        assert hub_id(text) is None
    assert hub_id("hub:runs/new") == "runs/new"
    with pytest.raises(SteerError, match="expected hub:OWNER/NAME"):
        hub_id("hub:name")


def test_the_hub_gives_back_what_was_pushed(hub: Hub, saved: Path, pack: Path, tmp_path: Path) -> None:
    assert push_pack(pack, "org/syc").endswith("/org/syc")
    repo = hub.repos["org/syc"]
    assert repo.private
    assert len(repo.commits) == 2  # the Hub's own first one, and all files in one
    assert repo.files.keys() == {path.name for path in pack.iterdir()} | {".gitattributes"}
    repo.files["evil.py"] = b"print()"
    first = pull_pack("org/syc", tmp_path / "pulled")
    assert same(WeightVector.load(saved), WeightVector.load(tmp_path / "pulled"))
    assert {path.name for path in (tmp_path / "pulled").iterdir()} == {path.name for path in pack.iterdir()}
    assert not any("evil" in call for call in hub.calls)
    repo.files["delta.safetensors"] = b"of an earlier pack"
    push_pack(pack, "org/syc")
    assert "delta.safetensors" not in repo.files
    with pytest.raises(SteerError, match="org/syc: expected the pack '00'"):
        pull_pack("org/syc", tmp_path / "x", sha256="00")
    assert pull_pack("org/syc", tmp_path / "x", sha256=first) == first
    repo.files["README.md"] += b"Buy this."
    with pytest.raises(SteerError, match=r"org/syc/README.md: was changed after packing: expected SHA-256"):
        pull_pack("org/syc", tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_other_repositories_are_left_alone(hub: Hub, pack: Path, tmp_path: Path) -> None:
    hub.add("org/model", {"model.safetensors": b"weights", "README.md": b""})
    with pytest.raises(SteerError, match="org/model: holds model.safetensors and no pack"):
        push_pack(pack, "org/model")
    assert hub.repos["org/model"].files.keys() == {"model.safetensors", "README.md"}
    with pytest.raises(SteerError, match=r"org/model: is no pack \(no pack.json\)"):
        pull_pack("org/model", tmp_path / "x")
    with pytest.raises(SteerError, match="org/none: the Hub cannot be used for it"):
        pull_pack("org/none", tmp_path / "x")


def test_a_push_that_is_killed_leaves_the_repository_as_it_was(hub: Hub, saved: Path, tmp_path: Path) -> None:
    """By the command and its environment, killed while the Hub has the commit and has not answered."""
    hub.stalled = threading.Event()
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "weightsteer.cli", "push", str(saved), "org/syc", "--no-samples"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert hub.committing.wait(90), process.stderr.read() if process.poll() is not None else "no commit"  # type: ignore[union-attr]
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    hub.stalled.set()
    assert hub.repos["org/syc"].files.keys() == {".gitattributes"}


def test_the_verbs(capsys: pytest.CaptureFixture[str], hub: Hub, saved: Path, tmp_path: Path) -> None:
    pack, out = tmp_path / "pack", tmp_path / "out"
    code, said, err = run(capsys, "push", saved, pack, "--about", "Agrees.", "--prompt", "Who?")
    assert code == 0, err
    assert "packed; SHA-256" in said
    assert "> Who?" in (pack / "README.md").read_text()
    code, said, err = run(capsys, "pull", pack, "-o", out, "--sha256", said.split()[-1])
    assert code == 0, err
    assert run(capsys, "steer", out, "Hello?", "--k=0.5", "--max-new-tokens", 2)[0] == 0
    assert run(capsys, "push", saved, "hub:org/syc", "--no-samples", "--public")[0] == 0
    assert not hub.repos["org/syc"].private
    assert b"weightsteer pull org/syc -o FOLDER" in hub.repos["org/syc"].files["README.md"]
    for arguments, message in (
        (("push", saved, pack), "exists, and a pack replaces nothing"),
        (("push", tmp_path, tmp_path / "new"), "not a saved weight vector"),
        (("pull", pack, "-o", out), "exists, and a pack replaces nothing"),
        (("pull", pack, "-o", tmp_path / "new", "--revision", "main"), "only a repository on the Hub has revisions"),
        (("pull", saved, "-o", tmp_path / "new"), "is no pack"),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 1
        assert message in err
