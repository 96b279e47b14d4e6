"`sedm sample`: settings become a sampler, seeds become files."
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sedm_kit.adm_unets import ADMUNet
from sedm_kit.checkpoints import save_model
from sedm_kit.generate import read_images, seed_ranges
from sedm_kit.images import to_uint8
from sedm_kit.networks import EDMPrecond
from sedm_kit.noise import edm_sigmas
from sedm_kit.sampler import LinearScaling, sample_seeds
from sedm_kit.discriminator import DiscriminatorGuidance
from sedm_kit.sampling import Sampling, open_draw, parse_seeds, run_sampling
from sedm_kit.worlds import load_world

WORLD = load_world("digits")
TINY = dict(model_type="SongUNet", model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])


@given(st.sets(st.integers(0, 300), min_size=1, max_size=40))
def test_seeds_survive_their_spelling(seeds):
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in seed_ranges(seeds))
    assert sorted(parse_seeds(text)) == sorted(seeds)


def test_a_world_with_everything():
    given = Sampling(solver="heun", steps=6, lam=1.01, slope=-0.001, w=1.0, w_later=0.5, window=(0.05, 0.9))
    expected = sample_seeds(WORLD.denoiser, range(8), edm_sigmas(6), shape=WORLD.shape, micro_batch=8, solver="heun", scaling=LinearScaling(1.01, -0.001),
                            guidance=DiscriminatorGuidance(WORLD.log_ratio["heun"], (1.0, 0.5), (0.05, 0.9)))
    assert torch.equal(open_draw(given)(range(8)), to_uint8(expected))


def test_ones_own_files(tmp_path):
    torch.manual_seed(0)
    save_model(EDMPrecond(8, 3, **TINY).eval(), tmp_path / "edm.safetensors", {})
    assert open_draw(Sampling(model=str(tmp_path / "edm.safetensors"), steps=3))(range(4)).shape == (4, 3, 8, 8)
    adm = ADMUNet(image_size=32, model_channels=32, num_res_blocks=1, channel_mult=[1, 1, 2], attention_resolutions=[4], num_head_channels=32, use_new_attention_order=True, resblock_updown=True)
    torch.save(adm.state_dict(), tmp_path / "adm.pt")
    save_model(adm.eval(), tmp_path / "adm.safetensors", {})
    for solver in ("ancestral", "ddim", "euler"):
        assert open_draw(Sampling(model=str(tmp_path / "adm.safetensors"), solver=solver, steps=3))(range(2)).shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="ddim samples ADM's checkpoints only"):
        open_draw(Sampling(model=str(tmp_path / "edm.safetensors"), solver="ddim"))


def test_another_network_of_the_same_name_is_refused(tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_model(EDMPrecond(8, 3, **TINY).eval(), tmp_path / str(seed) / "net.safetensors", {})
    settings = lambda seed: Sampling(model=str(tmp_path / str(seed) / "net.safetensors"), steps=2)
    run_sampling(settings(0), [0, 1], tmp_path / "out", micro_batch=8, progress=False)
    with pytest.raises(ValueError, match="model was 'net.safetensors, SHA-256"):
        run_sampling(settings(1), [0, 1, 2], tmp_path / "out", micro_batch=8, progress=False)


@pytest.mark.parametrize("wrong, words", [(dict(solver="leapfrog"), "unknown solver"), (dict(world="cats"), "unknown world"), (dict(precision="int8"), "precision"), (dict(steps=0), "steps"), (dict(lam=0.0), "lambda must be finite"),
                                          (dict(w=float("nan")), "weight"), (dict(window=(0.5, 0.1)), "window"), (dict(s_noise=-1.0), "not negative"), (dict(solver="ddim"), "ADM's checkpoints"), (dict(device="cuda"), "no CUDA device")])
def test_mistakes_are_found_before_work(wrong, words):
    if wrong.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=words):
        Sampling(**wrong)


def test_guidance_without_a_discriminator():
    with pytest.raises(ValueError, match="needs a discriminator for rk3"):
        open_draw(Sampling(solver="rk3", w=1.0))


def test_the_command(tmp_path, capsys):
    from sedm_kit.command import main
    words = ["sample", "0-19", "--solver", "euler", "--steps", "4", "--lambda", "1.02", "--w-dg", "1.2", "--out", str(tmp_path / "run"), "--batch", "8"]
    assert main(words) == 0
    assert "20 images" in capsys.readouterr().out and read_images(tmp_path / "run")["images"].shape == (20, 8, 8, 1)
    assert main([*words, "--steps", "5"]) == 2 and "steps was 4 and is now 5" in capsys.readouterr().err
    assert main(["sample", "5-1", "--out", str(tmp_path / "x")]) == 2 and "lower ones first" in capsys.readouterr().err
    assert main(["fid", str(tmp_path / "all.npz"), "x"]) == 2
    capsys.readouterr()
    assert main(["sample", "0-7", "--solver", "euler", "--steps", "4", "--out", str(tmp_path / "bf16"), "--precision", "bf16", "--packed", str(tmp_path / "all.npz")]) == 0
    assert "levels" in capsys.readouterr().out
    with np.load(tmp_path / "all.npz") as file:
        assert file["arr_0"].shape == (8, 8, 8, 1)
