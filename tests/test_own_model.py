"""Studies of one's own model: the formats of EDM, ADM and DG and every kind of data set go through `study` and the command, and mistakes are said in one line."""
import tarfile
import zipfile
from dataclasses import replace

import edm_files as files
import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from sedm_kit import command
from sedm_kit.adm_discriminator import cosine_time
from sedm_kit.adm_unets import ADMUNet, HalfUNet
from sedm_kit.checkpoints import convert, load_edm
from sedm_kit.diagnostics import eps_norms
from sedm_kit.discriminator import SATURATION, DiscriminatorGuidance, vp_input
from sedm_kit.images import open_images, write_cifar_archive, write_edm_zip, write_folder, write_npz
from sedm_kit.networks import EDMPrecond
from sedm_kit.noise import edm_sigmas
from sedm_kit.report import figures
from sedm_kit.sampler import sample_seeds
from sedm_kit.study import Plan, open_world, study

SONG = dict(model_type="SongUNet", model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
HALF = dict(classifier_width=64, classifier_depth=1, classifier_attention_resolutions="8")
ADM = dict(image_size=8, model_channels=32, num_res_blocks=1, channel_mult=[1, 2], attention_resolutions=[2], num_head_channels=32,
           use_new_attention_order=True, resblock_updown=True)
TINY = dict(solvers=("euler",), steps=3, images=8, blocks=2, micro_batch=8, split_images=4, diagnostics=0)
WORDS = "--solver euler --steps 3 --images 8 --blocks 2 --micro-batch 8 --split-images 4 --diagnostics 0".split()


def random_weights(model, seed=0):
    "A network without zeros, whose answer depends on everything it is given."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            z = torch.randn(weight.shape, generator=generator)
            weight.copy_(z / weight[0].numel() ** 0.5 if weight.ndim > 1 else name.endswith("weight") + 0.1 * z)
    return model.eval()


def crops(n, size, seed=0):
    "Crops of two photographs in turn (n, 3, size, size) uint8, and the number of the photograph."
    photos, rng = load_sample_images().images, np.random.default_rng(seed)
    corners = rng.integers(0, np.array(photos[0].shape[:2]) - size, (n, 2))
    return torch.from_numpy(np.stack([photos[k % 2][y:y + size, x:x + size] for k, (y, x) in enumerate(corners)])).permute(0, 3, 1, 2), torch.arange(n) % 2


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Files in the formats that a user brings."
    home = tmp_path_factory.mktemp("own")
    images, labels = crops(60, 8)
    write_npz(home / "images.npz", images)
    write_edm_zip(home / "labelled.zip", images, labels)
    write_folder(home / "folder", images[:24])
    write_cifar_archive(home / "cifar.tar.gz", *crops(48, 32))
    for name, size, classes in (("edm", 8, 0), ("classes", 8, 2), ("large", 32, 2)):
        model = random_weights(EDMPrecond(size, 3, label_dim=classes, **SONG))
        files.write(home / f"{name}.pkl", {"ema": files.like_edm(model)})
    for name, size, head in (("", 8, dict(image_size=8)), ("-classes", 8, dict(image_size=8, condition=True, num_classes=2)), ("-16", 16, dict(image_size=8, in_channels=128))):
        torch.save(random_weights(HalfUNet(size, **HALF, out_channels=10), 1).state_dict(), home / f"classifier{name}.pt")
        torch.save(random_weights(HalfUNet(**{"in_channels": 64, "out_channels": 1} | HALF | head), 2).state_dict(), home / f"head{name}.pt")
    for name, classes in (("adm", None), ("adm-classes", 2)):
        torch.save(random_weights(ADMUNet(**ADM, num_classes=classes)).state_dict(), home / f"{name}.pt")
    return home


def plan(home, model="edm.pkl", data="images.npz", **more):
    "A tiny study of these files."
    paths = {key: str(home / more.pop(key)) for key in ("classifier", "discriminator") if key in more}
    return Plan(**{**TINY, **more}, **paths, model=str(home / model), data=str(home / data))


def by_sampler(results):
    return {row["sampler"]: row for row in results["table"]}


# ---- what works

@pytest.mark.parametrize("model, data, left_out", [("classes.pkl", "labelled.zip", set()), ("edm.pkl", "folder", set()), ("large.pkl", "cifar.tar.gz", {"principal axes", "ideal denoiser"})])
def test_diagnostics_of_ones_own_model(home, model, data, left_out):
    found = study(plan(home, model, data, diagnostics=8), progress=False)["diagnostics"]
    assert not found["failed"] and left_out <= set(found["skipped"]) and set(found["skipped"]) <= left_out | {"three phases", "normality, one step, held-out images"}
    assert set(found["norms"]["euler"]["arms"]) == {"plain", "ES"} and found["sizes"]["images"] == 8


def test_a_pickle_and_an_npz(home):
    results = study(plan(home), progress=False)
    assert list(by_sampler(results)) == ["plain", "plain + moment map", "ES"]  # nobody gave a discriminator
    assert results["plan"]["world"] == "edm" and results["card"]["denoiser"]["class"] == "EDMPrecond" and results["card"]["images"].endswith("images.npz")
    expected = sample_seeds(load_edm(home / "edm.pkl"), range(8), edm_sigmas(3), solver="euler", micro_batch=8)
    torch.testing.assert_close(results["previews"]["euler"]["plain"], expected, rtol=0, atol=0)


def test_classes_come_from_the_data_and_from_the_seeds(home):
    chosen = plan(home, "classes.pkl", "labelled.zip")
    world = open_world(chosen)
    source = open_images(home / "labelled.zip")
    assert sorted(world.train_labels.tolist() + world.held_out_labels.tolist()) == sorted(source.labels.tolist())
    for image, label in zip(world.train[:5], world.train_labels[:5]):  # each image keeps its own
        assert source.labels[(source[:] == image).flatten(1).all(1)].eq(label).all()
    results = study(chosen, progress=False)
    model, sigmas = load_edm(home / "classes.pkl"), edm_sigmas(3)
    torch.testing.assert_close(results["previews"]["euler"]["plain"], sample_seeds(model, range(8), sigmas, solver="euler", micro_batch=8), rtol=0, atol=0)
    norms = [eps_norms(model, world.train, sigmas, class_labels=labels, generator=torch.Generator().manual_seed(0))["norm"] for labels in (world.train_labels, 1 - world.train_labels)]
    assert (norms[0] - norms[1]).abs().max() > 1e-4  # so labels matter, and the study used the right ones:
    ours = sample_seeds(model, range(8), sigmas, solver="euler", micro_batch=8, class_labels=torch.zeros(8, dtype=torch.int64))
    assert not torch.equal(ours, results["previews"]["euler"]["plain"])


def test_a_cifar_archive_with_classes(home):
    world = open_world(plan(home, "large.pkl", "cifar.tar.gz"))
    assert world.shape == (3, 32, 32) and len(world.train) + len(world.held_out) == 40
    assert set(world.train_labels.tolist()) == {0, 1}
    norms = eps_norms(world.denoiser, world.train[:8], edm_sigmas(3), class_labels=world.train_labels[:8])
    images = sample_seeds(world.denoiser, range(4), edm_sigmas(3), micro_batch=8, shape=world.shape)
    assert norms["norm"].isfinite().all() and images.shape == (4, 3, 32, 32) and images.isfinite().all()


def test_an_adm_checkpoint(home, tmp_path):
    convert(home / "adm.pt", tmp_path / "adm.safetensors", image_size=8)
    chosen = plan(home, tmp_path / "adm.safetensors", "folder")
    results = study(chosen, progress=False)
    assert list(by_sampler(results)) == ["plain", "plain + moment map", "ES"] and results["card"]["denoiser"]["class"] == "Denoiser"
    cosine, linear = (open_world(replace(chosen, schedule=schedule)).denoiser.sigma_max for schedule in ("cosine", "linear"))
    assert 1e4 < cosine < 1e5 and 100 < linear < 200  # the noise at the end of the two chains


def test_an_adm_checkpoint_with_classes(home, tmp_path):
    convert(home / "adm-classes.pt", tmp_path / "adm.safetensors", image_size=8)
    world = open_world(plan(home, tmp_path / "adm.safetensors", "labelled.zip"))
    images, sigma = world.train[:4].double(), torch.tensor(1.0)
    assert world.denoiser.label_dim == 2
    a, b = (world.denoiser(images, sigma, labels) for labels in (torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)))
    assert (a - b).abs().amax((1, 2, 3)).min() > 1e-3
    assert sample_seeds(world.denoiser, range(4), edm_sigmas(3), micro_batch=8).isfinite().all()


def test_what_adms_file_does_not_show_is_asked_for(home, tmp_path, capsys):
    assert command.main(["study", *WORDS, "--model", str(home / "adm.pt"), "--data", str(home / "images.npz"), "--out", str(tmp_path / "out")]) == 2
    warned, told = capsys.readouterr().err.splitlines()
    assert "sedm convert" in told and "image_size" in told and told.startswith("sedm study: ")
    assert warned.startswith("sedm study: warning: ") and "does not show image_size=32, num_head_channels=32" in warned


@pytest.mark.parametrize("model, data, suffix", [("edm.pkl", "images.npz", ""), ("classes.pkl", "labelled.zip", "-classes"), ("classes.pkl", "labelled.zip", "")])
def test_discriminator_guidance_files_guide(model, data, suffix, home):
    chosen = plan(home, model, data, classifier=f"classifier{suffix}.pt", discriminator=f"head{suffix}.pt", w_dg=2.0)
    world = open_world(chosen)
    guided, plain = (sample_seeds(world.denoiser, range(8), edm_sigmas(3), solver="euler", micro_batch=8, guidance=guidance)
                     for guidance in (DiscriminatorGuidance(world.log_ratio["euler"], 2.0), None))
    assert not torch.equal(guided, plain)
    if not suffix:
        results = study(chosen, progress=False)
        assert list(by_sampler(results)) == ["plain", "plain + moment map", "ES", "DG", "SEDM-G++"]
        torch.testing.assert_close(results["previews"]["euler"]["DG"], guided, rtol=0, atol=0)


def test_files_for_64_pixels_are_told_the_cosine_schedules_time(home, tmp_path):
    write_npz(tmp_path / "images.npz", crops(10, 64)[0])
    files.write(tmp_path / "edm.pkl", {"ema": files.like_edm(random_weights(EDMPrecond(64, 3, **SONG)))})
    classifier, head = random_weights(HalfUNet(64, **HALF, out_channels=10), 1), random_weights(HalfUNet(8, **HALF, in_channels=256, out_channels=1), 2)
    torch.save(classifier.state_dict(), tmp_path / "64x64_classifier.pt")
    torch.save(head.state_dict(), tmp_path / "head.pt")
    world = open_world(plan(home, tmp_path / "edm.pkl", tmp_path / "images.npz", classifier=tmp_path / "64x64_classifier.pt", discriminator=tmp_path / "head.pt"))
    x, sigma = world.train[:1].double(), torch.tensor(0.5, dtype=torch.float64)
    u, tau = vp_input(x, sigma)
    time = cosine_time(tau)
    assert (time - tau).abs() > 0.02
    expected = head(classifier(u, time, features=True), time).flatten()
    _, L = DiscriminatorGuidance(world.log_ratio["euler"], 1.0)(x, sigma)
    torch.testing.assert_close(L.float(), expected.detach().clamp(-SATURATION, SATURATION), rtol=1e-4, atol=1e-5)


def test_a_discriminator_is_trained_on_request(home):
    results = study(plan(home, train_discriminator=10), progress=False)
    assert {"DG", "SEDM-G++"} <= by_sampler(results).keys()
    accuracy = results["card"]["log_ratio"]["euler"]["accuracy"]
    assert max(accuracy["accuracy"]) > 0.8  # noise and photographs are easy to tell apart
    assert "discriminators" in figures(results)


def test_the_command_writes_a_report(home, tmp_path, capsys):
    words = ["--model", str(home / "edm.pkl"), "--data", str(home / "folder"), "--out", str(tmp_path / "out")]
    assert command.main(["study", *WORDS, *words]) == 0
    assert "plain + moment map" in capsys.readouterr().out
    assert {"report.html", "results.json", "distances.png"} <= {path.name for path in (tmp_path / "out").iterdir()}


# ---- what does not: one line, status 2, nothing left behind

def cut(source, target, share=0.6):
    "The beginning of a file."
    target.write_bytes(source.read_bytes()[:int(share * source.stat().st_size)])


def mixed_sizes(folder):
    write_folder(folder, crops(2, 8)[0])
    write_folder(folder / "more", crops(2, 16)[0])


def spoiled(path, value):
    "A network with this value among its weights."
    model = random_weights(EDMPrecond(8, 3, **SONG))
    with torch.no_grad():
        model.model.dec["8x8_aux_conv"].weight.fill_(value)
    files.write(path, {"ema": files.like_edm(model)})


MADE = {  # name -> what puts it there
    "cut.pkl": lambda home, path: cut(home / "edm.pkl", path),
    "cut.pt": lambda home, path: cut(home / "adm.pt", path),
    "cut.npz": lambda home, path: cut(home / "images.npz", path),
    "cut.zip": lambda home, path: cut(home / "labelled.zip", path),
    "cut.tar.gz": lambda home, path: cut(home / "cifar.tar.gz", path),
    "empty": lambda home, path: path.mkdir(),
    "text.txt": lambda home, path: path.write_text("hello, world"),
    "texts": lambda home, path: (path.mkdir(), (path / "notes.txt").write_text("no image")),
    "mixed": lambda home, path: mixed_sizes(path),
    "other.tar": lambda home, path: tarfile.open(path, "w").close(),
    "other.zip": lambda home, path: zipfile.ZipFile(path, "w").close(),
    "no-network.pkl": lambda home, path: files.write(path, {"step": 1}),
    "grey.npz": lambda home, path: write_npz(path, crops(20, 8)[0][:, :1]),
    "16.npz": lambda home, path: write_npz(path, crops(20, 16)[0]),
    "labels.npz": lambda home, path: write_npz(path, crops(20, 8)[0], torch.arange(20) % 5),
    "one.npz": lambda home, path: write_npz(path, crops(1, 8)[0]),
    "nan.pkl": lambda home, path: spoiled(path, torch.nan),
    "overflow.pkl": lambda home, path: spoiled(path, 3e38)  # finite, but the answer is not,
}
MISTAKES = {  # what is wrong -> (options, part of the message)
    "no model file": ("--model missing.pkl --data images.npz", "no file at {made}/missing.pkl"),
    "model is a folder": ("--model folder --data images.npz", "folder"),
    "model is text": ("--model text.txt --data images.npz", "text.txt: it begins with b'hello, w"),
    "model is images": ("--model images.npz --data images.npz", "images.npz: it is a zip archive with 1 entries, but not one that torch.save wrote"),
    "model without a network": ("--model no-network.pkl --data images.npz", "it is no state dict, a dictionary of names and tensors; it holds a int"),
    "model is a classifier": ("--model classifier.pt --data images.npz", "classifier.pt holds a HalfUNet, which is no denoiser"),
    "truncated pickle": ("--model cut.pkl --data images.npz", "cannot read {made}/cut.pkl"),
    "truncated state dict": ("--model cut.pt --data images.npz", "damaged or cut off"),
    "model without data": ("--model edm.pkl", "a model and its data go together"),
    "data without model": ("--data images.npz", "a model and its data go together"),
    "classifier without discriminator": ("--model edm.pkl --data images.npz --classifier classifier.pt", "goes together with a discriminator"),
    "discriminator without classifier": ("--model edm.pkl --data images.npz --discriminator head.pt", "needs its feature extractor"),
    "discriminator for an embedded world": ("--classifier classifier.pt --discriminator head.pt", "goes with a model of your own"),
    "no classifier file": ("--model edm.pkl --data images.npz --classifier missing.pt --discriminator head.pt", "no file at {made}/missing.pt"),
    "no discriminator file": ("--model edm.pkl --data images.npz --classifier classifier.pt --discriminator missing.pt", "no file at {made}/missing.pt"),
    "a denoiser as discriminator": ("--model edm.pkl --data images.npz --classifier classifier.pt --discriminator edm.pkl", "edm.pkl"),
    "the two exchanged": ("--model edm.pkl --data images.npz --classifier head.pt --discriminator classifier.pt", "do not belong together"),
    "conditional discriminator, unconditional model": ("--model edm.pkl --data images.npz --classifier classifier-classes.pt --discriminator head-classes.pt",
                                                       "head-classes.pt does not fit {home}/edm.pkl: this network is conditional and needs labels of its 2 classes"),
    "discriminator of another size": ("--model edm.pkl --data images.npz --classifier classifier-16.pt --discriminator head-16.pt", "head-16.pt does not fit {home}/edm.pkl: expected images of shape (b, 3, 16, 16)"),
    "no data": ("--model edm.pkl --data missing", "there is no such file or folder"),
    "data is text": ("--model edm.pkl --data text.txt", "text.txt starts with b'hello, w'"),
    "data is a pickle": ("--model edm.pkl --data edm.pkl", "expected CIFAR-10's tar"),
    "truncated npz": ("--model edm.pkl --data cut.npz", "cut.npz"),
    "truncated zip": ("--model edm.pkl --data cut.zip", "cut.zip"),
    "truncated archive": ("--model large.pkl --data cut.tar.gz", "cut.tar.gz"),
    "an empty folder": ("--model edm.pkl --data empty", "empty"),
    "a folder without images": ("--model edm.pkl --data texts", "texts"),
    "images of mixed sizes": ("--model edm.pkl --data mixed", "mixed"),
    "another tar": ("--model edm.pkl --data other.tar", "other.tar"),
    "an empty zip": ("--model edm.pkl --data other.zip", "other.zip"),
    "wrong channels": ("--model edm.pkl --data grey.npz", "makes images of shape (3, 8, 8), but those of {made}/grey.npz have shape (1, 8, 8)"),
    "wrong size": ("--model edm.pkl --data 16.npz", "makes images of shape (3, 8, 8), but those of {made}/16.npz have shape (3, 16, 16)"),
    "one image": ("--model edm.pkl --data one.npz", "1"),
    "no labels for a conditional model": ("--model classes.pkl --data images.npz", "knows 2 classes, but {home}/images.npz has no labels"),
    "labels beyond the classes": ("--model classes.pkl --data labels.npz", "0 to 1, but {made}/labels.npz has the label 4"),
    "NaN among the weights": ("--model nan.pkl --data images.npz", "not finite"),
    "a model that answers NaN": ("--model overflow.pkl --data images.npz", "the denoiser returns values that are not finite"),
    "another schedule": ("--model adm.pt --data images.npz --schedule square", "square"),
    "negative training": ("--model edm.pkl --data images.npz --train-discriminator -5", "--train-discriminator: expected a whole number, 0 or above, got '-5'"),
    "two discriminators": ("--model edm.pkl --data images.npz --classifier classifier.pt --discriminator head.pt --train-discriminator 5", "either"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_give_one_line_and_leave_nothing(mistake, home, tmp_path, capsys):
    options, message = MISTAKES[mistake]
    words, made = options.split(), tmp_path / "made"
    made.mkdir()
    for i, word in enumerate(words):
        if not word.startswith("-") and words[i - 1] in ("--model", "--data", "--classifier", "--discriminator"):
            if word in MADE:
                MADE[word](home, made / word)
            words[i] = str((home if (home / word).exists() else made) / word)
    before = sorted(made.rglob("*"))
    capsys.readouterr()
    assert command.main(["study", *WORDS, *words, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert message.format(made=made, home=home) in told.err and told.err.startswith("sedm study: ") and told.err.count("\n") == 1 and not told.out
    assert not (tmp_path / "out").exists() and sorted(made.rglob("*")) == before


def test_labels_for_an_unconditional_model_are_refused(home):
    world = open_world(plan(home))
    with pytest.raises(ValueError, match="label"):
        world.denoiser(world.train[:2], torch.tensor(1.0), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="label"):
        sample_seeds(world.denoiser, range(2), edm_sigmas(3), class_labels=torch.tensor([0, 1]), micro_batch=8)


def test_labels_beside_images_do_not_disturb_an_unconditional_model(home):
    assert open_world(plan(home, "edm.pkl", "labelled.zip")).train_labels is not None
