"""The public networks: golden outputs, every name and shape of the full-size checkpoints, and clear errors."""
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch.testing import assert_close

from sedm_kit.adm_blocks import ATTENTION_LAYOUTS, attention, head_count, one_hot, unet_plan, wave_embedding
from sedm_kit.adm_unets import ADMUNet, HalfUNet
from sedm_kit.edm_unets import DhariwalUNet, ResampleConv, SongUNet, edm_names, with_side_path

GOLDEN = Path(__file__).parent / "golden"
KEPT = ("resample_filter", "freqs", "u")  # buffers that no formula fills


def golden(name):
    "Arrays of a golden file; its configuration and shapes as dicts."
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return {key: json.loads(str(value)) if value.dtype.kind == "U" else torch.from_numpy(value) for key, value in arrays.items()}


def fill(model, seed, prefix="", buffers=()):
    "Weights as tests/golden/README.md says: they follow from the parameters' names."
    state = model.state_dict()
    for name, tensor in state.items():
        random = np.random.RandomState((zlib.crc32((prefix + name).encode()) + int(seed)) % 2**32).randn(*tensor.shape)
        if name.split(".")[-1] in KEPT:
            state[name] = buffers[name] if name in buffers else tensor
        elif tensor.ndim >= 2:
            state[name] = torch.from_numpy(0.8 * random / math.sqrt(np.prod(tensor.shape[1:])))
        else:
            state[name] = torch.from_numpy((1 if name.endswith("weight") else 0) + 0.1 * random)
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in state.items()})
    return model.eval().requires_grad_(False)


def shapes(model, prefix=""):
    return {prefix + name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def deviation(found, expected):
    "Largest deviation relative to the largest value."
    return ((found - expected).abs().max() / expected.abs().max()).item()


class Prefixed(torch.nn.Module):
    "EDM's checkpoints keep the raw network as `model`."
    def __init__(self, model):
        super().__init__()
        self.model = model


# --- golden outputs -------------------------------------------------------------------------------------------------------

EDM_NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


@pytest.mark.parametrize("name", ["net_edm_ddpmpp", "net_ve_ncsnpp", "net_edm_adm"])
def test_edm_networks_give_the_public_outputs(name):
    "The denoisers' golden outputs, turned back into those of the raw networks: float32 on both sides, hence 1e-5."
    numbers = golden(name)
    config = numbers["config"]
    form, network = config.pop("precond"), EDM_NETWORKS[config.pop("model_type")]
    channels = config.pop("img_channels")
    model = Prefixed(network(in_channels=channels, out_channels=channels, **config))
    assert shapes(model) == numbers["shapes"]
    fill(model, numbers["seed"], buffers={key[7:]: value for key, value in numbers.items() if key.startswith("buffer/")})
    x, s = numbers["x"], numbers["sigma"].reshape(-1, 1, 1, 1)
    total = s**2 + 0.25
    c_skip, c_out, c_in, c_noise = {"EDMPrecond": (0.25 / total, s * 0.5 / total.sqrt(), total.rsqrt(), s.log() / 4),
                                    "VEPrecond": (1, s, 1, (s / 2).log())}[form]
    found = model.model(c_in * x, c_noise.flatten(), numbers.get("class_labels"))
    assert deviation(c_skip * x + c_out * found, numbers["D"]) < 1e-5
    assert deviation(found, (numbers["D"] - c_skip * x) / c_out) < 1e-5
    if "augment_labels" in numbers:
        found = model.model(c_in * x, c_noise.flatten(), None, numbers["augment_labels"])
        assert deviation(c_skip * x + c_out * found, numbers["D_augment"]) < 1e-5
        assert deviation(numbers["D"], numbers["D_augment"]) > 1e-2  # the labels matter


def test_adm_unet_gives_the_public_outputs():
    numbers = golden("net_adm_unet")
    model = fill(ADMUNet(**numbers["config"]), numbers["seed"])
    assert shapes(model) == numbers["shapes"]
    assert deviation(model(numbers["x"], numbers["timesteps"]), numbers["out"]) < 1e-5


def test_discriminator_gives_the_public_outputs():
    "Features, class scores, probability, log-ratio and its gradient; measured 1e-6, the promise is 1e-4."
    numbers = golden("discriminator_small")
    extractor = fill(HalfUNet(**numbers["config"]["classifier"]), numbers["seed"], "classifier/")
    head = fill(HalfUNet(**numbers["config"]["discriminator"]), numbers["seed"], "discriminator/")
    assert {"classifier": shapes(extractor), "discriminator": shapes(head)} == numbers["shapes"]
    x, t = numbers["x"].requires_grad_(), numbers["t"]
    features = extractor(x, t, features=True)
    log_ratio = head(features, t).squeeze(1)
    gradient, = torch.autograd.grad(log_ratio.sum(), x)
    found = {"features": features, "class_logits": extractor(x, t), "prob": log_ratio.sigmoid(), "log_ratio": log_ratio, "grad": gradient}
    assert {name: deviation(value, numbers[name]) < 1e-5 for name, value in found.items()} == dict.fromkeys(found, True)
    assert features.dtype == torch.float32


# --- names and shapes of the full-size checkpoints ------------------------------------------------------------------------

CIFAR = dict(img_resolution=32, in_channels=3, out_channels=3, channel_mult=[2, 2, 2], augment_dim=9)
NCSN = dict(embedding_type="fourier", channel_mult_noise=2, encoder_type="residual", resample_filter=[1, 3, 3, 1])
CHECKPOINTS = {
    "edm-cifar10-32x32-uncond-vp": (SongUNet, CIFAR),
    "edm-cifar10-32x32-cond-vp": (SongUNet, CIFAR | {"label_dim": 10}),
    "edm-cifar10-32x32-uncond-ve": (SongUNet, CIFAR | NCSN),
    "edm-ffhq-64x64-uncond-vp": (SongUNet, dict(img_resolution=64, in_channels=3, out_channels=3, augment_dim=9)),
    "edm-imagenet-64x64-cond-adm": (DhariwalUNet, dict(img_resolution=64, in_channels=3, out_channels=3, label_dim=1000)),
    "dg-32x32_classifier": (HalfUNet, {}),
    "dg-discriminator-cifar10-uncond": (HalfUNet, dict(image_size=8, in_channels=512, out_channels=1)),
    "dg-discriminator-cifar10-cond": (HalfUNet, dict(image_size=8, in_channels=512, out_channels=1, condition=True)),
    "adm-cifar10-32x32-uncond": (ADMUNet, dict(image_size=32, num_head_channels=32, resblock_updown=True, use_new_attention_order=True)),
}
PUBLIC = json.loads((GOLDEN / "state_dict_shapes.json").read_text())


def on_meta(cls, config):
    with torch.device("meta"):
        return cls(**config)


@pytest.mark.parametrize("name", PUBLIC)
def test_full_size_names_and_shapes(name):
    "Every tensor, buffers included, and in the files' order."
    cls, config = CHECKPOINTS[name]
    found = shapes(on_meta(cls, config), "model." if name.startswith("edm") else "")
    assert list(found.items()) == list(PUBLIC[name].items())


@pytest.mark.parametrize("name, buffers", [("edm-cifar10-32x32-uncond-vp", 8), ("edm-cifar10-32x32-uncond-ve", 11),
                                           ("edm-ffhq-64x64-uncond-vp", 12), ("edm-imagenet-64x64-cond-adm", 12)])
def test_nothing_that_the_output_needs_is_missing_from_the_state(name, buffers):
    "A network built without memory is complete once its tensors are assigned: all buffers are in the state."
    model = on_meta(*CHECKPOINTS[name])
    assert len(list(model.buffers())) == buffers
    assert {key for key, _ in model.named_buffers()} <= set(model.state_dict())


# --- variants -------------------------------------------------------------------------------------------------------------

SMALL_SONG = dict(img_resolution=8, in_channels=3, out_channels=3, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
SMALL_DHARIWAL = SMALL_SONG | {"model_channels": 32, "label_dim": 4}
SMALL_ADM = dict(image_size=8, model_channels=32, num_res_blocks=1, attention_resolutions=[2], channel_mult=[1, 2], num_head_channels=16)
SMALL_HALF = dict(image_size=8, classifier_width=64, classifier_depth=1, out_channels=3)
SMALL = {"ddpmpp": (SongUNet, SMALL_SONG), "ncsnpp": (SongUNet, SMALL_SONG | NCSN), "song, classes": (SongUNet, SMALL_SONG | {"label_dim": 4}),
         "dhariwal": (DhariwalUNet, SMALL_DHARIWAL), "adm": (ADMUNet, SMALL_ADM), "adm, classes": (ADMUNet, SMALL_ADM | {"num_classes": 4}),
         "adm, updown": (ADMUNet, SMALL_ADM | {"resblock_updown": True}), "half": (HalfUNet, SMALL_HALF),
         "half, classes": (HalfUNet, SMALL_HALF | {"condition": True, "num_classes": 4})}


def call(model, x, time, labels=None):
    "A network's output, however it names its labels."
    if isinstance(model, HalfUNet):
        return model(x, time, condition=labels)
    return model(x, time, labels)


def small(name):
    "A small network with random weights, images, times and labels for it."
    cls, config = SMALL[name]
    labels = torch.eye(4)[[1, 3]] if "class" in name or name == "dhariwal" else None
    with torch.random.fork_rng([]):
        torch.manual_seed(0)  # also for the frequencies of NCSN++, which `fill` keeps
        return fill(cls(**config), 0), torch.randn(2, 3, 8, 8), torch.tensor([0.1, 0.9]), labels


@pytest.mark.parametrize("name", SMALL)
def test_config_survives_json_and_rebuilds_the_network(name):
    cls, config = SMALL[name]
    model = cls(**config)
    again = cls(**json.loads(json.dumps(model.config)))
    assert shapes(again) == shapes(model) and again.config == model.config


@pytest.mark.parametrize("name", SMALL)
def test_images_of_a_batch_do_not_meet(name):
    model, x, time, labels = small(name)
    together = call(model, x, time, labels)
    alone = [call(model, x[i:i + 1], time[i:i + 1], None if labels is None else labels[i:i + 1]) for i in range(2)]
    assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert_close(call(model, x, time[:1], labels), call(model, x, time[:1].expand(2), labels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_takes_part(name):
    "A parameter without a gradient would be a name without a meaning."
    model, x, time, labels = small(name)
    call(model.requires_grad_(True), x, time, labels).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", [name for name in SMALL if "class" in name or name == "dhariwal"])
def test_labels_matter(name):
    model, x, time, labels = small(name)
    assert deviation(call(model, x, time, labels.flip(0)), call(model, x, time, labels)) > 1e-3


@pytest.mark.parametrize("name", ["adm, classes", "half, classes"])
def test_labels_as_numbers_or_rows(name):
    model, x, time, labels = small(name)
    assert torch.equal(call(model, x, time, labels.argmax(1)), call(model, x, time, labels))


def test_resampling_by_convolution_has_its_names():
    names = {name.rsplit(".", 1)[0] for name in on_meta(ADMUNet, SMALL_ADM).state_dict()}
    assert {"input_blocks.2.0.op", "output_blocks.1.2.conv"} <= names
    assert not any(".op" in name or name.endswith("conv") for name in on_meta(ADMUNet, SMALL_ADM | {"resblock_updown": True}).state_dict())


def test_heads_on_the_way_up_may_differ():
    config = SMALL_ADM | {"num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 4}
    model = on_meta(ADMUNet, config)
    assert {model.input_blocks[3][1].heads, model.middle_block[1].heads, model.output_blocks[0][1].heads} == {2, 4}
    assert model.output_blocks[0][1].heads == 4


def test_features_are_the_middle_of_the_extractor():
    model, x, time, _ = small("half")
    caught = []
    model.middle_block.register_forward_hook(lambda module, given, output: caught.append(output))
    features = model(x, time, features=True)
    assert torch.equal(features, caught[0]) and features.shape == (2, 64, 8, 8)
    assert model(x, time).shape == (2, 3)


def test_half_precision_is_for_gpus_only():
    "On a CPU the flag changes no bit; under a forced float16 the arithmetic holds to a few thousandths."
    model, x, time, labels = small("adm, classes")
    exact = call(model, x, time, labels)
    model.use_fp16 = True
    assert torch.equal(call(model, x, time, labels), exact)
    song, x, time, _ = small("ncsnpp")
    exact = song(x, time)
    with torch.autocast("cpu", torch.float16):
        halved = song(x, time)
    assert 1e-5 < deviation(halved.float(), exact) < 5e-3


# --- parts ----------------------------------------------------------------------------------------------------------------

@given(heads=st.integers(1, 4), size=st.integers(1, 5), positions=st.integers(1, 6), layout=st.sampled_from(sorted(ATTENTION_LAYOUTS)))
def test_attention_by_hand(heads, size, positions, layout):
    "Channel by channel, with the index of every layout written out."
    index = {"new": lambda part, h, c: (part * heads + h) * size + c, "legacy": lambda part, h, c: (h * 3 + part) * size + c,
             "edm": lambda part, h, c: (h * size + c) * 3 + part}[layout]
    qkv = torch.randn(2, 3 * heads * size, positions, dtype=torch.float64, generator=torch.Generator().manual_seed(heads))
    expected = []
    for h in range(heads):
        q, k, v = (qkv[:, [index(part, h, c) for c in range(size)]] for part in range(3))
        weights = (q.mT @ k / math.sqrt(size)).softmax(-1)
        expected.append(v @ weights.mT)
    assert_close(attention(qkv, heads, layout), torch.cat(expected, dim=1))


@given(levels=st.integers(1, 4), blocks=st.integers(1, 3), last_only=st.booleans())
def test_plans_use_every_skip_once(levels, blocks, last_only):
    plan = unet_plan(8, 3, 32, range(1, levels + 1), blocks, [True] * levels, last_only)
    assert [row.skip for row in plan.decoder if row.kind == "block"] == [row.width_out for row in reversed(plan.encoder)]
    rows = [*plan.encoder, *plan.middle, *plan.decoder]
    assert all(after.width_in == before.width_out for before, after in zip(rows, rows[1:]))
    assert rows[-1].level == 0 and plan.middle[0].level == levels - 1
    names = edm_names(with_side_path(plan.encoder), 8)
    assert sum("aux_residual" in name for name in names) == levels - 1 and len(names) == len(plan.encoder) + levels - 1


@pytest.mark.parametrize("resample_filter", [[1, 1], [1, 3, 3, 1]])
def test_resampling_keeps_constants_and_is_its_own_transpose(resample_filter):
    "Away from the border a constant stays; <down(x), y> = <x, up(y)>/4, whatever x and y."
    down, up = ResampleConv(2, 2, 0, resample_filter), ResampleConv(2, 2, 0, resample_filter, up=True)
    assert_close(down(torch.ones(1, 2, 12, 12))[..., 1:-1, 1:-1], torch.ones(1, 2, 4, 4))
    assert_close(up(torch.ones(1, 2, 6, 6))[..., 2:-2, 2:-2], torch.ones(1, 2, 8, 8))
    x, y = torch.randn(1, 2, 12, 12), torch.randn(1, 2, 6, 6)
    assert_close((down(x) * y).sum(), (x * up(y)).sum() / 4, rtol=1e-4, atol=1e-4)


def test_waves_cosines_first():
    waves = wave_embedding(torch.tensor([3.0]), 8)[0]
    frequencies = torch.tensor([1.0, 1e-1, 1e-2, 1e-3])
    assert_close(waves, torch.cat([(3 * frequencies).cos(), (3 * frequencies).sin()]))


def test_where_classes_join():
    "SongUNet: before the mixing layers, times sqrt(classes); DhariwalUNet: after them; ADM: added to the embedded time."
    silu, rows, c_noise = torch.nn.functional.silu, torch.eye(4)[[1, 3]], torch.tensor([0.3, -1.0])
    song = small("song, classes")[0]
    cosines, sines = wave_embedding(c_noise, 16, endpoint=True).chunk(2, dim=1)
    mixed = torch.cat([sines, cosines], dim=1) + 2 * song.map_label.weight.T[[1, 3]] + song.map_label.bias
    assert_close(song.embed(c_noise, rows, None), silu(song.map_layer1(silu(song.map_layer0(mixed)))))
    dhariwal = small("dhariwal")[0]
    mixed = dhariwal.map_layer1(silu(dhariwal.map_layer0(wave_embedding(c_noise, 32)))) + dhariwal.map_label.weight.T[[1, 3]]
    assert_close(dhariwal.embed(c_noise, rows, None), silu(mixed))
    adm = small("adm, classes")[0]
    assert_close(adm.embed(c_noise, rows, 2, "cpu"), adm.time_embed(wave_embedding(c_noise, 32)) + adm.label_emb.weight[[1, 3]])


def test_song_start():
    "Xavier uniform: variance 2/(fan_in + fan_out); residual paths end at 1e-5 of it, attention's map at a fifth, biases at 0."
    torch.manual_seed(0)
    state = SongUNet(**SMALL_SONG | {"model_channels": 64, "dropout": 0.0}).state_dict()
    scale = lambda name: state[name].std().item() / math.sqrt(2 / (state[name][0].numel() + state[name].shape[0] * state[name][0, 0].numel()))
    assert scale("enc.8x8_block0.conv0.weight") == pytest.approx(1, rel=0.02)
    assert scale("map_layer0.weight") == pytest.approx(1, rel=0.02)
    assert scale("dec.4x4_in0.qkv.weight") == pytest.approx(math.sqrt(0.2), rel=0.02)
    assert {round(scale(name) * 1e5, 1) for name in ("enc.8x8_block0.conv1.weight", "dec.4x4_in0.proj.weight", "dec.8x8_aux_conv.weight")} == {1.0}
    assert not any(value.any() for name, value in state.items() if name.endswith("bias"))


# --- errors ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, arguments, message", [
    ("ddpmpp", lambda x, t: (x[:, :1], t), r"expected images of shape \(b, 3, 8, 8\), got \(2, 1, 8, 8\)"),
    ("ddpmpp", lambda x, t: (x[..., :4], t), r"got \(2, 3, 8, 4\)"),
    ("ddpmpp", lambda x, t: (x[0], t), r"got \(3, 8, 8\)"),
    ("ddpmpp", lambda x, t: (x, t, torch.eye(4)[:2]), r"class_labels must be None: this network takes none, got \(2, 4\)"),
    ("ddpmpp", lambda x, t: (x, t, None, torch.zeros(2, 9)), "augment_labels must be None"),
    ("song, classes", lambda x, t: (x, t), r"class_labels must be rows \(b, 4\), got None"),
    ("dhariwal", lambda x, t: (x, t, torch.eye(5)[:2]), r"rows \(b, 4\), got \(2, 5\)"),
    ("adm", lambda x, t: (x.repeat(1, 2, 1, 1), t), r"\(b, 3, 8, 8\), got \(2, 6, 8, 8\)"),
    ("adm", lambda x, t: (x, t[[0, 1, 0]]), "timesteps must hold one entry or one per image, 2, got 3"),
    ("adm", lambda x, t: (x, t, torch.tensor([0, 1])), "labels were given, but this network is unconditional"),
    ("adm, classes", lambda x, t: (x, t), "conditional and needs labels of its 4 classes"),
    ("adm, classes", lambda x, t: (x, t, torch.tensor([0, 4])), "class_labels must be 0 to 3, got 0 to 4"),
    ("adm, classes", lambda x, t: (x, t, torch.zeros(2, 3)), r"\(b, 4\) one-hot rows, got shape \(2, 3\)"),
    ("adm, classes", lambda x, t: (x, t, torch.tensor([0, 1, 2])), "class_labels must hold one entry or one per image, 2, got 3"),
    ("half", lambda x, t: (torch.cat([x, x], 3), t), r"got \(2, 3, 8, 16\)"),
])
def test_wrong_inputs_are_named(name, arguments, message):
    model, x, time, _ = small(name)
    with pytest.raises(ValueError, match=message):
        model(*arguments(x, time))


@pytest.mark.parametrize("build, message", [
    (lambda: SongUNet(**SMALL_SONG | {"decoder_type": "skip"}), "decoder_type must be one of 'standard', got 'skip'"),
    (lambda: SongUNet(**SMALL_SONG | {"encoder_type": "skip"}), "encoder_type must be one of 'standard', 'residual', got 'skip'"),
    (lambda: SongUNet(**SMALL_SONG | {"embedding_type": "none"}), "embedding_type must be one of"),
    (lambda: SongUNet(**SMALL_SONG | {"img_resolution": 9}), "images of 9 pixels per side cannot be halved 1 times"),
    (lambda: SongUNet(**SMALL_SONG | {"channel_mult": []}), "levels must be a whole number of at least 1"),
    (lambda: SongUNet(**SMALL_SONG | {"model_channels": 2}), "2 channels cannot be normalised"),
    (lambda: SongUNet(**SMALL_SONG | {"num_blocks": 2.5}), "blocks must be a whole number .* got 2.5"),
    (lambda: SongUNet(**SMALL_SONG | {"channel_mult": [1, 10**9]}), "width of level 1 must be .* below 65536"),
    (lambda: DhariwalUNet(**SMALL_DHARIWAL | {"model_channels": 48}), "96 channels cannot be split into heads"),
    (lambda: ADMUNet(**SMALL_ADM | {"use_scale_shift_norm": False}), "use_scale_shift_norm=True"),
    (lambda: ADMUNet(**SMALL_ADM | {"model_channels": 48}), "multiples of 32, got 48"),
    (lambda: ADMUNet(**SMALL_ADM | {"channel_mult": None}), "channel_mult must be given for images of 8 pixels; known without it: 64, 32"),
    (lambda: HalfUNet(**SMALL_HALF | {"classifier_pool": "spatial"}), "only pool known is 'attention', got 'spatial'"),
    (lambda: HalfUNet(**SMALL_HALF | {"image_size": 24}), "images of 24 pixels"),
    (lambda: head_count(32, 5, -1), "32 channels cannot be split into heads"),
    (lambda: one_hot(torch.zeros(3), 3), r"got shape \(3,\)"),
])
def test_wrong_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
