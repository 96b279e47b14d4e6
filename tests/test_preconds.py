"""The four preconditioners: golden denoisers, their formulas, rounding, labels, and clear errors."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from test_unets import deviation, fill, golden, shapes
from torch.testing import assert_close

from sedm_kit.networks import DENOISER_NETWORKS, EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from sedm_kit.noise import iddpm_levels, vp_time

FORMS = {"EDMPrecond": EDMPrecond, "VPPrecond": VPPrecond, "VEPrecond": VEPrecond, "iDDPMPrecond": iDDPMPrecond}
SMALL = dict(img_resolution=8, img_channels=3, model_type="SongUNet", model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])


@pytest.mark.parametrize("name", ["net_edm_ddpmpp", "net_ve_ncsnpp", "net_edm_adm"])
def test_denoisers_give_the_public_outputs(name):
    numbers = golden(name)
    config = numbers["config"]
    model = FORMS[config.pop("precond")](**config)
    assert shapes(model) == numbers["shapes"]
    fill(model, numbers["seed"], buffers={key[7:]: value for key, value in numbers.items() if key.startswith("buffer/")})
    x, sigma, labels = numbers["x"], numbers["sigma"], numbers.get("class_labels")
    assert deviation(model(x, sigma, labels), numbers["D"]) < 1e-5
    assert torch.equal(model(x.double(), sigma.double(), None if labels is None else labels.argmax(1)), model(x, sigma, labels))
    if "augment_labels" in numbers:
        assert deviation(model(x, sigma, augment_labels=numbers["augment_labels"]), numbers["D_augment"]) < 1e-5
    assert_close(model.round_sigma(numbers["round_in"]), numbers["round_out"], rtol=0, atol=0)
    assert (model.sigma_min, model.sigma_max) == (numbers["sigma_min"].item(), numbers["sigma_max"].item())


class Spy(torch.nn.Module):
    "In place of a network: keeps what it was given and returns a constant."
    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, x, c_noise, class_labels=None):
        self.given = x, c_noise
        return torch.arange(1.0, self.channels + 1)[None, :, None, None].expand(len(x), -1, *x.shape[2:])


@settings(max_examples=30)
@given(log_sigma=st.floats(math.log(0.02), math.log(80)), sigma_data=st.floats(0.1, 2.0))
def test_formulas(log_sigma, sigma_data):
    "Table 1 of Karras et al. (2022), written once more, in double precision."
    s, x, first = math.exp(log_sigma), torch.randn(2, 1, 8, 8), 1.0
    small = dict(img_resolution=8, img_channels=1, model_type="PatchNet", channels=8, blocks=1)
    t = (math.sqrt(0.01 + 2 * 19.9 * math.log1p(s * s)) - 0.1) / 19.9
    u = iddpm_levels()
    index = (u - s).abs().argmin().item()
    root = math.hypot(s, sigma_data)
    expected = {"EDMPrecond": ((sigma_data / root) ** 2, s * sigma_data / root, 1 / root, math.log(s) / 4),
                "VPPrecond": (1, -s, 1 / math.hypot(s, 1), 999 * t), "VEPrecond": (1, s, 1, math.log(s / 2)),
                "iDDPMPrecond": (1, -s, 1 / math.hypot(s, 1), 999 - index)}
    for name, (c_skip, c_out, c_in, c_noise) in expected.items():
        model = FORMS[name](**small, **({"sigma_data": sigma_data} if name == "EDMPrecond" else {}))
        model.model = Spy(model.outputs)
        assert_close(model(x, s), c_skip * x + c_out * first, rtol=1e-5, atol=1e-4)
        assert_close(model.model.given[0], c_in * x, rtol=1e-5, atol=1e-6)
        assert_close(model.model.given[1], torch.tensor([float(c_noise)]), rtol=2e-6, atol=1e-5)


def test_ranges_of_noise():
    build = lambda form, **settings: FORMS[form](8, 1, model_type="PatchNet", channels=8, blocks=1, **settings)
    vp, chain = build("VPPrecond"), build("iDDPMPrecond")
    assert (vp.sigma_min, vp.sigma_max) == (pytest.approx(0.0010005, rel=1e-4), pytest.approx(152.167, rel=1e-5))
    assert (build("VEPrecond").sigma_min, build("VEPrecond").sigma_max) == (0.02, 100.0)
    assert (chain.sigma_min, chain.sigma_max) == (pytest.approx(iddpm_levels()[999]), pytest.approx(iddpm_levels()[0]))
    assert chain.u.shape == (1001,) and chain.u[-1] == 0 and "u" in chain.state_dict()
    other = build("VPPrecond", beta_d=10.0, beta_min=0.5, M=100)
    assert other.coefficients(torch.full((1, 1, 1, 1), other.sigma_max))[3].item() == pytest.approx(99, rel=1e-5)
    assert float(vp_time(152.167)) == pytest.approx(1, rel=1e-5)


@given(sigma=st.floats(0.003, 20000))
def test_rounding_finds_the_nearest_level(sigma):
    model = iDDPMPrecond(8, 1, model_type="PatchNet", channels=8, blocks=1)
    found = model.round_sigma(torch.tensor(sigma, dtype=torch.float64))
    assert found.dtype == torch.float64 and found.shape == () and found in model.u.double()
    assert (found - sigma).abs() <= (model.u.double() - sigma).abs().min() * (1 + 1e-4) + 1e-6 * sigma
    assert torch.equal(model.round_sigma(found), found)
    assert model.round_sigma([1, 5]).dtype == torch.float64 and model.round_sigma(torch.ones(2, 3)).dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_built_without_memory(form):
    "Ranges are numbers and names are known even on the meta device; then the tensors are assigned."
    real = FORMS[form](**SMALL)
    with torch.device("meta"):
        model = FORMS[form](**SMALL)
    assert (model.sigma_min, model.sigma_max) == (real.sigma_min, real.sigma_max)
    model.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.eval()(x, 1.0), real.eval()(x, 1.0))
    assert model.config == real.config and model.config["model_type"] == "SongUNet"


def test_labels():
    model = fill(EDMPrecond(**SMALL, label_dim=4), 0)
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([3, 1])
    assert torch.equal(model(x, 1.0, labels), model(x, 1.0, torch.eye(4)[labels]))
    assert deviation(model(x, 1.0), model(x, 1.0, torch.zeros(2, 4))) < 1e-5 < 1e-3 < deviation(model(x, 1.0), model(x, 1.0, labels))
    assert deviation(model(x, 1.0, labels[:1]), model(x, 1.0, labels[[0, 0]])) < 1e-5


def test_half_precision_asks_for_a_gpu():
    model = fill(EDMPrecond(**SMALL), 0)
    x = torch.randn(2, 3, 8, 8)
    exact = model(x, 1.0)
    model.use_fp16 = True
    assert torch.equal(model(x, 1.0), exact)
    assert EDMPrecond(**SMALL, use_fp16=True).config["use_fp16"] is True


@pytest.mark.parametrize("change, arguments, message", [
    ({}, lambda x: (x, 1.0, torch.tensor([0, 1])), "this denoiser is unconditional"),
    ({"label_dim": 4}, lambda x: (x, 1.0, torch.zeros(2, 3)), r"\(b, 4\) one-hot rows, got shape \(2, 3\)"),
    ({"label_dim": 4}, lambda x: (x, 1.0, torch.tensor([0, 4])), "class_labels must be 0 to 3"),
    ({"label_dim": 4}, lambda x: (x, 1.0, torch.tensor([0, 1, 2])), "class_labels must hold one entry or one per image, 2, got 3"),
    ({}, lambda x: (x, torch.ones(3)), "sigma must hold one entry or one per image, 2, got 3"),
    ({}, lambda x: (x[:, :1], 1.0), r"expected images of shape \(b, 3, 8, 8\), got \(2, 1, 8, 8\)"),
    ({}, lambda x: (x, 1.0, None, torch.zeros(2, 9)), "augment_labels must be None"),
])
def test_wrong_inputs_are_named(change, arguments, message):
    model = EDMPrecond(**SMALL | change)
    with pytest.raises(ValueError, match=message):
        model(*arguments(torch.randn(2, 3, 8, 8)))


@pytest.mark.parametrize("form", FORMS)
def test_unknown_networks_are_named(form):
    with pytest.raises(ValueError, match=f"unknown model_type 'SwinNet'; known: {', '.join(DENOISER_NETWORKS)}"):
        FORMS[form](**SMALL | {"model_type": "SwinNet"})


@pytest.mark.parametrize("sigma_data", [0.0, -0.5, float("nan"), float("inf")])
def test_a_standard_deviation_that_is_none(sigma_data):
    with pytest.raises(ValueError, match="sigma_data must be finite and positive"):
        EDMPrecond(8, 1, model_type="PatchNet", sigma_data=sigma_data, channels=8, blocks=1)
