from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weightsteer import cli
from weightsteer.checkpoints.checkpoint import fingerprint
from weightsteer.errors import SteerError
from weightsteer.export.llama_cpp import export_control, model_type_of
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.steering.activations import ActivationVector
from xllama_server import packaged_gguf


def vector_on(*layers: int, width: int = 32, seed: int = 0, **card: str) -> ActivationVector:
    generator = torch.Generator().manual_seed(seed)
    directions = {layer: torch.randn(width, generator=generator) for layer in layers}
    return ActivationVector(directions, RunCard("activations", **card))


def read_back(path: Path) -> dict[int, np.ndarray]:
    """Layer -> direction, as the file has them."""
    return {int(t.name.removeprefix("direction.")): np.array(t.data) for t in GGUFReader(path).tensors}


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    sys.argv = ["weightsteer", *map(str, args)]
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_the_file_holds_k_a_by_the_names_that_llama_cpp_reads(tmp_path: Path) -> None:
    vector = vector_on(1, 5)
    path = export_control(vector, tmp_path / "deep" / "v.gguf", k=-2.5, model_type="llama")
    fields = GGUFReader(path).fields
    assert fields["general.architecture"].contents() == "controlvector"
    assert fields["controlvector.model_hint"].contents() == "llama"
    assert fields["controlvector.layer_count"].contents() == 2
    assert [(t.name, t.tensor_type.name) for t in GGUFReader(path).tensors] == [
        ("direction.1", "F32"),
        ("direction.5", "F32"),
    ]
    for layer, direction in read_back(path).items():
        np.testing.assert_allclose(direction, -2.5 * vector.layers[layer].numpy(), rtol=1e-6)


@given(k=st.floats(-8, 8).filter(lambda k: abs(k) > 1e-3), layer=st.integers(1, 90))
def test_k_times_a_then_scale_one_is_a_at_scale_k(
    tmp_path_factory: pytest.TempPathFactory, k: float, layer: int
) -> None:
    vector, path = vector_on(layer, width=7), tmp_path_factory.mktemp("c") / "v.gguf"
    once = read_back(export_control(vector, path, k=1.0, model_type="llama"))
    scaled = read_back(export_control(vector, path, k=k, model_type="llama"))
    assert list(scaled) == [layer]
    np.testing.assert_allclose(scaled[layer], np.float32(k) * once[layer], rtol=1e-6)


def test_writing_replaces_the_older_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    for k in (1.0, 3.0):
        export_control(vector_on(2), path, k=k, model_type="llama")
    np.testing.assert_allclose(read_back(path)[2], 3.0 * vector_on(2).layers[2].numpy(), rtol=1e-6)
    assert [file.name for file in tmp_path.iterdir()] == ["v.gguf"]


def test_half_precision_is_widened(tmp_path: Path) -> None:
    halves = ActivationVector({1: vector_on(1).layers[1].bfloat16()}, RunCard("activations"))
    found = read_back(export_control(halves, tmp_path / "v.gguf", k=1.0, model_type="llama"))[1]
    assert found.dtype == np.float32
    assert torch.equal(torch.from_numpy(found), halves.layers[1].float())


def test_what_a_control_vector_cannot_say_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    with pytest.raises(SteerError, match="layer 0.*--layer"):
        export_control(vector_on(0, 1), path, k=1.0, model_type="llama")
    with pytest.raises(SteerError, match="k = 0 is zero in every layer"):
        export_control(vector_on(1), path, k=0.0, model_type="llama")
    with pytest.raises(SteerError, match="layer 1: .* not finite"):
        export_control(vector_on(1), path, k=1e39, model_type="llama")
    with pytest.raises(SteerError, match="is a folder"):
        export_control(vector_on(1), tmp_path, k=1.0, model_type="llama")
    assert not path.exists()


def test_a_first_layer_of_zeros_is_no_obstacle(tmp_path: Path) -> None:
    vector = ActivationVector({0: torch.zeros(32), **vector_on(1).layers}, RunCard("activations"))
    assert list(read_back(export_control(vector, tmp_path / "v.gguf", k=1.0, model_type="llama"))) == [1]


def test_the_verb_takes_one_layer_of_a_saved_vector(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    vector = vector_on(0, 1, base_model=str(checkpoint), base_revision=fingerprint(checkpoint))
    saved, out = vector.save(tmp_path / "a"), tmp_path / "x.gguf"
    code, said, err = run(capsys, "export", "gguf", saved, "--k=-2", "--layer", 1, "-o", out)
    assert code == 0, err
    assert "at k = -2, layer 1" in said
    np.testing.assert_allclose(read_back(out)[1], -2 * vector.layers[1].numpy(), rtol=1e-6)
    assert GGUFReader(out).fields["controlvector.model_hint"].contents() == "llama"


def test_a_vector_of_one_layer_needs_no_choice(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    saved = vector_on(1, base_model=str(checkpoint), base_revision=fingerprint(checkpoint)).save(tmp_path / "a")
    code, said, err = run(capsys, "export", "gguf", saved, "--k=1", "-o", tmp_path / "x.gguf")
    assert code == 0, err
    assert "at k = 1, layer 1" in said


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--k=1",), "--layer: is needed"),
        (("--k=1", "--layer", "0"), "layer 0: the vector steers the output of the first block"),
        ((), "Missing option '--k'"),
        (("--k=1", "--layer", "9"), "layer 9: the vector has layers 0 to 1"),
        (("--k=1", "--dtype", "float32"), "No such option: --dtype"),
        (("--k=1", "--max-rank", "4"), "No such option: --max-rank"),
        (("--k=1", "--negative", "b"), "No such option: --negative"),
        (("--k=1", "--layer", "1", "--model", "./none"), "./none: no such folder"),
    ],
)
def test_mistakes_in_the_verb_say_what_to_do(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, extra: tuple[str, ...], message: str
) -> None:
    saved = vector_on(0, 1, base_model=str(checkpoint), base_revision=fingerprint(checkpoint)).save(tmp_path / "a")
    code, _, err = run(capsys, "export", "gguf", saved, "-o", tmp_path / "x.gguf", *extra)
    assert code == 1
    assert message in err
    assert not (tmp_path / "x.gguf").exists()


def test_other_sources_and_other_forms_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path
) -> None:
    _, _, err = run(capsys, "export", "gguf", checkpoint, "--k=1", "-o", tmp_path / "x.gguf")
    assert "no saved activations (activations.safetensors)" in err
    _, _, err = run(capsys, "export", "peft", "w", "--k=1", "--layer", 1, "-o", tmp_path / "x")
    assert "No such option: --layer" in err
    nameless = vector_on(1).save(tmp_path / "a")
    _, _, err = run(capsys, "export", "gguf", nameless, "--k=1", "-o", tmp_path / "x.gguf")
    assert "names no base model; give one with --model" in err


def test_model_type_comes_from_the_config(checkpoint: Path, tmp_path: Path) -> None:
    assert model_type_of(str(checkpoint)) == "llama"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SteerError, match="its config cannot be read"):
        model_type_of(str(tmp_path))


class LlamaCpp:
    """The llama.cpp inside xllamacpp, by its C interface: Python reaches its control vectors in no other way.

    Its parameter structures are passed on as they come, in a block of memory larger than any of them, so that
    their fields, which change from version to version, do not matter.
    """

    class Block(ctypes.Structure):
        _fields_ = (("bytes", ctypes.c_byte * 1024),)

    def __init__(self, package: ModuleType, gguf: Path, vocabulary: int) -> None:
        (library,) = Path(package.__path__[0]).glob("*.so")
        self.library, self.vocabulary = ctypes.CDLL(str(library)), vocabulary
        if not hasattr(self.library, "llama_set_adapter_cvec"):
            pytest.skip("this build of xllamacpp hides llama.cpp's C interface, or has another version of it")
        at, block, number = ctypes.c_void_p, self.Block, ctypes.c_int32
        self.silence = ctypes.CFUNCTYPE(None, number, ctypes.c_char_p, at)(lambda level, text, data: None)
        self.call("llama_log_set", None, type(self.silence), at)(self.silence, None)
        self.call("llama_backend_init", None)()
        of_model, of_context = (self.call(f"llama_{w}_default_params", block)() for w in ("model", "context"))
        model = self.call("llama_model_load_from_file", at, ctypes.c_char_p, block)(str(gguf).encode(), of_model)
        self.context = self.call("llama_init_from_model", at, at, block)(model, of_context)
        assert self.context

    def call(self, name: str, result: object, *arguments: object) -> Callable[..., object]:
        function = getattr(self.library, name)
        function.restype, function.argtypes = result, arguments
        return function

    def log_probs(self, ids: list[int]) -> Tensor:
        """Of the next token: (vocabulary,)."""
        at, number = ctypes.c_void_p, ctypes.c_int32
        memory = self.call("llama_get_memory", at, at)(self.context)
        self.call("llama_memory_clear", None, at, ctypes.c_bool)(memory, True)
        tokens = (number * len(ids))(*ids)
        batch = self.call("llama_batch_get_one", self.Block, at, number)(ctypes.addressof(tokens), len(ids))
        assert self.call("llama_decode", number, at, self.Block)(self.context, batch) == 0
        found = self.call("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), at, number)(self.context, -1)
        logits = np.ctypeslib.as_array(found, (self.vocabulary,))  # type: ignore[call-overload]
        return torch.tensor(logits).double().log_softmax(0)

    def steer(self, directions: dict[int, np.ndarray], layers: int) -> None:
        """What `--control-vector` does with a file: direction.N is row N - 1 of one block of numbers."""
        width = next(iter(directions.values())).size
        rows = np.zeros((layers, width), dtype=np.float32)
        for layer, direction in directions.items():
            rows[layer - 1] = direction
        number = ctypes.c_int32
        arguments = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, number, number, number)
        set_vector = self.call("llama_set_adapter_cvec", number, *arguments)
        assert set_vector(self.context, rows.ctypes.data, rows.size, width, 1, layers) == 0


@pytest.mark.embedded
@torch.no_grad()
def test_llama_cpp_steers_as_our_hook_does(embedded: LM, tmp_path: Path) -> None:
    """The change of every token's log-probability agrees, and would not with the direction one block off."""
    engine = LlamaCpp(pytest.importorskip("xllamacpp"), packaged_gguf(), vocabulary := embedded.model.config.vocab_size)
    ids, layers = embedded.chat_ids("What is the capital of France?"), len(embedded.blocks)
    vector, k = vector_on(12, width=embedded.model.config.hidden_size), 3.0

    def ours() -> Tensor:
        logits = embedded.model(torch.tensor([ids], device=embedded.device)).logits[0, -1]
        return logits.cpu().double().log_softmax(0)

    before, theirs_before = ours(), engine.log_probs(ids)
    assert before.shape == (vocabulary,)
    with vector.applied(embedded, k):
        change = ours() - before
    file = read_back(export_control(vector, tmp_path / "v.gguf", k=k, model_type="llama"))
    agreement = {}
    for off in (-1, 0, 1):
        engine.steer({layer + off: direction for layer, direction in file.items()}, layers)
        theirs = engine.log_probs(ids) - theirs_before
        agreement[off] = float(torch.corrcoef(torch.stack([change, theirs]))[0, 1])
    assert change.abs().mean() > 0.5  # nats: far above what four bits a weight cost
    assert agreement[0] > 0.99
    assert max(agreement[-1], agreement[1]) < 0.95
