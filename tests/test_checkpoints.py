"Saving and loading: the same bits, and one clear error for every file that is not what it claims."
import json
import math
import os
import stat

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedm_kit import checkpoints
from sedm_kit.checkpoints import load_model, save_model, write_atomically, write_json
from sedm_kit.networks import EDMPrecond, PatchFeatures, PatchLogRatio, seeded


def build(kind="denoiser"):
    "A small network with random weights everywhere."
    with seeded(1):
        model = {"denoiser": lambda: EDMPrecond(8, 1, model_type="PatchNet", channels=8, blocks=1, sigma_data=0.7),
                 "log_ratio": lambda: PatchLogRatio(8, 1, channels=8, blocks=1, sigma_range=(0.05, 2.0)),
                 "features": lambda: PatchFeatures(8, 1, classes=3, channels=4)}[kind]()
        for tensor in model.state_dict().values():
            tensor.normal_()
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    "A checkpoint to spoil."
    path = tmp_path / "model.safetensors"
    save_model(build(), path, {"data": "none"})
    return path


def rewrite(path, change):
    "Change tensors of a checkpoint, with a card whose checksum agrees."
    tensors, card = safetensors.torch.load_file(path), json.loads(path.with_suffix(".json").read_text())
    change(tensors, card)
    data = safetensors.torch.save(tensors)
    card["sha256"] = checkpoints.hashlib.sha256(data).hexdigest()
    path.write_bytes(data)
    path.with_suffix(".json").write_text(json.dumps(card))


@pytest.mark.parametrize("kind", ["denoiser", "log_ratio", "features"])
def test_round_trip_is_bitwise(kind, tmp_path):
    model = build(kind)
    save_model(model, tmp_path / "a.safetensors", {"note": "x"})
    loaded, card = load_model(tmp_path / "a.safetensors")
    assert type(loaded) is type(model) and loaded.config == model.config and card["note"] == "x"
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    save_model(loaded, tmp_path / "b.safetensors", {"note": "x"})
    for suffix in (".safetensors", ".json"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_loaded_networks_calculate_the_same(tmp_path):
    x, model = torch.randn(3, 1, 8, 8), build()
    save_model(model, tmp_path / "a.safetensors", {})
    assert torch.equal(load_model(tmp_path / "a.safetensors")[0](x, 0.4), model(x, 0.4))


def test_loading_uses_no_random_numbers(saved):
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    load_model(saved)
    assert torch.equal(torch.randn(2), expected)


@settings(max_examples=25, deadline=None)
@given(content=st.dictionaries(st.text(max_size=5), st.one_of(
    st.integers(-2**40, 2**40), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5), st.none(), st.lists(st.floats(-1, 1), max_size=3)), max_size=4))
def test_any_plain_notes_survive(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("card") / "a.json"
    write_json(path, content)
    assert json.loads(path.read_text()) == content


def test_infinity_is_a_word_in_the_card_and_a_number_in_the_model(saved):
    text = saved.with_suffix(".json").read_text()
    assert '"sigma_max": "inf"' in text and "Infinity" not in text
    assert load_model(saved)[0].sigma_max == math.inf


@pytest.mark.parametrize("card, error", [({"loss": math.nan}, ValueError), ({"class": "x"}, ValueError), ({"when": object()}, TypeError)])
def test_a_card_that_cannot_be_written_writes_nothing(card, error, tmp_path):
    with pytest.raises(error):
        save_model(build(), tmp_path / "a.safetensors", card)
    assert list(tmp_path.iterdir()) == []


def test_other_classes_are_not_saved(tmp_path):
    class EDMPrecond(torch.nn.Linear): "An impostor by name."
    for model in (torch.nn.Linear(1, 1), EDMPrecond(1, 1)):
        with pytest.raises(TypeError, match="cannot save a .*known classes: EDMPrecond, .*PatchFeatures"):
            save_model(model, tmp_path / "a.safetensors", {})


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_written_files_can_be_read_by_others(tmp_path):
    write_atomically(tmp_path / "a.txt", b"x")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644


def test_missing_files(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors is missing"):
        load_model(tmp_path / "nothing.safetensors")
    saved.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match="model.json is missing"):
        load_model(saved)


def test_other_suffixes_are_refused(tmp_path):
    for action in (lambda path: load_model(path), lambda path: save_model(build(), path, {})):
        with pytest.raises(ValueError, match=r"must end in .safetensors, got '.*model.pkl'"):
            action(tmp_path / "model.pkl")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_truncation_is_one_clear_error(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / "model.safetensors"
    save_model(build("features"), path, {})
    whole = path.read_bytes()
    path.write_bytes(whole[:data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match="no complete safetensors file"):
        load_model(path)


@settings(max_examples=40, deadline=None)
@given(noise=st.binary(max_size=200))
def test_any_other_bytes_are_refused(noise, tmp_path_factory):
    path = tmp_path_factory.mktemp("noise") / "model.safetensors"
    save_model(build("features"), path, {})
    path.write_bytes(noise)
    with pytest.raises(ValueError, match="no complete safetensors file|does not belong"):
        load_model(path)


def test_a_pickle_is_not_executed(saved, tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "executed"),)
    torch.save(Evil(), saved)
    with pytest.raises(ValueError, match="no complete safetensors file"):
        load_model(saved)
    assert not (tmp_path / "executed").exists()


def test_one_flipped_bit_is_noticed(saved):
    data = bytearray(saved.read_bytes())
    data[-5] ^= 1
    saved.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="does not belong to its card"):
        load_model(saved)


def test_weights_and_card_of_different_models(saved, tmp_path):
    save_model(build("features"), tmp_path / "other.safetensors", {})
    saved.write_bytes((tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(ValueError, match="does not belong to its card"):
        load_model(saved)


FIRST = "model.head.bias"


@pytest.mark.parametrize("change, message", [
    (lambda t, c: t.pop(FIRST), "tensors missing model.head.bias"),
    (lambda t, c: t.update(extra=torch.zeros(1)), "tensors not expected extra"),
    (lambda t, c: t.update({FIRST: torch.zeros(5)}), r"of another shape or type: model.head.bias \(expected \(4,\) torch.float32, found \(5,\) torch.float32\)"),
    (lambda t, c: t.update({FIRST: torch.zeros(4, dtype=torch.float16)}), r"found \(4,\) torch.float16"),
    (lambda t, c: t.update({FIRST: torch.full((4,), math.nan)}), "not finite: model.head.bias"),
    (lambda t, c: t.clear(), "missing .* and 13 more"),
    (lambda t, c: t.update({f"x{i}": torch.zeros(1) for i in range(9)}), "not expected x0, x1, x2, x3, x4 and 4 more"),
])
def test_tensors_that_do_not_fit_are_named(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(saved)
    assert str(caught.value).startswith(f"{saved} does not fit the network")


@pytest.mark.parametrize("change, message", [
    (lambda t, c: c.update({"class": "os.system"}), "unknown class 'os.system'; known: EDMPrecond"),
    (lambda t, c: c.update({"class": ["EDMPrecond"]}), "unknown class"),
    (lambda t, c: c.pop("config"), "must be an object with a 'class' and a 'config'"),
    (lambda t, c: c["config"].update(surprise=1), "does not fit the class EDMPrecond: .*surprise"),
    (lambda t, c: c["config"].update(channels="many"), "does not fit the class EDMPrecond: .*channels"),
    (lambda t, c: c["config"].update(channels=60_000), "of another shape or type"),  # built without memory
    (lambda t, c: c["config"].update(model_type="eval"), "unknown model_type 'eval'"),
])
def test_hostile_cards(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=message):
        load_model(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_cards_that_are_no_cards(saved, text):
    saved.with_suffix(".json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="is not a"):
        load_model(saved)
