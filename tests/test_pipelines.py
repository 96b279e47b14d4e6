"from_diffusers, and ESScheduler in diffusers' stock pipelines."
import inspect
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sedm_kit import adapters, pipelines
from sedm_kit.adapters import diffusers_kind, fractional_step, from_diffusers
from sedm_kit.noise import edm_sigmas, sigma_from_alphas
from sedm_kit.pipelines import advance, chain_times, evaluations, read_scaling
from sedm_kit.sampler import MULTISTEP, SOLVERS, Churn, LinearScaling, heun_step, sample

diffusers = pytest.importorskip("diffusers", reason="diffusers is an optional extra: pip install 'sedm_kit[interop]'")
ESScheduler = pipelines.ESScheduler

BLOCKS = dict(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
              down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
CODER = dict(block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
LINEAR = dict(beta_start=1e-4, beta_end=0.02)  # HeunDiscreteScheduler has other defaults


def untrained(cls, seed=0, **settings):
    torch.manual_seed(seed)
    return cls(**settings).eval()


UNET = untrained(diffusers.UNet2DModel, in_channels=1, out_channels=1, **BLOCKS)
CLASSY = untrained(diffusers.UNet2DModel, in_channels=1, out_channels=1, num_class_embeds=3, **BLOCKS)
DIT = untrained(diffusers.DiTTransformer2DModel, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
                sample_size=4, norm_num_groups=4)
nn.init.normal_(DIT.proj_out_2.weight, std=0.1)
NOISE = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@torch.no_grad()
def loop(scheduler, start, net=UNET, generator=None, **run):
    "A pipeline's loop as diffusers' documentation describes it: every state, the start first."
    scheduler.set_timesteps(**run)
    path, extra = [NOISE * start(scheduler)], {} if generator is None else {"generator": generator}
    for t in scheduler.timesteps:
        path.append(scheduler.step(net(scheduler.scale_model_input(path[-1], t), t).sample, t, path[-1], **extra).prev_sample)
    return path


def own_start(scheduler):
    return scheduler.init_noise_sigma


def top_level(scheduler):
    return scheduler.sigmas[0]


def by_kit(scheduler, net=UNET, **settings):
    "The kit's sampler on the scheduler's grid, from the same start."
    denoiser = from_diffusers(net, scheduler, fractional=True)
    return sample(denoiser, NOISE.double() * scheduler.sigmas[0], scheduler.sigmas, **settings)


# ---- against diffusers' own schedulers

OTHERS = [("euler", diffusers.EulerDiscreteScheduler, dict(timestep_spacing=spacing, use_karras_sigmas=karras, prediction_type=prediction))
          for spacing, karras, prediction in [("linspace", False, "epsilon"), ("leading", False, "v_prediction"), ("trailing", False, "epsilon"),
                                              ("trailing", True, "v_prediction"), ("linspace", True, "epsilon")]]
OTHERS += [("heun", diffusers.HeunDiscreteScheduler, LINEAR | settings) for _, _, settings in OTHERS]
OTHERS += [("euler", diffusers.EDMEulerScheduler, dict(prediction_type=prediction, sigma_schedule=schedule, sigma_data=0.7))
           for prediction, schedule in [("epsilon", "karras"), ("v_prediction", "karras"), ("epsilon", "exponential")]]
OTHERS += [("euler", diffusers.EulerDiscreteScheduler, dict(beta_schedule=schedule, timestep_spacing="trailing"))
           for schedule in ("scaled_linear", "squaredcos_cap_v2")]
OTHERS += [("euler", diffusers.EulerDiscreteScheduler, dict(timestep_spacing="leading", steps_offset=1))]


@pytest.mark.parametrize("solver, cls, settings", OTHERS, ids=[f"{cls.__name__}-{'-'.join(map(str, settings.values()))}" for _, cls, settings in OTHERS])
def test_lambda_1_is_diffusers_own(solver, cls, settings):
    other = cls(**settings)
    own = ESScheduler.from_config(other.config, solver=solver)
    path, reference = loop(own, own_start, num_inference_steps=6), loop(other, top_level, num_inference_steps=6)
    assert_close(own.timesteps, other.timesteps, rtol=2e-7, atol=2e-7)
    levels = [sigma for _, sigma in own._plan] + [0.0]
    for x, y, sigma in zip(path, reference, levels, strict=True):
        assert relative(x / own._c_in(sigma), y) < 1e-6


def test_prediction_of_the_sample_is_diffusers_own():
    bounded = lambda x, t: diffusers.models.unets.unet_2d.UNet2DOutput(sample=x.tanh() / 2 + torch.cos(t / 300))  # an untrained U-Net amplifies rounding
    for solver, cls in (("euler", diffusers.EulerDiscreteScheduler), ("heun", diffusers.HeunDiscreteScheduler)):
        other = cls(prediction_type="sample", timestep_spacing="trailing", **LINEAR)
        own = ESScheduler.from_config(other.config, solver=solver)
        a, b = loop(own, own_start, bounded, num_inference_steps=6)[-1], loop(other, top_level, bounded, num_inference_steps=6)[-1]
        assert relative(a, b) < 1e-6


# ---- against the kit's sampler

KINDS = {"epsilon": dict(timestep_spacing="trailing"), "v": dict(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
         "EDM": dict(sigma_data=0.5), "EDM, v": dict(sigma_data=0.5, prediction_type="v_prediction")}
SCALINGS = {"constant": (1.03, 1.03), "linear": ({"b": 1.01, "k": 0.01}, LinearScaling(1.01, 0.01)),
            "table": ([1.05, 1.0, 0.97, 1.02, 1.1], [1.05, 1.0, 0.97, 1.02, 1.1])}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_equals_the_kits_sampler(kind, solver, scaling):
    written, meant = SCALINGS[scaling]
    scheduler = ESScheduler(solver=solver, scaling=written, **KINDS[kind])
    images = loop(scheduler, own_start, num_inference_steps=5)[-1]
    # a pipeline keeps its state in float32; what looks back doubles that rounding
    assert relative(images, by_kit(scheduler, solver=solver, scaling=meant)) < (2e-6 if SOLVERS[solver] in MULTISTEP else 1e-6)
    assert relative(images, by_kit(scheduler, solver=solver)) > 1e-3


@pytest.mark.parametrize("solver", [name for name, step in SOLVERS.items() if step in MULTISTEP])
def test_solvers_with_memory_are_not_stirred(solver):
    with pytest.raises(ValueError, match="uses slopes of earlier steps"):
        ESScheduler(solver=solver, s_churn=4.0)


@pytest.mark.parametrize("solver", [name for name, step in SOLVERS.items() if step not in MULTISTEP])
@pytest.mark.parametrize("kind", KINDS)
def test_churn_equals_the_kits_sampler(kind, solver):
    "The noise is raised before the network is asked, on a chain up to one of its levels; s_max keeps the first step deterministic."
    plain = ESScheduler(**KINDS[kind])
    plain.set_timesteps(6)
    s_max = float(plain.sigmas[1])
    scheduler = ESScheduler(solver=solver, scaling=1.02, s_churn=2.0, s_min=0.05, s_max=s_max, s_noise=1.01, **KINDS[kind])
    images = loop(scheduler, own_start, generator=torch.Generator().manual_seed(5), num_inference_steps=6)[-1]
    stirred = [start > float(sigma) for start, sigma in zip(scheduler._starts, scheduler.sigmas)]
    assert not stirred[0] and any(stirred)
    generator, asked = torch.Generator().manual_seed(5), iter(stirred)
    noise = lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype) if next(asked) else torch.zeros_like(x)
    expected = by_kit(scheduler, solver=solver, scaling=1.02, churn=Churn(2.0, 0.05, s_max, 1.01), noise=noise)
    assert relative(images, expected) < 1e-6
    assert relative(images, by_kit(scheduler, solver=solver, scaling=1.02)) > 1e-3


def test_churn_at_the_first_step_widens_the_start():
    scheduler = ESScheduler(sigma_data=0.5, s_churn=2.0, s_noise=1.1)
    scheduler.set_timesteps(5)
    start = scheduler._starts[0]
    assert start == pytest.approx(80 * 1.4)
    assert scheduler.init_noise_sigma == pytest.approx((80**2 + 1.21 * (start**2 - 80**2)) ** 0.5 / (start**2 + 0.25) ** 0.5)


def test_churn_never_lowers_the_noise():
    "Between two levels of a short chain, the nearest level of the chain may lie below."
    scheduler = ESScheduler(num_train_timesteps=10, beta_end=0.5, s_churn=0.01)
    scheduler.set_timesteps(sigmas=torch.tensor([1.0, 0.35, 0.0]))
    assert all(start >= sigma for start, sigma in zip(scheduler._starts, scheduler.sigmas.tolist()))


def test_own_noise_levels():
    scheduler = ESScheduler(sigma_data=0.5)
    images = loop(scheduler, own_start, sigmas=edm_sigmas(5, 0.01, 20.0))[-1]
    assert scheduler.num_inference_steps == 5 and len(scheduler.timesteps) == 9
    assert relative(images, by_kit(scheduler)) < 1e-6


def test_half_precision_state_is_kept():
    scheduler = ESScheduler(sigma_data=0.5)
    scheduler.set_timesteps(2)
    out = scheduler.step(torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16), scheduler.timesteps[0], torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16))
    assert out.prev_sample.dtype == out.pred_original_sample.dtype == torch.bfloat16


def test_a_run_may_start_in_the_middle():
    scheduler = ESScheduler(sigma_data=0.5)
    scheduler.set_timesteps(4)
    x = NOISE * scheduler._c_in(float(scheduler.sigmas[2])) * float(scheduler.sigmas[2])
    with torch.no_grad():
        for t in scheduler.timesteps[2 * scheduler.order:]:
            x = scheduler.step(UNET(x, t).sample, t, x, return_dict=False)[0]
    expected = sample(from_diffusers(UNET, scheduler), NOISE.double() * scheduler.sigmas[2], scheduler.sigmas[2:])
    assert relative(x, expected) < 1e-6


def test_a_learned_variance_is_left_out():
    scheduler, answer = ESScheduler(solver="euler"), torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(4))
    results = []
    for out in (answer, answer[:, :1]):
        scheduler.set_timesteps(3)
        results.append(scheduler.step(out, scheduler.timesteps[0], NOISE).prev_sample)
    assert results[0].shape == NOISE.shape and torch.equal(*results)


# ---- the parts

def test_replay_does_not_repeat_a_solvers_memory():
    def counting(slope, x, sigma, sigma_next, memory):
        memory["steps"] = memory.get("steps", 0) + 1
        return heun_step(slope, x, sigma, sigma_next, memory)

    memory, x = {}, torch.ones(1, 1, 1, 1)
    for known in ([], [x], [x, x]):
        *_, ended = advance(counting, x, 2.0, 1.0, memory, known)
    assert ended and memory == {"steps": 1}


def test_plan_counts_evaluations():
    assert len(evaluations(heun_step, [3.0, 2.0, 1.0], [2.0, 1.0, 0.0])) == 5
    assert ESScheduler(solver="euler").order == 1 and ESScheduler(solver="heun").order == 2


def test_fractional_steps_invert_the_chain():
    levels = sigma_from_alphas(diffusers_kind(diffusers.DDPMScheduler()).alphas_cumprod)
    assert_close(fractional_step(levels, levels), torch.arange(1000.0, dtype=torch.float64))
    assert_close(fractional_step(torch.tensor([1e-9, 1e9]), levels), torch.tensor([0.0, 999.0], dtype=torch.float64))


# ---- stock pipelines

class UnitStart(ESScheduler):
    "DDIM's start, which LDMPipeline asks for."
    init_noise_sigma = 1.0


def stock(kind, scheduler):
    "A stock pipeline's images."
    if kind == "DDPM":
        pipe, arguments = diffusers.DDPMPipeline(UNET, scheduler), dict(batch_size=2)
    elif kind == "DiT":
        pipe, arguments = diffusers.DiTPipeline(DIT, untrained(diffusers.AutoencoderKL, latent_channels=4, **CODER), scheduler), dict(class_labels=[3, 7])
    else:
        unet, coder = untrained(diffusers.UNet2DModel, **BLOCKS), untrained(diffusers.VQModel, num_vq_embeddings=16, **CODER)
        pipe, arguments = diffusers.LDMPipeline(vqvae=coder, unet=unet, scheduler=scheduler), dict(batch_size=2)
    pipe.set_progress_bar_config(disable=True)
    return torch.tensor(pipe(generator=torch.Generator().manual_seed(2), num_inference_steps=4, output_type="np", **arguments).images)


@pytest.mark.parametrize("kind", ["DDPM", "DiT", "LDM"])
def test_stock_pipelines(kind):
    ddim = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    expected = stock(kind, ddim)
    assert ((0 < expected) & (expected < 1)).float().mean() > 0.1  # pipelines clip images: all black would equal all black
    neutral, scaled, heun = (stock(kind, UnitStart.from_config(ddim.config, **settings)) for settings in (
        dict(solver="euler"), dict(solver="euler", scaling=1.05), dict(s_churn=1.0, scaling=[1.1, 1.0, 1.0, 1.0])))
    assert_close(neutral, expected, rtol=0, atol=2e-6)
    assert (scaled - neutral).abs().max() > 1e-2 and (heun - neutral).abs().max() > 1e-3
    assert heun.isfinite().all() and heun.shape == expected.shape


def test_stock_pipeline_equals_the_kits_sampler():
    scheduler = ESScheduler(prediction_type="v_prediction", scaling=1.04, timestep_spacing="trailing")
    images = stock("DDPM", scheduler)[..., 0]
    start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2)).double() / scheduler._c_in(float(scheduler.sigmas[0]))
    expected = sample(from_diffusers(UNET, scheduler), start, scheduler.sigmas, scaling=1.04)[:, 0]
    assert relative(images, (expected / 2 + 0.5).clamp(0, 1)) < 1e-6


def test_edm_type_model_in_a_stock_pipeline():
    scheduler = ESScheduler.from_config(diffusers.EDMEulerScheduler().config, scaling=1.01, s_churn=1.0)
    assert stock("DDPM", scheduler).isfinite().all()
    assert scheduler.init_noise_sigma == pytest.approx(1.0, abs=1e-4)


# ---- settings

def public(config):
    return {name: value for name, value in config.items() if name[0] != "_"}


def test_config_round_trip(tmp_path):
    settings = dict(sigma_data=0.6, scaling={"b": 1.01, "k": 0.002}, solver="euler", s_churn=3.0, s_max=40.0)
    scheduler = ESScheduler(**settings)
    scheduler.save_pretrained(tmp_path / "scheduler")
    again = ESScheduler.from_pretrained(tmp_path / "scheduler")
    assert type(again) is ESScheduler and public(again.config) == public(scheduler.config)
    a, b = (loop(s, own_start, generator=torch.Generator().manual_seed(0), num_inference_steps=3)[-1] for s in (again, scheduler))
    assert torch.equal(a, b)
    diffusers.DDPMPipeline(UNET, scheduler).save_pretrained(tmp_path / "pipe")
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "pipe", low_cpu_mem_usage=False)
    assert type(pipe.scheduler) is ESScheduler and public(pipe.scheduler.config) == public(scheduler.config)


def test_from_config_keeps_the_other_classes_defaults():
    "diffusers drops entries that equal the other class's defaults: without sigma_data it would be another kind of model."
    assert ESScheduler.from_config(diffusers.EDMEulerScheduler().config).config.sigma_data == 0.5
    assert ESScheduler.from_config(diffusers.HeunDiscreteScheduler().config).config.beta_start == 0.00085
    assert ESScheduler.from_config(diffusers.EulerDiscreteScheduler().config).config.timestep_spacing == "linspace"


@pytest.mark.parametrize("settings, error, message", [
    (dict(scaling=0.0), ValueError, "lambda must be finite and positive"),
    (dict(scaling=[1.0, -1.0]), ValueError, "got -1.0 at step 1"),
    (dict(scaling=float("nan")), ValueError, "lambda must be finite and positive"),
    (dict(scaling={"b": 1.0, "slope": 2}), ValueError, "entries b and k"),
    (dict(scaling="1.01"), TypeError, "scaling must be a number"),
    (dict(solver="rk4"), ValueError, "unknown solver 'rk4'; known: 'euler', 'heun'"),
    (dict(prediction_type="x"), ValueError, "unknown prediction_type 'x'.*DDPM.*'epsilon', 'sample', 'v_prediction'"),
    (dict(prediction_type="sample", sigma_data=0.5), ValueError, "of EDM type; known: 'epsilon', 'v_prediction'"),
    (dict(timestep_spacing="even"), ValueError, "unknown timestep_spacing 'even'"),
    (dict(sigma_data=-1.0), ValueError, "sigma_data must be positive"),
    (dict(sigma_data=0.5, sigma_schedule="cosine"), ValueError, "unknown sigma_schedule 'cosine'"),
    (dict(s_churn=-1.0), ValueError, "s_churn"),
])
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        ESScheduler(**settings)


def test_bad_runs():
    scheduler = ESScheduler(scaling=[1.0, 1.01, 1.02], sigma_data=0.5)
    with pytest.raises(ValueError, match="scaling has 3 values for 4 steps"):
        scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(NOISE, torch.tensor(1.0), NOISE)
    with pytest.raises(ValueError, match="not both or neither"):
        scheduler.set_timesteps()
    with pytest.raises(ValueError, match="must decrease strictly"):
        scheduler.set_timesteps(sigmas=[1.0, 2.0, 0.0])
    loop(scheduler, own_start, num_inference_steps=3)
    with pytest.raises(ValueError, match="all 5 evaluations of this schedule are done"):
        scheduler.step(NOISE, scheduler.timesteps[0], NOISE)
    with pytest.raises(ValueError, match="from 1 to 1000"):
        ESScheduler().set_timesteps(1001)


def test_bad_configurations():
    with pytest.raises(TypeError, match="unknown settings lambda_; known: .*scaling"):
        ESScheduler.from_config(diffusers.DDPMScheduler().config, lambda_=1.1)
    with pytest.raises(ValueError, match="use_beta_sigmas=True"):
        ESScheduler.from_config(diffusers.EulerDiscreteScheduler(use_beta_sigmas=True).config)
    with pytest.raises(ValueError, match="final_sigmas_type='sigma_min'"):
        ESScheduler.from_config(diffusers.EDMEulerScheduler(final_sigmas_type="sigma_min").config)
    cosine = {"_class_name": "CosineDPMSolverMultistepScheduler", "sigma_data": 1.0, "solver_order": 2, "prediction_type": "v_prediction"}
    for other in (diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.CMStochasticIterativeScheduler(), cosine,
                  diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")):
        with pytest.raises(ValueError, match="neither of DDPM type"):
            diffusers_kind(other)


# ---- from_diffusers

def test_ddpm_type_by_its_own_add_noise():
    "The network is shown what diffusers' add_noise makes, and D inverts its definition of each prediction."
    clean = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(3)) - 0.5
    for prediction in ("epsilon", "sample", "v_prediction"):
        scheduler = diffusers.DDPMScheduler(prediction_type=prediction, beta_schedule="squaredcos_cap_v2")
        t = torch.tensor([5, 400, 950])
        shown = scheduler.add_noise(clean, NOISE, t)
        target = {"epsilon": NOISE, "sample": clean, "v_prediction": scheduler.get_velocity(clean, NOISE, t)}[prediction]

        def network(x, told, class_labels=None, return_dict=True):
            assert_close(x, shown.double(), rtol=1e-5, atol=1e-6)
            assert torch.equal(told, t)
            return (target.double(),)

        denoiser = from_diffusers(network, scheduler.config, shape=(1, 8, 8))
        sigma = sigma_from_alphas(scheduler.alphas_cumprod)[t]
        assert_close(denoiser(clean.double() + sigma[:, None, None, None] * NOISE, sigma), clean.double(), rtol=0, atol=1e-4)  # sigma up to 13


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_type_by_its_own_preconditioning(prediction):
    other, x = diffusers.EDMEulerScheduler(sigma_data=0.7, prediction_type=prediction), 3.0 * NOISE
    denoiser = from_diffusers(UNET, other)
    with torch.no_grad():
        answer = UNET(other.precondition_inputs(x, 3.0), other.precondition_noise(3.0)).sample
        assert_close(denoiser(x, 3.0), other.precondition_outputs(x, answer, 3.0).double(), rtol=1e-5, atol=1e-5)
    assert (denoiser.sigma_data, denoiser.sigma_min, denoiser.sigma_max) == (0.7, 0.002, 80.0)
    assert from_diffusers(UNET, diffusers.EDMDPMSolverMultistepScheduler()).sigma_data == 0.5


def test_config_without_the_object_gives_the_same_chain():
    for settings in (dict(beta_schedule="scaled_linear"), dict(trained_betas=[0.1, 0.2, 0.3]), dict(beta_schedule="sigmoid")):
        scheduler = diffusers.DDPMScheduler(**settings)
        assert torch.equal(diffusers_kind(scheduler.config).alphas_cumprod, scheduler.alphas_cumprod.double())
    zero_snr = diffusers_kind(diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    assert 4095 < zero_snr.sigma_max < 1e5
    assert diffusers_kind({"beta_schedule": "linear", "trained_betas": [0.1, 0.2, 1.0]}).sigma_max == pytest.approx(4096, rel=1e-6)


def test_labels():
    classes = torch.tensor([0, 2, 1])
    denoiser = from_diffusers(CLASSY, diffusers.DDPMScheduler())
    with torch.no_grad():
        numbers = denoiser(NOISE, 1.0, classes)
        assert torch.equal(numbers, denoiser(NOISE, 1.0, torch.eye(3)[classes])) and denoiser.label_dim == 3
        assert not torch.equal(numbers, denoiser(NOISE, 1.0, classes.flip(0)))
        latents = torch.randn(2, 4, 4, 4)
        transformer = from_diffusers(DIT, diffusers.DDIMScheduler())
        assert transformer.label_dim == 1000 and transformer(latents, 1.0).shape == latents.shape
        t = transformer.round_sigma(1.0)
        step = fractional_step(t, sigma_from_alphas(diffusers.DDIMScheduler().alphas_cumprod)).round().long()
        eps = DIT((latents / (1 + t**2).sqrt()).float(), step.expand(2), class_labels=torch.tensor([1000, 1000])).sample[:, :4]
        assert_close(transformer(latents, t).float(), latents - t.float() * eps, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="needs class_labels, one of 3 classes"):
        denoiser(NOISE, 1.0)
    with pytest.raises(ValueError, match="no classes"):
        from_diffusers(UNET, diffusers.DDPMScheduler())(NOISE, 1.0, classes)


def test_bad_networks():
    chain = diffusers.DDPMScheduler()
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\), got \(3, 8, 8\)"):
        from_diffusers(UNET, chain)(torch.randn(1, 3, 8, 8), 1.0)
    with pytest.raises(ValueError, match="give shape"):
        from_diffusers(lambda x, t, **_: (x,), chain)
    text = diffusers.UNet2DConditionModel(**BLOCKS | dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=8,
                                                          up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")))
    with pytest.raises(ValueError, match="UNet2DConditionModel needs the embedding of a text"):
        from_diffusers(text, chain)
    with pytest.raises(ValueError, match="fourier"):
        from_diffusers(diffusers.UNet2DModel(time_embedding_type="fourier", **BLOCKS), chain)


# ---- without diffusers

def test_modules_import_without_diffusers():
    code = """
import sys
sys.modules["diffusers"] = None
import sedm_kit.adapters, sedm_kit.pipelines
try: sedm_kit.pipelines.ESScheduler
except ImportError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "sedm_kit[interop]" in done.stdout


def test_modules_do_not_import_diffusers_at_the_top():
    for module in (adapters, pipelines):
        assert not any(line.startswith(("import diffusers", "from diffusers")) for line in inspect.getsource(module).splitlines())
