"Laws of autoguidance, and the vision transformer that stands in for a convolutional discriminator."
import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from sedm_kit.analytic import GaussianMixture
from sedm_kit.checkpoints import load_model, save_model
from sedm_kit.discriminator import DiscriminatorGuidance, train_discriminator
from sedm_kit.guidance import Autoguidance, Remembered
from sedm_kit.networks import EDMPrecond, PatchLogRatio, seeded
from sedm_kit.noise import edm_sigmas, vp_time
from sedm_kit.sampler import Churn, sample, sample_seeds
from sedm_kit.vision_transformer import ViTBlock, ViTLogRatio, ViTTrunk

GOOD = GaussianMixture(torch.tensor([[[[0.4, -0.2]]], [[[-0.5, 0.3]]]]), [1.0, 2.0], std=0.3)
BAD = GaussianMixture(torch.tensor([[[[0.3, -0.1]]], [[[-0.4, 0.2]]]]), [1.0, 1.0], std=0.5)


def unit(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def counted(denoiser):
    "A denoiser and the list of its evaluations."
    calls = []

    def evaluate(x, sigma):
        calls.append(sigma)
        return denoiser(x, sigma)
    return evaluate, calls


def small(label_dim=0, **settings):
    with seeded(0):
        network = EDMPrecond(**{"img_resolution": 8, "img_channels": 1, "label_dim": label_dim, "model_type": "PatchNet", "channels": 8, "blocks": 1} | settings).eval()
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.2)
    return network.requires_grad_(False)


# ---- autoguidance

@given(weight=st.floats(-2, 6), solver=st.sampled_from(["euler", "heun", "midpoint", "rk3", "ab2", "dpmpp2m"]))
@settings(deadline=None, max_examples=30)
def test_guided_sampler_is_the_sampler_of_the_guided_denoiser(weight, solver):
    guided, start = Autoguidance(GOOD.denoiser(), BAD.denoiser(), weight), 80 * unit(4, 1, 1, 2)
    D, B = GOOD.denoiser(), BAD.denoiser()
    expected = sample(lambda x, sigma: B(x, sigma) + weight * (D(x, sigma) - B(x, sigma)), start, edm_sigmas(7), solver=solver)
    assert_close(sample(guided.denoiser, start, edm_sigmas(7), solver=solver, guidance=guided), expected, rtol=1e-9, atol=1e-9)


@given(weight=st.floats(-2, 6), scaling=st.floats(0.9, 1.1), sigma=st.floats(0.01, 50))
@settings(deadline=None, max_examples=30)
def test_slope_in_the_kits_convention(weight, scaling, sigma):
    guided, seen, x = Autoguidance(GOOD.denoiser(), BAD.denoiser(), weight), [], sigma * unit(3, 1, 1, 2)
    sample(guided.denoiser, x, [sigma, 0.0], solver="euler", scaling=scaling, guidance=guided, callback=seen.append)
    good, bad = GOOD.denoiser()(x, sigma), BAD.denoiser()(x, sigma)
    assert_close(seen[0]["slope"], (x - good) / sigma / scaling + (weight - 1) * (bad - good) / sigma, rtol=1e-9, atol=1e-9)
    assert seen[0]["L"] is None


def test_weights_zero_and_one_are_the_two_denoisers():
    start = 80 * unit(5, 1, 1, 2)
    for weight, denoiser in ((1, GOOD.denoiser()), (0.0, BAD.denoiser())):
        guided = Autoguidance(GOOD.denoiser(), BAD.denoiser(), weight)
        assert_close(sample(guided.denoiser, start, edm_sigmas(9), guidance=guided), sample(denoiser, start, edm_sigmas(9)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver, evaluations", [("euler", 6), ("heun", 11)])
def test_each_denoiser_is_evaluated_once_per_slope(solver, evaluations):
    (good, good_calls), (bad, bad_calls) = counted(GOOD.denoiser()), counted(BAD.denoiser())
    guided = Autoguidance(good, bad, 2.0)
    sample(guided.denoiser, 80 * unit(2, 1, 1, 2), edm_sigmas(6), solver=solver, guidance=guided)
    assert len(good_calls) == len(bad_calls) == evaluations


def test_sampling_with_the_bare_denoiser_costs_more_but_is_the_same():
    (good, calls), start = counted(GOOD.denoiser()), 80 * unit(2, 1, 1, 2)
    guided = Autoguidance(good, BAD.denoiser(), 2.0)
    images = sample(good, start, edm_sigmas(6), solver="euler", guidance=guided)
    assert len(calls) == 12
    assert torch.equal(images, sample(guided.denoiser, start, edm_sigmas(6), solver="euler", guidance=guided))


def test_an_answer_is_recalled_once_and_only_to_the_same_question():
    good, calls = counted(GOOD.denoiser())
    memory, x, sigma = Remembered(good), unit(2, 1, 1, 2), torch.tensor(0.5)
    first = memory(x, sigma)
    assert memory.recall(x, sigma) is first and len(calls) == 1
    memory.recall(x, sigma)
    assert len(calls) == 2  # forgotten after it was fetched
    memory(x, sigma)
    assert_close(memory.recall(x.clone(), sigma), first)
    assert len(calls) == 4
    memory(x, sigma)
    x += 1
    assert_close(memory(x, sigma), GOOD.denoiser()(x, sigma))  # as a denoiser it always evaluates
    assert Remembered(GOOD.denoiser()).shape == copy.deepcopy(Remembered(GOOD.denoiser())).shape == (1, 1, 2)


def test_window_closes_and_saves_the_evaluation():
    bad, calls = counted(BAD.denoiser())
    edge = vp_time(torch.tensor(0.4, dtype=torch.float64)).item()
    guided, seen = Autoguidance(GOOD.denoiser(), bad, 2.0, window=(0.0, edge)), []
    sample(guided.denoiser, 3 * unit(2, 1, 1, 2), [3.0, 1.0, 0.3, 0.1, 0.0], solver="euler", guidance=guided, callback=seen.append)
    assert len(calls) == 2 and [torch.is_tensor(info["g"]) for info in seen] == [False, False, True, True]
    g, _ = guided(unit(2, 1, 1, 2), torch.tensor([0.2, 2.0], dtype=torch.float64))  # a level per image
    assert g[0].abs().min() > 0 and g[1].count_nonzero() == 0


def test_stirred_runs_and_networks():
    good, bad = small(), small(channels=4)
    guided = Autoguidance(good, bad, 1.5)
    images = sample_seeds(guided.denoiser, [1, 2, 3], edm_sigmas(4), micro_batch=8, guidance=guided, churn=Churn(5.0))
    assert images.shape == (3, 1, 8, 8) and images.dtype == torch.float64


def test_a_worse_version_without_classes_is_not_told_them():
    good, bad, labels = small(label_dim=3), small(), torch.tensor([0, 2])
    guided, x, sigma = Autoguidance(good, bad, 3.0), unit(2, 1, 8, 8), torch.tensor(0.7, dtype=torch.float64)
    g, L = guided(x, sigma, labels)
    assert L is None
    assert_close(g, 2 * (bad(x, sigma).double() - good(x, sigma, labels).double()))


@pytest.mark.parametrize("make, message", [
    (lambda: Autoguidance(small(), small(), math.nan), "the guidance weight must be a finite number"),
    (lambda: Autoguidance(small(), small(), "2"), "the guidance weight must be a finite number"),
    (lambda: Autoguidance(small(), small(), math.inf), "got inf"),
    (lambda: Autoguidance(small(), small(), 2.0, window=(0.5, 0.5)), "window must satisfy 0 <= low < high"),
    (lambda: Autoguidance(small(), small(), 2.0, window=(-1.0, 0.5)), "window must satisfy 0 <= low < high"),
    (lambda: Autoguidance(small(), small(img_resolution=6)), "img_resolution is 6 instead of 8"),
    (lambda: Autoguidance(small(), small(img_channels=3)), "img_channels is 3 instead of 1"),
    (lambda: Autoguidance(small(label_dim=3), small(label_dim=4)), "the same 3 classes or none, got label_dim 4"),
    (lambda: Autoguidance(GOOD.denoiser(), lambda x, sigma: x[:1], 2.0)(unit(2, 1, 1, 2), torch.tensor(0.5)), r"must return their input's shape, \(2, 1, 1, 2\)"),
])
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- the vision transformer

@given(blocks=st.integers(1, 3), heads=st.sampled_from([1, 2, 4]), channels=st.integers(1, 3), side=st.sampled_from([4, 6, 8]))
@settings(deadline=None, max_examples=15)
def test_interface_of_the_log_ratio(blocks, heads, channels, side):
    with seeded(0):
        network = ViTLogRatio(side, channels, channels=8, blocks=blocks, heads=heads, sigma_range=(0.05, 2.0)).eval()
        nn.init.normal_(network.head.weight)
    u = unit(3, channels, side, side).float()
    assert network(u, 0.4).shape == (3,) and network.sigma_range == (0.05, 2.0) and isinstance(network, PatchLogRatio)
    assert_close(network(u, torch.tensor([0.1, 0.4, 0.9]))[1], network(u[1:2], 0.4)[0], rtol=1e-4, atol=1e-5)
    again = ViTLogRatio(**network.config)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(u, 0.4), network(u, 0.4))


@given(seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=15)
def test_a_block_does_not_mind_the_order_of_patches(seed):
    with seeded(seed):
        block, order, h, emb = ViTBlock(8, 5, heads=2), torch.randperm(6), torch.randn(2, 6, 8), torch.randn(2, 5)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.3)
    assert_close(block(h[:, order], emb), block(h, emb)[:, order], rtol=1e-3, atol=1e-4)


def test_the_trunk_knows_where_a_patch_lies_and_what_the_noise_level_is():
    with seeded(0):
        trunk = ViTTrunk(4, 1, 0, channels=8, blocks=1)
        for parameter in trunk.parameters():
            nn.init.normal_(parameter, std=0.3)
        x, c_noise = torch.randn(1, 1, 4, 4), torch.zeros(1)
    assert not torch.allclose(trunk(x.flip(3), c_noise).mean(1), trunk(x, c_noise).mean(1), atol=1e-3)
    assert not torch.allclose(trunk(x, c_noise + 1), trunk(x, c_noise), atol=1e-3)


def test_labels_reach_the_transformer():
    with seeded(0):
        network = ViTLogRatio(4, 1, label_dim=3, channels=8, blocks=1).eval()
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    u = unit(2, 1, 4, 4).float()
    assert not torch.allclose(network(u, 0.4, torch.tensor([0, 1])), network(u, 0.4, torch.tensor([2, 2])))


def test_it_learns_is_saved_and_guides(tmp_path):
    generator = torch.Generator().manual_seed(0)
    real, fake = 0.5 * torch.randn(400, 1, 4, 4, generator=generator), 0.5 * torch.randn(400, 1, 4, 4, generator=generator) + 0.4
    with seeded(0):
        network = ViTLogRatio(4, 1, channels=16, blocks=1, dropout=0.0, sigma_range=(0.05, 0.5))
    history = train_discriminator(network, real, fake, steps=60, batch=64, checks=3, lr=3e-3, progress=False)
    assert min(history["held_out"]) < 0.5 < math.log(2)
    save_model(network, tmp_path / "vit.safetensors", {})
    again, card = load_model(tmp_path / "vit.safetensors")
    assert card["class"] == "ViTLogRatio" and type(again) is ViTLogRatio
    x, sigma = fake[:8].double(), torch.tensor(0.2, dtype=torch.float64)
    g, L = DiscriminatorGuidance(again, 1.0)(x, sigma)
    assert torch.equal(g, DiscriminatorGuidance(network, 1.0)(x, sigma)[0]) and g.mean() > 0  # downhill: towards the real mean


@pytest.mark.parametrize("settings_, message", [
    ({"img_resolution": 7}, "must be even"), ({"heads": 5}, "channels must be a multiple of heads, got 48 channels and 5 heads"),
    ({"heads": 0}, "heads must be a whole number of at least 1"), ({"blocks": 0}, "blocks must be a whole number"),
    ({"sigma_range": (3.0, 0.02)}, "sigma_range must be two noise levels"),
])
def test_impossible_transformers(settings_, message):
    with pytest.raises(ValueError, match=message):
        ViTLogRatio(**{"img_resolution": 8, "img_channels": 1} | settings_)
