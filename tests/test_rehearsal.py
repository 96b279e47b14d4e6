"""Rehearsals: the mode follows from what is there, stand-ins have the real formats, and no number of a rehearsal can be taken for a result."""
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from sedm_kit.archives import read_file
from sedm_kit.checkpoints import PRECONDITIONINGS, build_without_memory, load_adm, load_discriminator, load_edm
from sedm_kit.diagnostics import eps_norms
from sedm_kit.discriminator import DiscriminatorGuidance
from sedm_kit.draws import ddpm_draw, sampler_draw
from sedm_kit.external import EXTERNAL, quoted_table
from sedm_kit.features import SeedBlocks, feature_stats, read_moments
from sedm_kit.generate import generate, kept_stats
from sedm_kit.images import open_images
from sedm_kit.metrics import Estimate, fd
from sedm_kit.networks import EDMPrecond
from sedm_kit.noise import ddpm_alphas_cumprod
from sedm_kit.rehearsal import (_SIZES, ADM_HIDDEN, NETWORKS, Stage, claims_table, like_edm, missing, mode, open_stage, photo_crops, stand_in_network, train_briefly,
                                write_edm_state, write_reference, write_stand_in)
from sedm_kit.resampling import Score


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch):
    for name in ("SEDM_MODE", "SEDM_FILES", "SEDM_OUT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def stage():
    return Stage("test", "rehearsal")


# ---- modes

def test_the_mode_follows_from_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert mode() == mode(["adm"]) == "rehearsal" and missing() == ["a CUDA device"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert mode() == "full" and mode(["adm"]) == "rehearsal"
    write_stand_in("adm", tmp_path / "ADM-baseline.pt")
    assert mode(["adm"], tmp_path) == "full" and missing(["adm"], tmp_path) == []
    monkeypatch.setenv("SEDM_FILES", str(tmp_path))
    assert mode(["adm"]) == "full" and mode(["adm", "adm-ip"]) == "rehearsal"
    (tmp_path / "ADM-baseline.pt").write_bytes((tmp_path / "ADM-baseline.pt").read_bytes()[:-9])
    assert mode(["adm"]) == "rehearsal" and "truncated" in missing(["adm"])[0]
    monkeypatch.setenv("SEDM_MODE", "dress")
    assert mode(["adm"]) == "dress"


def test_full_without_files_or_gpu_is_one_error(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SEDM_MODE", "full")
    with pytest.raises(ValueError) as error:
        open_stage("edm_baseline", needs=["cifar10", "edm-uncond"], folder=tmp_path)
    told = str(error.value)
    assert all(words in told for words in ("cifar-10-python.tar.gz: missing", EXTERNAL["edm-uncond"].address, "a CUDA device", "SEDM_FILES", "SEDM_MODE=rehearsal"))
    monkeypatch.setenv("SEDM_MODE", "dress")
    with pytest.raises(ValueError, match="needs a CUDA device"):
        mode()
    monkeypatch.setenv("SEDM_MODE", "ful")
    with pytest.raises(ValueError, match="SEDM_MODE must be one of full, dress, rehearsal, got 'ful'"):
        mode()
    monkeypatch.setenv("SEDM_MODE", " Rehearsal ")
    assert mode(["cifar10"]) == "rehearsal"
    with pytest.raises(ValueError, match="unknown file"):
        missing(["cifar"])


def test_a_full_stage_takes_real_files_only(tmp_path):
    stage = Stage("x", "full", tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no ADM-baseline.pt"):
        stage.path("adm")
    (tmp_path / "ADM-baseline.pt").write_bytes(b"x")
    assert stage.path("adm") == tmp_path / "ADM-baseline.pt"
    assert stage.out("a") == tmp_path / "out" / "x-full" / "a" and stage.n() == 50_000 and stage.pick(1, 2, 3) == 1
    assert Stage("x", "rehearsal", tmp_path).path("adm") != tmp_path / "ADM-baseline.pt"  # so that a rehearsal is the same everywhere
    with pytest.raises(ValueError, match="mode must be one of"):
        Stage("x", "half")


# ---- the formats

FULL = {"edm-uncond": (55_733_891, 425), "edm-cond": (55_735_299, 427), "stf-ncsnpp": (56_397_827, 432), "adm": (57_094_662, 494),
        "dg-classifier": (47_771_112, 255), "dg-uncond": (2_883_841, 71), "dg-cond": (3_395_841, 72)}  # of the published definitions


@pytest.mark.parametrize("name", FULL)
def test_full_sizes_are_the_published_ones(name):
    family, more = NETWORKS[name]
    cls, always, full, _ = _SIZES[family]
    network = build_without_memory(cls, {**always, **full, **more}, name)
    assert (sum(p.numel() for p in network.parameters()), len(network.state_dict())) == FULL[name]


def test_stand_ins_are_the_same_every_time(tmp_path):
    for name in NETWORKS:
        a, b = (stand_in_network(name).state_dict() for _ in range(2))
        assert all(torch.equal(a[key], b[key]) for key in a)
    a, b = (load_edm(write_stand_in("edm-uncond", tmp_path / file)).state_dict() for file in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(ValueError, match="no stand-in for the network 'cifar10'"):
        stand_in_network("cifar10")


def test_training_states_have_the_entries_of_their_makers(tmp_path):
    network = stand_in_network("stf")
    edm, stf = read_file(write_edm_state(tmp_path / "a.pt", network)), read_file(write_edm_state(tmp_path / "b.pt", network, stf=True))
    assert edm.keys() == {"net", "optimizer_state"} and stf.keys() == {"net", "optimizer_state", "step", "ema"}
    assert (tmp_path / "a.pt").read_bytes()[:2] == b"PK" and (tmp_path / "b.pt").read_bytes()[:1] == b"\x80"
    for path in (tmp_path / "a.pt", tmp_path / "b.pt"):
        loaded = load_edm(path)
        assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in network.state_dict().items())
    assert len(edm["optimizer_state"]["state"]) == len(list(network.parameters()))


@pytest.mark.parametrize("kind", PRECONDITIONINGS)
def test_every_denoiser_can_be_written_like_edms(kind):
    more = {"model_type": "DhariwalUNet", "model_channels": 64, "M": 50} if kind == "iDDPMPrecond" else {"model_type": "SongUNet", "model_channels": 8}
    model = PRECONDITIONINGS[kind](8, 3, channel_mult=[1], num_blocks=1, attn_resolutions=[], **more)
    tree = like_edm(model)
    assert type(tree).__name__ == kind and tree.state_dict().keys() == model.state_dict().keys()
    assert "torch_utils" not in sys.modules


def test_the_stages_files_go_through_the_kits_readers(stage):
    assert stage.images.shape == (3, 32, 32) and len(stage.images) == 320 and set(stage.images.labels.tolist()) == {0, 1}
    assert len(open_images(stage.path("cifar10"), part="test")) == 64
    with np.load(stage.path("fid-reference"), allow_pickle=False) as held:
        assert sorted(held.files) == ["mu", "sigma"] and held["mu"].shape == (12,) and held["sigma"].shape == (12, 12)
    assert fd(feature_stats(stage.images, stage.features), read_moments(stage.path("fid-reference"))) < 1e-9
    with pytest.raises(ValueError, match="no stand-in for Inception"):
        stage.path("inception")
    for name in NETWORKS:
        assert stage.path(name).name == EXTERNAL[name].file and stage.path(name) == stage.path(name)


def test_a_whole_chain_in_small(stage):
    denoiser = load_edm(stage.path("edm-cond"))
    guidance = DiscriminatorGuidance(load_discriminator(stage.path("dg-classifier"), stage.path("dg-cond"), class_conditional=True), weight=1.0)
    sigmas = stage.sigmas(3, denoiser)
    draws = [sampler_draw(denoiser, sigmas, solver="heun", guidance=given) for given in (None, guidance)]
    plain, guided = (draw(range(4)) for draw in draws)
    assert plain.shape == (4, 3, 32, 32) and not torch.equal(plain, guided)
    manifest = generate(draws[0], range(6), stage.out("plain"), micro_batch=4, features=stage.features, progress=False)
    assert manifest["count"] == 6 and kept_stats(stage.out("plain")).n == 6
    eps = load_adm(stage.path("adm-ip"), **ADM_HIDDEN)
    assert ddpm_draw(eps, ddpm_alphas_cumprod("cosine", 1000), 3, (3, 32, 32))(range(2)).shape == (2, 3, 32, 32)
    assert eps_norms(load_edm(stage.path("edm-uncond")), stage.images[:8], sigmas)["norm"].isfinite().all()


def test_references_hold_mu_and_sigma_only(tmp_path, stage):
    stats = feature_stats(stage.images, stage.features)
    write_reference(tmp_path / "a.npz", stats)
    read = read_moments(tmp_path / "a.npz")
    assert np.array_equal(read.mean, stats.mean) and np.array_equal(read.cov, stats.cov) and not read.variant


# ---- the dress rehearsal, with a tiny network

@pytest.mark.parametrize("classes", [0, 2])
def test_brief_training(classes):
    images, labels = photo_crops(32)
    model = EDMPrecond(32, 3, label_dim=classes, model_type="PatchNet", channels=8, blocks=1)
    before = [parameter.clone() for parameter in model.parameters()]
    average, record = train_briefly(model, open_images(images, labels=labels), minutes=0.01, batch=8, precision="fp32", probe=2, progress=False)
    assert type(average) is EDMPrecond and not all(map(torch.equal, before, model.parameters()))
    assert record["steps"] >= 1 and record["images_per_second"] > 0 and np.isfinite(record["loss"])
    assert record["seconds"] < 20
    json.dumps(record)


def test_a_dress_stage_trains_once_and_keeps_its_file(tmp_path, monkeypatch):
    calls = []

    def brief(network, images, minutes):
        calls.append((type(network).__name__, len(images), minutes))
        return network, {"steps": 1}
    monkeypatch.setattr("sedm_kit.rehearsal.train_briefly", brief)
    monkeypatch.setattr("sedm_kit.rehearsal._SIZES", {family: (cls, always, small, small) for family, (cls, always, _, small) in _SIZES.items()})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    stage = Stage("x", "dress", results=tmp_path, minutes=2.0)
    assert len(stage.images) == 10_000
    path = stage.path("edm-uncond")
    assert calls == [("EDMPrecond", 10_000, 2.0)] and stage.records == {"edm-uncond": {"steps": 1}}
    assert Stage("x", "dress", results=tmp_path).path("edm-uncond") == path and len(calls) == 1
    assert path.is_relative_to(tmp_path / "x-dress") and load_edm(path).img_resolution == 32
    assert load_adm(stage.path("adm"), **ADM_HIDDEN).image_size == 32 and len(calls) == 1
    real = tmp_path / "real"
    real.mkdir()
    (real / "ADM-IP.pt").write_bytes(b"real")
    assert Stage("x", "dress", real, tmp_path).path("adm-ip") == real / "ADM-IP.pt"


# ---- nothing can be mistaken

def words(figure):
    return [text.get_text() for text in figure.texts]


def test_lesser_modes_stamp_their_figures(tmp_path):
    for kind, expected in (("full", []), ("dress", ["DRESS REHEARSAL: not the paper's networks"]), ("rehearsal", ["REHEARSAL: random weights"])):
        stage = Stage("x", kind, results=tmp_path)
        figure, ax = plt.subplots()
        assert stage.stamp(ax) is figure and words(figure) == expected
        plt.close(figure)


QUOTED = quoted_table([{"solver": "Heun", "NFE": 35, "FID": 1.97}, {"solver": "Euler", "NFE": 35, "FID": 3.81}, {"solver": "Euler", "NFE": 13, "FID": None}], "somebody 2024")


def test_claims_and_measurements_stay_apart(tmp_path):
    ours = {("Heun", 35): SeedBlocks([2.01, 1.99, 2.03], 50_000, "FID", "", (0, 50_000, 100_000)), ("Euler", 35): Score("FID", 3.9, 0.02, 50_000, None, seeds="0 to 49999")}
    table = claims_table(QUOTED, ours, Stage("x", "full", results=tmp_path))
    assert [row["FID, quoted"] for row in table.rows] == [1.97, 3.81, None]
    first, second, third = table.rows
    assert first["measured"] == "2.01" and first["minimum"] == "1.99" and first["n"] == "3 x 50000" and "100000 to 149999" in first["seeds"] and "3 blocks" in first["spread"]
    assert second["measured"] == "3.9" and second["n"] == "50000" and second["minimum"] is None and third["measured"] is None
    for kind in ("dress", "rehearsal"):
        stage = Stage("x", kind, results=tmp_path)
        lesser = claims_table(QUOTED, ours, stage)
        assert [row["measured"] for row in lesser.rows] == [stage.note, stage.note, None]
        assert not any(number in repr(lesser) + lesser._repr_html_() for number in ("2.01", "1.99", "3.9 ", "3.9<"))
        assert [row["FID, quoted"] for row in lesser.rows] == [1.97, 3.81, None]


@pytest.mark.parametrize("found", [1.97, torch.tensor(1.97), {"value": 1.97}])
def test_bare_numbers_are_no_measurements(found, stage):
    with pytest.raises(TypeError, match="must bring its spread"):
        claims_table(QUOTED, {("Heun", 35): found}, stage)


def test_measurements_need_a_claim(stage):
    with pytest.raises(ValueError, match=r"measured, but not quoted: \('Heun', 21\)"):
        claims_table(QUOTED, {("Heun", 21): Estimate([1, 2], 3)}, stage)
    single = quoted_table([{"NFE": 35, "FID": 1.97}], "x")
    assert claims_table(single, {35: Estimate([1, 2], 3)}, stage).rows[0]["measured"] == "REHEARSAL"


def test_records_say_where_and_when(stage):
    record = stage.hardware()
    json.dumps(record)
    assert record["mode"] == "rehearsal" and record["device"].startswith("CPU") and len(record["date"]) == 10
    assert str(Path.home()) not in json.dumps(record)
