"Heavy numerics of sedm_kit.networks: the preconditioning's laws, scale invariances, labels, errors."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sedm_kit.analytic import GaussianMixture
from sedm_kit.networks import EDMPrecond, PatchFeatures, PatchLogRatio, PatchNet, one_hot, seeded
from sedm_kit.noise import vp_scale, vp_time

SIGMA = st.floats(1e-3, 150.0)
SIGMA_DATA = st.floats(0.05, 5.0)


def random_denoiser(**settings):
    "A denoiser whose output layer is not zero, as after training."
    with seeded(0):
        model = EDMPrecond(8, 1, **{"model_type": "PatchNet", "channels": 16, "blocks": 1, **settings}).eval().requires_grad_(False)
        torch.nn.init.normal_(model.model.head.weight, std=0.1)
    return model


@settings(max_examples=50, deadline=None)
@given(sigma=SIGMA, sigma_data=SIGMA_DATA)
def test_coefficients_are_karras_table_1(sigma, sigma_data):
    c_skip, c_out, c_in, c_noise = (float(c) for c in EDMPrecond(8, 1, model_type="PatchNet", sigma_data=sigma_data, channels=8, blocks=1)
                                    .coefficients(torch.tensor(sigma, dtype=torch.float64)))
    root = math.hypot(sigma, sigma_data)
    assert c_skip == pytest.approx((sigma_data / root) ** 2)
    assert c_out == pytest.approx(sigma * sigma_data / root)
    assert c_in == pytest.approx(1 / root)
    assert c_noise == pytest.approx(math.log(sigma) / 4)


@settings(max_examples=50, deadline=None)
@given(sigma=SIGMA, sigma_data=SIGMA_DATA)
def test_input_and_target_have_unit_variance(sigma, sigma_data):
    "Exactly, by the variances of independent data and noise; Karras et al. 2022, Appendix B.6."
    sigma = torch.tensor(sigma, dtype=torch.float64)
    c_skip, c_out, c_in, _ = EDMPrecond(8, 1, model_type="PatchNet", sigma_data=sigma_data, channels=8, blocks=1).coefficients(sigma)
    assert_close(c_in**2 * (sigma_data**2 + sigma**2), torch.ones_like(sigma))
    target = ((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2) / c_out**2
    assert_close(target, torch.ones_like(sigma), rtol=1e-9, atol=0)


@settings(max_examples=20, deadline=None)
@given(sigma=SIGMA, sigma_data=SIGMA_DATA)
def test_untrained_is_the_exact_denoiser_of_white_gaussian_data(sigma, sigma_data):
    model = EDMPrecond(8, 1, model_type="PatchNet", sigma_data=sigma_data, channels=8, blocks=1)
    exact = GaussianMixture(torch.zeros(1, 1, 8, 8), [1.0], std=sigma_data).denoiser()
    x = math.hypot(sigma, sigma_data) * torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(model(x, sigma).double(), exact(x, sigma), rtol=1e-5, atol=1e-6)


def test_preconditioning_identity_with_a_network_inside():
    model = random_denoiser(sigma_data=0.7)
    x, sigma = torch.randn(5, 1, 8, 8), torch.tensor([0.002, 0.1, 1.0, 7.0, 80.0])
    c_skip, c_out, c_in, c_noise = model.coefficients(sigma.reshape(-1, 1, 1, 1))
    assert_close(model(x, sigma), c_skip * x + c_out * model.model(c_in * x, c_noise.flatten()))


def test_sigma_as_number_tensor_or_per_image_and_any_float_of_x():
    model, x = random_denoiser(), torch.randn(4, 1, 8, 8)
    expected = model(x, 0.3)
    assert expected.dtype == torch.float32
    for sigma in (torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64), torch.full((4,), 0.3), torch.full((1,), 0.3)):
        assert_close(model(x, sigma), expected)
    assert_close(model(x.double(), 0.3), expected)


def test_denoiser_ends_where_noise_ends():
    "For small sigma the estimate is the input."
    model, x = random_denoiser(), torch.randn(4, 1, 8, 8)
    assert_close(model(x, 1e-6), x, rtol=0, atol=1e-5)


def test_images_of_a_batch_do_not_see_each_other():
    model, x = random_denoiser(), torch.randn(6, 1, 8, 8)
    assert_close(model(x, 0.5)[2:4], model(x[2:4], 0.5))


@pytest.mark.parametrize("resolution, channels", [(8, 1), (6, 3), (16, 2)])
def test_shapes(resolution, channels):
    x = torch.randn(2, channels, resolution, resolution)
    assert EDMPrecond(resolution, channels, model_type="PatchNet", channels=8, blocks=1)(x, 1.0).shape == x.shape
    assert PatchLogRatio(resolution, channels, channels=8, blocks=1)(x, 0.1).shape == (2,)
    assert PatchFeatures(resolution, channels, classes=3)(x).shape == (2, 64)


def test_default_sizes():
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert 0.14e6 < count(EDMPrecond(8, 1, model_type="PatchNet")) < 0.16e6
    assert 0.07e6 < count(PatchLogRatio(8, 1)) < 0.12e6


def test_class_labels_as_numbers_or_rows():
    labels = torch.tensor([2, 0, 1])
    assert_close(one_hot(labels, 3), torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]))
    assert one_hot(None, 3).tolist() == [[0, 0, 0]] and one_hot(labels, 0) is None
    with pytest.raises(ValueError, match=r"\(b, 3\) one-hot rows, got shape \(2, 4\)"):
        one_hot(torch.zeros(2, 4), 3)
    model, x = random_denoiser(label_dim=3), torch.randn(3, 1, 8, 8)
    torch.nn.init.normal_(model.model.trunk.blocks[0].conv1.weight, std=0.1)
    assert_close(model(x, 1.0, labels), model(x, 1.0, one_hot(labels, 3)))
    assert not torch.allclose(model(x, 1.0, labels), model(x, 1.0))
    assert model(x, 1.0).shape == x.shape
    log_ratio = PatchLogRatio(8, 1, label_dim=3)
    assert_close(log_ratio(x, 0.1, labels), log_ratio(x, 0.1, one_hot(labels, 3)))


def test_log_ratio_gradient_is_that_of_finite_differences():
    with seeded(0):
        log_ratio = PatchLogRatio(8, 1, channels=8, blocks=1).eval()
        torch.nn.init.normal_(log_ratio.head.weight)
        torch.nn.init.normal_(log_ratio.trunk.blocks[0].conv1.weight, std=0.1)
    log_ratio.double().requires_grad_(False)
    log_ratio.trunk.embed.float()  # the noise level comes in as float32
    for film in (block.film for block in log_ratio.trunk.blocks):
        film.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    sigma = torch.tensor([0.1, 1.0])
    u = (vp_scale(sigma).reshape(-1, 1, 1, 1) * torch.randn(2, 1, 8, 8)).requires_grad_()
    gradient, = torch.autograd.grad(log_ratio(u, vp_time(sigma)).sum(), u)
    step = 1e-5 * torch.randn_like(u)
    with torch.no_grad():
        difference = (log_ratio(u + step, vp_time(sigma)) - log_ratio(u - step, vp_time(sigma))) / 2
    assert_close((gradient * step).sum((1, 2, 3)), difference, rtol=1e-6, atol=1e-12)


def test_dropout_acts_in_training_only():
    with seeded(0):
        log_ratio = PatchLogRatio(8, 1)
        torch.nn.init.normal_(log_ratio.head.weight)
        torch.nn.init.normal_(log_ratio.trunk.blocks[0].conv1.weight, std=0.1)
    u = torch.randn(4, 1, 8, 8)
    assert not torch.equal(log_ratio.train()(u, 0.1), log_ratio(u, 0.1))
    assert torch.equal(log_ratio.eval()(u, 0.1), log_ratio(u, 0.1))


@settings(max_examples=10, deadline=None)
@given(factor=st.floats(0.01, 100.0), shift=st.floats(-3.0, 3.0))
def test_feature_scale_is_set_by_the_training_images(factor, shift):
    "Whatever the raw features look like, trace(cov) is 64 and the mean 0 afterwards, and the classes stay."
    with seeded(0):
        features = PatchFeatures(8, 1, classes=4).eval().requires_grad_(False)
    features.body[-1].weight.mul_(factor)
    features.body[-1].bias.add_(shift)
    images = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    logits = features.classify(images)
    features.normalise(images)
    found = features(images)
    assert_close(found.T.cov().trace(), torch.tensor(64.0), rtol=1e-3, atol=0)
    assert_close(found.mean(0), torch.zeros(64), rtol=0, atol=1e-4 * (1 + 100 / factor))
    assert torch.equal(features.classify(images), logits)


def test_seeded_repeats_and_leaves_the_caller_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    with seeded(0): a = torch.randn(2)
    with seeded(0): b = torch.randn(2)
    assert torch.equal(a, b)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("build, message", [
    (lambda: EDMPrecond(8, 1, model_type="SwinNet"), "unknown model_type 'SwinNet'; known: PatchNet, SongUNet, DhariwalUNet"),
    (lambda: EDMPrecond(7, 1, model_type="PatchNet"), "img_resolution must be even, because images are folded 2x2, got 7"),
    (lambda: PatchNet(8, 1, 1, channels=0), "channels must be a whole number of at least 1"),
    (lambda: PatchNet(8, 1, 1, blocks=2.5), "blocks must be a whole number .* got 2.5"),
    (lambda: PatchNet(8, 1, 1, channels=10**12), "below 65536"),
    (lambda: PatchLogRatio(8, 1, sigma_range=(3.0, 0.02)), "sigma_range must be two noise levels with 0 < low < high < inf"),
    (lambda: PatchFeatures(8, 1, classes=0), "classes must be a whole number"),
])
def test_wrong_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
