"The worlds: their data and splits, the shipped files, the fitted mixture."
import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sedm_kit.analytic import Denoiser
from sedm_kit.images import open_images, write_edm_zip
from sedm_kit.metrics import FeatureStats, fd
from sedm_kit.networks import EDMPrecond, seeded
from sedm_kit.training import denoising_loss, held_out_losses
from sedm_kit.worlds import PATCH, WORLDS, RandomFeatures, fit_mixture, load_images, load_world, patch_columns, world_folder, world_from


DIGITS_HELD_OUT = [21, 24, 28, 34, 35, 37, 39, 42]  # first rows of scikit-learn's file that are held out


@pytest.fixture(scope="module", params=WORLDS)
def world(request):
    return load_world(request.param)


@pytest.mark.parametrize("name, train, held_out", [("digits", 1437, 360), ("patches", 60_000, 4_000)])
def test_sizes_types_and_range(name, train, held_out):
    split = load_images(name)
    assert split.train.shape == (train, 1, 8, 8) and split.held_out.shape == (held_out, 1, 8, 8)
    for images, labels in ((split.train, split.train_labels), (split.held_out, split.held_out_labels)):
        assert images.dtype == torch.float32 and labels.dtype == torch.int64 and len(images) == len(labels)
        assert images.min() >= -1 and images.max() <= 1 and images.is_contiguous()


def test_images_are_cached():
    assert load_images("digits").train is load_images("digits").train


def test_digits_are_all_of_scikit_learns_and_no_image_is_in_both_parts():
    from sklearn.datasets import load_digits
    split = load_images("digits")
    rows = lambda images: {tuple(row) for row in ((images + 1) * 8).flatten(1).int().tolist()}
    original = {tuple(row) for row in load_digits().data.astype(int).tolist()}
    assert not rows(split.train) & rows(split.held_out)
    assert rows(split.train) | rows(split.held_out) == original


def test_digits_are_stratified():
    split = load_images("digits")
    shares = torch.stack([labels.bincount() / len(labels) for labels in (split.train_labels, split.held_out_labels)])
    assert_close(shares[0], shares[1], rtol=0, atol=1 / 360)


def test_split_is_the_one_the_networks_were_trained_with():
    "Row numbers of scikit-learn's file; a changed split would put training images into the held-out part."
    from sklearn.datasets import load_digits
    numbers = {image.tobytes(): i for i, image in enumerate(load_digits().images.astype("uint8"))}
    held_out = sorted(numbers[((image + 1) * 8).numpy().astype("uint8").tobytes()] for image in load_images("digits").held_out[:, 0])
    assert held_out[:8] == DIGITS_HELD_OUT


@pytest.mark.parametrize("width", [64, 100, 320, 1000])
def test_patches_of_the_two_parts_share_no_pixel(width):
    covered = [{column + i for column in columns.tolist() for i in range(PATCH)} for columns in patch_columns(width)]
    assert covered[0] and covered[1] and not covered[0] & covered[1]
    assert max(max(part) for part in covered) < width


def test_patches_are_cut_from_the_columns_they_should_be():
    "Found again in the photographs by their pixels, independently of how they were cut."
    from sklearn.datasets import load_sample_images
    photos = torch.stack([torch.tensor(photo, dtype=torch.float32) for photo in load_sample_images().images]).mean(-1) / 127.5 - 1
    grey = photos[:, :426, :].unflatten(1, (213, 2)).unflatten(3, (320, 2)).mean((2, 4))
    split, columns = load_images("patches"), patch_columns(320)
    for images, labels, allowed in zip(split[:2], split[2:], columns):
        for image, label in zip(images[:5], labels[:5]):
            windows = grey[label].unfold(0, 8, 1).unfold(1, 8, 1)
            distance = (windows - image[0]).abs().amax((2, 3))
            found = (distance < 1e-5).nonzero()
            assert len(found) and set(found[:, 1].tolist()) <= set(allowed.tolist())


def test_patches_are_distinct_positions():
    train = load_images("patches").train.flatten(1)
    assert len(train.unique(dim=0)) > 0.99 * len(train)  # the blue sky holds a few equal ones


@pytest.mark.parametrize("load", [load_images, load_world])
@pytest.mark.parametrize("name", ["mnist", "", "Digits", None])
def test_unknown_worlds_are_named(load, name):
    with pytest.raises(ValueError, match=rf"unknown world {name!r}; known: digits, patches"):
        load(name)


def test_a_world_is_complete(world):
    assert set(world.log_ratio) == {"euler", "heun"} and world.shape == (1, 8, 8)
    assert world.sigma_data == pytest.approx(world.train.std().item(), abs=1e-3)
    x = torch.randn(4, 1, 8, 8)
    assert world.denoiser(x, 1.0).shape == x.shape and world.features(x).shape == (4, 64)
    for solver, network in world.log_ratio.items():
        assert network(x, 0.1).shape == (4,) and network.sigma_range == tuple(world.card["log_ratio"][solver]["sigma_range"])
    assert all(not network.training for network in (world.denoiser, world.features, *world.log_ratio.values()))
    assert world.to("cpu").train is world.train
    assert world.name in repr(world) and len(repr(world)) < 200


def test_feature_space_has_unit_mean_variance_on_training_images(world):
    assert_close(world.features(world.train).double().T.cov().trace().item(), 64.0, rtol=1e-3, atol=0)


def test_the_card_says_what_the_denoiser_does(world):
    "The held-out loss in the card is measured again."
    card = world.card["denoiser"]
    losses = held_out_losses(world.denoiser, world.held_out[:2000], [float(sigma) for sigma in card["held_out_loss_per_sigma"]])
    assert_close(losses, torch.tensor(list(card["held_out_loss_per_sigma"].values()), dtype=torch.float64), rtol=0.01, atol=0.002)
    assert losses.mean().item() == pytest.approx(card["held_out_loss"], rel=0.01) and card["held_out_loss"] < 0.4


def test_the_card_says_what_the_features_do(world):
    if world.name == "digits":
        predicted = world.features.classify(world.held_out).argmax(1)
        found = (predicted == load_images("digits").held_out_labels).double().mean().item()
        assert found == pytest.approx(world.card["features"]["held_out_accuracy"], abs=0.003) and found > 0.97


def test_denoiser_has_not_learned_the_training_images_by_heart():
    "Its loss on held-out digits is at most a fifth above that on training digits."
    world = load_world("digits")
    sigmas = torch.tensor([0.1, 0.3, 1.0])
    train, fresh = (held_out_losses(world.denoiser, images, sigmas).mean() for images in (world.train, world.held_out))
    assert fresh < 1.2 * train


def test_tuned_values_come_from_seeds_of_their_own(world):
    used = {}
    for solver, tuned in world.card["tuned"].items():
        assert tuned["steps"] == 18 and set(tuned) >= {"ES", "DG", "SEDM-G++"}
        assert tuned["ES"]["w"] == 0 and tuned["DG"]["lambda"] == 1
        fakes = world.card["log_ratio"][solver]["fake_seeds"]
        assert fakes[1] < tuned["seeds"][0] and fakes[0] >= 1_000_000  # studies report seeds below that
        used[solver] = tuned
    assert set(used) == {"euler", "heun"}


def test_loading_from_another_folder(tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(world_folder("digits"), folder)
    for path in folder.glob("log_ratio_heun*"):
        path.unlink()
    assert list(load_world("digits", folder).log_ratio) == ["euler"]
    (folder / "denoiser.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="denoiser.safetensors is no complete safetensors file"):
        load_world("digits", folder)
    with pytest.raises(FileNotFoundError, match="world.json is missing"):
        load_world("digits", tmp_path)


def test_shipped_files_are_small_and_strict_json():
    files = [path for name in WORLDS for path in world_folder(name).iterdir()]
    assert sum(path.stat().st_size for path in files) < 5e6
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{path} holds {word}"))


def test_mixture_has_the_moments_of_the_images():
    images = load_images("digits").train
    mixture, rows = fit_mixture(images, k=5, ridge=1e-2), images.flatten(1).double()
    assert_close(mixture.mean.flatten(), rows.mean(0))
    assert_close(mixture.cov, rows.T.cov(correction=0) + 1e-2 * torch.eye(64, dtype=torch.float64))


def test_mixture_is_repeatable_and_describes_the_images():
    images = load_images("digits").train
    a, b = fit_mixture(images, seed=3), fit_mixture(images, seed=3)
    assert torch.equal(a.means, b.means)
    one = fit_mixture(images, k=1)
    held_out = load_images("digits").held_out
    gain = (a.log_prob(held_out.double(), 0.2) - one.log_prob(held_out.double(), 0.2)).mean()
    assert gain > 1  # ten groups explain unseen digits better than one, in nats per image


def test_exact_denoiser_of_the_mixture_beats_the_network_on_the_mixture():
    "No denoiser has a smaller error than the exact one, on data from its own density."
    world = load_world("digits")
    mixture = fit_mixture(world.train)
    data = mixture.sample(500, generator=torch.Generator().manual_seed(0)).float()
    noise, sigma = torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.full((500,), 0.5)
    exact = mixture.denoiser()
    exact.sigma_data = world.sigma_data
    assert denoising_loss(exact, data, noise, sigma).mean() < denoising_loss(world.denoiser, data, noise, sigma).mean()


@pytest.mark.parametrize("k", [0, 10**6])
def test_mixtures_need_a_sensible_number_of_groups(k):
    with pytest.raises(ValueError, match="k must be between 1 and the number of images"):
        fit_mixture(load_images("digits").held_out, k=k)


# ---- worlds of one's own

def colour(n=40, side=8, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def shrink(x, sigma, class_labels=None):
    return x / (1 + torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1) ** 2)


def test_a_world_of_ones_own_is_like_a_shipped_one():
    digits = load_world("digits")
    mine = world_from(digits.train, digits.denoiser, digits.features, held_out=digits.held_out, name="again")
    assert torch.equal(mine.train, digits.train) and torch.equal(mine.held_out, digits.held_out) and mine.denoiser is digits.denoiser
    assert mine.name == "again" and mine.shape == digits.shape and mine.log_ratio == {} and mine.train_labels is None
    assert mine.sigma_data == pytest.approx(digits.sigma_data, abs=1e-3)
    assert torch.equal(mine.features(digits.held_out[:300]), torch.cat([digits.features(part) for part in digits.held_out[:300].split(256)]))
    assert "no solver" in repr(mine) and json.dumps(mine.card) and mine.card["held_out"] == "a source of its own"
    assert mine.to("cpu").train is mine.train


@pytest.mark.parametrize("held_out, sizes", [(0.1, (36, 4)), (7, (33, 7)), (colour(5, seed=1), (40, 5))])
def test_held_out_images_are_set_aside_or_given(held_out, sizes):
    source = open_images(colour(), labels=torch.arange(40))
    given = isinstance(held_out, torch.Tensor)
    world = world_from(source, Denoiser(shrink, (3, 8, 8), 0.58), held_out=open_images(held_out, labels=range(5)) if given else held_out)
    assert (len(world.train), len(world.held_out)) == sizes
    assert ("may have seen" in world.card["held_out"]) is not given
    if not given:
        assert sorted(world.train_labels.tolist() + world.held_out_labels.tolist()) == list(range(40))
    assert torch.equal(world.train, colour()[world.train_labels])
    again = world_from(source, Denoiser(shrink, (3, 8, 8), 0.58), held_out=held_out if not given else 0.1, seed=1)
    assert given or not torch.equal(again.train_labels, world.train_labels)


def test_the_limit_bounds_both_parts_and_is_a_random_choice(tmp_path):
    write_edm_zip(tmp_path / "x.zip", colour(), torch.arange(40))
    world = world_from(tmp_path / "x.zip", shrink, held_out=20, limit=6)
    assert len(world.train) == len(world.held_out) == 6 and world.train_labels.tolist() != list(range(6))
    assert_close(world.train, colour()[world.train_labels], rtol=0, atol=1 / 127.5)
    assert not set(world.train_labels.tolist()) & set(world.held_out_labels.tolist())


def test_plain_functions_do_as_denoiser_and_features():
    world = world_from(colour(300), shrink, lambda images: images.mean((2, 3))).to("cpu")
    assert world.features(colour(300)).shape == (300, 3) and world.sigma_data == pytest.approx(world.train.std().item())


def test_labels_of_a_conditional_denoiser():
    seen = []
    network = EDMPrecond(8, 3, label_dim=4, model_type="PatchNet", channels=8, blocks=1)
    network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[2]))
    labelled = open_images(colour(), labels=torch.arange(40) % 4)
    world = world_from(labelled, network, features=nn.Flatten())
    assert torch.equal(seen[0], world.train_labels[:2]) and len(world.held_out_labels) == len(world.held_out)
    with pytest.raises(ValueError, match=r"knows 4 classes, but array has no labels; open_images\(..., labels=...\) adds them"):
        world_from(colour(), network)
    with pytest.raises(ValueError, match="knows 4 classes, 0 to 3, but array has the label 39"):
        world_from(open_images(colour(), labels=range(40)), network)
    with pytest.raises(ValueError, match="array has no labels"):
        world_from(labelled, network, held_out=colour(5))


def nan_denoiser(x, sigma, class_labels=None):
    return x * float("nan")


@pytest.mark.parametrize("images, denoiser, options, message", [
    (colour(side=16), Denoiser(shrink, (3, 8, 8), 0.5), {}, r"denoiser makes images of shape \(3, 8, 8\), but those of array have shape \(3, 16, 16\)"),
    (colour()[:, :1], Denoiser(shrink, (3, 8, 8), 0.5), {}, r"but those of array have shape \(1, 8, 8\)"),
    (colour(), nn.Conv2d(1, 1, 3), {}, r"the denoiser fails on images of shape \(3, 8, 8\)"),
    (colour(), nan_denoiser, {}, "the denoiser returns values that are not finite"),
    (colour(), lambda x, sigma, labels: x[:, :, 1:], {}, r"the denoiser makes \(2, 3, 7, 8\) of \(2, 3, 8, 8\)"),
    (colour(), shrink, {"features": lambda x: x}, r"features must be \(b, f\), got shape \(2, 3, 8, 8\)"),
    (colour(), shrink, {"features": nn.Linear(5, 5)}, "the feature map fails on images"),
    (colour(), shrink, {"held_out": 40}, "held_out must leave at least one image on either side of 40, got 40"),
    (colour(), shrink, {"held_out": colour(side=16)}, r"shape \(3, 16, 16\), expected \(3, 8, 8\)"),
    (colour() * 2, shrink, {}, r"expected floats in \[-1, 1\]"),
    ("nowhere.zip", shrink, {}, "no images at nowhere.zip"),
    (colour(), shrink, {"limit": 0}, "limit must be at least 2"),
    (colour(), None, {}, "denoiser must be a function"),
])
def test_what_does_not_fit_is_refused(images, denoiser, options, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        world_from(images, denoiser, **options)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16), (3, 5, 9)])
def test_random_features_are_fixed_by_their_seed_and_normalised(shape):
    images = torch.randn(300, *shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    features = RandomFeatures(images)
    assert_close(features(images).double().mean(0), torch.zeros(64, dtype=torch.float64), atol=1e-4, rtol=0)
    assert_close(features(images).double().var(0).mean().item(), 1.0, rtol=1e-4, atol=0)
    with seeded(5):
        again = RandomFeatures(images)
    assert torch.equal(again(images), features(images)) and not torch.equal(RandomFeatures(images, seed=1)(images), features(images))
    assert_close(RandomFeatures(images, batch=7)(images), features(images), atol=1e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in features.parameters())


def test_random_features_see_what_second_moments_cannot(world):
    train = world.train[:4000]
    generator = torch.Generator().manual_seed(0)
    gaussian = fit_mixture(train, k=1, ridge=1e-6).sample(1000, generator=generator).float()
    real = train[torch.randint(len(train), (1000,), generator=generator)]
    def floors(look):
        reference = FeatureStats.of(look(train))
        return fd(FeatureStats.of(look(gaussian)), reference) / fd(FeatureStats.of(look(real)), reference)
    assert floors(lambda images: images) < 2 and floors(RandomFeatures(train)) > 8
