"""Model directories: what is written comes back, in each precision; what is damaged is refused by name."""

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors
import tiny_models as tiny
from safetensors.numpy import load_file, save_file

from mlx_impl import modeldir
from mlx_impl.config import ModelConfig
from mlx_impl.errors import DamagedFileError, InputError

CONFIG = ModelConfig.from_hf(tiny.HF_CONFIG | {"vocab_size": 40})
WEIGHTS = tiny.weights(vocab=40)


def write(target: Path, tensors: Any = WEIGHTS, **options: Any) -> Path:
    files = {"tokenizer.json": "{}", "tokenizer.model": b"\x00"}
    return modeldir.write_model_directory(
        target, CONFIG, tensors, files, {"eos_token_id": 2}, {"hub": "a/b"}, **options
    )


def bfloat16(array: np.ndarray) -> np.ndarray:
    """Round to the nearest of the two neighbours with a short mantissa, ties to the even one; slowly."""
    down = (array.view(np.uint32) & 0xFFFF0000).view(np.float32)
    up = ((array.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32)
    even = (down.view(np.uint32) >> 16) % 2 == 0
    below, above = np.abs(array - down), np.abs(up - array)
    return np.where((below < above) | ((below == above) & even), down, up)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_comes_back(tmp_path: Path, dtype: str) -> None:
    folder = write(tmp_path / "m", reversed(WEIGHTS.items()), dtype=dtype)  # order does not matter
    assert ModelConfig.from_hf(json.loads((folder / "config.json").read_text())) == CONFIG
    infos = modeldir.validate_safetensors(modeldir.weight_files(folder), modeldir.expected_shapes(CONFIG))
    assert {info.dtype for info in infos.values()} == {dtype}
    rounded = {"float32": lambda a: a, "float16": lambda a: a.astype(np.float16), "bfloat16": bfloat16}[dtype]
    for name, array in modeldir.read_tensors(infos):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, rounded(WEIGHTS[name]), err_msg=name)
    again = write(tmp_path / "again", modeldir.read_tensors(infos), dtype=dtype)
    assert (again / modeldir.WEIGHTS).read_bytes() == (folder / modeldir.WEIGHTS).read_bytes()


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    for name, array in load_file(folder / modeldir.WEIGHTS).items():
        np.testing.assert_array_equal(array, WEIGHTS[name], err_msg=name)
    with safetensors.safe_open(folder / modeldir.WEIGHTS, "numpy") as file:
        assert file.metadata() == {"format": "mlx"}


def test_bfloat16_ties_go_to_the_even_neighbour(tmp_path: Path) -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000], np.uint32)
    modeldir.write_safetensors(tmp_path / "t", {"x": (5,)}, {"x": bits.view(np.float32)}, "bfloat16")
    ((_, array),) = modeldir.read_tensors(modeldir.validate_safetensors(tmp_path / "t"))
    assert [hex(b >> 16) for b in array.view(np.uint32)] == ["0x3f80", "0x3f82", "0x3f81", "0x3f80", "0xbf82"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_expected_shapes_add_up(bias: bool, tied: bool) -> None:
    config = ModelConfig(vocab_size=99, d_model=64, num_layers=3, num_query_heads=4, num_kv_heads=2, d_ff=96,
                         head_dim=32, attention_bias=bias, mlp_bias=bias, tie_embeddings=tied)  # fmt: skip
    shapes = modeldir.expected_shapes(config)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == config.num_parameters()
    assert ("lm_head.weight" in shapes) is not tied


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("model.norm.weight", None, "missing: model.norm.weight$"),
        ("extra", np.zeros(1, np.float32), "unknown: extra$"),
        ("model.norm.weight", np.zeros(7, np.float32), r"model.norm.weight is \[7\], .* says \[64\]$"),
        ("model.norm.weight", np.full(64, np.inf, np.float32), "64 of 64 values are not finite in float16"),
        ("model.norm.weight", np.full(64, 1e6, np.float32), "64 of 64 values are not finite in float16"),
    ],
)
def test_nothing_is_written_for_wrong_tensors(tmp_path: Path, name: str, array: np.ndarray | None, words: str) -> None:
    tensors = {key: value for key, value in (WEIGHTS | {name: array}).items() if value is not None}
    with pytest.raises(DamagedFileError, match=words):
        write(tmp_path / "m", tensors, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_kept_unless_told(tmp_path: Path) -> None:
    write(tmp_path / "m")
    with pytest.raises(InputError, match="exists already"):
        write(tmp_path / "m")
    (tmp_path / "m" / "old").touch()
    write(tmp_path / "m", replace=True)
    assert not (tmp_path / "m" / "old").exists()


# -- checks -------------------------------------------------------------------------


def test_all_wrong_tensors_are_named_at_once(tmp_path: Path) -> None:
    arrays = {**WEIGHTS, "a": np.zeros(1, np.float32), "model.norm.weight": np.zeros(3, np.float32)}
    del arrays["model.layers.0.mlp.up_proj.weight"], arrays["model.layers.1.mlp.up_proj.weight"]
    save_file(arrays, tmp_path / "t.safetensors")
    with pytest.raises(DamagedFileError) as caught:
        modeldir.validate_safetensors(tmp_path / "t.safetensors", modeldir.expected_shapes(CONFIG))
    assert str(caught.value) == (
        f"{tmp_path}/t.safetensors: missing: model.layers.0.mlp.up_proj.weight, "
        "model.layers.1.mlp.up_proj.weight; unknown: a; "
        "wrong shape: model.norm.weight is [3], the configuration says [64]"
    )


def test_what_transformers_ignores_is_ignored(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}
    extra["lm_head.weight"] = WEIGHTS["model.embed_tokens.weight"]
    save_file(WEIGHTS | extra, tmp_path / "t")
    assert modeldir.validate_safetensors(tmp_path / "t", modeldir.expected_shapes(CONFIG)).keys() == WEIGHTS.keys()
    assert modeldir.validate_safetensors(tmp_path / "t").keys() == (WEIGHTS | extra).keys()


def header_file(path: Path, header: Any, data: int = 16, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))
    return path


def entry(start: int, stop: int, dtype: str = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "tensor b overlaps another"),
        ({"a": entry(0, 8), "b": entry(8, 16), "c": entry(8, 16)}, "tensor c overlaps another"),
        ({"a": entry(0, 8)}, "its tensors end at"),
        ({"a": entry(4, 12)}, "tensor a leaves a gap"),
        ({"a": entry(-8, 0)}, r"data_offsets \[-8, 0\]"),
        ({"a": entry(8, 0)}, "-8 bytes"),
        ({"a": entry(0, 16)}, r"16 bytes, F32 \[2\] has 8"),
        ({"a": entry(0, 2**40, shape=(2**38,))}, r"ends at byte [\d,]+, the file at [\d,]+"),
        ({"a": entry(0, 0, shape=(2**62, 2**62))}, "tensor a: 0 bytes"),
        ({"a": entry(0, 16, dtype="I64")}, "dtype 'I64'; only F32, F16, BF16"),
        ({"a": entry(0, 8, shape=(True, 2))}, "make no sense"),
        ({"a": entry(0, 8, shape=(2.0,))}, "make no sense"),
        ({"a\n": entry(0, 16)}, "no name of a tensor"),
        ({"a": []}, "its entry is a list"),
        ([1], "a list, not an object"),
        ({"a": entry(0, 16), "__metadata__": {"format": 1}}, "__metadata__ does not map texts to texts"),
        ({"a": entry(0, 16), "__metadata__": False}, "__metadata__ does not map texts to texts"),
        (b'{"a": {"x": 1}, "a": {}}', "key 'a' appears twice"),
        (b"{" * 5000, "no safetensors header"),
        (b"[" * 200000, "no safetensors header"),
        (b"\xff\xfe", "no safetensors header"),
    ],
)
def test_damaged_headers(tmp_path: Path, header: Any, words: str) -> None:
    with pytest.raises(DamagedFileError, match=words) as caught:
        modeldir.validate_safetensors(header_file(tmp_path / "t", header))
    assert str(tmp_path / "t") in str(caught.value)


def test_mlx_writes_null_for_metadata(tmp_path: Path) -> None:
    """Adapters of mlx-lm have it; the safetensors library takes it too."""
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"a": mx.ones(2)})
    assert b'"__metadata__":null' in (tmp_path / "a.safetensors").read_bytes()
    assert list(modeldir.validate_safetensors(tmp_path / "a.safetensors")) == ["a"]


@pytest.mark.parametrize("length", [17, 2**63, 2**64 - 1])
def test_header_length_is_checked_against_the_file(tmp_path: Path, length: int) -> None:
    with pytest.raises(DamagedFileError, match=f"header of {length:,} bytes, at most 16"):
        modeldir.validate_safetensors(header_file(tmp_path / "t", b"", length=length))
    (tmp_path / "t").write_bytes(b"123")
    with pytest.raises(DamagedFileError, match="header of"):
        modeldir.validate_safetensors(tmp_path / "t")


def test_shards(tmp_path: Path) -> None:
    folder = tiny.write_hf(tmp_path / "m", WEIGHTS, shards=3)
    files = modeldir.weight_files(folder)
    assert [file.name for file in files] == [f"model-{i:05d}.safetensors" for i in (1, 2, 3)]
    infos = modeldir.validate_safetensors(files, modeldir.expected_shapes(CONFIG))
    for name, array in modeldir.read_tensors(infos):
        np.testing.assert_array_equal(array, WEIGHTS[name])
    with pytest.raises(DamagedFileError, match=r"tensor \S+ is in model-00003.safetensors already"):
        modeldir.validate_safetensors([*files, files[2]])
    files[1].unlink()
    with pytest.raises(DamagedFileError, match=r"model-00002.safetensors is missing"):
        modeldir.weight_files(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a\\b.safetensors", "x.bin", "", ".."])
def test_an_index_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / modeldir.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(DamagedFileError, match="is no file of this folder"):
        modeldir.weight_files(tmp_path)


def test_a_folder_without_weights_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match=r"no model.safetensors .*; found pytorch_model.bin instead"):
        modeldir.weight_files(tmp_path)


def test_manifest_notices_a_flipped_bit(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    assert modeldir.verify_manifest(folder)["source"] == {"hub": "a/b"}
    weights = folder / modeldir.WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (folder / "config.json").unlink()
    with pytest.raises(DamagedFileError, match=r"config.json is missing; model.safetensors has sha256 \w+, recorded"):
        modeldir.verify_manifest(folder)
    modeldir.write_manifest(folder, training={"steps": 3})
    assert modeldir.verify_manifest(folder)["training"] == {"steps": 3}
    for change in ({"format_version": 2}, {"files": {"../x": "0"}}, {"files": 3}):
        manifest = modeldir.write_manifest(folder) | change
        (folder / modeldir.MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(DamagedFileError, match=r"minimac.json: f"):
            modeldir.verify_manifest(folder)


@pytest.mark.parametrize("manifest", ["{}", '{"format_version": 1, "files": []}', "[]", "no JSON"])
def test_a_manifest_that_is_none_is_damage_for_all_who_read_it(tmp_path: Path, manifest: str) -> None:
    folder = write(tmp_path / "m")
    (folder / modeldir.MANIFEST).write_text(manifest)
    for read in (modeldir.verify_manifest, modeldir.identity):
        with pytest.raises(DamagedFileError, match=modeldir.MANIFEST):
            read(folder)
