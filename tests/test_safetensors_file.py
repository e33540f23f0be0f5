from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conftest import random_vector, tiny_lm
from weightsteer.checkpoints.checkpoint import fingerprint, stored_tensors
from weightsteer.checkpoints.safetensors_file import Planned, SafeFile, matrix_shape, same_bytes, write_stream
from weightsteer.errors import SteerError
from weightsteer.vectors.delta import blocks, to_dense
from weightsteer.vectors.vector_folder import dense_file
from weightsteer.vectors.weight_vector import WeightVector

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])


@given(shapes, dtypes, st.integers(1, 7))
def test_blocks_of_rows_are_the_tensor(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], dtype: torch.dtype, entries: int
) -> None:
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    tensor = (torch.randn(shape) * 3).to(dtype)
    save_file({"first": torch.ones(3), "x": tensor}, path)
    stored = SafeFile(path).tensors["x"]
    assert torch.equal(stored.read(), tensor)
    parts = [stored.rows(start, stop) for start, stop in blocks(shape, entries)]
    together = torch.cat(parts) if parts else torch.empty(0, dtype=dtype)
    assert torch.equal(together.reshape(-1), tensor.reshape(-1))


@given(st.lists(shapes, max_size=4), st.integers(0, 99))
def test_a_stream_is_a_safetensors_file(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, ...]], seed: int
) -> None:
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    torch.manual_seed(seed)
    tensors = {str(i): torch.randn(shape) for i, shape in enumerate(sizes)}
    plan = {name: Planned("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_stream(path, plan, (row for t in tensors.values() for row in t.reshape(matrix_shape(t.shape)).split(1)))
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert all(torch.equal(to_dense(delta), tensors[name]) for name, delta in dense_file(path).items())


def test_an_open_file_outlives_its_name(tmp_path: Path) -> None:
    save_file({"x": torch.arange(6.0)}, tmp_path / "x.safetensors")
    file = SafeFile(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(b"")
    (tmp_path / "y.safetensors").replace(tmp_path / "x.safetensors")
    assert torch.equal(file.tensors["x"].read(), torch.arange(6.0))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content in (b"", b"nonsense", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(SteerError, match=r"x\.safetensors: cannot be read"):
            SafeFile(path)
    save_file({"x": torch.ones(1000)}, path)
    file = SafeFile(path)
    path.write_bytes(path.read_bytes()[:200])  # cut while it is open
    with pytest.raises(SteerError, match="ends too early"):
        file.tensors["x"].read()


def test_same_bytes_and_fingerprint(tmp_path: Path) -> None:
    x = torch.randn(300, 1000)
    y = x.clone()
    y[-1, -1] += 1
    save_file({"x": x, "again": x.clone(), "y": y, "half": x.half()}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)
    assert same_bytes(stored["x"], stored["again"])
    assert not same_bytes(stored["x"], stored["y"])
    assert not same_bytes(stored["x"], stored["half"])
    before = fingerprint(tmp_path)
    save_file({"x": x, "again": x.clone(), "y": y, "half": -x.half()}, tmp_path / "model.safetensors")
    assert before != fingerprint(tmp_path) != ""
    assert fingerprint(tmp_path / "nowhere") == ""


def test_a_pickled_vector_is_read_in_another_process_and_refused_once_its_file_has_changed(
    tmp_path: Path,
) -> None:
    saved = WeightVector.load(random_vector(tiny_lm()).save(tmp_path / "w"))
    wanted = {"w": saved, "w + w": saved + saved, "by depth": saved.scale_by_depth(0.5, 1.0)}
    (tmp_path / "pickled").write_bytes(pickle.dumps(wanted))
    read = "import pickle, sys; print([w.norm() for w in pickle.load(open(sys.argv[1], 'rb')).values()])"
    done = subprocess.run(
        [sys.executable, "-c", read, tmp_path / "pickled"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [vector.norm() for vector in wanted.values()]
    os.utime(tmp_path / "w" / "adapter_model.safetensors", ns=(0, 0))
    with pytest.raises(SteerError, match="has changed since"):
        pickle.loads((tmp_path / "pickled").read_bytes())
