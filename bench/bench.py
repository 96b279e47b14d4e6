"""What the kit's own code costs, as ratios within one run: python bench/bench.py [--quick]

Every comparison runs its candidates in turn, A B C A B C ..., and prints the median of the ratios to the first one with their
range, so that a machine whose speed drifts does not decide the outcome. Times are wall time of this process."""
import argparse
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from scipy import linalg, stats
from tqdm.auto import tqdm

from sedm_kit.diagnostics import Trace
from sedm_kit.discriminator import DiscriminatorGuidance
from sedm_kit.metrics import frechet_distance
from sedm_kit.networks import EDMPrecond
from sedm_kit.noise import edm_sigmas
from sedm_kit.normality import shapiro_wilk
from sedm_kit.sampler import count_evaluations, sample, sample_seeds
from sedm_kit.study import peak_memory_mb
from sedm_kit.targets import stf_target
from sedm_kit.worlds import load_world

BATCH, STEPS = 256, 18


def compare(title: str, candidates: dict, repeats: int):
    "Time candidates in turn and print their ratios to the first one."
    seconds, order = {name: [] for name in candidates}, list(candidates.items())
    for _ in tqdm(range(repeats + 1), desc=title, leave=False):  # the first round warms up
        order = order[1:] + order[:1]  # nobody always runs first
        for name, run in order:
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    first = next(iter(seconds))
    print(f"\n{title} ({repeats} rounds)")
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values[1:], seconds[first][1:])]
        print(f"  {name:<44} {statistics.median(values[1:]) * 1e3:9.1f} ms   ratio {statistics.median(ratios):5.2f}   ({min(ratios):.2f} to {max(ratios):.2f})")


@torch.no_grad()
def bare_calls(denoiser, states: list):
    "The network alone, on the very inputs that a sampler gave it."
    for x, sigma in states:
        denoiser(x, sigma)


@torch.no_grad()
def float32_loop(denoiser, x, sigmas):
    "Euler's method in the style of k-diffusion: float32 state, one sigma per image."
    sigmas, ones = sigmas.float(), x.new_ones(len(x))
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        x = x + (x - denoiser(x, sigma * ones)) / sigma * (sigma_next - sigma)
    return x


def diffusers_loop(denoiser, x, steps: int):
    "Euler's method with diffusers' scheduler in its EDM form, or None if diffusers is not installed."
    try:
        from diffusers import EDMEulerScheduler
    except ImportError:
        return None
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, prediction_type="epsilon")

    @torch.no_grad()
    def run():
        scheduler.set_timesteps(steps)
        state = x * scheduler.init_noise_sigma
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
            scheduler.scale_model_input(state, t)  # it counts its steps here
            denoised = denoiser(state, sigma)
            c_skip, c_out = scheduler.precondition_outputs(torch.ones(()), torch.zeros(()), sigma), scheduler.precondition_outputs(torch.zeros(()), torch.ones(()), sigma)
            state = scheduler.step((denoised - c_skip * state) / c_out, t, state).prev_sample
        return state
    return run


def sampler_overhead(repeats: int):
    "The sampler against the network calls that it makes."
    world = load_world("digits")
    unit = torch.randn(BATCH, *world.shape)
    start, sigmas = 80 * unit.double(), edm_sigmas(STEPS)
    for solver in ("euler", "heun"):
        calls, states = count_evaluations(solver, STEPS), []
        sample(world.denoiser, start, sigmas, solver=solver, callback=lambda info: states.append((info["x"], info["sigma"])))
        candidates = {
            f"{calls} bare network calls": lambda states=states: bare_calls(world.denoiser, states),
            "sample": lambda: sample(world.denoiser, start, sigmas, solver=solver),
            "sample with epsilon scaling": lambda: sample(world.denoiser, start, sigmas, solver=solver, scaling=1.02),
            "sample with a trace": lambda: sample(world.denoiser, start, sigmas, solver=solver, callback=Trace()),
            "sample_seeds (one stream per image)": lambda: sample_seeds(world.denoiser, range(BATCH), sigmas, solver=solver, micro_batch=BATCH),
        }
        if solver == "euler":
            candidates["k-diffusion-style loop, float32"] = lambda: float32_loop(world.denoiser, start.float(), sigmas)
            if run := diffusers_loop(world.denoiser, unit, STEPS):
                candidates["diffusers' EDMEulerScheduler"] = run
        if solver in world.log_ratio:
            candidates["sample with discriminator guidance"] = lambda: sample(world.denoiser, start, sigmas, solver=solver, guidance=DiscriminatorGuidance(world.log_ratio[solver], 1.0))
        compare(f"{solver}, {STEPS} steps, {BATCH} digits, {torch.get_num_threads()} threads", candidates, repeats)


def trace_overhead(repeats: int, quick: bool):
    "What recording norms and diagonal variances costs on a small convolutional U-Net."
    torch.manual_seed(0)
    net = EDMPrecond(img_resolution=16, img_channels=3, model_type="SongUNet", model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8]).eval().requires_grad_(False)
    start, sigmas = 80 * torch.randn(32 if quick else BATCH, 3, 16, 16, dtype=torch.float64), edm_sigmas(4)
    parameters = sum(p.numel() for p in net.parameters())
    compare(f"Euler, 4 steps, {len(start)} images of 3x16x16, U-Net of {parameters / 1e6:.2f} M parameters (a trace: at most 1.05 wanted)",
            {"sample": lambda: sample(net, start, sigmas, solver="euler"),
             "sample with a trace": lambda: sample(net, start, sigmas, solver="euler", callback=Trace()),
             "sample with a trace and full covariances": lambda: sample(net, start, sigmas, solver="euler", callback=Trace(full=True))}, repeats)


MEMORY = """
from sedm_kit.diagnostics import Trace
from sedm_kit.noise import edm_sigmas
from sedm_kit.sampler import sample_seeds
from sedm_kit.study import peak_memory_mb
from sedm_kit.worlds import load_world
world = load_world("digits")
trace = Trace()
for first in range(0, {n}, 500):
    sample_seeds(world.denoiser, range(first, first + 500), edm_sigmas(6), solver="euler", micro_batch=250, callback=trace)
print(peak_memory_mb())
"""


def memory(sizes: tuple):
    "Peak memory of a process that samples n images with a trace: it must not grow with n."
    print("\npeak memory of a process that samples n digits with a trace")
    for n in sizes:
        peak = int(subprocess.run([sys.executable, "-c", MEMORY.format(n=n)], capture_output=True, text=True, check=True).stdout)
        print(f"  n = {n:<8} {peak:8.0f} MB")


def normality_tests(repeats: int):
    "3072 Shapiro-Wilk tests (the pixels of a CIFAR image), batched and by scipy one by one."
    for n, wanted in ((50, 100), (1000, 6)):
        errors = np.random.default_rng(0).normal(size=(3072, n))
        compare(f"3072 Shapiro-Wilk tests of {n} samples (at least {wanted}x wanted)",
                {"shapiro_wilk": lambda: shapiro_wilk(errors), "scipy.stats.shapiro, one by one": lambda: [stats.shapiro(row) for row in errors]}, repeats)


def pairwise_target(x, sigma, reference):
    "The direct form: a (b, n, d) tensor of differences in the images' own dtype."
    log_weights = (x[:, None].flatten(2) - reference.flatten(1)).square_().sum(2) / (-2 * sigma**2)
    return (log_weights.softmax(1) @ reference.flatten(1)).reshape(x.shape)


TARGET_MEMORY = """
import torch
from sedm_kit.study import peak_memory_mb
from sedm_kit.targets import stf_target
reference = torch.rand({n}, 3, 32, 32) * 2 - 1
x = reference[:{b}] + torch.randn({b}, 3, 32, 32)
stf_target(x[:2], 1.0, reference[:16])
before = peak_memory_mb()
stf_target(x, 1.0, reference)
print(peak_memory_mb() - before)
"""  # a process of its own: the peak of this one was reached long before


def stable_targets(repeats: int, quick: bool):
    "Time and extra memory of one target: 64 images of CIFAR size against 4096 (quick: 16 against 1024)."
    b, n = (16, 1024) if quick else (64, 4096)
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(n, 3, 32, 32, generator=generator) * 2 - 1
    x = reference[:b] + torch.randn(b, 3, 32, 32, generator=generator)
    extra = int(subprocess.run([sys.executable, "-c", TARGET_MEMORY.format(b=b, n=n)], capture_output=True, text=True, check=True).stdout)
    compare(f"stable target, {b} images against {n}, 3x32x32; extra memory {extra:.0f} MB against {b * n * 3072 * 4 / 1e6:.0f} MB of differences",
            {"stf_target": lambda: stf_target(x, 1.0, reference), "all differences, float32": lambda: pairwise_target(x, 1.0, reference)}, repeats)


def frechet_distances(repeats: int, quick: bool):
    "Fréchet distance of covariances like Inception's by the eigenvalues of a symmetric matrix, and by scipy's matrix root."
    d, rng = 512 if quick else 2048, np.random.default_rng(0)
    for images in (5 * d, 3 * d // 4):
        (a, b), zero, found = (half.T @ half / images for half in rng.normal(size=(2, images, d))), np.zeros(d), {}
        compare(f"Fréchet distance in {d} dimensions, covariances of {images} images (scipy: at least 7x wanted at 2048)",
                {"frechet_distance": lambda: found.update(ours=frechet_distance(zero, a, zero, b)),
                 "scipy.linalg.sqrtm": lambda: found.update(theirs=np.trace(a) + np.trace(b) - 2 * np.trace(linalg.sqrtm(a @ b)))}, repeats)
        print(f"  {found['ours']:.10f} against {found['theirs']:.10f}, relative difference {abs(found['ours'] / found['theirs'] - 1):.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it runs, not to quote")
    quick = parser.parse_args().quick
    sampler_overhead(2 if quick else 9)
    trace_overhead(1 if quick else 5, quick)
    normality_tests(2 if quick else 5)
    stable_targets(2 if quick else 5, quick)
    frechet_distances(1, quick)
    memory((1000, 2000) if quick else (1000, 10_000))
    print(f"\npeak memory of this benchmark: {peak_memory_mb()} MB")
