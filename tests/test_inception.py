"Inception's network against torch-fidelity's numbers, its weights, and the measures on its features."
import hashlib
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sedm_kit import inception
from sedm_kit.features import read_moments, write_moments
from sedm_kit.images import from_uint8, write_npz
from sedm_kit.inception import (OUTPUTS, Inception, download_inception, enlarge, fid, inception_score, inception_scores, load_inception,
                                named_features, torch_fidelity_scores)
from sedm_kit.metrics import FeatureStats

GOLDEN = json.loads((Path(__file__).parent / "golden" / "torch_fidelity.json").read_text(encoding="utf-8"))


def named_weights():
    "Inception's tensors, each drawn from its own name: He's scale, norms near 1, large logits."
    found = {}
    for name, tensor in Inception().state_dict().items():
        if name.endswith("num_batches_tracked"):
            found[name] = torch.zeros((), dtype=torch.long)
            continue
        z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(tensor.shape))
        scale, shift = ((2 / np.prod(z.shape[1:])) ** 0.5, 0.0) if z.ndim > 1 else (0.1, float(name.endswith(("weight", "running_var"))))
        found[name] = torch.from_numpy(shift + scale * z).float() * (30 if name == "fc.weight" else 1)
    return found


def two_sets(n=8):
    "Smooth colour images in bytes, and as many of which the second half is darker and rougher."
    rng = np.random.RandomState(0)

    def images(count, size, level, spread):
        coarse = torch.from_numpy(level + spread * rng.standard_normal((count, 3, size, size)))
        return torch.nn.functional.interpolate(coarse, (24, 24), mode="bilinear").clamp(0, 255).to(torch.uint8)
    return images(n, 4, 150, 45), torch.cat([images(n // 2, 4, 150, 45), images(n - n // 2, 24, 60, 90)])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(named_weights(), path)
    return path


@pytest.fixture(scope="module")
def scores(weights, tmp_path_factory):
    with pytest.warns(UserWarning, match="8 images for 2048 feature dimensions"):
        return inception_scores(*two_sets(), weights, batch=8, splits=2, folder=tmp_path_factory.mktemp("kept"), seeds="0 to 7")


# ---- the same images through torch-fidelity

def test_the_same_numbers_as_torch_fidelity(scores):
    assert scores["FD"].value == pytest.approx(GOLDEN["frechet_inception_distance"], rel=1e-5)
    assert scores["KD"].value == pytest.approx(GOLDEN["kernel_inception_distance_mean"], rel=1e-5)
    assert scores["IS"].mean == pytest.approx(GOLDEN["inception_score_mean"], rel=1e-5)
    assert scores["precision"].value == pytest.approx(GOLDEN["precision"], abs=1e-6) and scores["recall"].value == pytest.approx(GOLDEN["recall"], abs=1e-6)
    assert 0 < GOLDEN["precision"] != GOLDEN["recall"]  # a swap would show


def test_live_where_torch_fidelity_is_installed(weights, scores):
    try:
        import torch_fidelity  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torch-fidelity cannot be imported: {error}")
    theirs = torch_fidelity_scores(*two_sets(), weights, fid=False, kid_subset_size=8, kid_subsets=1)
    assert scores["KD"].value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    assert scores["precision"].value == pytest.approx(theirs["precision"], abs=1e-6)


# ---- network and weights

def test_enlarging_is_tensorflows():
    column = torch.tensor([0.0, 4.0, 8.0]).view(1, 1, 3, 1).expand(1, 1, 3, 3)
    expected = torch.tensor([min(k * 3 / 7, 2) * 4 for k in range(7)])
    torch.testing.assert_close(enlarge(column, 7)[0, 0, :, 1], expected)
    torch.testing.assert_close(enlarge(column.transpose(2, 3), 7)[0, 0, 1], expected)
    same = torch.rand(1, 3, 299, 299)
    torch.testing.assert_close(enlarge(same), same)


def test_names_and_shapes_are_those_of_the_published_file():
    state = Inception().state_dict()
    assert len(state) == 566 and state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert state["Mixed_6b.branch7x7_2.conv.weight"].shape == (128, 128, 1, 7) and state["fc.weight"].shape == (1008, 2048)


def test_outputs_alone_are_those_of_all_and_floats_are_refused(weights):
    images, network = two_sets()[0][:2], load_inception(weights, tuple(OUTPUTS)).function
    both = network(images)
    assert both.shape == (2, 2048 + 2023 + 1008) and both.dtype == torch.float32
    network.outputs = ("spatial",)
    torch.testing.assert_close(network(images), both[:, 2048: 2048 + 2023])
    for wrong in (from_uint8(images), images[:, :2], images[0]):
        with pytest.raises(ValueError, match="expected uint8 images"):
            network(wrong)
    with pytest.raises(ValueError, match="outputs must be some of pool, spatial, logits"):
        Inception(("pool_3",))


def test_weights_are_named_and_safetensors_hold_the_same(weights, tmp_path):
    named = load_inception(weights)
    assert named.name.startswith("Inception V3, other weights (pool, ") and named.raw
    save_file(named_weights(), tmp_path / "same.safetensors")
    again = load_inception(tmp_path / "same.safetensors")
    assert again.identity() == named.identity() and again.name != named.name


def test_only_the_published_file_makes_it_fid(weights, monkeypatch):
    assert not load_inception(weights).published and load_inception(weights).called("FD") == "FD"
    monkeypatch.setattr(inception, "KNOWN", hashlib.sha256(weights.read_bytes()).hexdigest()[:8])  # as if this were the published file
    published = load_inception(weights)
    assert published.name.startswith("Inception 2015-12-05 (pool, ") and [published.called(name) for name in ("FD", "sFD", "KD")] == ["FID", "sFID", "KID"]


@pytest.mark.parametrize("name", ["pixels", "digits"])
def test_devices_are_checked_for_all_features(name):
    with pytest.raises(ValueError, match="'cpu' or 'cuda', got 'banana'"):
        named_features(name, device="banana")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            named_features(name, device="cuda")


def test_weights_errors_name_the_remedy(tmp_path, monkeypatch):
    monkeypatch.delenv("SEDM_INCEPTION", raising=False)
    with pytest.raises(ValueError, match=r"weights=.*SEDM_INCEPTION.*download_inception\(\).*pixels"):
        load_inception()
    monkeypatch.setenv("SEDM_INCEPTION", str(tmp_path / "nothing.pth"))
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        load_inception()
    state = named_weights()
    state["extra"] = state.pop("fc.bias")
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="2 tensors are missing, unknown or of another shape, such as fc.bias, extra"):
        load_inception(tmp_path / "wrong.pth")


class Command:
    "Would leave a file behind if a pickle were executed."
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_of_weights_is_not_executed(tmp_path):
    torch.save({"fc.weight": Command(tmp_path / "executed")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot read|no state dict"):
        load_inception(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_download_is_checked_kept_and_never_silent(tmp_path, monkeypatch):
    (tmp_path / "published.pth").write_bytes(b"weights")
    url = (tmp_path / "published.pth").as_uri()
    begins = hashlib.sha256(b"weights").hexdigest()[:8]
    found = download_inception(tmp_path / "kept", url, begins)
    assert found.read_bytes() == b"weights"
    (tmp_path / "published.pth").unlink()
    assert download_inception(tmp_path / "kept", url, begins) == found  # not fetched again
    with pytest.raises(OSError, match="could not fetch .*; download it by other means and name the file"):
        download_inception(tmp_path / "other", url, begins)
    assert not list((tmp_path / "other").iterdir())
    monkeypatch.delenv("SEDM_INCEPTION", raising=False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("downloaded without being asked"))
    with pytest.raises(ValueError):
        fid(*two_sets())


# ---- measures

def test_scores_carry_their_provenance(scores):
    assert {"FD", "sFD", "KD", "IS", "precision", "recall", "density", "coverage"} == set(scores)  # random weights: none is a FID
    assert "(2 blocks of 4 images; Inception V3, other weights" in repr(scores["IS"]) and scores["IS"].seeds == "0 to 7"
    for name, score in scores.items():
        if name == "IS":
            continue
        assert (score.measure, score.n, score.n_reference, score.seeds) == (name, 8, 8, "0 to 7") and score.error > 0
        assert "other weights" in score.variant


def test_inception_score_of_known_probabilities():
    sure = torch.eye(10).repeat(20, 1) * 50  # ten classes, equally often, without doubt
    assert inception_score(sure, splits=2).mean == pytest.approx(10, rel=0.05)
    assert inception_score(torch.zeros(40, 10)).mean == pytest.approx(1)
    with pytest.raises(ValueError, match="n >= splits >= 2"):
        inception_score(torch.zeros(5, 10))


def test_fid_takes_files_and_reference_statistics(weights, tmp_path):
    a, b = (side[:4] for side in two_sets())
    write_npz(tmp_path / "a.npz", a)
    features = load_inception(weights)
    rows = torch.cat([features(side) for side in (a, b)])
    write_moments(tmp_path / "reference.npz", FeatureStats.of(rows), features.name)
    with pytest.warns(UserWarning, match="4 images for 2048"):
        score = fid(tmp_path / "a.npz", tmp_path / "reference.npz", weights, unequal=True)
    assert score.measure == "FD" and score.n_reference == 8 and score.value > 0
    assert read_moments(tmp_path / "reference.npz").variant == features.name


def test_names_of_features(weights, monkeypatch):
    monkeypatch.setenv("SEDM_INCEPTION", str(weights))
    assert named_features("inception").name == load_inception(weights).name
    assert named_features("pixels").name == "pixels" and "digits" in named_features("digits").name
    with pytest.raises(ValueError, match="known: pixels, digits, patches, inception"):
        named_features("dino")
    monkeypatch.setitem(inception.__dict__, "download_inception", lambda: weights)
    assert named_features("inception", download=True).raw
