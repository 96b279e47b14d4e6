"Many images: any order, subset, number of processes and restart gives the same bytes; nothing is lost, doubled or silently wrong."
import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sedm_kit import generate as module
from sedm_kit.draws import FastDenoiser, ddpm_draw, deviation, fitting_batch, sampler_draw
from sedm_kit.generate import chunk_name, chunks_of, finished, generate, kept_stats, pack, read_images, read_manifest, read_shard
from sedm_kit.images import open_images
from sedm_kit.noise import edm_sigmas
from sedm_kit.worlds import load_world

WORLD = load_world("digits")
DRAW = sampler_draw(WORLD.denoiser, edm_sigmas(4), shape=WORLD.shape, solver="euler")


def by_number(seeds):
    "Images that say their seed."
    return torch.tensor(seeds, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def quiet(draw, seeds, outdir, **settings):
    return generate(draw, seeds, outdir, progress=False, **settings)


# ---- a seed means an image

def test_any_order_and_subset(tmp_path):
    whole = read_images(quiet(DRAW, range(50), tmp_path / "a", micro_batch=16) and tmp_path / "a")
    rng = random.Random(0)
    for k in range(3):
        some = rng.sample(range(50), 13)
        quiet(DRAW, some, tmp_path / str(k), micro_batch=16)
        held = read_images(tmp_path / str(k))
        assert held["seeds"].tolist() == sorted(some)
        np.testing.assert_array_equal(held["images"], whole["images"][sorted(some)])


@pytest.mark.parametrize("format", ["npz", "safetensors", "png"])
def test_formats_hold_the_same(tmp_path, format):
    manifest = quiet(by_number, range(20), tmp_path, micro_batch=8, format=format, features=lambda images: images.flatten(1)[:, :2])
    held = read_images(tmp_path)
    assert manifest["complete"] and manifest["count"] == 20 and manifest["seeds"] == [[0, 19]] and len(manifest["files"]) == 3
    assert held["images"].shape == (20, 4, 4, 3) and held["images"][:, 0, 0, 0].tolist() == list(range(20)) and held["features"].shape == (20, 2)


def test_png_are_pictures_for_everybody(tmp_path):
    quiet(DRAW, range(16), tmp_path / "png", micro_batch=8, format="png")
    quiet(DRAW, range(16), tmp_path / "npz", micro_batch=8)
    folder = tmp_path / "png" / "seeds_00000000-00000007"
    assert sorted(path.name for path in folder.iterdir()) == [f"{k:08d}.png" for k in range(8)]
    source = open_images(pack(tmp_path / "npz", tmp_path / "all.npz"))
    assert len(source) == 16
    np.testing.assert_array_equal(read_images(tmp_path / "png")["images"], read_images(tmp_path / "npz")["images"])


def test_micro_batches_differ_by_a_level_at_most(tmp_path, capsys):
    draw = sampler_draw(WORLD.denoiser, edm_sigmas(18), shape=WORLD.shape, solver="euler")
    held = {size: read_images(quiet(draw, range(64), tmp_path / str(size), micro_batch=size) and tmp_path / str(size))["images"].astype(int) for size in (3, 8, 64)}
    for size in (3, 8):
        change = np.abs(held[size] - held[64])
        with capsys.disabled():
            print(f"\nmicro-batch {size} against 64: {(change > 0).mean():.2e} of the bytes differ, by {change.max()} at most")
        assert change.max() <= 1


def test_discrete_sampler(tmp_path):
    from sedm_kit.checkpoints import as_eps_model
    from sedm_kit.noise import ddpm_alphas_cumprod
    alphas = ddpm_alphas_cumprod("linear", 1000)
    draw = ddpm_draw(as_eps_model(WORLD.denoiser, alphas), alphas, 10, WORLD.shape)
    quiet(draw, range(20), tmp_path / "a", micro_batch=8)
    quiet(draw, [11, 4], tmp_path / "b", micro_batch=8)
    np.testing.assert_array_equal(read_images(tmp_path / "b")["images"], read_images(tmp_path / "a")["images"][[4, 11]])


# ---- interruptions

class Killed(BaseException):
    "As final as a signal: no handler of the kit may catch it."


@pytest.mark.parametrize("attempt", range(20))
def test_killed_anywhere_and_resumed(tmp_path, monkeypatch, attempt):
    "Twenty random points, in drawing and in the middle of writing."
    rng = random.Random(attempt)
    point, step = rng.randrange(12), [0]
    replace = os.replace
    def maybe():
        step[0] += 1
        if step[0] == point + 1:
            raise Killed
    def draw(seeds):
        maybe()
        return by_number(seeds)
    monkeypatch.setattr(os, "replace", lambda *names: (maybe(), replace(*names)))
    try:
        quiet(draw, range(40), tmp_path / "run", micro_batch=8)
    except Killed:
        pass
    before = finished(tmp_path / "run") if (tmp_path / "run").exists() else {}
    asked = []
    manifest = quiet(lambda seeds: asked.extend(seeds) or by_number(seeds), range(40), tmp_path / "run", micro_batch=8)
    held = read_images(tmp_path / "run")
    assert held["seeds"].tolist() == list(range(40)) and held["images"][:, 0, 0, 0].tolist() == list(range(40))
    assert not set(asked) & {seed for file in before.values() for seed in file["seeds"]}  # no finished image is made twice
    assert manifest == quiet(by_number, range(40), tmp_path / "straight", micro_batch=8)
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")] or point is not None


def test_a_killed_process_resumes(tmp_path):
    "A real SIGKILL in the middle of a run."
    code = textwrap.dedent(f"""
        import time, torch
        from sedm_kit.generate import generate
        def draw(seeds):
            time.sleep(0.05)
            return torch.tensor(seeds, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4)
        generate(draw, range(200), {str(tmp_path / 'run')!r}, micro_batch=8, progress=False)
    """)
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.time() + 60
    while len(list((tmp_path / "run").glob("seeds_*"))) < 3:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(ValueError, match="holds no finished run: run the same call"):
        read_images(tmp_path / "run")
    done = len(finished(tmp_path / "run"))
    asked = []
    quiet(lambda seeds: asked.append(seeds) or by_number(seeds), range(200), tmp_path / "run", micro_batch=8)
    assert 3 <= done < 25 and len(asked) == 25 - done and len(read_images(tmp_path / "run")["seeds"]) == 200


def test_a_damaged_file_is_made_again_and_no_other(tmp_path):
    manifest = quiet(by_number, range(32), tmp_path, micro_batch=8)
    victim = tmp_path / sorted(manifest["files"])[2]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 255
    victim.write_bytes(content)
    asked = []
    assert quiet(lambda seeds: asked.append(list(seeds)) or by_number(seeds), range(32), tmp_path, micro_batch=8) == manifest
    assert asked == [list(range(16, 24))]


def test_more_seeds_go_into_the_same_folder(tmp_path):
    quiet(by_number, range(10), tmp_path, micro_batch=8)
    asked = []
    manifest = quiet(lambda seeds: asked.append(list(seeds)) or by_number(seeds), range(5, 30), tmp_path, micro_batch=8)
    assert manifest["seeds"] == [[0, 29]] and manifest["count"] == 30 and not {seed for some in asked[:-1] for seed in some} & set(range(10))


# ---- processes

RUN = """
import os, sys, torch, torch.distributed as dist
from sedm_kit.generate import generate
torch.set_num_threads(1)
dist.init_process_group("gloo")
dies = os.environ.get("DIES") == os.environ["RANK"]
def draw(seeds):
    if dies and seeds[0] >= 16:
        raise RuntimeError("this rank dies")
    return torch.tensor(seeds, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4)
generate(draw, range(60), sys.argv[1], micro_batch=8, progress=False)
dist.destroy_process_group()
"""


def torchrun(script, folder, processes, **env):
    "A run by torchrun; its exit status and what it said."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(script), str(folder)]
    run = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, capture_output=True, text=True, timeout=180)
    return run.returncode, run.stderr


def test_one_or_two_processes_make_the_same(tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    for count in (1, 2):
        status, said = torchrun(tmp_path / "run.py", tmp_path / str(count), count)
        assert status == 0, said
    assert read_manifest(tmp_path / "1") == read_manifest(tmp_path / "2") == quiet(by_number, range(60), tmp_path / "0", micro_batch=8)


def test_a_rank_that_dies_ends_all_and_the_run_resumes(tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    status, said = torchrun(tmp_path / "run.py", tmp_path / "out", 2, DIES="1")
    assert status != 0 and "this rank dies" in said and not read_manifest(tmp_path / "out")["complete"]
    assert len(finished(tmp_path / "out")) >= 1
    assert torchrun(tmp_path / "run.py", tmp_path / "out", 2)[0] == 0
    assert read_manifest(tmp_path / "out") == quiet(by_number, range(60), tmp_path / "straight", micro_batch=8)


# ---- what must not happen

def test_other_settings_are_refused_by_name(tmp_path):
    quiet(by_number, range(8), tmp_path, micro_batch=8, settings={"lambda": 1.0})
    for change, words in ((dict(settings={"lambda": 1.004}), "lambda was 1.0 and is now 1.004"), (dict(settings={}), "lambda was 1.0 and is now None"), (dict(settings={"lambda": 1.0}, micro_batch=4), "micro_batch was 8 and is now 4")):
        with pytest.raises(ValueError, match=words):
            quiet(by_number, range(8), tmp_path, **{"micro_batch": 8, **change})


@pytest.mark.parametrize("seeds, words", [([], "at least one"), ([1, 1], "1"), ([-1], "-1")])
def test_bad_seeds(tmp_path, seeds, words):
    with pytest.raises(ValueError, match=words):
        quiet(by_number, seeds, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change, words", [(dict(micro_batch=0), "micro_batch must be"), (dict(format="jpg"), "format must be one of"), (dict(keep_images=False), "keep_images=False keeps features only")])
def test_bad_settings(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        quiet(by_number, range(8), tmp_path / "new", **change)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("draw", [lambda seeds: by_number(seeds)[:-1], lambda seeds: by_number(seeds).float(), lambda seeds: by_number(seeds)[0]])
def test_a_draw_that_miscounts_is_an_error(tmp_path, draw):
    with pytest.raises(ValueError, match="draw must return 8 images"):
        quiet(draw, range(8), tmp_path, micro_batch=8)


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"me")
    with pytest.raises(ValueError, match="is not an empty folder"):
        quiet(by_number, range(8), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not an empty folder"):
        quiet(by_number, range(8), tmp_path / "file")


def test_a_full_disk_says_so_and_loses_nothing(tmp_path, monkeypatch):
    write, room = module.write_atomically, [2]
    def full(path, data):
        if "seeds_" in str(path):
            room[0] -= 1
            if room[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)
    monkeypatch.setattr(module, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        quiet(by_number, range(40), tmp_path, micro_batch=8)
    assert len(finished(tmp_path)) == 2
    monkeypatch.undo()
    assert quiet(by_number, range(40), tmp_path, micro_batch=8)["count"] == 40


def test_missing_and_doubled_seeds_are_errors(tmp_path):
    quiet(by_number, range(16), tmp_path, micro_batch=8)
    name = sorted(path.name for path in tmp_path.glob("seeds_*"))[0]
    (tmp_path / "seeds_00000000-00000099.npz").write_bytes((tmp_path / name).read_bytes())
    with pytest.raises(ValueError, match="8 seeds are there more than once"):
        quiet(by_number, range(16), tmp_path, micro_batch=8)


def test_memory_does_not_grow(tmp_path):
    code = textwrap.dedent(f"""
        import resource, sys, torch
        from sedm_kit.draws import sampler_draw
        from sedm_kit.generate import generate
        from sedm_kit.noise import edm_sigmas
        from sedm_kit.worlds import load_world
        torch.set_num_threads(1)
        world = load_world("digits")
        draw = sampler_draw(world.denoiser, edm_sigmas(2), shape=world.shape, solver="euler")
        generate(draw, range(int(sys.argv[1])), {str(tmp_path)!r} + "/" + sys.argv[1], micro_batch=128, features="digits", progress=False)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    """)
    peak = {n: float(subprocess.run([sys.executable, "-c", code, str(n)], capture_output=True, text=True, check=True).stdout) for n in (1000, 10_000)}
    assert peak[10_000] < peak[1000] + 25, peak


# ---- speed, and what it costs

def test_fast_denoisers_deviate_by_what_is_said():
    draw = lambda **speed: sampler_draw(FastDenoiser(WORLD.denoiser, **speed), edm_sigmas(6), shape=WORLD.shape, solver="euler")
    plain = sampler_draw(WORLD.denoiser, edm_sigmas(6), shape=WORLD.shape, solver="euler")
    assert deviation(draw(), plain, range(16)) == {"mean": 0.0, "max": 0, "share": 0.0, "n": 16}
    found = deviation(draw(precision="bf16"), plain, range(16))
    assert 0 < found["mean"] < 2 and found["max"] >= 1 and 0 < found["share"] < 1
    assert WORLD.denoiser(torch.zeros(1, 1, 8, 8), torch.tensor(1.0)).dtype == torch.float32
    with pytest.raises(ValueError, match="precision must be"):
        FastDenoiser(WORLD.denoiser, "int8")
    with pytest.raises(TypeError, match="torch.nn.Module"):
        FastDenoiser(lambda x, sigma: x)


def test_the_batch_that_fits_is_settled_once(tmp_path):
    asked = []
    def draw(seeds):
        asked.append(len(seeds))
        if len(seeds) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return by_number(seeds)
    manifest = quiet(draw, range(30), tmp_path, micro_batch=None)
    assert manifest["settings"]["micro_batch"] == 16 and asked[:3] == [64, 32, 16]
    asked.clear()
    quiet(draw, range(50), tmp_path, micro_batch=None)
    assert set(asked) == {16}
    with pytest.raises(torch.OutOfMemoryError):
        fitting_batch(lambda seeds: (_ for _ in ()).throw(torch.OutOfMemoryError("none")), [0], start=2)


def test_features_in_place_of_images(tmp_path):
    manifest = quiet(DRAW, range(40), tmp_path / "f", micro_batch=16, features="digits", keep_images=False)
    assert "images" not in read_images(tmp_path / "f") and kept_stats(tmp_path / "f").n == 40 and manifest["settings"]["keep_images"] is False
    with pytest.raises(ValueError, match="holds features only"):
        pack(tmp_path / "f", tmp_path / "x.npz")
    quiet(DRAW, range(16), tmp_path / "i", micro_batch=16)
    with pytest.raises(ValueError, match="holds images only"):
        kept_stats(tmp_path / "i")


def test_names_of_files():
    assert chunk_name([3, 4, 5]) == "seeds_00000003-00000005" and chunk_name([3, 5]).startswith("seeds_00000003-00000005-")
    assert [len(chunk) for chunk in chunks_of(range(10), 4)] == [4, 4, 2]
