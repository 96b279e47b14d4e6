"Runs that are killed, continued, spoilt or shared between processes: sedm_kit.train_state and the machinery of sedm_kit.training."
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import sedm_kit.training as training
from sedm_kit.checkpoints import load_model
from sedm_kit.networks import seeded
from sedm_kit.train_loss import Objective
from sedm_kit.train_state import cut_lines, data_sha256, describe, read_lines, read_state
from sedm_kit.training import train_denoiser
from sedm_kit.weights import loss_weight
from tiny import images, small

ROOT = Path(__file__).parent.parent


def weights(model):
    return torch.cat([value.detach().flatten() for value in model.state_dict().values()])


SETTINGS = dict(steps=40, batch=8, checks=8, held_out=images(16, seed=1), gamma=0.1, reference=16, seed=3, snapshot=6, progress=False)


def run(out=None, resume=False, **settings):
    model = small()
    average, history = train_denoiser(model, images(), **{**SETTINGS, **settings}, out=out, resume=resume)
    return weights(model), weights(average), history


def stop_at(monkeypatch, name, call):
    "Let a function of the trainer fail at its n-th call, as if the process had been killed there."
    original, calls = getattr(training, name), [0]
    def stopped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)
    monkeypatch.setattr(training, name, stopped)


def same(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]


@pytest.fixture(scope="module")
def uninterrupted():
    return run()


def test_ten_kills_at_random_points(tmp_path, monkeypatch, uninterrupted):
    "Each run is killed inside a step, between two states, or while a state is being written."
    chance = random.Random(0)
    for number in range(10):
        place, most = chance.choice([("update_average", 40), ("_check_finite", 40), ("save_state", 7), ("append_line", 8)])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(patch, place, chance.randint(1, most))
            run(tmp_path / str(number))
        assert same(run(tmp_path / str(number), resume=True), uninterrupted), (number, place)
        assert [entry["step"] for entry in read_lines(tmp_path / str(number) / "log.jsonl")] == [5, 10, 15, 20, 25, 30, 35, 40]


def test_many_kills_of_one_run(tmp_path, monkeypatch, uninterrupted):
    for call in (9, 8, 13):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(patch, "update_average", call)
            run(tmp_path, resume=True)
    assert same(run(tmp_path, resume=True), uninterrupted)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_resume, sedm_kit.{module} as module
calls, original = [0], {original}
def deadly(*args, **kwargs):
    calls[0] += 1
    if calls[0] == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
{original} = deadly
test_resume.run({folder!r}, resume=True)
"""


def python(code, **environment):
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, stderr=subprocess.PIPE, text=True)


def test_two_real_kills(tmp_path, uninterrupted):
    "SIGKILL in the middle of a step, and between a state's last byte and its change of name."
    for module, original, call in (("training", "module.update_average", 23), ("checkpoints", "os.replace", 8)):
        process = python(KILLED.format(tests=str(ROOT / "tests"), module=module, original=original, call=call, folder=str(tmp_path)))
        _, error = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, error
    assert list(tmp_path.glob(".*"))  # the second kill left a torn file behind
    assert same(run(tmp_path, resume=True), uninterrupted)
    assert not list(tmp_path.glob(".state.pt.*"))


def test_resume_with_classes_and_half_precision(tmp_path, monkeypatch):
    labels = torch.arange(64) % 4
    def conditional(out, resume=False):
        model = small(label_dim=4)
        return weights(train_denoiser(model, images(), steps=12, batch=8, labels=labels, held_out=(images(8, seed=2), labels[:8]), precision="fp16", checks=3,
                                      reference="all", ema_half_life=100, lr_ramp=50, sanitise=True, snapshot=5, progress=False, out=out, resume=resume)[0])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, "update_average", 8)
        conditional(tmp_path / "a")
    assert torch.equal(conditional(tmp_path / "a", resume=True), conditional(tmp_path / "b"))


def test_a_finished_run_is_read_again(tmp_path, uninterrupted):
    assert same(run(tmp_path), uninterrupted)
    assert same(run(tmp_path, resume=True), uninterrupted)
    model, card = load_model(tmp_path / "denoiser.safetensors")
    assert torch.equal(weights(model), uninterrupted[1]) and card["training"]["gamma"] == 0.1 and card["step"] == 40
    first = read_lines(tmp_path / "log.jsonl")[0]
    assert first["images"] == 40 and first["images_per_second"] > 0 and first["held_out"] == uninterrupted[2]["held_out"][0]
    assert json.loads((tmp_path / "settings.json").read_text())["reference"] == 16
    rates = [entry["lr"] for entry in read_lines(tmp_path / "log.jsonl")]
    assert rates == [training.cosine_lr(step - 1, 40, 2e-3) for step in range(5, 41, 5)] and rates[-1] > 0  # of the step before


def test_the_pace_is_that_of_the_steps_alone(tmp_path):
    def slow(step, average):
        time.sleep(0.5)
    run(tmp_path, steps=4, checks=4, on_check=slow, snapshot=1)
    assert min(entry["images_per_second"] for entry in read_lines(tmp_path / "log.jsonl")[1:]) > 8 / 0.5


def test_a_folder_is_not_overwritten(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(ValueError, match="holds a run already: give resume=True"):
        run(tmp_path, steps=2)


@pytest.mark.parametrize("changes, named", [({"batch": 16}, "batch = 8 .now 16."), ({"gamma": 0.2}, "gamma = 0.1 .now 0.2."), ({"seed": 4}, "seed = 3"),
                                            ({"weight": "debias"}, "weight = 'edm' .now 'debias'.")])
def test_another_run_is_refused(tmp_path, changes, named):
    run(tmp_path, steps=2)
    with pytest.raises(ValueError, match=f"belongs to another run: it has .*{named}"):
        run(tmp_path, **{"steps": 2, **changes}, resume=True)


def test_settings_name_functions_the_same_way_in_every_process():
    objective = Objective(weight=functools.partial(schemed, "p2", k=2.0), gamma=half, alphas_cumprod=[0.9, 0.5])
    plain = describe(vars(Objective(alphas_cumprod=[0.9, 0.5])))
    assert describe(vars(objective)) == {**plain, "weight": "test_resume.schemed, given ('p2',) {'k': 2.0}", "gamma": "test_resume.half"}
    assert len(plain["alphas_cumprod"]) == 64 and describe({"weight": {"name": "p2", "k": 2}}) == {"weight": {"name": "p2", "k": 2}}


class Schedule:
    def __call__(self, sigma):
        return 0.1 * sigma

    at = __call__


@pytest.mark.parametrize("settings", [dict(weight=lambda sigma, sigma_data: sigma), dict(gamma=lambda sigma: 0.1), dict(gamma=Schedule()), dict(gamma=Schedule().at),
                                      dict(weight=functools.partial(lambda k, sigma, sigma_data: sigma, 1))], ids=repr)
def test_functions_without_a_name_are_refused_for_a_run_that_leaves_a_state(tmp_path, settings):
    with pytest.raises(ValueError, match="which a later process cannot recognise: .* give a named function"):
        run(tmp_path / "out", **{"steps": 2, **settings})
    assert not (tmp_path / "out").exists()
    run(steps=2, **settings)  # without a state nothing has to be recognised


def test_another_run_s_data_are_refused(tmp_path):
    def conditional(out, labels=torch.arange(64) % 4, held_out=(images(8, seed=2), torch.arange(8) % 4), **settings):
        return train_denoiser(small(label_dim=4), images(), steps=2, batch=8, labels=labels, held_out=held_out, progress=False, out=out, **settings)
    conditional(tmp_path)
    for name, other in (("labels", {"labels": torch.arange(64) % 3}), ("held_out", {"held_out": (images(8, seed=3), torch.arange(8) % 4)}),
                        ("held_out", {"held_out": (images(8, seed=2), torch.arange(8) % 3)}), ("held_out", {"held_out": None})):
        with pytest.raises(ValueError, match=f"belongs to another run: it has {name} = "):
            conditional(tmp_path, **other, resume=True)
    conditional(tmp_path, resume=True)


def test_how_often_a_state_is_written_may_change(tmp_path, monkeypatch, uninterrupted):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, "update_average", 20)
        run(tmp_path)
    assert same(run(tmp_path, resume=True, snapshot=9), uninterrupted)


def test_checksums_tell_data_apart():
    data = [(torch.zeros(3),), (torch.zeros(3, 1),), (torch.zeros(3), None), (torch.ones(3),), (torch.ones(3, dtype=torch.bfloat16),), (torch.arange(3), torch.zeros(3))]
    assert len({data_sha256(*parts) for parts in data}) == len(data) and data_sha256() is None and data_sha256(None, None) is None


def schemed(name, sigma, sigma_data, k):
    return loss_weight(name, sigma**-2, "x0", k=k).to(sigma)


def half(sigma):
    return 0.5


def test_other_images_and_another_architecture_are_refused(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(ValueError, match="belongs to another run: it has images = "):
        train_denoiser(small(), images(seed=5), **{**SETTINGS, "steps": 2}, out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="does not fit the network: tensors of another shape or type: .*expected"):
        train_denoiser(small(channels=4), images(), **{**SETTINGS, "steps": 2}, out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="does not fit the network: tensors missing"):
        train_denoiser(small(blocks=2), images(), **{**SETTINGS, "steps": 2}, out=tmp_path, resume=True)


class Evil:
    "Unpickled, it would write a file."
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_state_is_never_executed(tmp_path):
    torch.save({"denoiser": Evil(tmp_path / "executed")}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="no complete training state"):
        run(tmp_path, resume=True)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("size", [0, 10, 2000])
def test_a_torn_state_is_named(tmp_path, size):
    run(tmp_path, steps=2)
    whole = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(whole[:size])
    with pytest.raises(ValueError, match="state.pt is no complete training state"):
        run(tmp_path, steps=2, resume=True)
    torch.save({"something": 1}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="is no training state"):
        run(tmp_path, steps=2, resume=True)
    with pytest.raises(FileNotFoundError, match="no training state at"):
        read_state(tmp_path / "none.pt")


def spoilt_once(sigma, sigma_data, calls=[0]):
    calls[0] += 1
    return torch.where(torch.arange(len(sigma)) == 5, torch.nan, sigma) if calls[0] == 16 else sigma


def test_a_loss_that_turns_nan_keeps_the_last_good_state(tmp_path):
    with pytest.raises(FloatingPointError, match=r"training loss at step 14 is nan, first at noise level sigma = \d.* \(1 of 8 images\).*last good state is .*state.pt"):
        run(tmp_path, weight=spoilt_once, held_out=None)
    state = read_state(tmp_path / "state.pt")
    assert state["step"] == 12 and all(value.isfinite().all() for value in state["denoiser"].values())


def test_weights_that_are_not_finite_are_not_written(tmp_path, monkeypatch):
    def spoil(average, model, decay):
        next(model.parameters()).data.fill_(torch.nan)
    run(tmp_path, steps=6)
    before = (tmp_path / "state.pt").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match="weights after step 12 are not finite .*left as it was"):
        patch.setattr(training, "_check_finite", lambda *args: None)
        patch.setattr(training, "update_average", spoil)
        run(tmp_path / "new", steps=12, snapshot=12)
    assert not (tmp_path / "new" / "state.pt").exists() and (tmp_path / "state.pt").read_bytes() == before


def test_a_torn_log_line_is_dropped(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    cut_lines(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'


SHARED = dict(gamma=0.2, reference=24, gradient_penalty=0.01, weight_decay=1e-3)
PROCESS = """
import sys
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist
torch.set_num_threads(1)
import test_resume
from pathlib import Path
dist.init_process_group("gloo", init_method="file://{folder}/meet", rank=int(sys.argv[1]), world_size=2)
folder = Path({folder!r})
for name, cures in (("plain", {{}}), ("cures", test_resume.SHARED)):
    torch.save(test_resume.gradient(**cures), folder / f"{{name}}{{sys.argv[1]}}.pt")
history = test_resume.several_steps(folder / "run")
torch.save(test_resume.dropped(), folder / f"dropped{{sys.argv[1]}}.pt")
try:
    test_resume.gradient(batch=9)
except ValueError as error:
    (folder / f"refused{{sys.argv[1]}}").write_text(str(error))
dist.destroy_process_group()
"""


def gradient(**settings):
    "The gradient of a first step, by name."
    model = small()
    torch.nn.init.normal_(model.model.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    train_denoiser(model, images(), **{"steps": 1, "batch": 16, "seed": 3, "progress": False, **settings})
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def several_steps(out):
    return train_denoiser(small(), images(), steps=10, batch=16, checks=2, held_out=images(8, seed=1), snapshot=5, progress=False, out=out)


class Dropping(torch.nn.Module):
    "A denoiser with dropout that remembers its inputs and what it let through."
    sigma_data = 0.5

    def __init__(self):
        super().__init__()
        self.scale, self.seen = torch.nn.Parameter(torch.tensor(0.5)), []

    def forward(self, x, sigma):
        kept = torch.nn.functional.dropout(torch.ones_like(x), 0.5, self.training)
        self.seen.append((x.detach().clone(), kept))
        return self.scale * kept * x


def dropped():
    "What every step of a short run drops, and its inputs."
    model = Dropping()
    train_denoiser(model, images(), steps=3, batch=16, seed=3, progress=False)
    return model.seen


def test_two_processes_reach_the_gradient_of_one(tmp_path):
    code = PROCESS.format(tests=str(ROOT / "tests"), folder=str(tmp_path))
    both = [subprocess.Popen([sys.executable, "-c", code, str(rank)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
            for rank in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert not any(process.returncode for process in both), errors
    for name, cures in (("plain", {}), ("cures", SHARED)):
        alone = gradient(**cures)
        for rank in range(2):
            shared = torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True)
            assert max((shared[key] - alone[key]).abs().max().item() for key in alone) < 1e-6
            assert max(value.abs().max().item() for value in alone.values()) > 1e-3
    average, history = several_steps(None)
    log = read_lines(tmp_path / "run" / "log.jsonl")  # written once, by the first process
    assert [entry["step"] for entry in log] == [5, 10]
    assert_close([entry["loss"] for entry in log], history["loss"], rtol=1e-5, atol=0)
    assert_close(weights(load_model(tmp_path / "run" / "denoiser.safetensors")[0]), weights(average), rtol=0, atol=1e-5)
    for rank in range(2):
        assert "must divide the batch, got 2 processes for 9 images" in (tmp_path / f"refused{rank}").read_text()
    masks = [[kept for _, kept in torch.load(tmp_path / f"dropped{rank}.pt", weights_only=True)] for rank in range(2)]
    inputs = [torch.cat([x for x, _ in torch.load(tmp_path / f"dropped{rank}.pt", weights_only=True)]) for rank in range(2)]
    every = [mask for rank in masks for mask in rank]
    assert len(every) == 6 and not any(torch.equal(a, b) for k, a in enumerate(every) for b in every[:k])  # each process and step its own
    assert abs((torch.cat(masks[0]) - 1).flatten().dot((torch.cat(masks[1]) - 1).flatten()) / torch.cat(masks[0]).numel()) < 0.1
    first = dropped()[0][0]  # the images, levels and noise of the step are those of one process
    assert torch.equal(torch.cat([inputs[0][:8], inputs[1][:8]]), first)


def test_cures_leave_images_levels_and_noise_of_a_run_alone():
    "Two runs that differ by a cure share everything else that is drawn."
    def seen(**cure):
        found = []
        def weight(sigma, sigma_data):
            found.append(sigma.clone())
            return sigma
        train_denoiser(small(), images(), steps=3, batch=8, weight=weight, progress=False, **cure)
        return torch.cat(found[1:])
    plain = seen()
    assert all(torch.equal(plain, seen(**cure)) for cure in ({"gamma": 0.1}, {"reference": 32}, {"reference": "all"}, {"gradient_penalty": 1e-3}, {"weight_decay": 1e-3}))


def test_second_noise_is_independent_of_the_first():
    streams = tuple(torch.Generator().manual_seed(training._OTHER * (0 + k) % 2**62) for k in (1, 2))
    with seeded(0):
        batch = Objective(gamma=0.1).draw(images(), None, 4096, streams)
    a, b = batch["noise"].flatten(), batch["extra"].flatten()
    assert max(abs((a[:-shift or None] * b[shift:]).mean().item()) for shift in range(0, 9000, 64)) < 0.012
