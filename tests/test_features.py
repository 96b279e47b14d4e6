"Streams, files and comparisons of features."
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sedm_kit.command import main
from sedm_kit.features import (MEASURES, PIXELS, FeatureMap, choose, compare, compare_by, extract, feature_map, feature_stats, fingerprint, holds_moments, read_moments, same_images, seed_blocks,
                               write_moments)
from sedm_kit.images import open_images, write_edm_zip, write_folder, write_npz
from sedm_kit.metrics import FeatureStats, Moments, fd, fd_of_rows, real_floor
from sedm_kit.resampling import fd_infinity
from sedm_kit.two_samples import kid, neighbours


def pictures(n, seed=0, size=4):
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (n, 1, size, size))).float()


def linear(seed=0, size=16, width=3):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(size, width)).requires_grad_(False)


def test_any_function_or_network_is_a_feature_map():
    def brightness(images):
        return images.mean((2, 3))
    assert feature_map(brightness).name == "brightness" and feature_map(linear()).name == "Sequential"
    rows = extract(pictures(10), brightness, batch=3)
    torch.testing.assert_close(rows, pictures(10).mean((2, 3)))
    raw = FeatureMap("bytes", lambda images: images.flatten(1).float(), raw=True)
    assert extract((pictures(5) * 127 + 128).to(torch.uint8), raw).max() > 2
    torch.testing.assert_close(feature_stats(pictures(50), linear(), batch=7).cov, FeatureStats.of(linear()(pictures(50))).cov, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("function, message", [
    (lambda images: images, r"must be \(6, f\) for 6 images, got \(6, 1, 4, 4\)"),
    (lambda images: images[:2].flatten(1), r"got \(2, 16\)"),
    (lambda images: "no", "got str"),
    (lambda images: images.flatten(1) / 0, "NaN or infinite for 6 of 6 images; check the network"),
])
def test_features_that_are_none(function, message):
    with pytest.raises(ValueError, match=message):
        extract(pictures(6), FeatureMap("odd", function))
    with pytest.raises(ValueError, match="known: pixels, digits, patches"):
        extract(pictures(6), "dino")


def test_a_worlds_network_says_which_images_it_takes():
    assert feature_map("digits").shape == (1, 8, 8)
    with pytest.raises(ValueError, match="'network of the world digits' take images of 1x8x8, got 1x16x16; use pixels or inception, or resize"):
        compare(pictures(30, size=16), pictures(30, 1, size=16), "digits")


def test_only_the_published_inceptions_numbers_are_called_fid():
    published = FeatureMap("Inception 2015-12-05", PIXELS.function, published=True)
    assert [published.called(name) for name in ("FD", "sFD", "KD")] == ["FID", "sFID", "KID"] and PIXELS.called("KD") == "KD"
    found, _ = compare_by(pictures(200), pictures(200, 1), published)
    assert [found[name].measure for name in found] == ["FID", "FID", "FID", "KID"]
    assert seed_blocks({0: pictures(40), 40: pictures(40, 1)}, pictures(90, 2), published, n=40).measure == "FID"


def test_fingerprints_see_every_weight_and_the_class():
    network = linear()
    before = fingerprint(network)
    assert before == fingerprint(linear()) != fingerprint(linear(1))
    with torch.no_grad():
        network[1].bias[0] += 1e-6
    assert fingerprint(network) != before


def test_kept_features_are_found_again_and_only_for_the_same_images_and_network(tmp_path):
    calls = []

    class Counting(torch.nn.Linear):
        def forward(self, images):
            calls.append(len(images))
            return super().forward(images.flatten(1))
    torch.manual_seed(0)
    network = Counting(16, 2).requires_grad_(False)
    first = extract(pictures(9), network, folder=tmp_path / "new")
    assert torch.equal(extract(pictures(9), network, folder=tmp_path / "new"), first) and calls == [9]
    extract(pictures(9, 1), network, folder=tmp_path / "new")
    with torch.no_grad():
        network.weight += 1
    assert not torch.equal(extract(pictures(9), network, folder=tmp_path / "new"), first)
    assert calls == [9, 9, 9] and len(list((tmp_path / "new").iterdir())) == 3
    with pytest.raises(ValueError, match="give it a key="):
        extract(pictures(9), lambda images: images.flatten(1), folder=tmp_path)


def test_a_stale_or_broken_file_is_refused(tmp_path):
    extract(pictures(9), linear(), folder=tmp_path)
    extract(pictures(9, 1), linear(), folder=tmp_path)
    one, two = tmp_path.iterdir()
    one.write_bytes(two.read_bytes())
    one_set, other_set = (0, 1)
    refused = 0
    for seed in (one_set, other_set):
        try:
            extract(pictures(9, seed), linear(), folder=tmp_path)
        except ValueError as error:
            refused += "of other images or of another network" in str(error) and "delete it" in str(error)
    assert refused == 1
    two.write_bytes(two.read_bytes()[:20])
    one.write_bytes(b"")
    for seed in (0, 1):
        with pytest.raises(ValueError, match="no complete file of features"):
            extract(pictures(9, seed), linear(), folder=tmp_path)
    save_file({"features": torch.zeros(9, 3)}, one)
    save_file({"features": torch.zeros(9, 3)}, two)
    with pytest.raises(ValueError, match="delete it to compute them again"):
        extract(pictures(9), linear(), folder=tmp_path)


def test_nothing_half_written_is_left_behind(tmp_path):
    def fails(images):
        raise RuntimeError("out of memory")
    with pytest.raises(ValueError, match=r"'fails' fail on torch.float32 images of shape \(1, 4, 4\): out of memory"):
        extract(pictures(9), FeatureMap("fails", fails, key="1"), folder=tmp_path)
    assert not list(tmp_path.iterdir())


# ---- reference statistics

def test_moments_go_to_a_file_and_back(tmp_path):
    stats = FeatureStats.of(pictures(30))
    write_moments(tmp_path / "a.npz", stats, "pixels", spatial=FeatureStats.of(pictures(30)[:, :, :2]))
    read = read_moments(tmp_path / "a.npz")
    assert torch.equal(read.mean, stats.mean) and torch.equal(read.cov, stats.cov) and (read.n, read.variant) == (30, "pixels")
    assert read_moments(tmp_path / "a.npz", spatial=True).dim == 8
    np.savez(tmp_path / "edm.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert (read_moments(tmp_path / "edm.npz").n, read_moments(tmp_path / "edm.npz").variant) == (None, "")
    assert holds_moments(tmp_path / "edm.npz") and not holds_moments(tmp_path) and not holds_moments(tmp_path / "none")


@pytest.mark.parametrize("arrays, message", [
    (dict(mu=np.zeros(3)), "holds mu, but not mu and sigma|but not sigma"),
    (dict(mu=np.zeros(3), sigma=np.eye(2)), r"got \(3,\) and \(2, 2\)"),
    (dict(mu=np.zeros(2), sigma=np.array([[1, np.nan], [np.nan, 1]])), "holds NaN"),
    (dict(mu=np.array([None, None]), sigma=np.eye(2)), "no npz of reference statistics"),
    (dict(mu=np.zeros(2, int), sigma=np.eye(2)), "not floats"),
    (dict(mu=np.zeros(16), sigma=-np.eye(16)), "odd.npz.*no covariance: its eigenvalues reach from -1 to -1.*expected none below 0"),
])
def test_reference_files_that_are_none(tmp_path, arrays, message):
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_moments(tmp_path / "odd.npz")


def test_truncated_and_missing_references(tmp_path):
    write_moments(tmp_path / "a.npz", FeatureStats.of(pictures(30)), "pixels")
    content = (tmp_path / "a.npz").read_bytes()
    for cut in (0, 10, len(content) // 2, len(content) - 30):
        (tmp_path / "cut.npz").write_bytes(content[:cut])
        with pytest.raises(ValueError, match="cut.npz"):
            read_moments(tmp_path / "cut.npz")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_moments(tmp_path / "nowhere.npz")
    np.savez(tmp_path / "moments.npz", mu=np.zeros(16), sigma=np.eye(16))
    with pytest.raises(ValueError, match="but not mu_s and sigma_s"):
        read_moments(tmp_path / "moments.npz", spatial=True)


# ---- comparisons

def test_the_same_images_in_a_folder_a_zip_and_an_npz_are_at_distance_zero(tmp_path):
    images = (pictures(40) * 127 + 128).to(torch.uint8)
    write_npz(tmp_path / "a.npz", images)
    write_folder(tmp_path / "a", images)
    score = compare(tmp_path / "a.npz", tmp_path / "a")
    assert score.value == pytest.approx(0, abs=1e-9) and (score.n, score.n_reference, score.variant) == (40, 40, "pixels")


def test_equal_numbers_are_enforced_and_n_chooses_as_edm_does():
    a, b = pictures(60), pictures(50, 1)
    with pytest.raises(ValueError, match=r"60 images against 50.*n=50 of both, or allow it \(unequal=True, --unequal\)"):
        compare(a, b)
    assert compare(a, b, unequal=True).n == 60
    order = np.arange(60)
    np.random.RandomState(3).shuffle(order)
    expected = fd(FeatureStats.of(a[np.sort(order[:50])]), FeatureStats.of(b))
    assert compare(a, b, n=50, seed=3).value == pytest.approx(expected)
    with pytest.raises(ValueError, match="holds 50 images, cannot take n=55"):
        compare(a, b, n=55)


def test_several_measures_are_those_of_the_library():
    a, b, more = pictures(200), pictures(200, 1), pictures(430, 1)
    found, left_out = compare_by(a, b, measures=MEASURES)
    assert left_out == {} and list(found) == list(MEASURES)
    assert found["fd"] == compare(a, b) and found["kid"] == kid(a, b, variant="pixels", seeds="") and found["precision"] == neighbours(a, b, variant="pixels")
    rng, notes = torch.Generator().manual_seed(0), dict(measure="FD", variant="pixels")
    cut = [side[torch.randperm(200, generator=rng)].view(5, 40, -1) for side in (a, b)]
    assert found["infinity"] == fd_infinity(*cut, (1, 2), **notes) and found["floor"] == real_floor(b.flatten(1), 100, reference="others", **notes)
    only, _ = compare_by(a, b, measures=["kid"])
    assert list(only) == ["kid"]
    wide, left_out = compare_by(a, more, n=200, seed=2)  # 200 compared, 200 others beside them
    assert wide["floor"].block_size == 200 and "precision" not in wide and left_out == {}
    picked = torch.cat([choose(open_images(more), 200, 2)[:], choose(open_images(more), 200, 2, skip=200)[:]])
    assert len(picked.flatten(1).unique(dim=0)) == 400 and wide["floor"] == real_floor(picked.flatten(1), 200, seed=2, reference="others", measure="FD", variant="pixels")


def test_files_in_the_order_of_classes_are_shuffled_before_they_are_cut():
    level = torch.arange(10).repeat_interleave(40)[:, None, None, None] / 8 - 0.6  # ten classes, one after the other
    a, b = (0.3 * pictures(400, seed) + level for seed in (0, 1))
    found = compare_by(a, b, measures=["infinity"])[0]["infinity"]
    mixed = torch.randperm(400, generator=torch.Generator().manual_seed(9))
    shuffled = compare_by(a[mixed], b[mixed.flip(0)], measures=["infinity"])[0]["infinity"]
    assert abs(found.mean - shuffled.mean) < 3 * np.hypot(found.error, shuffled.error) and abs(found.mean) < found.ci
    in_order = fd_infinity(a.view(5, 80, -1), b.flip(0).reshape(5, 80, -1), (1, 2))  # what it was without
    assert abs(in_order.mean) > 10 * abs(found.mean)
    assert compare_by(a, b, measures=["infinity"], seed=1)[0]["infinity"] != found


def test_every_measure_names_features_and_numbers():
    found, _ = compare_by(pictures(200), pictures(200, 1), measures=MEASURES, seeds="0-199")
    assert all("pixels" in repr(one) for one in found.values())
    assert repr(found["floor"]).startswith("FD ") and "(5 blocks of 100 images; pixels)" in repr(found["floor"])
    assert "(5 blocks of 40 images; pixels; seeds 0-199)" in repr(found["infinity"]) and repr(found["kid"]).startswith("KD ")
    assert "(200 images against 200 images; pixels; k = 3; seeds 0-199)" in repr(found["precision"]) and repr(found["precision"]).count(" ± ") == 4


def test_the_same_images_as_floats_and_bytes_are_recognised():
    a, b = pictures(300), pictures(300, 1)
    with pytest.warns(UserWarning, match="^KD -.* is far below zero.*look like the same images"):
        compare_by(a, (a * 127.5 + 127.5).to(torch.uint8))
    with pytest.warns(UserWarning, match="^FD 0.0.* is far below the .* that independent real images show"):
        compare_by(a, (a * 127.5 + 127.5).to(torch.uint8), measures=["fd", "floor"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_images(compare_by(a, b)[0]) == "" and same_images(compare_by(a, a)[0]) == ""
        for seed in range(20):  # independent sets, heavy tails too
            compare_by(pictures(60, 2 * seed) ** 9, pictures(60, 2 * seed + 1) ** 9, measures=["fd", "floor", "kid"])


def test_references_that_do_not_say_what_they_are(tmp_path):
    np.savez(tmp_path / "plain.npz", mu=np.zeros(16), sigma=np.eye(16) / 3)
    with pytest.warns(UserWarning, match="plain.npz does not say of which features its statistics are; .*'pixels'"):
        compare(pictures(30), tmp_path / "plain.npz")
    with pytest.warns(UserWarning, match="does not say of which features"):
        seed_blocks({0: pictures(30), 30: pictures(30, 1)}, tmp_path / "plain.npz", n=30)
    write_moments(tmp_path / "known.npz", FeatureStats.of(pictures(50, 1)), "pixels")
    with pytest.warns(UserWarning, match=r"30 images against statistics of 50: .*unequal=True, --unequal"):
        score = compare(pictures(30), tmp_path / "known.npz")
    assert "30 images against 50 images" in repr(score)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compare(pictures(30), tmp_path / "known.npz", unequal=True) == score and compare(pictures(50), tmp_path / "known.npz").n == 50


def test_measures_that_cannot_be_had_are_named_before_features_are_computed(monkeypatch):
    exact = Moments(np.zeros(16), np.eye(16) / 3)
    found, left_out = compare_by(pictures(200), exact)
    assert list(found) == ["fd", "infinity"] and set(left_out) == {"floor", "kid"}
    found, left_out = compare_by(pictures(60), pictures(60, 1))
    assert list(found) == ["fd", "floor", "kid"] and "at least 170 are needed in 16 dimensions" in left_out["infinity"]
    with pytest.warns(UserWarning, match="16 images for 16 feature dimensions"):
        assert "needs at least 32 real images, and there are 16" in compare_by(pictures(16), pictures(16, 1))[1]["floor"]
    monkeypatch.setattr("sedm_kit.features.PAIRS", 100)
    assert "ask for it by name" in compare_by(pictures(200), pictures(200, 1))[1]["kid"] and "kid" in compare_by(pictures(200), pictures(200, 1), measures=["kid"])[0]
    monkeypatch.setattr("sedm_kit.features.extract", lambda *a, **k: pytest.fail("work had started"))
    for measures, message in ((["precision"], "precision cannot be had: it compares single images"), ([], "got none"), (["fid"], "got 'fid'")):
        with pytest.raises(ValueError, match=message):
            compare_by(pictures(200), exact, measures=measures)


def test_what_cannot_be_compared(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(1, 5, 5\), expected \(1, 4, 4\)"):
        compare(pictures(30), pictures(30, size=5))
    with pytest.raises(ValueError, match="expected uint8 pixels, or floats"):
        compare(pictures(30), np.zeros((30, 1, 4, 4), np.int64))
    with pytest.raises(ValueError, match="the reference has 3 feature dimensions, 'pixels' has 16"):
        compare(pictures(30), Moments(np.zeros(3), np.eye(3)))
    with pytest.raises(ValueError, match="holds features 'Inception', the images would get 'pixels'"):
        compare(pictures(30), Moments(np.zeros(16), np.eye(16), variant="Inception"))
    with pytest.warns(UserWarning, match="10 images for 16 feature dimensions"):
        compare(pictures(10), pictures(10, 1))


def test_blocks_give_mean_error_and_minimum():
    blocks, reference = {seed: pictures(40, seed) for seed in (0, 40, 80)}, FeatureStats.of(pictures(400, 7))
    found = seed_blocks(blocks, reference, n=40)
    values = [fd(FeatureStats.of(images), reference) for images in blocks.values()]
    assert found.values == pytest.approx(values) and found.minimum == pytest.approx(min(values)) and found.mean > found.minimum
    assert found.as_dict()["seeds"] == [0, 40, 80] and repr(found).startswith("FD ")
    assert "(3 blocks of 40 images; pixels; minimum " in repr(found) and "seeds 0 to 39, 40 to 79, 80 to 119)" in repr(found)
    assert seed_blocks(blocks, pictures(400, 7), n=40).values == pytest.approx(values)
    with pytest.raises(ValueError, match=r"do not overlap .*at least n=50 apart\), got \[0, 40, 80\]"):
        seed_blocks(blocks, reference, n=50)
    with pytest.raises(ValueError, match="the block of seed 40 has 39 images, expected n=40"):
        seed_blocks(blocks | {40: pictures(39)}, reference, n=40)


def test_sources_are_taken_as_they_are():
    source = open_images(pictures(30)).subset(range(20))
    assert compare(source, pictures(20, 1)).n == 20


# ---- the command

def test_the_command_prints_value_error_n_variant_and_seeds(tmp_path, capsys):
    images = (pictures(60, size=8) * 127 + 128).to(torch.uint8)
    write_npz(tmp_path / "a.npz", images[:40])
    write_folder(tmp_path / "b", images[20:])
    write_edm_zip(tmp_path / "c.zip", images[20:])
    write_moments(tmp_path / "d.npz", FeatureStats.of(pictures(200, size=8)), "pixels")
    for other in ("b", "c.zip", "d.npz"):
        assert main(["fid", str(tmp_path / "a.npz"), str(tmp_path / other), "--features", "pixels", "--seeds", "0-39", "--measures", "fd"]) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()[::2]
    assert lines[0] == lines[1] != lines[2] and lines[0].startswith("FD ") and " ± " in lines[0]
    assert "40 images against 40 images; pixels; seeds 0-39" in lines[0] and "against 200 images" in lines[2]
    warned = told.err.splitlines()
    few = [line.startswith("sedm fid: warning: 40 images for 64 feature dimensions: ") and "KID" in line for line in warned]
    assert len(warned) == 4 and sum(few) == 3 and sum("40 images against statistics of 200" in line for line in warned) == 1
    assert main(["fid", str(tmp_path / "a.npz"), str(tmp_path / "b"), "--features", "digits", "--n", "30", "--cache", str(tmp_path / "kept")]) == 0
    assert len(list((tmp_path / "kept").iterdir())) == 2 and "  without floor: it needs at least 60 real images, and there are 40" in capsys.readouterr().out.splitlines()


def test_the_command_says_what_else_must_be_known(tmp_path, capsys):
    write_npz(tmp_path / "a.npz", (pictures(200) * 127 + 128).to(torch.uint8))
    write_npz(tmp_path / "b.npz", (pictures(500, 1) * 127 + 128).to(torch.uint8))
    write_moments(tmp_path / "c.npz", feature_stats(tmp_path / "b.npz"), "pixels")
    call = lambda *words: (main(["fid", *(str(tmp_path / word) if word.endswith("npz") else word for word in words), "--features", "pixels"]), capsys.readouterr())
    status, told = call("a.npz", "b.npz", "--n", "200")
    assert status == 0 and told.err == ""
    first, bias, floor, infinity, kernel = told.out.splitlines()
    assert first.startswith("FD ") and "(200 images against 200 images; pixels; seeds not recorded)" in first and "bias" in bias and "standard error" in bias
    assert floor.startswith("  floor: 200 real images against 200 others show FD ") and "about" not in floor
    assert infinity.startswith("  extended to infinitely many images: FD ") and "on both sides; from 5 blocks of 40" in infinity
    assert kernel.startswith("  KD ") and " ± " in kernel and kernel.endswith("which has no such bias") and all("; pixels)" in line for line in (floor, infinity))
    status, told = call("b.npz", "b.npz")
    assert status == 0 and told.out == "FD 0 (500 images against 500 images; pixels; seeds not recorded)\n  both sides hold the same images\n" and told.err == ""
    _, told = call("a.npz", "c.npz")
    assert "against 500 images" in told.out and "the bias of the reference stays" in told.out
    assert [line.split(":")[0] for line in told.out.splitlines()[-2:]] == ["  without floor", "  without kid"] and "mean and covariance" in told.out
    status, told = call("a.npz", "b.npz", "--unequal", "--measures", "kid,precision")
    assert status == 0 and told.out.startswith("KD ") and told.out.count(" ± ") == 5 and "200 images against 500 images" in told.out and "recall 0." in told.out and "coverage 0." in told.out
    status, told = call("a.npz", "b.npz", "--n", "120", "--measures", "floor")
    assert told.out.startswith("  floor: 120 real images against 120 others") and told.out.count("\n") == 1
    _, told = call("b.npz", "a.npz", "--unequal")
    assert "floor: 100 real images against 100 others" in told.out and "falling like 1/n" in told.out and "for 200" in told.out


def test_the_commands_mistakes_cost_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SEDM_INCEPTION", raising=False)
    write_npz(tmp_path / "a.npz", (pictures(30) * 127 + 128).to(torch.uint8))
    write_npz(tmp_path / "b.npz", (pictures(20) * 127 + 128).to(torch.uint8))
    write_npz(tmp_path / "c.npz", (torch.rand(30, 3, 4, 4) * 255).to(torch.uint8))
    np.savez(tmp_path / "d.npz", mu=np.zeros(9), sigma=np.eye(9))
    for words, message in [(["a.npz", "a.npz"], "--weights FILE or in the environment variable SEDM_INCEPTION, or let --download"), (["a.npz", "a.npz", "--features", "vgg"], "--features: unknown 'vgg'; known: inception, pixels, digits, patches"),
                           (["a.npz", "a.npz", "--features", "pixels", "--measures", "fd,fid"], "--measures: unknown 'fid'; known: fd, floor, infinity, kid, precision"), (["a.npz", "a.npz", "--n", "1"], "--n: expected a whole number, 2 or above, got '1'"),
                           (["a.npz", "b.npz", "--features", "pixels", "--n", "20", "--measures", "infinity"], "infinity cannot be had: 20 images are too few to extend: at least 170"),
                           (["a.npz", "a.npz", "--features", "pixels", "--measures", "fd,fd"], "different ones of"), (["a.npz", "a.npz", "--seed", "-1"], "--seed"), (["a.npz"], "required: real"), (["a.npz", "b.npz", "--features", "pixels"], "--unequal"),
                           (["a.npz", "c.npz", "--features", "pixels"], "expected (1, 4, 4)"), (["a.npz", "d.npz", "--features", "pixels"], "9 feature dimensions"),
                           (["c.npz", "c.npz", "--features", "digits"], "take images of 1x8x8, got 3x4x4"), (["a.npz", "e.npz", "--features", "pixels"], "no such file"),
                           (["d.npz", "a.npz", "--features", "pixels"], "expected exactly one of")]:
        assert main(["fid", *(str(tmp_path / word) if word.endswith("npz") else word for word in words)]) == 2
        complaint = capsys.readouterr().err
        assert message in complaint and complaint.count("\n") == 1, complaint
