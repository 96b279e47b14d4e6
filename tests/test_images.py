"Image sources: every format gives the same images, nothing is read that is not asked for, nothing in a file is executed."
import io
import json
import os
import pickle
import pickletools
import struct
import sys
import tarfile
import tracemalloc
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.testing import assert_close

from sedm_kit import image_files
from sedm_kit.image_files import FileStore, layout, read_batch
from sedm_kit.images import (CONVENTIONS, ImageSource, from_uint8, open_images, to_uint8, write_cifar_archive, write_edm_zip, write_folder,
                             write_npz)

N = 24
PIXELS = torch.randint(0, 256, (N, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(N) % 10
ONE_HOT = torch.nn.functional.one_hot(LABELS, 10)


def batch_bytes(images, labels, protocol=2):
    "One batch as Python 3 and this numpy pickle it."
    return pickle.dumps({b"batch_label": b"a batch", b"labels": list(labels), b"data": np.asarray(images).reshape(len(images), -1),
                         b"filenames": [b"a.png"] * len(images)}, protocol=protocol)


def python2_batch(images, labels):
    "One batch instruction by instruction as Python 2 and numpy 1 wrote the real ones: text and pixels are byte strings."
    text = lambda value: b"U" + bytes([len(value)]) + value
    raw, short = np.asarray(images).tobytes(), struct.Struct("<H").pack
    array = (b"cnumpy.core.multiarray\n_reconstruct\nq\x01" + b"cnumpy\nndarray\nq\x02" + b"K\x00\x85q\x03" + text(b"b") + b"q\x04\x87q\x05Rq\x06"
             + b"(K\x01" + b"M" + short(len(images)) + b"M" + short(3072) + b"\x86q\x07"
             + b"cnumpy\ndtype\nq\x08" + text(b"u1") + b"q\x09K\x00K\x01\x87q\x0aRq\x0b(K\x03" + text(b"|") + b"q\x0cNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0db\x89"
             + b"T" + struct.pack("<i", len(raw)) + raw + b"q\x0etq\x0fb.")[:-1]
    numbers = b"]q\x10(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}q\x00(" + text(b"data") + array + text(b"labels") + numbers + text(b"batch_label") + text(b"testing batch 1 of 1") + b"u."


def write_tar(path, batches, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def train_batches(dump=batch_bytes):
    return {f"data_batch_{k + 1}": dump(PIXELS[rows], LABELS[rows].tolist()) for k, rows in enumerate(np.array_split(np.arange(N), 5))}


def write_folder_of_batches(path):
    (path / "cifar-10-batches-py").mkdir(parents=True)
    for name, content in train_batches().items():
        (path / "cifar-10-batches-py" / name).write_bytes(content)


def hand_made_zip(path):
    "Names of EDM's own tool, backslashes in the json, other files beside the images."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for k in reversed(range(N)):
            archive.writestr(f"00000/img{k:08d}.png", png(PIXELS[k]))
        archive.writestr("dataset.json", json.dumps({"labels": [[f"00000\\img{k:08d}.png", ONE_HOT[k].tolist()] for k in range(N)]}))
        archive.writestr("__MACOSX/00000/._img.png", b"junk")


def png(pixels, mode=None):
    content, array = io.BytesIO(), pixels.permute(1, 2, 0).numpy()
    image = Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)
    (image.convert(mode) if mode else image).save(content, "png")
    return content.getvalue()


NHWC, FLOATS = PIXELS.permute(0, 2, 3, 1).numpy(), (PIXELS.double() / 127.5 - 1).numpy()
FORMATS = {
    "adm.npz": lambda path: write_npz(path, PIXELS, LABELS),
    "dg.npz": lambda path: np.savez(path, samples=NHWC, label=ONE_HOT.float()),
    "compressed.npz": lambda path: np.savez_compressed(path, images=NHWC, labels=LABELS),
    "channels_first.npz": lambda path: np.savez(path, arr_0=PIXELS, arr_1=LABELS),
    "fortran.npz": lambda path: np.savez(path, arr_0=np.asfortranarray(NHWC), arr_1=LABELS[:, None]),
    "floats.npz": lambda path: np.savez(path, arr_0=FLOATS.astype(np.float32), label=LABELS.double()),
    "big_endian.npz": lambda path: np.savez_compressed(path, arr_0=FLOATS.astype(">f8"), label=LABELS.to(torch.uint8)),
    "edm.zip": lambda path: write_edm_zip(path, PIXELS, LABELS),
    "edm_tool.zip": hand_made_zip,
    "folder": lambda path: write_folder(path, PIXELS, LABELS, first=995),
    "cifar.tar.gz": lambda path: write_tar(path, train_batches()),
    "cifar.tar": lambda path: write_tar(path, train_batches(lambda *batch: batch_bytes(*batch, protocol=4)), "w"),
    "cifar_of_python_2.tar.gz": lambda path: write_tar(path, train_batches(python2_batch)),
    "cifar_of_numpy_1.tar.gz": lambda path: write_tar(path, {name: content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
                                                             for name, content in train_batches().items()}),
    "cifar_unpacked": write_folder_of_batches,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    for name, write in FORMATS.items():
        write(folder / name)
    np.save(folder / "plain.npy", NHWC)
    return folder


# ---- bytes and numbers

def test_every_byte_comes_back_in_edms_convention():
    u = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(u)), u) and torch.equal(to_uint8(from_uint8(u).double(), "edm"), u)
    assert_close(from_uint8(u), torch.linspace(-1, 1, 256))


@given(st.floats(-1, 1))
def test_edm_rounds_and_adm_cuts_off(x):
    level, x = 127.5 * (x + 1), torch.tensor(x, dtype=torch.float64)
    assert abs(to_uint8(x, "edm").item() - level) <= 0.5 + 1e-9
    assert -1 - 1e-9 < to_uint8(x, "adm").item() - level <= 1e-9


def test_adm_is_half_a_level_lower():
    x = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    difference = to_uint8(x, "adm").double() - to_uint8(x, "edm").double()
    assert set(difference.unique().tolist()) == {-1.0, 0.0} and abs(difference.mean() + 0.5) < 0.003


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_beyond_the_range_are_cut_off(convention, dtype):
    assert to_uint8(torch.tensor([-9.0, -1.0, 1.0, 9.0, float("inf"), -float("inf")], dtype=dtype), convention).tolist() == [0, 0, 255, 255, 255, 0]


@pytest.mark.parametrize("call, error, message", [
    (lambda: to_uint8(torch.zeros(2), "dm"), ValueError, "unknown convention 'dm'; known: edm, adm"),
    (lambda: to_uint8(torch.tensor([0.0, float("nan")])), ValueError, "1 of 2 pixels are NaN"),
    (lambda: to_uint8(torch.zeros(2, dtype=torch.uint8)), TypeError, r"expected float pixels in \[-1, 1\], got torch.uint8"),
    (lambda: from_uint8(torch.zeros(2)), TypeError, "expected uint8 pixels, got torch.float32"),
])
def test_wrong_pixels_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- formats

@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_images_and_labels(files, name):
    source = open_images(files / name, expect=(3, 32, 32))
    assert len(source) == N and source.shape == (3, 32, 32) and repr(source).endswith("24 images (3, 32, 32), labels 0 to 9)")
    assert torch.equal(source.raw(), PIXELS) and source.raw().dtype == torch.uint8
    assert torch.equal(source.labels, LABELS) and source.labels.dtype == torch.int64
    for images in (source[:], source.tensor(), torch.cat([images for images, _ in source.batches(7)])):
        assert images.dtype == torch.float32 and images.is_contiguous()
        assert_close(images, from_uint8(PIXELS), rtol=0, atol=1e-7)


def test_arrays_in_memory_and_npy(files):
    for images in (PIXELS, PIXELS.numpy(), NHWC, torch.tensor(FLOATS), FLOATS.astype(np.float16), files / "plain.npy"):
        source = open_images(images, labels=ONE_HOT)
        assert torch.equal(source.raw(), PIXELS) and torch.equal(source.labels, LABELS)
    assert open_images(PIXELS).labels is None and "no labels" in repr(open_images(PIXELS))
    assert open_images(torch.zeros(5, 8, 8, dtype=torch.uint8)).shape == (1, 8, 8)


def test_a_source_can_be_opened_again_with_other_labels_and_expectations(files):
    source = open_images(open_images(files / "edm.zip").subset(slice(3, 9)), labels=[1] * 6, expect=(3, 32, 32))
    assert torch.equal(source.raw(), PIXELS[3:9]) and source.labels.tolist() == [1] * 6


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("write, name", [(write_npz, "x.npz"), (write_edm_zip, "x.zip"), (write_folder, "x")])
def test_what_is_written_is_read(tmp_path, write, name, channels):
    images = PIXELS[:5, :channels, :8, :12]
    for k, given_images in enumerate((images, images.numpy(), open_images(images), from_uint8(images), from_uint8(images).double())):
        write(tmp_path / str(k) / name, given_images)
        source = open_images(tmp_path / str(k) / name)
        assert torch.equal(source.raw(), images) and source.labels is None
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("write, name", [(write_npz, "x.npz"), (write_edm_zip, "x.zip"), (write_folder, "x")])
def test_samples_beyond_the_range_are_cut_off_in_the_convention_asked_for(tmp_path, write, name):
    samples = 1.3 * torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for convention in CONVENTIONS:
        write(tmp_path / convention / name, samples, convention=convention)
        assert torch.equal(open_images(tmp_path / convention / name).raw(), to_uint8(samples, convention))


def test_files_are_named_by_number_and_a_thousand_share_a_folder(tmp_path):
    write_folder(tmp_path / "x", PIXELS[:4], first=998)
    assert sorted(p.relative_to(tmp_path / "x").as_posix() for p in tmp_path.rglob("*.png")) == [
        "000000/000998.png", "000000/000999.png", "001000/001000.png", "001000/001001.png"]


def test_a_zip_is_the_same_bytes_whenever_it_is_written(tmp_path):
    write_edm_zip(tmp_path / "a.zip", PIXELS, LABELS)
    write_edm_zip(tmp_path / "b.zip", open_images(tmp_path / "a.zip"))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as content:
        assert {info.date_time for info in content.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_numpy_reads_what_is_written(tmp_path):
    write_npz(tmp_path / "x.npz", PIXELS, LABELS, key="samples")
    with np.load(tmp_path / "x.npz") as content:
        assert np.array_equal(content["samples"], NHWC) and np.array_equal(content["label"], LABELS)


def test_both_parts_of_a_rehearsal_archive(tmp_path):
    write_cifar_archive(tmp_path / "c.tar.gz", PIXELS, LABELS)
    train, test = (open_images(tmp_path / "c.tar.gz", part=part) for part in ("train", "test"))
    assert torch.equal(torch.cat([train.raw(), test.raw()]), PIXELS) and torch.equal(torch.cat([train.labels, test.labels]), LABELS)
    with tarfile.open(tmp_path / "c.tar.gz") as archive:  # as the users of the real one read it
        names = archive.getnames()
        first = pickle.loads(archive.extractfile("cifar-10-batches-py/data_batch_1").read(), encoding="bytes")
    assert names == [f"cifar-10-batches-py/{name}" for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")]
    assert first[b"data"].shape == (4, 3072) and first[b"labels"] == [0, 1, 2, 3]


def test_the_batch_of_python_2_is_one_that_python_reads():
    "The hand-made stream above means what it should, according to pickle itself."
    found = pickle.loads(python2_batch(PIXELS[:3], [4, 5, 6]), encoding="bytes")
    assert np.array_equal(found[b"data"], PIXELS[:3].reshape(3, -1)) and found[b"labels"] == [4, 5, 6]


def test_null_labels_are_none_and_folders_can_be_classes(tmp_path):
    for name in ("b/1.png", "a/2.PNG", "b/deep/3.png", "a/.hidden.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(PIXELS[0]))
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    assert open_images(tmp_path).labels is None and len(open_images(tmp_path)) == 3
    assert open_images(tmp_path, labels="folders").labels.tolist() == [0, 1, 1]


def test_conversion_is_done_when_asked_for(tmp_path):
    for k, mode in enumerate(("RGB", "L", "P", "RGBA", "1")):
        (tmp_path / f"{k}.png").write_bytes(png(PIXELS[0], mode))
    assert open_images(tmp_path, mode="RGB").raw().shape == (5, 3, 32, 32)
    grey = open_images(tmp_path, mode="L")
    assert grey.shape == (1, 32, 32) and np.array_equal(grey.raw(0)[0], Image.open(tmp_path / "0.png").convert("L"))


def test_floats_of_another_range(tmp_path):
    for low, high in ((0, 1), (0, 255), (-3.0, 5.0)):
        array = (FLOATS + 1) / 2 * (high - low) + low
        np.savez(tmp_path / "x.npz", arr_0=array)
        source = open_images(tmp_path / "x.npz", value_range=(low, high))
        assert_close(source[:], from_uint8(PIXELS), rtol=0, atol=1e-6)
        assert source[:].abs().max() <= 1
    with pytest.warns(UserWarning, match=r"no value is below 0; if black is 0 and not -1, say value_range=\(0, 1\)"):
        open_images((FLOATS + 1) / 2)


@pytest.mark.parametrize("shape, expected", [
    ((5, 3, 8, 8), ((5, 3, 8, 8), False)), ((5, 8, 8, 3), ((5, 3, 8, 8), True)), ((5, 1, 4, 6), ((5, 1, 4, 6), False)),
    ((5, 4, 6, 1), ((5, 1, 4, 6), True)), ((5, 3, 3, 1), ((5, 1, 3, 3), True)), ((5, 1, 3, 3), ((5, 1, 3, 3), False)), ((5, 7, 9), ((5, 1, 7, 9), False)),
])
def test_layouts(shape, expected):
    assert layout(shape, "x") == expected


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (5, 4, 8, 8), (5, 3, 8, 3), (8, 8, 3), (5, 8), (5,), (1, 5, 3, 8, 8)])
def test_unclear_layouts_are_refused(shape):
    with pytest.raises(ValueError, match="x: expected images .* got shape"):
        layout(shape, "x")


# ---- the laws of an index

indices = st.one_of(
    st.integers(-N, N - 1), st.slices(N), st.lists(st.integers(-N, N - 1), max_size=6), st.lists(st.booleans(), min_size=N, max_size=N))


@pytest.mark.parametrize("name", ["adm.npz", "floats.npz", "edm.zip", "cifar.tar.gz"])
def test_an_index_picks_what_it_picks_from_an_array(files, name):
    source = open_images(files / name)

    @settings(max_examples=60)
    @given(indices, st.sampled_from(["plain", "numpy", "tensor"]))
    def law(key, form):
        if isinstance(key, list):
            key = np.asarray(key, dtype=bool if len(key) == N else np.int64)
            key = {"plain": key.tolist(), "numpy": key, "tensor": torch.from_numpy(key)}[form]
        as_numpy = key.numpy() if isinstance(key, torch.Tensor) else key
        expected = torch.from_numpy(PIXELS.numpy()[as_numpy].copy())
        assert torch.equal(source.raw(key), expected)
        assert_close(source[key], from_uint8(expected), rtol=0, atol=1e-7)
        if not isinstance(key, int):
            part = source.subset(key)
            assert torch.equal(part.raw(), expected) and torch.equal(part.labels, torch.from_numpy(LABELS.numpy()[as_numpy].copy()))
            assert torch.equal(part.subset(slice(None, None, 2)).raw(), expected[::2])
    law()


@pytest.mark.parametrize("key", [N, -N - 1, [0, N], torch.tensor([[0]]), None, (0, 1), 1.0, "0", torch.ones(N - 1, dtype=torch.bool)])
def test_indices_without_an_image(key):
    with pytest.raises(IndexError):
        open_images(PIXELS)[key]


def test_a_source_ends_and_can_be_changed_without_changing_the_data(files):
    source = open_images(files / "edm.zip")
    assert len(list(source)) == N
    source.raw([0, 1]).zero_(); source.raw(0).zero_()
    assert torch.equal(source.raw([0, 1]), PIXELS[:2])
    memory = PIXELS.clone()
    open_images(memory).raw(slice(None)).zero_()
    assert torch.equal(memory, PIXELS)


def test_batches_are_all_images_once_and_a_seed_is_an_order(files):
    source = open_images(files / "adm.npz")
    batches = list(source.batches(7, seed=3))
    assert [len(images) for images, _ in batches] == [7, 7, 7, 3]
    images, labels = (torch.cat(part) for part in zip(*batches))
    order = [int((PIXELS == to_uint8(image)).flatten(1).all(1).nonzero()) for image in images]
    assert sorted(order) == list(range(N)) != order and torch.equal(labels, LABELS[order])
    again = torch.cat([images for images, _ in open_images(files / "edm.zip").batches(7, seed=3)])
    assert torch.equal(images, again) and not torch.equal(images, torch.cat([images for images, _ in source.batches(7, seed=4)]))
    assert next(open_images(PIXELS).batches(5))[1] is None


@given(st.floats(0.05, 0.9) | st.integers(1, N - 1), st.integers(0, 100))
def test_a_split_is_a_partition_in_order(held_out, seed):
    source = open_images(PIXELS, labels=torch.arange(N))
    rest, fresh = source.split(held_out, seed)
    assert len(fresh) == (held_out if isinstance(held_out, int) else round(held_out * N))
    assert sorted(rest.labels.tolist() + fresh.labels.tolist()) == list(range(N))
    assert all(part.labels.tolist() == sorted(part.labels.tolist()) for part in (rest, fresh)) and torch.equal(fresh.raw(), PIXELS[fresh.labels])


def test_limits(files):
    source = open_images(files / "edm.zip")
    assert torch.equal(source.tensor(limit=5), from_uint8(PIXELS[:5])) and len(source.tensor(limit=10**6)) == N
    for call in (lambda: source.batches(0), lambda: source.split(0.0), lambda: source.split(N), lambda: source.split(1e-9)):
        with pytest.raises(ValueError):
            call()


def test_workers_of_a_data_loader_share_a_zip(files):
    loader = torch.utils.data.DataLoader(open_images(files / "edm.zip"), batch_size=4, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat(list(loader)), from_uint8(PIXELS))


def test_every_process_has_its_own_handle_of_a_zip(files, monkeypatch):
    source, opened, original = open_images(files / "edm.zip"), [], zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda path: opened.append(path) or original(path))
    source.raw(0)
    assert not opened
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert torch.equal(source.raw([1, 2]), PIXELS[1:3]) and len(opened) == 1


# ---- what is not read

def peak_memory(call):
    tracemalloc.start()
    try:
        result = call()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def sparse_npz(path, shape):
    "An uncompressed npz whose pixels are a hole in the file, written by hand; the last image is white."
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
    head, name = head.getvalue(), b"arr_0.npy"
    size, image = len(head) + int(np.prod(shape)), int(np.prod(shape[1:]))
    common = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 33, 0, size, size, len(name), 0)
    with open(path, "wb") as file:
        file.write(b"PK\x03\x04" + common + name + head)
        file.seek(30 + len(name) + size - image)
        file.write(b"\xff" * image)
        start = file.tell()
        central = b"PK\x01\x02" + struct.pack("<H", 20) + common + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name
        file.write(central + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), start, 0))


def test_three_gigabytes_are_opened_without_reading_them(tmp_path):
    sparse_npz(tmp_path / "large.npz", (1_000_000, 32, 32, 3))
    source, peak = peak_memory(lambda: open_images(tmp_path / "large.npz"))
    assert len(source) == 1_000_000 and peak < 20e6  # the row numbers are 8 MB
    images, peak = peak_memory(lambda: source[[0, 500_000, -1]])
    assert images.amax((1, 2, 3)).tolist() == [-1, -1, 1] and peak < 1e6
    parts, peak = peak_memory(lambda: source.split(100))
    assert len(parts[1][:3]) == 3 and peak < 100e6


def test_a_compressed_npz_is_unpacked_on_use_and_not_into_memory(tmp_path, monkeypatch):
    unpacked, original = [], image_files.MappedArray._unpacked
    monkeypatch.setattr(image_files.MappedArray, "_unpacked", lambda self: unpacked.append(1) or original(self))
    monkeypatch.setattr(image_files, "BLOCK", 1 << 18)
    np.savez_compressed(tmp_path / "x.npz", arr_0=np.full((10_000, 32, 32, 3), 7, np.uint8))
    source = open_images(tmp_path / "x.npz")
    assert not unpacked
    images, peak = peak_memory(lambda: source.raw([9_999, 3]))
    assert (images == 7).all() and len(unpacked) == 1 and peak < 3e6
    assert (source.raw(5) == 7).all() and len(unpacked) == 1


@pytest.mark.parametrize("write, name", [(write_edm_zip, "x.zip"), (write_folder, "x")])
def test_files_are_decoded_on_demand_and_once(tmp_path, write, name, monkeypatch):
    write(tmp_path / name, PIXELS)
    decoded, original = [], FileStore._load
    monkeypatch.setattr(FileStore, "_load", lambda self, name, decode=False: decoded.append(decode) or original(self, name, decode))
    source = open_images(tmp_path / name)
    assert decoded == [False] * N
    del decoded[:]
    source.raw([3, 5]); source.raw(slice(3, 6))
    assert decoded == [True] * 3
    del decoded[:]
    open_images(tmp_path / name, check=False)
    assert decoded == [False]


def test_the_cache_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "CACHE", 20 * 3072)
    write_edm_zip(tmp_path / "x.zip", PIXELS)
    source = open_images(tmp_path / "x.zip")
    source.raw()
    assert source._store._decoded.cache_info().currsize == 20


def test_writing_an_npz_takes_one_block_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("sedm_kit.images.BLOCK", 1 << 18)
    source = open_images(np.broadcast_to(PIXELS[:1].numpy(), (10_000, 3, 32, 32)))
    _, peak = peak_memory(lambda: write_npz(tmp_path / "x.npz", source))
    assert (tmp_path / "x.npz").stat().st_size > 30e6 and peak < 3e6
    assert torch.equal(open_images(tmp_path / "x.npz").raw(-1), PIXELS[0])


def test_npz_needs_no_pillow_and_files_say_so(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert len(open_images(files / "adm.npz")[:2]) == 2
    for call in (lambda: open_images(files / "folder"), lambda: write_edm_zip(files / "y.zip", PIXELS)):
        with pytest.raises(ImportError, match=r"need Pillow: pip install 'sedm_kit\[data\]'"):
            call()
    assert not (files / "y.zip").exists() and not list(files.glob("*.partial"))


# ---- what is not executed

class Call:
    "Pickles as a call of a function."
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def program(*parts):
    "A pickle of protocol 2 put together by hand: {b'data': <parts>, b'labels': []}."
    return b"\x80\x02}(U\x04data" + b"".join(parts) + b"U\x06labels]u."


def hostile(folder):
    "Name -> (pickle, what the refusal says). Those that run a command would leave a file behind."
    command = f"touch {folder / 'canary'}"
    batch = batch_bytes(PIXELS[:2], [0, 1])
    text = b"X" + struct.pack("<I", len(command)) + command.encode()
    run = b"cposix\nsystem\n" + text + b"\x85R"
    array = b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    huge = b"\x8a\x08" + struct.pack("<q", 1 << 50)
    return {
        "os.system": (pickle.dumps({b"data": Call(os.system, command), b"labels": []}), "names posix.system"),
        "eval": (pickle.dumps({b"data": Call(eval, f"__import__('os').system({command!r})"), b"labels": []}), "names builtins.eval"),
        "exec": (pickle.dumps({b"data": Call(exec, f"import os; os.system({command!r})"), b"labels": []}, 2), "names __builtin__.exec"),
        "getattr": (pickle.dumps({b"data": Call(getattr, "x", "upper"), b"labels": []}), "names builtins.getattr"),
        "nested loads": (pickle.dumps({b"data": Call(pickle.loads, pickle.dumps(Call(os.system, command))), b"labels": []}), "names _pickle.loads"),
        "as a key": (pickle.dumps({Call(os.system, command): 1}), "names posix.system"),
        "as a label": (pickle.dumps({b"data": b"", b"labels": [Call(os.system, command)]}), "names posix.system"),
        "subtype of an array": (program(b"cnumpy._core.multiarray\n_reconstruct\n(", run, b"K\x00\x85U\x01btR"), "names posix.system"),
        "state of an array": (program(array, b"(K\x01", run, b"tb"), "names posix.system"),
        "dotted name": (b"\x80\x04}(\x8c\x04data\x8c\x05numpy\x8c\x0endarray.tofile\x93u.", "names numpy.ndarray.tofile"),
        "other numpy": (program(b"cnumpy.f2py.diagnose\nrun\n)R"), "names numpy.f2py.diagnose.run"),
        "numpy.load": (program(b"cnumpy\nload\n", text, b"\x85R"), "names numpy.load"),
        "torch": (program(b"ctorch.storage\n_load_from_bytes\n", text, b"\x85R"), "names torch.storage._load_from_bytes"),
        "INST": (program(b"(S'" + command.encode() + b"'\niposix\nsystem\n"), "instruction MARK|instruction STRING|instruction INST"),
        "OBJ": (program(b"(cposix\nsystem\n", text, b"o"), "instruction OBJ|names posix.system"),
        "NEWOBJ": (program(b"cnumpy\nndarray\n)\x81"), "instruction NEWOBJ"),
        "EXT1": (program(b"\x82\x01"), "instruction EXT1"),
        "PERSID": (program(b"Pname\n"), "instruction PERSID"),
        "BUILD on a global": (program(b"cnumpy\nndarray\nN}U\x05stateK\x01s\x86b"), "is no batch"),
        "BUILD on a list": (program(b"]N}U\x05stateK\x01s\x86b"), "is no batch"),
        "memory slot": (program(b"Nr\xff\xff\xff\x7f"), "memory slot 2147483647"),
        "huge shape": (program(array, b"(K\x01(", huge, b"tcnumpy\ndtype\nU\x02u1\x85R\x89U\x00tb"), "is no batch"),
        "huge subarray": (program(b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\n", huge, b"\x85U\x01b\x87R"), "is no batch"),
        "objects": (batch_bytes(np.array([[None] * 3072], dtype=object), [1]), "no plain array of bytes"),
        "floats": (batch_bytes(np.zeros((2, 3072)), [0, 1]), "no plain array of bytes"),
        "codec": (program(b"c_codecs\nencode\nX\x01\x00\x00\x00aU\x03zip\x86R"), "is no batch"),
        "deep": (b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".", "is no batch"),
        "no dictionary": (pickle.dumps([1, 2, 3], 2), "is no batch"),
        "other keys": (pickle.dumps({b"images": 1}, 2), "it has no b'data'"),
        "empty": (b"", "is no batch"),
        "text": (b"these are no pickles", "is no batch"),
        "truncated": (batch[:len(batch) // 2], "is no batch"),
        "wrong size": (batch_bytes(np.zeros((2, 3000), np.uint8), [0, 1]), "is no batch"),
        "labels missing": (batch_bytes(PIXELS[:2], [0]), "has 2 images but 1 labels"),
        "label too large": (batch_bytes(PIXELS[:2], [0, 10]), "labels are not numbers from 0 to 9"),
        "labels of another kind": (batch_bytes(PIXELS[:2], [b"a", 1.0]), "labels are not numbers|instruction BINFLOAT"),
    }


@pytest.mark.parametrize("name", hostile(Path("x")))
def test_hostile_batches_run_nothing(tmp_path, name):
    content, message = hostile(tmp_path)[name]
    with pytest.raises(ValueError, match=message):
        read_batch(content, "x")
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match="test_batch in "):
        open_images(tmp_path, part="test")
    assert not (tmp_path / "canary").exists()
    pixels, labels = read_batch(batch_bytes(PIXELS[:2], [0, 1]), "x")  # and leave nothing behind for the next file
    assert np.array_equal(pixels, PIXELS[:2]) and labels == [0, 1]


@pytest.mark.parametrize("name", ["os.system", "eval", "exec", "nested loads", "as a key", "as a label", "subtype of an array", "state of an array"])
def test_the_canary_would_sing(tmp_path, name):
    "The same bytes do run under pickle.loads, so the test above could fail."
    with suppress(Exception):
        pickle.loads(hostile(tmp_path)[name][0], encoding="bytes")
    assert (tmp_path / "canary").exists()


def test_every_instruction_of_a_real_batch_is_known():
    for content in (batch_bytes(PIXELS, LABELS.tolist()), python2_batch(PIXELS, LABELS.tolist())):
        assert {instruction.name for instruction, _, _ in pickletools.genops(content)} <= image_files._INSTRUCTIONS


def test_arrays_of_objects_are_refused(tmp_path, files):
    canary = tmp_path / "canary"
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", arr_0=np.array([Call(os.system, f"touch {canary}")], dtype=object))
        with pytest.raises(ValueError, match="arr_0 in .*x.npz holds Python objects, which only unpickling could read"):
            open_images(tmp_path / "x.npz")
        save(tmp_path / "x.npz", arr_0=NHWC, label=np.array([Call(os.system, f"touch {canary}")], dtype=object))
        with pytest.raises(ValueError, match="label in .*x.npz holds Python objects"):
            open_images(tmp_path / "x.npz")
    assert not canary.exists()


# ---- what is refused

def change(files, name, target, position=0.5):
    content = (files / name).read_bytes()
    target.write_bytes(content[:int(len(content) * position)])
    return target


@pytest.mark.parametrize("name", [name for name in FORMATS if name.endswith((".npz", ".zip", ".gz", ".tar"))])
def test_a_truncated_file_gives_an_error_and_never_other_images(files, tmp_path, name):
    for position in (0.02, 0.3, 0.6, 0.9, 0.99, 0.9999):
        try:
            found = open_images(change(files, name, tmp_path / name, position)).raw()
        except ValueError as error:
            assert name in str(error)
        else:
            assert torch.equal(found, PIXELS) and name.endswith((".tar", ".gz"))  # whose last bytes are padding


@pytest.mark.parametrize("name", ["edm.zip", "compressed.npz"])
def test_damage_inside_a_file_is_found_by_its_checksum(files, tmp_path, name):
    content = bytearray((files / name).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*(cannot be decoded|damaged)"):
        open_images(tmp_path / name).raw()


def pictures(folder, **content):
    folder.mkdir(exist_ok=True)
    for name, data in content.items():
        (folder / name.replace("_", ".")).write_bytes(data)
    return folder


def archive(path, **content):
    with zipfile.ZipFile(path, "w") as file:
        for name, data in content.items():
            file.writestr(name.replace("_", "."), data)
    return path


def arrays(path, save=np.savez, **content):
    save(path, **content)
    return path


ONE, SMALL, GREY = png(PIXELS[0]), png(PIXELS[0, :, :16]), png(PIXELS[0, :1])
BROKEN, LOUD = FLOATS.copy(), FLOATS * 3
BROKEN[5, 1, 2, 3] = np.nan
REFUSED = {
    "missing": (lambda t: t / "nowhere", {}, "no images at .*nowhere: there is no such file or folder"),
    "no images": (lambda t: pictures(t / "x", readme_txt=b"hello", _DS_Store=b""), {}, r"x holds no images: none of its 1 files ends in \.png, \.jpg, \.jpeg, \.webp, \.bmp"),
    "empty folder": (lambda t: pictures(t / "x"), {}, "holds no images: none of its 0 files"),
    "empty zip": (lambda t: archive(t / "x.zip"), {}, "x.zip holds no images"),
    "text": (lambda t: pictures(t / "x", a_txt=b"hello") / "a.txt", {}, "a.txt starts with b'hello'; expected CIFAR-10's tar, a zip of images, an npz or an npy, or a folder"),
    "empty file": (lambda t: pictures(t / "x", a_npz=b"") / "a.npz", {}, "starts with b''"),
    "other tar": (lambda t: write_tar(t / "x.tar.gz", {"photo.png": ONE}) or t / "x.tar.gz", {}, "not the complete python version of CIFAR-10: data_batch_1, .*, data_batch_5 missing"),
    "gzip but no tar": (lambda t: pictures(t / "x", a_gz=b"\x1f\x8b\x08 no tar") / "a.gz", {}, "a.gz is no complete tar file"),
    "one batch missing": (lambda t: write_tar(t / "x.tar", {k: v for k, v in train_batches().items() if k != "data_batch_3"}, "w") or t / "x.tar", {}, ": data_batch_3 missing"),
    "mixed sizes": (lambda t: pictures(t / "x", a_png=ONE, b_png=ONE, c_png=SMALL, d_png=SMALL), {}, r"c.png is 32x16 colour, but a.png is 32x32 colour; all images must agree in size and channels$"),
    "grey among colour": (lambda t: archive(t / "x.zip", a_png=ONE, b_png=GREY), {}, r"b.png is 32x32 grey, but a.png is 32x32 colour; .*mode='RGB' or 'L' converts the channels"),
    "transparency": (lambda t: pictures(t / "x", a_png=png(PIXELS[0], "RGBA")), {}, r"a.png has pixels of kind 'RGBA'; expected 8-bit grey or colour without transparency \(mode="),
    "16 bits": (lambda t: pictures(t / "x", a_png=sixteen_bits()), {"mode": "L"}, r"a.png has pixels of kind 'I;16'; expected 8-bit .*transparency$"),
    "no image": (lambda t: pictures(t / "x", a_png=ONE, b_png=b"not a png"), {}, "b.png cannot be decoded as an image"),
    "half an image": (lambda t: pictures(t / "x", a_png=ONE, b_png=ONE[:len(ONE) // 2]), {}, "b.png cannot be decoded as an image"),
    "unknown mode": (lambda t: pictures(t / "x", a_png=ONE), {"mode": "rgb"}, "mode must be 'L' .* got 'rgb'"),
    "labels missing": (lambda t: archive(t / "x.zip", a_png=ONE, b_png=ONE, dataset_json='{"labels": [["a.png", 1]]}'), {}, r"has 2 images, dataset.json has 1 labels; .*first without a partner: b.png"),
    "labels of no image": (lambda t: archive(t / "x.zip", a_png=ONE, dataset_json='{"labels": [["a.png", 1], ["b.png", 1]]}'), {}, "has 1 images, dataset.json has 2 labels; .*b.png"),
    "a null label": (lambda t: archive(t / "x.zip", a_png=ONE, dataset_json='{"labels": [["a.png", null]]}'), {}, "first without a partner: a.png"),
    "a label twice": (lambda t: archive(t / "x.zip", a_png=ONE, dataset_json='{"labels": [["a.png", 1], ["a.png", 2]]}'), {}, "stands there twice"),
    "broken json": (lambda t: archive(t / "x.zip", a_png=ONE, dataset_json='{"labels": [['), {}, "dataset.json must be an object with"),
    "other json": (lambda t: archive(t / "x.zip", a_png=ONE, dataset_json='[1]'), {}, "dataset.json must be an object with"),
    "negative label": (lambda t: archive(t / "x.zip", a_png=ONE, dataset_json='{"labels": [["a.png", -1]]}'), {}, "labels must be whole numbers from 0 or one-hot rows; label 0 is -1"),
    "unknown keys": (lambda t: arrays(t / "x.npz", pictures=NHWC, mu=np.zeros(3)), {}, "x.npz holds the arrays pictures, mu; expected exactly one of arr_0, samples, images, or key="),
    "two sets": (lambda t: arrays(t / "x.npz", samples=NHWC, images=NHWC), {}, "holds the arrays samples, images; expected exactly one"),
    "unknown key": (lambda t: arrays(t / "x.npz", samples=NHWC), {"key": "faces"}, "holds the arrays samples; expected"),
    "label count": (lambda t: arrays(t / "x.npz", samples=NHWC, label=np.zeros(3)), {}, "has 24 images but 3 labels"),
    "fractional labels": (lambda t: arrays(t / "x.npz", samples=NHWC, label=np.full(N, 0.5)), {}, "label 0 is 0.5"),
    "nearly one-hot": (lambda t: arrays(t / "x.npz", samples=NHWC, label=np.eye(N)[:, :10]), {}, r"row 10 is neither: \[0.0, "),
    "text as labels": (lambda t: arrays(t / "x.npz", samples=NHWC, label=np.array(["cat"] * N)), {}, "labels must be whole numbers"),
    "NaN": (lambda t: arrays(t / "x.npz", arr_0=BROKEN), {}, r"image 5 holds NaN, expected floats in \[-1, 1\]"),
    "out of range": (lambda t: arrays(t / "x.npz", np.savez_compressed, arr_0=LOUD), {}, r"image 0 holds values from -3 to 3, expected floats in \[-1, 1\]; value_range="),
    "infinity": (lambda t: np.where(np.isnan(BROKEN), np.inf, BROKEN), {}, "image 5 holds values from -1 to inf"),
    "0 to 255": (lambda t: PIXELS.float(), {}, r"array: image 0 holds values from 0 to 255, expected floats in"),
    "wrong range": (lambda t: FLOATS, {"value_range": (1, -1)}, r"value_range must be two numbers \(black, white\) in rising order, got \(1, -1\)"),
    "range of bytes": (lambda t: PIXELS, {"value_range": (0, 1)}, "value_range only with floats"),
    "integers": (lambda t: PIXELS.long(), {}, "array: expected uint8 pixels, or floats .*, got int64"),
    "latents": (lambda t: torch.zeros(4, 4, 8, 8), {}, r"expected images .* got shape \(4, 4, 8, 8\)"),
    "no rows": (lambda t: arrays(t / "x.npz", arr_0=NHWC[:0]), {}, "holds no images: its first dimension is 0"),
    "no rows of floats": (lambda t: FLOATS[:0], {}, "holds no images"),
    "size": (lambda t: PIXELS, {"expect": (3, 64, 64)}, r"array has images of shape \(3, 32, 32\), expected \(3, 64, 64\)"),
    "channels": (lambda t: PIXELS, {"expect": (1, 32, 32)}, r"array has images of shape \(3, 32, 32\) \(colour\), expected \(1, 32, 32\) \(grey\)"),
    "part of a folder": (lambda t: pictures(t / "x", a_png=ONE), {"part": "test"}, "x is a folder of images, for which part has no meaning"),
    "unknown part": (lambda t: write_tar(t / "x.tar", train_batches(), "w") or t / "x.tar", {"part": "valid"}, "unknown part 'valid' of CIFAR-10; known: train, test"),
    "part that is not there": (lambda t: write_tar(t / "x.tar", train_batches(), "w") or t / "x.tar", {"part": "test"}, "not the complete python version of CIFAR-10: test_batch missing"),
    "folders of an array": (lambda t: PIXELS, {"labels": "folders"}, "labels='folders' has no meaning for array"),
    "unknown word": (lambda t: pictures(t / "x", a_png=ONE), {"labels": "names"}, "labels='names' has no meaning"),
}


def sixteen_bits():
    content = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(content, "png")
    return content.getvalue()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(tmp_path, name):
    make, options, message = REFUSED[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        source = open_images(make(tmp_path), **options)
        assert name == "half an image"  # its header is whole: found when it is decoded
        source.raw()


@pytest.mark.parametrize("damage", [lambda head: head.replace(b"(24, 32", b"(25, 32"), lambda head: head.replace(b"NUMPY", b"NUMPI"),
                                    lambda head: head.replace(b"fortran_order", b"fortran_hoard"), lambda head: head[:6] + b"\x07" + head[7:]])
def test_damaged_headers_of_arrays(tmp_path, damage):
    content = io.BytesIO()
    np.save(content, NHWC)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("arr_0.npy", damage(content.getvalue()[:128]) + content.getvalue()[128:])
    with pytest.raises(ValueError, match="arr_0 in .*x.npz is (damaged or truncated|no array that numpy wrote)"):
        open_images(tmp_path / "x.npz")


def test_a_tar_with_a_giant_batch_is_not_read(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        member = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        member.size = 1 << 30
        archive.fileobj.write(member.tobuf(archive.format))
    with pytest.raises(ValueError, match="test_batch has 1073741824 bytes, more than any batch"):
        open_images(tmp_path / "x.tar", part="test")


def test_unchecked_files_are_checked_when_they_are_read(tmp_path):
    source = open_images(pictures(tmp_path / "x", a_png=ONE, b_png=SMALL), check=False)
    assert torch.equal(source.raw(0), PIXELS[0])
    with pytest.raises(ValueError, match="b.png is 32x16 colour, but a.png is 32x32 colour"):
        source[1]


@pytest.mark.parametrize("call, message", [
    (lambda t: write_folder(t, PIXELS), "is not an empty folder"),
    (lambda t: write_npz(t / "x.npz", PIXELS, [1, 2]), "24 images but 2 labels"),
    (lambda t: write_edm_zip(t / "x.zip", torch.full((2, 3, 8, 8), float("nan"))), "384 of 384 pixels are NaN"),
    (lambda t: write_npz(t / "x.npz", FLOATS, convention="half"), "unknown convention 'half'"),
    (lambda t: write_cifar_archive(t / "x.tar.gz", PIXELS[:, :1], LABELS), r"at least 6 images of shape \(3, 32, 32\) with labels 0 to 9"),
    (lambda t: write_cifar_archive(t / "x.tar.gz", PIXELS, LABELS + 1), "with labels 0 to 9"),
])
def test_writers_refuse_before_anything_is_there(tmp_path, call, message):
    (tmp_path / "other").touch()
    with pytest.raises((ValueError, FileExistsError), match=message):
        call(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_an_interrupted_writer_leaves_the_old_file(tmp_path):
    write_npz(tmp_path / "x.npz", PIXELS)
    old = (tmp_path / "x.npz").read_bytes()

    class Store:
        shape = (3, 3, 8, 8)
        def read(self, rows): raise KeyboardInterrupt
    for write, name in ((write_npz, "x.npz"), (write_edm_zip, "y.zip")):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / name, ImageSource(Store()))
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"] and (tmp_path / "x.npz").read_bytes() == old
