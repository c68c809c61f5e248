"""Files: what is written comes back, mapped; what is damaged is refused by name; nothing is left half done."""

from __future__ import annotations

import pickle
import zipfile

import numpy as np
import pytest

from attn_numba import files
from attn_numba.integrations.ml_dtypes import bfloat16

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "q": RANDOM.standard_normal((2, 3, 5, 4)),
    "k": RANDOM.standard_normal((2, 1, 7, 4)).astype(np.float32),
    "ids": np.arange(7),
    "allowed": RANDOM.random((5, 7)) < 0.5,
    "empty": np.zeros((0, 3), np.float16),
    "number": np.float32(2.5).reshape(()),
}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_several_arrays_come_back(tmp_path, suffix):
    path = tmp_path / f"all{suffix}"
    files.write_arrays(path, ARRAYS)
    found = files.read_arrays(path)
    assert sorted(found) == sorted(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert list(files.read_arrays(path, ["k", "q"])) == ["k", "q"]
    assert [path.name for path in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", files.SUFFIXES)
def test_arrays_are_mapped_and_read_only(tmp_path, suffix):
    path = tmp_path / f"one{suffix}"
    files.write_arrays(path, {"one": ARRAYS["q"]})
    array = files.read_array(path)
    assert isinstance(array, np.memmap)
    assert not array.flags.writeable
    np.testing.assert_array_equal(array, ARRAYS["q"])


def test_columns_first_and_compressed_members_of_an_archive(tmp_path):
    columns = np.asfortranarray(ARRAYS["q"])
    np.savez(tmp_path / "stored.npz", columns=columns)
    np.savez_compressed(tmp_path / "packed.npz", columns=columns)
    for name in ("stored.npz", "packed.npz"):
        np.testing.assert_array_equal(files.read_array(tmp_path / name), columns)


def test_bfloat16_is_kept_by_safetensors_alone(tmp_path):
    array = ARRAYS["q"].astype(bfloat16)
    files.write_arrays(tmp_path / "half.safetensors", {"q": array})
    found = files.read_array(tmp_path / "half.safetensors")
    assert found.dtype == bfloat16
    np.testing.assert_array_equal(found.view(np.uint16), array.view(np.uint16))
    for suffix in (".npy", ".npz"):
        with pytest.raises(ValueError, match="cannot hold q, which is bfloat16; use .safetensors"):
            files.write_arrays(tmp_path / f"half{suffix}", {"q": array})
    np.save(tmp_path / "half.npy", array)
    with pytest.raises(ValueError, match=r"half\.npy: holds numbers that \.npy cannot name"):
        files.read_array(tmp_path / "half.npy")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "out.npz"
    files.write_arrays(path, {"out": np.zeros(3)})

    def fail(*arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", fail)
    with pytest.raises(OSError, match="no space"):
        files.write_arrays(path, {"out": np.ones(3)}, overwrite=True)
    np.testing.assert_array_equal(files.read_array(path), np.zeros(3))
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]


def test_what_exists_is_replaced_only_when_told(tmp_path):
    path = tmp_path / "out.npy"
    files.write_arrays(path, {"out": np.zeros(3)})
    with pytest.raises(FileExistsError, match=r"out\.npy exists"):
        files.write_arrays(path, {"out": np.ones(3)})
    files.write_arrays(path, {"out": np.ones(3)}, overwrite=True)
    np.testing.assert_array_equal(np.load(path), np.ones(3))


def test_output_paths_are_checked(tmp_path):
    with pytest.raises(ValueError, match="unknown kind of file '.txt'"):
        files.check_output(tmp_path / "out.txt")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        files.check_output(tmp_path / "missing" / "out.npy")
    with pytest.raises(ValueError, match=r"\.npy holds one array, not out, lse"):
        files.write_arrays(tmp_path / "out.npy", {"out": np.ones(3), "lse": np.ones(3)})


def damaged(tmp_path):
    """Yield the name of a damaged file, what it holds, and what the message must say."""
    whole = {}
    for suffix in files.SUFFIXES:
        files.write_arrays(tmp_path / f"whole{suffix}", {"q": ARRAYS["q"]})
        whole[suffix] = (tmp_path / f"whole{suffix}").read_bytes()
        yield f"truncated{suffix}", whole[suffix][:-40], ""
        yield f"empty{suffix}", b"", ""
        yield f"other{suffix}", b"these are no numbers" * 9, ""
    yield "pickle.npy", pickle.dumps([1, 2]), "pickle"
    yield "header.npy", whole[".npy"].replace(b"(2, 3, 5, 4)", b"(2, 3, 9, 4)"), "length"
    yield "header.npz", whole[".npz"].replace(b"(2, 3, 5, 4)", b"(2, 3, 9, 4)"), "damaged"
    yield "offsets.safetensors", whole[".safetensors"].replace(b"[0,960]", b"[0,970]"), "safetensors"


def test_damaged_files_are_refused_by_name(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", q=np.array([{}], object))
    cases = [("objects.npy", None, "pickle"), ("objects.npz", None, "pickle"), *damaged(tmp_path)]
    for name, content, message in cases:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path}: .*{message}") as caught:
            files.read_arrays(path)
        assert "\n" not in str(caught.value)


def test_compressed_members_are_checked(tmp_path):
    path = tmp_path / "packed.npz"
    np.savez_compressed(path, q=np.zeros(1000))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        (member,) = archive.infolist()
    content[member.header_offset + 30 + len("q.npy") + 20 + 4] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: "):
        files.read_arrays(path)


def test_names(tmp_path):
    path = tmp_path / "some.npz"
    files.write_arrays(path, {"q": np.ones(2), "k": np.ones(3)})
    with pytest.raises(ValueError, match=r"some\.npz: has no array v; it holds k, q"):
        files.read_arrays(path, ["q", "v"])
    with pytest.raises(ValueError, match=r"some\.npz: one array is needed; it holds k, q"):
        files.read_array(path)
    with pytest.raises(ValueError, match="unknown kind of file '.bin'"):
        files.read_arrays(tmp_path / "some.bin")
    with pytest.raises(FileNotFoundError):
        files.read_arrays(tmp_path / "missing.safetensors")


@pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required additional header parsing")
@pytest.mark.parametrize("suffix", files.SUFFIXES)
def test_any_changed_byte_gives_arrays_or_a_clean_error(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    files.write_arrays(path, {"q": np.arange(24.0).reshape(2, 12)})
    content = path.read_bytes()
    random = np.random.default_rng(1)
    for _ in range(300):
        changed = bytearray(content[: random.integers(len(content)) if random.random() < 0.2 else None])
        for place in random.integers(max(1, len(changed)), size=random.integers(1, 4)):
            if len(changed):
                changed[place] = random.integers(256)
        path.write_bytes(changed)
        try:
            for array in files.read_arrays(path).values():
                array.tobytes()
        except (ValueError, OSError, MemoryError):
            pass
