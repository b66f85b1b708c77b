"""Reading and writing against the safetensors library, and what every kind of damage must give."""

import json
import os
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from bmjax.config import UserError
from bmjax.io.safetensors import DTYPES, PACKED_BITS, Reader, SharedWriter, open_checkpoint


def random_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    dtypes = [np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.int64, np.uint16, np.bool_, np.float64]
    shapes = [(7, 5), (3,), (), (4, 3, 2), (0, 4), (1, 1), (9, 2), (6, 4)]
    return {
        f"t{i}.weight": np.asarray(rng.standard_normal(shape) * 3).astype(dtype)
        for i, (dtype, shape) in enumerate(zip(dtypes, shapes, strict=True))
    }


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def plan_of(tensors: dict[str, np.ndarray]) -> list[tuple[str, np.dtype, tuple[int, ...]]]:
    return [(name, value.dtype, value.shape) for name, value in tensors.items()]


def write_all(directory: Path, tensors: dict[str, np.ndarray], shard_bytes: float = 5e9) -> None:
    directory.mkdir(exist_ok=True)
    with SharedWriter(directory, plan_of(tensors), shard_bytes) as writer:
        for name, value in tensors.items():
            writer.write(name, 0, value)


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = random_tensors()
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(tensors)
    for name, value in tensors.items():
        assert same_bits(checkpoint.read(name), value)
        assert checkpoint.tensors[name].numpy_dtype == value.dtype


def test_the_library_reads_what_we_wrote(tmp_path: Path) -> None:
    tensors = random_tensors(1)
    write_all(tmp_path, tensors)
    stored = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(tensors)
    assert all(same_bits(stored[name], value) for name, value in tensors.items())
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_written_tensors_are_aligned_for_torch(tmp_path: Path) -> None:
    torch_load = pytest.importorskip("safetensors.torch").load_file
    tensors = {
        "odd": np.ones(3, ml_dtypes.bfloat16),
        "wide": np.arange(4, dtype=np.float32),
        "byte": np.ones(1, np.int8),
    }
    write_all(tmp_path, tensors)
    assert torch_load(tmp_path / "model.safetensors")["wide"].tolist() == [0, 1, 2, 3]


def test_every_dtype_of_the_table_round_trips(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    tensors = {
        name: rng.integers(0, 2 if name == "BOOL" else 256, dtype.itemsize * 6, np.uint8).view(dtype).reshape(2, 3)
        for name, dtype in DTYPES.items()
        if dtype not in PACKED_BITS
    }
    write_all(tmp_path, tensors)
    checkpoint = open_checkpoint(tmp_path)
    for name, value in tensors.items():
        assert checkpoint.tensors[name].dtype == name
        assert same_bits(checkpoint.read(name), value)


def test_packed_types_are_copied_and_not_read(tmp_path: Path) -> None:
    plan = [(name, DTYPES[name], (4, 6)) for name in ("F4", "F6_E2M3", "F6_E3M2")]
    sizes = {"F4": 12, "F6_E2M3": 18, "F6_E3M2": 18}
    with SharedWriter(tmp_path, plan) as writer:
        for name, size in sizes.items():
            writer.write(name, 0, np.arange(size, dtype=np.uint8))
    checkpoint, reader = open_checkpoint(tmp_path), Reader()
    for name, size in sizes.items():
        info, out = checkpoint.tensors[name], np.empty(size - 3, np.uint8)
        assert (info.dtype, info.shape, info.nbytes) == (name, (4, 6), size)
        reader.read(info, 3, out)
        assert out.tolist() == list(range(3, size))
        with pytest.raises(UserError, match=f"{name} is packed; it can only be copied"):
            checkpoint.read(name)
    reader.close()


@pytest.mark.parametrize(
    "index",
    [
        (slice(2, 5),), (slice(None), slice(1, 3)), (slice(3, 7), slice(0, 1)), (slice(6, 7), slice(4, 5)),
        (slice(0, 0),), (slice(None), slice(None)), (slice(-2, None),),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bounce", [1, 50, 2**20])
def test_reads_blocks(tmp_path: Path, index: tuple[slice, ...], bounce: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmjax.io.safetensors.BOUNCE_BYTES", bounce)
    value = np.random.default_rng(0).standard_normal((7, 5, 3)).astype(ml_dtypes.bfloat16)
    safetensors.numpy.save_file({"a": np.ones(3, np.float32), "x": value}, tmp_path / "model.safetensors")
    assert same_bits(open_checkpoint(tmp_path).read("x", index), value[index])


def test_reads_only_the_rows_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(tmp_path, {"x": np.arange(40_000, dtype=np.float32).reshape(100, 400)})
    checkpoint = open_checkpoint(tmp_path)
    read = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read.append(preadv(fd, buffers, offset)) or read[-1])
    block = checkpoint.read("x", (slice(10, 12),))
    assert block[0, 0] == 4000
    assert sum(read) == 2 * 400 * 4


def test_a_step_is_refused(tmp_path: Path) -> None:
    write_all(tmp_path, {"x": np.ones((4, 4), np.float32)})
    with pytest.raises(ValueError, match="step 1"):
        open_checkpoint(tmp_path).read("x", (slice(0, 4, 2),))


def test_shards_like_hugging_face(tmp_path: Path) -> None:
    # Sizes 40, 40, 40, 120, 40 with a limit of 100: a file closes when the next tensor would take it over.
    tensors = {
        n: np.full(size, i, np.float32) for i, (n, size) in enumerate(zip("abcde", [10, 10, 10, 30, 10], strict=True))
    }
    write_all(tmp_path, tensors, shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    file = "model-0000{}-of-00004.safetensors".format
    assert index["weight_map"] == {"a": file(1), "b": file(1), "c": file(2), "d": file(3), "e": file(4)}
    assert index["metadata"]["total_size"] == 280
    assert sorted(p.name for p in tmp_path.iterdir()) == [*map(file, (1, 2, 3, 4)), "model.safetensors.index.json"]
    checkpoint = open_checkpoint(tmp_path)
    assert all(same_bits(checkpoint.read(name), value) for name, value in tensors.items())
    for i in (1, 2, 3, 4):
        for name, value in safetensors.numpy.load_file(tmp_path / file(i)).items():
            assert same_bits(value, tensors[name])


# Reader and SharedWriter


@pytest.mark.parametrize("shard_bytes", [5e9, 60])
def test_parts_in_any_order_give_the_same_files(tmp_path: Path, shard_bytes: float) -> None:
    """Parts written by several threads, against whole tensors one after another."""
    tensors = random_tensors(3)
    write_all(tmp_path / "one", tensors, shard_bytes)
    (tmp_path / "two").mkdir()
    writer = SharedWriter(tmp_path / "two", plan_of(tensors), shard_bytes)
    parts = [(name, i) for name, value in tensors.items() for i in range(value.size)]
    np.random.default_rng(0).shuffle(parts)

    def write(part: tuple[str, str]) -> None:
        name, i = part[0], int(part[1])
        flat = tensors[name].reshape(-1)
        writer.write(str(name), i * flat.itemsize, flat[i : i + 1])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, parts))
    for name, value in tensors.items():
        writer.flush(name)
        out = np.empty_like(value)
        writer.read(name, 0, out)
        assert same_bits(out, value)
    writer.finish()
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]
    assert {path.name for path in writer.files} == files[1].keys() - {"model.safetensors.index.json"}


def test_a_writer_goes_on_with_its_files(tmp_path: Path) -> None:
    plan = [("a", np.dtype(np.float32), (1000,)), ("b", np.dtype(np.float32), (1000,))]
    first = SharedWriter(tmp_path, plan)
    assert (tmp_path / "model.safetensors").stat().st_size > 8000, "the space is not taken at the start"
    first.write("a", 400, np.ones(100, np.float32))
    first.close()
    first.close()
    second = SharedWriter(tmp_path, plan)
    out = np.empty(102, np.float32)
    second.read("a", 396, out)
    assert out.tolist() == [0.0] + [1.0] * 100 + [0.0]
    second.close()
    # Of another size: not the file that was begun.
    (tmp_path / "model.safetensors").write_bytes(b"x" * 9000)
    third = SharedWriter(tmp_path, plan)
    third.read("a", 396, out)
    assert not out.any()
    third.finish()
    assert open_checkpoint(tmp_path).read("b").shape == (1000,)


def test_a_writer_stays_within_the_tensor(tmp_path: Path) -> None:
    writer = SharedWriter(tmp_path, [("a", np.dtype(np.float32), (4,)), ("b", np.dtype(np.float32), (4,))])
    for start in (4, 16, 100):
        with pytest.raises(ValueError, match="a: bytes"):
            writer.write("a", start, np.ones(4, np.float32))
    writer.write("a", 0, np.ones(4, np.float32))
    writer.write("a", 16, np.ones(0, np.float32))
    writer.finish()
    assert open_checkpoint(tmp_path).read("b").tolist() == [0, 0, 0, 0]


def test_a_plan_names_a_tensor_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="twice"):
        SharedWriter(tmp_path, [("a", np.dtype(np.float32), (4,))] * 2)
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_closes_the_files(tmp_path: Path) -> None:
    writer = SharedWriter(tmp_path, [("a", np.dtype(np.float32), (4,))])
    with pytest.raises(RuntimeError), writer:
        raise RuntimeError
    with pytest.raises(OSError, match="Bad file descriptor"):
        writer.write("a", 0, np.ones(4, np.float32))


def test_a_writer_of_an_empty_tensor(tmp_path: Path) -> None:
    SharedWriter(tmp_path, [("empty", np.dtype(np.float32), (0, 4))]).finish()
    assert open_checkpoint(tmp_path).tensors["empty"].shape == (0, 4)


def test_a_writer_closes_its_files_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    allocate = os.posix_fallocate

    def full(fd: int, offset: int, length: int) -> None:
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        allocate(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        SharedWriter(tmp_path, [(name, np.dtype(np.float32), (100,)) for name in "abc"], 400)
    assert len(calls) == 2
    for fd in calls:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_reader_reads_parts_from_many_threads(tmp_path: Path) -> None:
    tensors = {name: np.arange(1000, dtype=np.float32).astype(ml_dtypes.bfloat16) + i for i, name in enumerate("abcd")}
    write_all(tmp_path, tensors, 4000)
    checkpoint, reader = open_checkpoint(tmp_path), Reader()
    for info in checkpoint.tensors.values():
        reader.advise(info, 0, info.nbytes)

    def read(start: int) -> bool:
        name = "abcd"[start % 4]
        out = np.empty(min(37, 1000 - start), ml_dtypes.bfloat16)
        reader.read(checkpoint.tensors[name], start, out)
        return same_bits(out, tensors[name][start : start + 37])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(0, 1000, 3)))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    reader.close()
    if before:
        assert len(os.listdir("/proc/self/fd")) == before - 2, "a file was opened more than once"
    reader.close()


def test_a_reader_of_a_file_that_changes(tmp_path: Path) -> None:
    write_all(tmp_path, {"x": np.ones(1000, np.float32)})
    info, path = open_checkpoint(tmp_path).tensors["x"], tmp_path / "model.safetensors"
    reader = Reader()
    os.truncate(path, 2000)
    with pytest.raises(UserError, match=r"model.safetensors: ended at byte 2000; it was cut off while being read"):
        reader.read(info, 0, np.empty(1000, np.float32))
    reader.close()
    path.unlink()
    with pytest.raises(UserError, match=r"model.safetensors: cannot open: No such file"):
        reader.read(info, 0, np.empty(1, np.float32))
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a regular file"):
        reader.read(info, 0, np.empty(1, np.float32))


# Malformed files


def raw_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: object, start: object, end: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOOD = {"a": entry([2], 0, 8), "b": entry([1], 8, 12)}
DEEP = b"[" * 200_000

BAD_FILES = {
    "empty": (b"", "0 bytes"),
    "seven_bytes": (b"\x01" * 7, "7 bytes"),
    "header_100_gb": (raw_file(GOOD, b"\0" * 12, length=100 * 10**9), "claims 100000000000"),
    "header_2_to_64": (raw_file(GOOD, b"\0" * 12, length=2**64 - 1), "claims"),
    "header_past_end": (raw_file(GOOD, b"", length=500), "claims 500"),
    "no_header": (raw_file(b""), "not valid JSON"),
    "not_json": (raw_file(b"{'a': 1}"), "not valid JSON"),
    "not_utf8": (raw_file(b'{"\xff": {}}'), "not valid JSON"),
    "deep_json": (raw_file(DEEP), "not valid JSON"),
    "list": (raw_file([1, 2]), "JSON object"),
    "duplicate": (raw_file(b'{"a":' + json.dumps(entry([2], 0, 8)).encode() + b',"a":'
                           + json.dumps(entry([2], 8, 16)).encode() + b"}", b"\0" * 16), "stands twice"),
    "entry_not_object": (raw_file({"a": 3}), "expected dtype, shape"),
    "no_dtype": (raw_file({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8), "dtype None"),
    "unknown_dtype": (raw_file({"a": entry([2], 0, 8, "F99")}, b"\0" * 8), "dtype 'F99'"),
    "dtype_list": (raw_file({"a": entry([2], 0, 8, ["F32"])}, b"\0" * 8), "dtype"),
    "shape_missing": (raw_file({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8), "shape None"),
    "shape_negative": (raw_file({"a": entry([-2, -1], 0, 8)}, b"\0" * 8), "shape"),
    "shape_float": (raw_file({"a": entry([2.0], 0, 8)}, b"\0" * 8), "shape"),
    "shape_bool": (raw_file({"a": entry([True], 0, 4)}, b"\0" * 4), "shape"),
    "shape_text": (raw_file({"a": entry("2", 0, 8)}, b"\0" * 8), "shape"),
    "shape_overflow": (raw_file({"a": entry([2**62, 4], 0, 8)}, b"\0" * 8), "takes"),
    "shape_zero_trick": (raw_file({"a": entry([2**62, 0], 0, 8)}, b"\0" * 8), "8 bytes, but"),
    "too_many_dimensions": (raw_file({"a": entry([1] * 65, 0, 4)}, b"\0" * 4), "shape"),
    "offsets_three": (raw_file({"a": entry([2], 0, 8) | {"data_offsets": [0, 8, 8]}}, b"\0" * 8), "data_offsets"),
    "offsets_negative": (raw_file({"a": entry([2], -8, 0)}, b"\0" * 8), "data_offsets"),
    "offsets_reversed": (raw_file({"a": entry([2], 8, 0)}, b"\0" * 8), "data_offsets"),
    "offsets_float": (raw_file({"a": entry([2], 0.0, 8.0)}, b"\0" * 8), "data_offsets"),
    "size_mismatch": (raw_file({"a": entry([3], 0, 8)}, b"\0" * 8), "8 bytes, but F32"),
    "overlap": (raw_file({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12), "overlaps"),
    "same_bytes": (raw_file({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, b"\0" * 8), "overlaps"),
    "hole": (raw_file({"a": entry([2], 0, 8), "b": entry([1], 12, 16)}, b"\0" * 16), "gap"),
    "hole_at_start": (raw_file({"a": entry([2], 4, 12)}, b"\0" * 12), "gap"),
    "truncated": (raw_file(GOOD, b"\0" * 11), "1 less than"),
    "trailing": (raw_file(GOOD, b"\0" * 13), "1 more than"),
    "past_end": (raw_file({"a": entry([25 * 10**9], 0, 100 * 10**9)}, b"\0" * 8), "less than"),
    "metadata_list": (raw_file({"__metadata__": ["x"], **GOOD}, b"\0" * 12), "__metadata__"),
    "metadata_number": (raw_file({"__metadata__": {"format": 1}, **GOOD}, b"\0" * 12), "__metadata__"),
    "huge_number": (raw_file(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}'),
                    "not valid JSON"),
    "half_a_character": (raw_file({"\ud800": entry([2], 0, 8)}, b"\0" * 8), "no text"),
    "newline_in_name": (raw_file({"a\nb": entry([3], 0, 8)}, b"\0" * 8), "a\\\\nb"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_malformed_files(tmp_path: Path, case: str) -> None:
    content, message = BAD_FILES[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(tmp_path)
    line = str(error.value)
    assert line.startswith(str(tmp_path / "model.safetensors")) and "\n" not in line and len(line) < 500


def test_the_good_file_of_the_malformed_ones_is_good(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw_file({"__metadata__": {}, **GOOD}, struct.pack("<3f", 1, 2, 3)))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.read("a").tolist() == [1, 2] and checkpoint.read("b").tolist() == [3]


def two_shards(directory: Path) -> dict[str, str]:
    safetensors.numpy.save_file({"a": np.ones(2, np.float32)}, directory / "one.safetensors")
    safetensors.numpy.save_file({"b": np.ones(2, np.float32)}, directory / "two.safetensors")
    return {"a": "one.safetensors", "b": "two.safetensors"}


BAD_INDEXES = {
    "not_json": ("{", "not valid JSON"),
    "list": ("[]", "weight_map"),
    "no_map": ("{}", "weight_map"),
    "empty_map": ('{"weight_map": {}}', "weight_map"),
    "map_list": ('{"weight_map": ["a"]}', "weight_map"),
    "duplicate": ('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "stands twice"),
    "file_number": ({"a": 3}, "is said to be in 3"),
    "file_empty": ({"a": ""}, "same directory"),
    "parent": ({"a": "../outside.safetensors"}, "same directory"),
    "absolute": ({"a": "/etc/passwd"}, "same directory"),
    "dots": ({"a": ".."}, "same directory"),
    "subdirectory": ({"a": "x/one.safetensors"}, "same directory"),
    "backslash": ({"a": "x\\one.safetensors"}, "same directory"),
    "null_byte": ({"a": "one\0.safetensors"}, "same directory"),
    "shard_absent": ({"a": "one.safetensors", "b": "three.safetensors"}, "three.safetensors: cannot open: No such"),
    "tensor_absent": ({"b": "two.safetensors", "c": "two.safetensors"}, r"lacks 1 tensor \(c\)"),
    "swapped": ({"a": "two.safetensors", "b": "one.safetensors"}, r"lacks 1 tensor \(b\)"),
    "unlisted_twice": (
        {"b": "both.safetensors", "x": "more.safetensors"},
        r"more\.safetensors: holds 1 tensor \(a\), as both",
    ),
    "other_file": ({"a": "notes.txt"}, "notes.txt: "),
    "half_a_character": ({"a": "\ud800.safetensors"}, "same directory"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_malformed_indexes(tmp_path: Path, case: str) -> None:
    content, message = BAD_INDEXES[case]
    outside = tmp_path / "outside.safetensors"
    safetensors.numpy.save_file({"a": np.ones(2, np.float32)}, outside)
    directory = tmp_path / "model"
    directory.mkdir()
    two_shards(directory)
    both = {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}
    safetensors.numpy.save_file(both, directory / "both.safetensors")
    safetensors.numpy.save_file({"x": both["a"], "a": both["a"]}, directory / "more.safetensors")
    (directory / "notes.txt").write_text("these are not weights")
    text = content if isinstance(content, str) else json.dumps({"weight_map": content})
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(directory)
    assert "\n" not in str(error.value)


def sharded(directory: Path, **extra: Any) -> None:
    """Two shards with an index, and files beside them."""
    directory.mkdir()
    mapping = two_shards(directory)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
    for name, tensors in extra.items():
        values = {tensor: np.full(2, value, np.float32) for tensor, value in tensors.items()}
        safetensors.numpy.save_file(values, directory / f"{name}.safetensors")


@pytest.mark.parametrize("stray", ["model", "consolidated", "value_head"])
@pytest.mark.parametrize("tensors", [{"a": 5, "b": 5}, {"a": 5}, {"c": 5}], ids=str)
def test_the_index_decides_what_is_read_and_a_stray_file_is_noted(tmp_path: Path, stray: str, tensors: Any) -> None:
    sharded(tmp_path / "m", **{stray: tensors})
    checkpoint = open_checkpoint(tmp_path / "m")
    assert set(checkpoint.tensors) == {"a", "b"} and checkpoint.read("a").tolist() == [1, 1]
    (note,) = checkpoint.notes
    assert f"{stray}.safetensors" in note and "not read" in note
    sharded(tmp_path / "clean")
    assert open_checkpoint(tmp_path / "clean").notes == ()


def test_an_overlay_is_read_where_the_index_places_it_and_noted(tmp_path: Path) -> None:
    sharded(tmp_path / "m", overlay={"a": 5})
    mapping = {"a": "overlay.safetensors", "b": "two.safetensors"}
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.read("a").tolist() == [5, 5] and "one.safetensors" in checkpoint.notes[0]
    sharded(tmp_path / "n", two={"a": 5, "b": 6})
    checkpoint = open_checkpoint(tmp_path / "n")
    assert checkpoint.read("a").tolist() == [1, 1] and checkpoint.read("b").tolist() == [6, 6]
    assert "two.safetensors: holds 1 tensor (a) that" in checkpoint.notes[0]


def test_a_tensor_that_the_index_leaves_out_is_read_as_loaders_do_and_noted(tmp_path: Path) -> None:
    """transformers loads every file of the index as a whole."""
    sharded(tmp_path / "m", two={"b": 6, "c": 7}, stray={"d": 8})
    checkpoint = open_checkpoint(tmp_path / "m")
    values = {name: checkpoint.read(name).tolist() for name in checkpoint.tensors}
    assert values == {"a": [1, 1], "b": [6, 6], "c": [7, 7]}
    note = "two.safetensors: holds 1 tensor (c) that model.safetensors.index.json leaves out"
    assert any(note in line for line in checkpoint.notes)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=r"model.safetensors: a pointer of Git LFS.*run `git lfs pull`"):
        open_checkpoint(tmp_path)


def test_a_single_file_beside_an_index_of_nothing_is_read(tmp_path: Path) -> None:
    sharded(tmp_path / "m", model={"a": 5})
    for name in ("one", "two"):
        (tmp_path / f"m/{name}.safetensors").unlink()
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.read("a").tolist() == [5, 5] and "names files that are not there" in checkpoint.notes[0]


def test_shards_without_an_index_beside_a_single_file_are_noted(tmp_path: Path) -> None:
    sharded(tmp_path / "m", model={"a": 5})
    (tmp_path / "m/model.safetensors.index.json").unlink()
    (note,) = open_checkpoint(tmp_path / "m").notes
    assert "one.safetensors, two.safetensors: 2 more files" in note


def test_directories_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(UserError, match="no weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=r"pytorch_model.bin: pickle weights are refused; convert to safetensors"):
        open_checkpoint(tmp_path)
    with pytest.raises(UserError, match="not a directory"):
        open_checkpoint(tmp_path / "pytorch_model.bin")
    two_shards(tmp_path)
    with pytest.raises(UserError, match=r"one.safetensors but neither model.safetensors nor"):
        open_checkpoint(tmp_path)


def test_only_regular_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a regular file"):
        open_checkpoint(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="not a regular file"):
        open_checkpoint(tmp_path)
    path.rmdir()
    for to, message in (("nothing", "No such file"), (path.name, "symbolic links")):
        path.symlink_to(to)
        with pytest.raises(UserError, match=f"model.safetensors: cannot open: .*{message}"):
            open_checkpoint(tmp_path)
        path.unlink()
    (tmp_path / "blob").write_bytes(raw_file(GOOD, b"\0" * 12))
    path.symlink_to("blob")  # as the hub's cache lays models out
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}


def test_a_claim_of_100_gb_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = raw_file({"a": entry([25 * 10**9], 0, 100 * 10**9)})
    for content, size in [(raw_file(GOOD, length=100 * 10**9), None), (header, None), (header, len(header) + 10**11)]:
        path.write_bytes(content)
        if size is not None:
            os.truncate(path, size)  # sparse: the claim is true, yet nothing is read until asked for
        tracemalloc.start()
        try:
            if size is None:
                with pytest.raises(UserError):
                    open_checkpoint(tmp_path)
            else:
                assert open_checkpoint(tmp_path).read("a", (slice(10**9, 10**9 + 3),)).tolist() == [0, 0, 0]
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()


def test_a_file_cut_while_reading(tmp_path: Path) -> None:
    write_all(tmp_path, {"x": np.ones(1000, np.float32)})
    checkpoint = open_checkpoint(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 2000)
    with pytest.raises(UserError, match="cut off while being read"):
        checkpoint.read("x")


def test_writing_holds_no_second_copy(tmp_path: Path) -> None:
    tensors = {f"t{i}": np.zeros((256, 1024), np.float32) for i in range(8)}
    tracemalloc.start()
    try:
        write_all(tmp_path, tensors)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
