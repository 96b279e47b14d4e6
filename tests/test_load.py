"""Other people's checkpoints: files in their exact structure load to identical weights and outputs, and what does not fit is named."""
import json
import sys
import types
import zlib

import edm_files as files
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_allowlist import HOSTILE, watched

from sedm_kit import checkpoints
from sedm_kit.adm_discriminator import ADMDiscriminator, cosine_time
from sedm_kit.adm_unets import ADMUNet, HalfUNet
from sedm_kit.checkpoints import adm_arguments, build_without_memory, convert, download, half_arguments, load_adm, load_any, load_discriminator, load_edm, load_model
from sedm_kit.discriminator import DiscriminatorGuidance, correction
from sedm_kit.networks import EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from sedm_kit.noise import vp_sigma, vp_time

GOLDEN = "tests/golden/"
SONG = dict(model_type="SongUNet", model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8])
ADM = dict(model_type="DhariwalUNet", model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8])
DENOISERS = {
    "ddpmpp": lambda: EDMPrecond(16, 3, augment_dim=9, sigma_data=0.6, **SONG),
    "ddpmpp with classes": lambda: EDMPrecond(16, 3, label_dim=5, **SONG),
    "ncsnpp": lambda: EDMPrecond(16, 3, embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=[1, 3, 3, 1], **SONG),
    "adm": lambda: EDMPrecond(16, 3, label_dim=5, sigma_max=80.0, **ADM),
    "vp": lambda: VPPrecond(16, 3, beta_min=0.2, **SONG),
    "ve": lambda: VEPrecond(16, 3, embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=[1, 3, 3, 1], **SONG),
    "iddpm": lambda: iDDPMPrecond(16, 3, label_dim=5, M=200, **ADM),
}


def golden_weights(model, seed: int, prefix: str = ""):
    "Weights that follow from the parameters' names (see golden/README.md); buffers keep their values."
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            z = np.random.RandomState((zlib.crc32((prefix + name).encode()) + seed) % 2**32).randn(*parameter.shape)
            z = 0.8 * z / np.sqrt(np.prod(parameter.shape[1:])) if parameter.ndim > 1 else 1 + 0.1 * z if name.endswith("weight") else 0.1 * z
            parameter.copy_(torch.from_numpy(np.asarray(z)))
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    "What torch imports on first use is imported before anything is watched."
    load_edm(files.write(tmp_path_factory.mktemp("warm") / "a.pkl", {"ema": files.like_edm(build("ddpmpp"))}))


def build(kind):
    return golden_weights(DENOISERS[kind](), 1)


def assert_same_state(found, expected):
    a, b = found.state_dict(), expected.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in b)
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    assert not any(t.is_meta for t in [*found.parameters(), *found.buffers()])


def same_outputs(a, b, labels):
    x, sigma = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.tensor([0.3, 5.0])
    labels = torch.eye(5)[[1, 3]] if labels else None
    return torch.equal(a(x, sigma, labels), b(x, sigma, labels)) and not torch.equal(a(x, sigma, labels), a(x, 2 * sigma, labels))


# ---- EDM

@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize("how, key", [("pickle", "ema"), ("zip", "net"), ("legacy", "net")])
def test_edm_files_load_to_identical_weights_and_outputs(kind, how, key, tmp_path):
    model = build(kind)
    path = files.write(tmp_path / "a.pkl", {key: files.like_edm(model), "step": 1}, how)
    loaded = watched(lambda: load_edm(path))
    assert type(loaded) is type(model) and loaded.config == model.config
    assert_same_state(loaded, model)
    assert same_outputs(loaded, model, model.label_dim)
    assert (loaded.sigma_min, loaded.sigma_max) == (model.sigma_min, model.sigma_max)


@pytest.mark.parametrize("name", ["net_edm_ddpmpp", "net_ve_ncsnpp", "net_edm_adm"])
def test_golden_outputs_come_out_of_a_pickle(name, tmp_path):
    golden = np.load(f"{GOLDEN}{name}.npz")
    config = json.loads(str(golden["config"]))
    model = getattr(checkpoints, config.pop("precond"))(**config)
    golden_weights(model, int(golden["seed"]))
    for key in golden.files:
        if key.startswith("buffer/"):
            model.get_buffer(key.removeprefix("buffer/")).copy_(torch.from_numpy(golden[key]))
    loaded = load_edm(files.write(tmp_path / "a.pkl", {"ema": files.like_edm(model, numpy_1=True)}))
    labels = torch.from_numpy(golden["class_labels"]) if "class_labels" in golden.files else None
    D = loaded(torch.from_numpy(golden["x"]), torch.from_numpy(golden["sigma"]), labels)
    assert (D - torch.from_numpy(golden["D"])).norm() < 1e-5 * np.linalg.norm(golden["D"])


def test_positional_arguments(tmp_path):
    model = build("ddpmpp with classes")
    loaded = load_edm(files.write(tmp_path / "a.pkl", {"ema": files.like_edm(model, args=(16, 3))}))
    assert loaded.config == model.config


def test_the_networks_class_may_be_left_to_the_part(tmp_path):
    content = files.like_edm(build("adm"))
    del content._init_kwargs["model_type"]
    assert load_edm(files.write(tmp_path / "a.pkl", {"ema": content})).config["model_type"] == "DhariwalUNet"


def test_half_precision_weights_become_single(tmp_path):
    model = build("adm")
    loaded = load_edm(files.write(tmp_path / "a.pkl", {"ema": files.like_edm(model).half()}))
    assert_same_state(loaded, model.half().float())


def test_loading_uses_no_random_numbers(tmp_path):
    path = files.write(tmp_path / "a.pkl", {"ema": files.like_edm(build("ncsnpp"))})
    before = torch.get_rng_state()
    load_edm(path)
    assert torch.equal(torch.get_rng_state(), before)


def spoil(path, change, kind="ddpmpp"):
    content = files.like_edm(build(kind))
    change(content)
    return files.write(path, {"ema": content})


@pytest.mark.parametrize("change, words", [
    (lambda n: vars(n.model)["_modules"].pop("map_layer0"), "tensors missing model.map_layer0.bias, model.map_layer0.weight"),
    (lambda n: n.model._modules.clear(), "tensors missing model.dec.* and 1[0-9]+ more"),
    (lambda n: n.register_buffer("extra", torch.ones(1)), "not expected extra"),
    (lambda n: n.model.map_layer0.register_parameter("bias", torch.nn.Parameter(torch.ones(5))), r"model.map_layer0.bias \(expected \(64,\) torch.float32, found \(5,\)"),
    (lambda n: n.model.map_layer0.bias.fill_(torch.nan), "not finite: model.map_layer0.bias"),
    (lambda n: n.model.map_layer0.register_parameter("bias", torch.nn.Parameter(torch.ones(64, dtype=torch.int64), requires_grad=False)), "torch.int64"),
    (lambda n: n._init_kwargs.update(num_blocks=2), "missing .*block1"),
    (lambda n: n._init_kwargs.update(num_blocks=10**9), "argument 'num_blocks' = 1000000000, which no network has"),
    (lambda n: n._init_kwargs.update(channel_mult=[1] * 100), "argument 'channel_mult' = .*, which no network has"),
    (lambda n: n._init_kwargs.update(model_channels=10**12), "argument 'model_channels' = 1000000000000, which no network has"),
    (lambda n: n._init_kwargs.update(model_channels=65_000), "does not fit the (class|network)"),
    (lambda n: n._init_kwargs.update(model_channels="many"), "does not fit the class EDMPrecond"),
    (lambda n: n._init_kwargs.update(channel_mult={"a": 10**9}), "which no network has"),
    (lambda n: n._init_kwargs.update(channel_mult=[float("inf")]), "does not fit the class EDMPrecond"),
    (lambda n: n._init_kwargs.update(surprise=1), "unexpected keyword argument 'surprise'"),
    (lambda n: n._init_kwargs.update(self=1), "does not fit the class EDMPrecond"),
    (lambda n: n._init_kwargs.update(model_type="os.system"), "its arguments name the network 'os.system', but it holds a 'SongUNet'"),
    (lambda n: (n._init_kwargs.update(model_type="Evil"), setattr(type(n.model), "__name__", "Evil")), "unknown model_type 'Evil'; known: "),
    (lambda n: n._init_kwargs.clear(), "does not fit the class EDMPrecond: .*img_resolution"),
    (lambda n: setattr(n, "_init_args", (16, 3, 0, False)), "4 nameless arguments; at most 3"),
    (lambda n: setattr(type(n), "__name__", "EDMLoss"), "holds a 'EDMLoss'; known: EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond"),
])
def test_files_that_do_not_fit_are_refused_by_name(change, words, tmp_path):
    path = spoil(tmp_path / "a.pkl", change)
    error = watched(lambda: load_edm(path))
    assert isinstance(error, ValueError) and str(path) in str(error)
    with pytest.raises(ValueError, match=words):
        load_edm(path)


def test_an_absurd_chain_is_not_built(tmp_path):
    path = spoil(tmp_path / "a.pkl", lambda n: n._init_kwargs.update(M=10**9), "iddpm")
    with pytest.raises(ValueError, match="argument 'M' = 1000000000"):
        load_edm(path)


def test_first_five_problems_of_each_kind(tmp_path):
    path = spoil(tmp_path / "a.pkl", lambda n: [n.register_buffer(f"extra{i}", torch.ones(1)) for i in range(9)])
    with pytest.raises(ValueError, match="not expected extra0, extra1, extra2, extra3, extra4 and 4 more"):
        load_edm(path)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_execute_nothing_whatever_loads_them(kind, tmp_path):
    path = tmp_path / "stranger.pkl"
    path.write_bytes(HOSTILE[kind](tmp_path / "canary"))
    for load in (load_edm, load_adm, load_any, lambda path: load_discriminator(path, path), lambda path: convert(path, tmp_path / "new.safetensors")):
        error = watched(lambda: load(path))
        assert isinstance(error, ValueError) and str(path) in str(error), error
    assert sorted(tmp_path.iterdir()) == [path]


# ---- ADM and DG

def shapes(name):
    "Names and shapes of a public checkpoint."
    with open(f"{GOLDEN}state_dict_shapes.json") as file:
        return {key: torch.empty(shape, device="meta") for key, shape in json.load(file)[name].items()}


@pytest.mark.parametrize("name, cls, infer, expected", [
    ("adm-cifar10-32x32-uncond", ADMUNet, adm_arguments, dict(model_channels=128, num_res_blocks=3, channel_mult=[1, 2, 2, 2], attention_resolutions=[2, 4],
                                                             resblock_updown=True, out_channels=6, num_classes=None)),
    ("dg-32x32_classifier", HalfUNet, half_arguments, dict(image_size=32, classifier_depth=4, classifier_attention_resolutions="32,16,8", out_channels=1000, condition=False)),
    ("dg-discriminator-cifar10-uncond", HalfUNet, half_arguments, dict(image_size=8, in_channels=512, classifier_depth=2, out_channels=1, condition=False)),
    ("dg-discriminator-cifar10-cond", HalfUNet, half_arguments, dict(image_size=8, in_channels=512, num_classes=1000, condition=True)),
])
def test_public_shapes_tell_their_arguments(name, cls, infer, expected):
    tensors = shapes(name)
    arguments = infer(tensors)
    assert expected.items() <= arguments.items()
    state = build_without_memory(cls, arguments, name).state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in tensors.items()}


@settings(max_examples=40)
@given(levels=st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4), blocks=st.integers(1, 3), updown=st.booleans(),
       attention=st.sets(st.sampled_from([1, 2, 4, 8])), classes=st.sampled_from([None, 7]), channels=st.sampled_from([(3, 6), (1, 1)]))
def test_any_adm_network_tells_its_arguments(levels, blocks, updown, attention, classes, channels):
    config = dict(image_size=32, in_channels=channels[0], out_channels=channels[1], model_channels=32, channel_mult=levels, num_res_blocks=blocks, num_head_channels=32,
                  attention_resolutions=[ds for ds in (1, 2, 4, 8)[:len(levels)] if ds in attention], num_classes=classes, use_new_attention_order=True)
    with torch.device("meta"):
        state = ADMUNet(**config, resblock_updown=updown).state_dict()
    found = adm_arguments(state)
    assert config.items() <= found.items() and (found["resblock_updown"] == updown or len(levels) == 1)


@settings(max_examples=20)
@given(size=st.sampled_from([8, 16, 32, 64]), depth=st.integers(1, 4), updown=st.booleans(), condition=st.booleans(), sides=st.sets(st.sampled_from(["32", "16", "8"]), min_size=1))
def test_any_half_network_tells_its_arguments(size, depth, updown, condition, sides):
    with torch.device("meta"):
        model = HalfUNet(size, classifier_width=64, classifier_depth=depth, classifier_resblock_updown=updown, condition=condition,
                         classifier_attention_resolutions=",".join(sides), out_channels=3, in_channels=5)
        found = half_arguments(model.state_dict())
        again = HalfUNet(**found)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert again.image_size == size and again.classes == model.classes


def adm(**config):
    return golden_weights(ADMUNet(16, model_channels=32, channel_mult=(1, 2), num_res_blocks=2, attention_resolutions=(2,), **config), 2)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("config", [dict(num_head_channels=32, use_new_attention_order=True, resblock_updown=True),
                                    dict(num_head_channels=32, use_new_attention_order=True), dict(num_head_channels=16, num_classes=4, out_channels=3)])
def test_adm_state_dicts(new, config, tmp_path):
    model = adm(**config)
    torch.save(model.state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    loaded = watched(lambda: load_adm(tmp_path / "a.pt", image_size=16, num_head_channels=config["num_head_channels"],
                                      use_new_attention_order=config.get("use_new_attention_order", False)))
    assert_same_state(loaded, model)
    x, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 3]) if "num_classes" in config else None
    assert torch.equal(loaded(x, torch.tensor([5, 900]), labels), model(x, torch.tensor([5, 900]), labels))


def test_golden_adm_network(tmp_path):
    golden = np.load(f"{GOLDEN}net_adm_unet.npz")
    config = json.loads(str(golden["config"]))
    torch.save(golden_weights(ADMUNet(**config), int(golden["seed"])).state_dict(), tmp_path / "a.pt")
    loaded = load_adm(tmp_path / "a.pt", image_size=16, num_head_channels=config["num_head_channels"])
    out = loaded(torch.from_numpy(golden["x"]), torch.from_numpy(golden["timesteps"]))
    assert (out - torch.from_numpy(golden["out"])).norm() < 1e-5 * np.linalg.norm(golden["out"])


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("out.2.weight"), "does not hold the state dict of ADMUNet: it has no tensor out.2.weight"),
    (lambda s: s.pop("time_embed.0.weight"), "tensors missing time_embed.0.weight"),
    (lambda s: s.pop("input_blocks.0.0.weight"), "it has no tensor input_blocks.0.0.weight"),
    (lambda s: s.update({"input_blocks.0.0.weight": torch.ones(())}), "it has no tensor input_blocks.0.0.weight"),
    (lambda s: s.update({"input_blocks.0.0.weight": torch.ones(32)}), "does not hold the state dict of ADMUNet"),
    (lambda s: s.update({"input_blocks.0.0.weight": torch.ones(0, 3, 3, 3)}), "does not hold the state dict of ADMUNet"),
    (lambda s: s.update({"output_blocks.77.0.weight": torch.ones(1)}), "output_blocks are not numbered from 0"),
    (lambda s: s.clear() or s.update(a=torch.ones(1)), "does not hold the state dict of ADMUNet"),
    (lambda s: s.update({"out.2.weight": torch.ones(6, 32, 1, 1)}), "out.2.weight .expected .6, 32, 3, 3"),
])
def test_adm_files_that_do_not_fit(change, words, tmp_path):
    state = dict(adm(num_head_channels=32).state_dict())
    change(state)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=words):
        load_adm(tmp_path / "a.pt")


def test_wrong_names_of_adm_arguments(tmp_path):
    torch.save(adm(num_head_channels=32).state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="unexpected keyword argument 'heads'"):
        load_adm(tmp_path / "a.pt", heads=3)


@pytest.fixture
def golden_pair(tmp_path):
    "DG's two files, with the golden weights."
    golden = np.load(f"{GOLDEN}discriminator_small.npz")
    for part, arguments in json.loads(str(golden["config"])).items():
        model = golden_weights(HalfUNet(**arguments), int(golden["seed"]), f"{part}/")
        torch.save(model.state_dict(), tmp_path / f"{part}.pt")
    return golden, tmp_path / "classifier.pt", tmp_path / "discriminator.pt"


def test_golden_discriminator(golden_pair):
    golden, classifier, head = golden_pair
    log_ratio = watched(lambda: load_discriminator(classifier, head))
    u = torch.from_numpy(golden["x"]).float().requires_grad_()
    tau = torch.from_numpy(golden["t"])
    features = log_ratio.classifier(u, tau, features=True)
    torch.testing.assert_close(features.detach().numpy(), golden["features"].astype(np.float32), rtol=1e-4, atol=1e-5)
    L = log_ratio(u, tau)
    gradient, = torch.autograd.grad(L.sum(), u)
    np.testing.assert_allclose(L.detach(), golden["log_ratio"], rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(gradient.numpy() - golden["grad"]) < 1e-4 * np.linalg.norm(golden["grad"])


def test_guidance_takes_a_loaded_discriminator(golden_pair):
    _, classifier, head = golden_pair
    log_ratio = load_discriminator(classifier, head)
    x, sigma = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    g, L = DiscriminatorGuidance(log_ratio, weight=2.0)(x, sigma)
    assert torch.equal(g, 2 * correction(log_ratio, x, sigma)[0]) and L.shape == (2,) and g.abs().max() > 0
    assert log_ratio.sigma_range == (float(vp_sigma(1e-5)), float(vp_sigma(1)))


def test_the_wrong_kind_or_order_of_discriminator_is_refused(golden_pair):
    _, classifier, head = golden_pair
    with pytest.raises(ValueError, match="discriminator.pt is not class-conditional: call with class_conditional=False"):
        load_discriminator(classifier, head, class_conditional=True)
    with pytest.raises(ValueError, match="do not belong together: the head must read 64 channels of 8x8"):
        load_discriminator(head, classifier)


def test_conditional_heads_take_numbers_and_rows(tmp_path):
    classifier = golden_weights(HalfUNet(16, classifier_width=64, classifier_depth=1), 1)
    head = golden_weights(HalfUNet(8, in_channels=128, classifier_width=64, out_channels=1, condition=True), 2)
    for name, model in (("c", classifier), ("d", head)):
        torch.save(model.state_dict(), tmp_path / name)
    with pytest.raises(ValueError, match="is class-conditional: call with class_conditional=True"):
        load_discriminator(tmp_path / "c", tmp_path / "d")
    log_ratio = load_discriminator(tmp_path / "c", tmp_path / "d", class_conditional=True)
    u, labels = torch.randn(2, 3, 16, 16), torch.tensor([9, 0])
    assert torch.equal(log_ratio(u, 0.3, labels), log_ratio(u, 0.3, torch.eye(10)[labels]))
    assert not torch.equal(log_ratio(u, 0.3, labels), log_ratio(u, 0.3, labels.flip(0)))
    with pytest.raises(ValueError, match="needs labels"):
        log_ratio(u, 0.3)


def test_labels_do_not_matter_to_an_unconditional_head(golden_pair):
    log_ratio, u = load_discriminator(*golden_pair[1:]), torch.randn(2, 3, 16, 16)
    assert torch.equal(log_ratio(u, 0.3), log_ratio(u, 0.3, torch.eye(10)[:2]))


def test_networks_for_64_pixels_are_told_cosine_time():
    classifier = golden_weights(HalfUNet(64, classifier_width=64, classifier_depth=1), 1)
    head = golden_weights(HalfUNet(8, in_channels=256, classifier_width=64, out_channels=1), 2)
    u, tau = torch.randn(1, 3, 64, 64), vp_time(torch.tensor([1.0]))
    default, plain = ADMDiscriminator(classifier, head), ADMDiscriminator(classifier, head, use_cosine_time=False)
    assert default.use_cosine_time and torch.equal(default(u, tau), plain(u, cosine_time(tau)))
    assert abs(float(cosine_time(tau)) - 0.49604996) < 2e-7


# ---- converting

@pytest.mark.parametrize("kind", ["ncsnpp", "iddpm", "vp"])
def test_converted_denoisers_are_bitwise_the_same(kind, tmp_path):
    model = build(kind)
    path = files.write(tmp_path / "a.pkl", {"ema": files.like_edm(model)})
    card = convert(path, tmp_path / "a.safetensors")
    loaded, again = load_model(tmp_path / "a.safetensors")
    assert card == again and card["class"] == type(model).__name__ and card["source"] == "a.pkl"
    assert card["source_sha256"] == checkpoints.hashlib.sha256(path.read_bytes()).hexdigest()
    assert_same_state(loaded, model)
    assert same_outputs(loaded, model, model.label_dim)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_converted_state_dicts(tmp_path, golden_pair):
    model = adm(num_head_channels=16)
    torch.save(model.state_dict(), tmp_path / "adm.pt")
    convert(tmp_path / "adm.pt", tmp_path / "adm.safetensors", image_size=16, num_head_channels=16, use_new_attention_order=False)
    assert_same_state(load_model(tmp_path / "adm.safetensors")[0], model)
    golden, classifier, head = golden_pair
    card = convert(head, tmp_path / "pair.safetensors", classifier=classifier)
    pair = load_model(tmp_path / "pair.safetensors")[0]
    assert card["class"] == "ADMDiscriminator" and card["classifier"] == "classifier.pt"
    assert_same_state(pair, load_discriminator(classifier, head))
    np.testing.assert_allclose(pair(torch.from_numpy(golden["x"]).float(), torch.from_numpy(golden["t"])), golden["log_ratio"], rtol=1e-4, atol=1e-5)
    assert convert(classifier, tmp_path / "half.safetensors")["class"] == "HalfUNet"


def test_converting_never_overwrites_and_leaves_nothing_behind(tmp_path):
    torch.save(adm(num_head_channels=32).state_dict(), tmp_path / "a.pt")
    (tmp_path / "b.json").write_text("mine")
    with pytest.raises(ValueError, match="b.json exists already"):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="must end in .safetensors"):
        convert(tmp_path / "a.pt", tmp_path / "b.pkl")
    with pytest.raises(ValueError, match="a classifier was given, but .* is a ADMUNet"):
        convert(tmp_path / "a.pt", tmp_path / "c.safetensors", classifier=tmp_path / "a.pt")
    torch.save({"weight": torch.ones(1)}, tmp_path / "d.pt")
    with pytest.raises(ValueError, match="state dict of an unknown kind, with 'weight'"):
        convert(tmp_path / "d.pt", tmp_path / "c.safetensors")
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "nothing.pt", tmp_path / "c.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.json", "d.pt"]


def test_a_hostile_card_builds_nothing(tmp_path):
    convert(files.write(tmp_path / "a.pkl", {"ema": files.like_edm(build("ddpmpp"))}), tmp_path / "a.safetensors")
    card = json.loads((tmp_path / "a.json").read_text())
    card["config"]["num_blocks"] = 60_000
    (tmp_path / "a.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="argument 'num_blocks' = 60000, which no network has"):
        load_model(tmp_path / "a.safetensors")


# ---- downloading

def test_downloads_go_through_pooch_with_their_checksum(tmp_path, monkeypatch):
    calls = []
    def retrieve(url, **options):
        calls.append((url, options))
        return str(options["path"] / options["fname"])
    monkeypatch.setitem(sys.modules, "pooch", types.SimpleNamespace(retrieve=retrieve))
    path = download("https://example.org/edm/edm-cifar10-32x32-uncond-vp.pkl", "AB" * 32, tmp_path)
    assert path == tmp_path / "edm-cifar10-32x32-uncond-vp.pkl"
    assert calls[0][0].startswith("https://example.org") and calls[0][1]["known_hash"] == "sha256:" + "ab" * 32


def test_without_pooch_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r"pip install 'sedm_kit\[data\]'"):
        download("https://example.org/a.pkl", "0" * 64, tmp_path)


@pytest.mark.parametrize("url", ["ftp://example.org/a", "https://example.org/", "https://example.org/..", "file:///a.pkl", "https://example.org/a%2fb", "a.pkl", "https://example.org/.bashrc"])
def test_strange_addresses(url, tmp_path):
    with pytest.raises(ValueError, match="url must be"):
        download(url, "0" * 64, tmp_path)


@pytest.mark.parametrize("digits", ["", "0" * 63, "g" * 64, "md5:" + "0" * 60])
def test_a_checksum_is_needed(digits, tmp_path):
    with pytest.raises(ValueError, match="sha256 must be 64 hexadecimal digits"):
        download("https://example.org/a.pkl", digits, tmp_path)
