"The worlds: their data and splits, the shipped files, the fitted mixture."
import json
import shutil

import pytest
import torch
from torch.testing import assert_close

from sedm_kit.training import denoising_loss, held_out_losses
from sedm_kit.worlds import PATCH, WORLDS, fit_mixture, load_images, load_world, patch_columns, world_folder


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
