"The adapters of sedm_kit.checkpoints, and PFGM++'s start."
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from sedm_kit.analytic import Denoiser, GaussianMixture
from sedm_kit.adapters import as_denoiser, as_eps_model, from_k_diffusion, nearest_step, own_dtype, to_k_diffusion
from sedm_kit.ddpm import respaced_steps, sample_ddpm
from sedm_kit.networks import EDMPrecond, PatchNet, seeded
from sedm_kit.noise import ddpm_alphas_cumprod, edm_sigmas, sigma_from_alphas, vp_time
from sedm_kit.sampler import Churn, SeedStreams, pfgm_latents, sample, sample_seeds

COSINE = ddpm_alphas_cumprod("cosine", 1000)
LEVELS = sigma_from_alphas(COSINE)
MIXTURE = GaussianMixture(torch.tensor([[-0.5, 0.2], [0.5, -0.4]]).reshape(2, 1, 1, 2), [0.4, 0.6], std=0.2)


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def answer(prediction, x, sigma, sigma_data):
    "What a perfect network answers about x at level sigma (b,), in the definitions' own words."
    clean, sigma = MIXTURE.denoise(x, sigma), sigma.reshape(-1, 1, 1, 1)
    noise, alpha = (x - clean) / sigma, (1 + sigma**2).rsqrt()
    if prediction == "F":
        return (clean - sigma_data**2 / (sigma**2 + sigma_data**2) * x) * (sigma**2 + sigma_data**2).sqrt() / (sigma * sigma_data)
    return {"eps": noise, "x0": clean, "v": alpha * noise - sigma * alpha * clean}[prediction]


def discrete(prediction):
    "A perfect network on the VP side."
    return lambda x, t: answer(prediction, x / COSINE[t].sqrt()[:, None, None, None], LEVELS[t], 1.0)


# ---- as_denoiser

@settings(max_examples=60, deadline=None)
@given(prediction=st.sampled_from(["eps", "x0", "v"]), t=st.lists(st.integers(0, 999), min_size=4, max_size=4))
def test_every_discrete_prediction_gives_the_exact_denoiser_on_known_levels(prediction, t):
    x = normal(4, 1, 1, 2) * LEVELS[t].reshape(-1, 1, 1, 1)
    found = as_denoiser(discrete(prediction), prediction, alphas_cumprod=COSINE)(x, LEVELS[t])
    assert_close(found, MIXTURE.denoise(x, LEVELS[t]), rtol=1e-9, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(prediction=st.sampled_from(["eps", "x0", "v", "F"]), sigma=st.lists(st.floats(1e-3, 100), min_size=4, max_size=4), sigma_data=st.floats(0.1, 3))
def test_every_continuous_prediction_gives_the_exact_denoiser(prediction, sigma, sigma_data):
    sigma = torch.tensor(sigma, dtype=torch.float64)
    x = normal(4, 1, 1, 2) * (sigma**2 + 0.2).sqrt().reshape(-1, 1, 1, 1)
    def network(fed, told):
        if prediction == "F":
            level = (4 * told).exp()
            return answer("F", fed * (level**2 + sigma_data**2).sqrt().reshape(-1, 1, 1, 1), level, sigma_data)
        return answer(prediction, fed, told, sigma_data)
    assert_close(as_denoiser(network, prediction, sigma_data=sigma_data)(x, sigma), MIXTURE.denoise(x, sigma), rtol=1e-8, atol=1e-8)


def test_own_input_functions_make_a_continuous_vp_network():
    "Score SDE's VP networks: input in VP scale, told 999 tau."
    seen = []
    def network(fed, told):
        seen.append(told)
        return answer("eps", fed * (1 + sigma**2) ** 0.5, told.new_full((3,), sigma), 1.0)
    sigma, x = 0.8, normal(3, 1, 1, 2)
    denoiser = as_denoiser(network, "eps", c_in=lambda s: (1 + s**2).rsqrt(), c_noise=lambda s: 999 * vp_time(s))
    assert_close(denoiser(x, sigma), MIXTURE.denoise(x, sigma))
    assert_close(seen[0], 999 * vp_time(sigma).expand(3))


def test_one_level_and_one_level_per_image_are_the_same():
    x, seen = normal(3, 1, 1, 2), []
    denoiser = as_denoiser(lambda fed, t: seen.append(t) or discrete("eps")(fed, t), "eps", alphas_cumprod=COSINE)
    forms = [denoiser(x, s) for s in (0.5, torch.tensor(0.5), torch.full((3,), 0.5), torch.tensor([0.5]))]
    for found in forms:
        assert_close(found, forms[0])
    assert all(t.dtype == torch.int64 and t.shape == (3,) for t in seen)


@settings(max_examples=100, deadline=None)
@given(sigma=st.floats(1e-4, 1e5))
def test_nearest_step_is_nearest_in_log_sigma(sigma):
    found = nearest_step(torch.tensor(sigma, dtype=torch.float64), LEVELS)
    distance = (LEVELS.log() - math.log(sigma)).abs()
    assert distance[found] == distance.min()


def test_rounding():
    denoiser = as_denoiser(discrete("eps"), "eps", alphas_cumprod=COSINE)
    assert nearest_step(torch.tensor(0.0), LEVELS) == 0 and denoiser.round_sigma(0.0) == LEVELS[0] and denoiser.round_sigma(1e9) == LEVELS[-1]
    assert denoiser.round_sigma(LEVELS).equal(LEVELS)
    assert as_denoiser(discrete("eps"), "x0").round_sigma(0.3) == 0.3  # every level is known
    with_clean_end = as_denoiser(discrete("eps"), "eps", alphas_cumprod=[1.0, 0.9, 0.5])
    assert with_clean_end.round_sigma([0.0, 0.2, 0.7]).tolist() == pytest.approx([0, 1 / 3, 1.0])


def test_between_levels_only_the_step_is_rounded():
    sigma, seen = (LEVELS[400] * LEVELS[401]).sqrt().item() * 1.0001, []
    denoiser = as_denoiser(lambda fed, t: seen.append((fed, t)) or fed, "eps", alphas_cumprod=COSINE)
    x = normal(2, 1, 1, 2)
    found = denoiser(x, sigma)
    assert seen[0][1].tolist() == [401, 401]
    assert_close(seen[0][0], x / math.sqrt(1 + sigma**2))
    assert_close(found, x - sigma * x / math.sqrt(1 + sigma**2))


def test_samplers_snap_churn_to_known_levels():
    denoiser, seen = as_denoiser(discrete("eps"), "eps", alphas_cumprod=COSINE, shape=(1, 1, 2)), []
    sigmas = [*denoiser.round_sigma(edm_sigmas(8, 0.01, 50)[:-1]).tolist(), 0.0]
    sample(denoiser, sigmas[0] * normal(2, 1, 1, 2), sigmas, churn=Churn(3), callback=lambda info: seen.append(info["sigma"].item()))
    assert set(seen) <= set(LEVELS.tolist()) and len(set(seen) - set(sigmas)) > 3


def test_a_discrete_model_samples_like_the_exact_denoiser():
    denoiser = as_denoiser(discrete("v"), "v", alphas_cumprod=COSINE, shape=(1, 1, 2))
    sigmas = [*LEVELS[respaced_steps(900, 12)].flip(0).tolist(), 0.0]
    assert_close(sample_seeds(denoiser, [3, 4], sigmas, shape=(1, 1, 2)), sample_seeds(MIXTURE.denoiser(), [3, 4], sigmas, shape=(1, 1, 2)))


def test_the_bare_network_of_edmprecond_is_edmprecond():
    with seeded(3):
        whole = EDMPrecond(8, 2, model_type="PatchNet", label_dim=3, sigma_data=0.7, channels=8, blocks=1).eval()
        nn.init.normal_(whole.model.head.weight)
    x, sigma, labels = torch.randn(3, 2, 8, 8), torch.tensor([0.01, 1.0, 70.0]), torch.tensor([2, 0, 1])
    rebuilt = as_denoiser(whole.model, "F", sigma_data=0.7, label_dim=3)
    with torch.no_grad():
        for given_labels in (labels, nn.functional.one_hot(labels, 3), None):
            assert_close(rebuilt(x, sigma, given_labels).float(), whole(x, sigma, given_labels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_network_gets_the_type_of_its_weights_and_the_answer_is_float64(dtype):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), dtype=dtype))

        def forward(self, x, told):
            assert x.dtype == dtype and told.dtype in (dtype, torch.int64)
            return self.weight * x
    for kind in (dict(alphas_cumprod=COSINE), {}):
        assert as_denoiser(Network(), "x0", **kind)(torch.randn(2, 1, 2, 2), 0.7).dtype == torch.float64
    assert own_dtype(Network(), torch.float64) == dtype and own_dtype(nn.ReLU(), torch.float64) == torch.float64


def test_variance_channels_are_left_out_and_gradients_pass():
    x = normal(2, 3, 4, 4).requires_grad_()
    model = lambda x, t: torch.cat([x.tanh(), x * 0 + 7], 1)  # noqa: E731
    found = as_denoiser(model, "eps", alphas_cumprod=COSINE)(x, LEVELS[300])
    assert_close(found, x - LEVELS[300] * (COSINE[300].sqrt() * x).tanh())
    assert torch.autograd.grad(found.sum(), x)[0].abs().min() > 0


@pytest.mark.parametrize("form, given_labels, expected", [
    ("index", torch.tensor([2, 0]), [2, 0]), ("index", torch.eye(3)[[2, 0]], [2, 0]), (None, torch.eye(3)[[2, 0]], [2, 0]),
    ("one_hot", torch.tensor([2, 0]), [[0, 0, 1], [1, 0, 0]]), ("one_hot", None, [[0, 0, 0]]), ("index", None, None)])
def test_labels_arrive_in_the_form_the_model_wants(form, given_labels, expected):
    seen = []
    def model(x, t, *labels):
        seen.append(labels[0].tolist() if labels else None)
        return x
    as_denoiser(model, "eps", alphas_cumprod=COSINE, label_dim=3, label_form=form)(torch.zeros(2, 1, 2, 2), 1.0, given_labels)
    assert seen == [expected]


def test_attributes_come_from_the_caller_the_model_or_the_chain():
    plain = as_denoiser(lambda x, t: x, "eps", alphas_cumprod=COSINE)
    assert (plain.sigma_min, plain.sigma_max, plain.sigma_data, plain.label_dim) == (LEVELS[0].item(), LEVELS[-1].item(), 0.5, 0)
    model = EDMPrecond(8, 2, model_type="PatchNet", label_dim=3, sigma_data=0.7, sigma_min=0.01, channels=8, blocks=1)
    own = as_denoiser(model, "x0")
    assert (own.sigma_min, own.sigma_max, own.sigma_data, own.label_dim, own.img_channels, own.img_resolution) == (0.01, math.inf, 0.7, 3, 2, 8)
    told = as_denoiser(model, "x0", sigma_data=0.3, sigma_min=0.02, sigma_max=9.0, label_dim=5, shape=(1, 4, 4))
    assert (told.sigma_min, told.sigma_max, told.sigma_data, told.label_dim, told.img_channels, told.img_resolution) == (0.02, 9.0, 0.3, 5, 1, 4)
    assert isinstance(own, Denoiser)


@pytest.mark.parametrize("classes", [None, 4])
def test_adms_names_of_the_attributes_are_known_too(classes):
    model = lambda x, t, y=None: x  # noqa: E731
    model.image_size, model.in_channels, model.num_classes = 16, 3, classes
    denoiser = as_denoiser(model, "eps", alphas_cumprod=COSINE)
    assert (denoiser.img_channels, denoiser.img_resolution, denoiser.label_dim) == (3, 16, classes or 0)


@pytest.mark.parametrize("arguments, words", [
    (dict(prediction="noise"), "unknown prediction 'noise'; known: 'eps', 'x0', 'v', 'F'"), (dict(prediction=None), "unknown prediction None"),
    (dict(prediction="F", alphas_cumprod=COSINE), "'F'"), (dict(label_form="words"), "'words'"),
    (dict(alphas_cumprod=[0.5, 0.9]), "decrease strictly"), (dict(alphas_cumprod=[1.2, 0.9]), "(0, 1]"), (dict(alphas_cumprod=[]), "at least one")])
def test_unknown_kinds_are_refused(arguments, words):
    with pytest.raises(ValueError) as error:
        as_denoiser(lambda x, t: x, **arguments)
    assert words in str(error.value)


@pytest.mark.parametrize("model, labels, kind, words", [
    (lambda x, t: x[:, :1], None, ValueError, "(2, 1, 4, 4)"), (lambda x, t: torch.cat([x] * 3, 1), None, ValueError, "(2, 9, 4, 4)"),
    (lambda x, t: (x,), None, TypeError, "tuple"), (lambda x, t: x, torch.tensor([1, 0]), ValueError, "no classes")])
def test_wrong_answers_and_labels_of_no_class_are_named(model, labels, kind, words):
    with pytest.raises(kind) as error:
        as_denoiser(model, alphas_cumprod=COSINE)(torch.zeros(2, 3, 4, 4), 1.0, labels)
    assert words in str(error.value)


# ---- as_eps_model

@settings(max_examples=40, deadline=None)
@given(t=st.lists(st.integers(0, 999), min_size=3, max_size=3), chain=st.sampled_from(["cosine", "linear"]))
def test_round_trips_are_identities(t, chain):
    alphas, t = ddpm_alphas_cumprod(chain, 1000), torch.tensor(t)
    levels, x = sigma_from_alphas(alphas), normal(3, 1, 2, 2)
    eps_model = lambda x, t: (x + t[:, None, None, None] / 500).tanh()  # noqa: E731
    assert_close(as_eps_model(as_denoiser(eps_model, "eps", alphas_cumprod=alphas), alphas)(x, t), eps_model(x, t), rtol=1e-8, atol=1e-8)
    denoise = lambda x, sigma, labels=None: x / (1 + torch.as_tensor(sigma).reshape(-1, 1, 1, 1)) + 0.1  # noqa: E731
    back = as_denoiser(as_eps_model(denoise, alphas), "eps", alphas_cumprod=alphas)
    x = x * levels[t].reshape(-1, 1, 1, 1)
    assert_close(back(x, levels[t]), denoise(x, levels[t]), rtol=1e-8, atol=1e-8)


def test_any_denoiser_runs_on_the_discrete_side():
    x, seen = normal(20, 1, 1, 2), []
    eps_model = as_eps_model(MIXTURE.denoiser(), COSINE)
    first = sample_ddpm(eps_model, x, COSINE, 12, eta=0.0, callback=lambda info: seen.append(info["eps"]))
    second = sample_ddpm(discrete("eps"), x, COSINE, 12, eta=0.0)
    assert_close(first, second, rtol=1e-7, atol=1e-7)
    assert eps_model(x.float(), torch.full((20,), 5)).dtype == torch.float64


def test_as_eps_model_hands_labels_on_and_refuses_a_step_without_noise():
    seen = []
    as_eps_model(lambda x, sigma, labels=None: seen.append(labels) or x, COSINE)(torch.zeros(1, 1, 2, 2), torch.tensor([4]), "labels")
    assert seen == ["labels"]
    with pytest.raises(ValueError, match="without noise"):
        as_eps_model(MIXTURE.denoiser(), [1.0, 0.5])


# ---- k-diffusion

def test_from_k_diffusion_gives_every_image_its_sigma_and_the_class_its_keyword():
    seen = []
    class Model(nn.Module):
        sigma_data = 0.6

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x, sigma, class_cond=None):
            seen.append((x.dtype, sigma.dtype, sigma.tolist(), None if class_cond is None else class_cond.tolist()))
            return self.weight * x
    x = normal(2, 1, 2, 2)
    denoiser = from_k_diffusion(Model(), label_dim=3, shape=(1, 2, 2))
    denoiser(x, 0.5)
    denoiser(x, torch.tensor([0.5, 0.25]), torch.eye(3)[[1, 2]])
    assert seen == [(torch.float32, torch.float32, [0.5, 0.5], None), (torch.float32, torch.float32, [0.5, 0.25], [1, 2])]
    assert denoiser.sigma_data == 0.6 and denoiser.img_resolution == 2
    with pytest.raises(ValueError, match="no classes"):
        from_k_diffusion(Model())(x, 0.5, torch.tensor([0, 1]))


def test_to_k_diffusion_answers_like_its_models():
    model = to_k_diffusion(MIXTURE.denoiser())
    x, sigma = normal(3, 1, 1, 2), torch.tensor([0.1, 1.0, 10.0])
    assert model(x.float(), sigma.float()).dtype == torch.float32
    assert_close(model(x, sigma), MIXTURE.denoise(x, sigma))
    assert_close(from_k_diffusion(model)(x, sigma), MIXTURE.denoise(x, sigma))
    with pytest.raises(TypeError, match="cond_scale"):
        model(x, sigma, cond_scale=3.0)


def test_labels_pass_through_k_diffusions_form():
    seen = []
    model = to_k_diffusion(lambda x, sigma, labels=None: seen.append(labels.tolist()) or x, label_name="y")
    from_k_diffusion(model, label_name="y", label_dim=4)(torch.zeros(2, 1, 2, 2), 1.0, torch.tensor([3, 0]))
    assert seen == [[3, 0]]


# ---- PFGM++

@pytest.mark.parametrize("D", [1, 8, 128, 2048.5])
def test_pfgm_radius_has_its_distribution(D):
    N, sigma, n = 12, 40.0, 3000
    x = pfgm_latents(range(n), (3, 2, 2), D, sigma)
    assert x.shape == (n, 3, 2, 2) and x.dtype == torch.float64
    R = x.flatten(1).norm(dim=1).numpy()
    B = (R / (sigma * math.sqrt(D))) ** 2
    assert scipy.stats.kstest(B / (1 + B), scipy.stats.beta(N / 2, D / 2).cdf).pvalue > 1e-3
    direction = x.flatten(1) / torch.from_numpy(R)[:, None]
    assert (direction.mean(0).abs() < 5 / math.sqrt(N * n)).all()
    assert abs(scipy.stats.spearmanr(direction[:, 0].abs(), R).statistic) < 4 / math.sqrt(n)  # direction and radius are independent


def test_pfgm_tends_to_edms_start_seed_by_seed():
    seeds = [5, 2**40 + 1, 9]
    edm = 80.0 * SeedStreams(seeds).latents((1, 4, 4)).to(torch.float64)
    gaps = [(pfgm_latents(seeds, (1, 4, 4), D, 80.0) / edm - 1).abs().max().item() for D in (10, 1e3, 1e5, 1e7)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 2e-3
    assert pfgm_latents(seeds, (1, 4, 4), math.inf, 80.0).equal(edm)
    assert pfgm_latents([9], (1, 4, 4), 64, 80.0).equal(pfgm_latents(seeds, (1, 4, 4), 64, 80.0)[2:])


def test_sampling_runs_on_from_pfgms_start():
    x = pfgm_latents([1, 2], (1, 1, 2), 128, 80.0)
    assert sample(MIXTURE.denoiser(), x, edm_sigmas(12)).isfinite().all()


@pytest.mark.parametrize("D, sigma", [(0, 80.0), (-3, 80.0), (math.nan, 80.0), (128, 0.0), (128, -1.0), (128, math.inf), (128, math.nan)])
def test_pfgm_refuses_what_has_no_meaning(D, sigma):
    with pytest.raises(ValueError, match="D > 0"):
        pfgm_latents([1], (1, 2, 2), D, sigma)
    with pytest.raises(ValueError, match="more than once"):
        pfgm_latents([1, 1], (1, 2, 2), 8, 1.0)


def test_a_patchnet_in_every_form_runs():
    with seeded(0):
        network = PatchNet(8, 1, 1, channels=8, blocks=1).eval()
    for kind in (dict(prediction="F"), dict(prediction="eps"), dict(prediction="v"), dict(prediction="x0")):
        images = sample_seeds(as_denoiser(network, shape=(1, 8, 8), **kind), [0, 1], edm_sigmas(4), micro_batch=2)
        assert images.shape == (2, 1, 8, 8) and images.dtype == torch.float64
