"""The objective's formulas against autograd, each other and their definitions."""
import math

import numpy as np
import pytest
import torch

import sample
import train_dit as D

PATHS, PREDICTIONS = ("linear", "gvp", "vp"), ("velocity", "noise", "score", "x")
EVERY = [(path, prediction) for path in PATHS for prediction in PREDICTIONS]


def drawn(n=7, width=5):
    """(x0, noise, t [n, 1]), float64, away from the ends."""
    random = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, n, width, generator=random, dtype=torch.float64)
    return x0, noise, torch.linspace(0.05, 0.95, n, dtype=torch.float64)[:, None]


def true_output(how, x0, noise, t):
    """What a perfect network puts out."""
    wanted = D.target(how, x0, noise, t)
    return wanted / D.interpolant(how.path, t)[1] if how.prediction == "score" else wanted


@pytest.mark.parametrize("path", PATHS)
def test_paths_run_from_data_to_noise_with_their_derivatives(path):
    t = torch.tensor([0.01, 0.3, 0.7, 0.99], dtype=torch.float64, requires_grad=True)
    alpha, sigma, d_alpha, d_sigma = D.interpolant(path, t)
    assert torch.allclose(torch.autograd.grad(alpha.sum(), t, retain_graph=True)[0], d_alpha)
    assert torch.allclose(torch.autograd.grad(sigma.sum(), t)[0], d_sigma)
    alpha, sigma, *_ = D.interpolant(path, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.allclose(alpha[:1], alpha.new_ones(1)) and alpha[1] < 0.01
    assert sigma[0] == 0 and sigma[1] > 0.9999


@pytest.mark.parametrize("path, prediction", EVERY)
def test_every_prediction_is_read_as_the_same_truth(path, prediction):
    """A perfect output has no loss at any weight, and gives back velocity, data and noise."""
    how, (x0, noise, t) = D.Objective(prediction, path), drawn()
    x, output = D.interpolate(how, x0, noise, t), true_output(how, x0, noise, t)
    velocity = D.target(D.Objective("velocity", path), x0, noise, t)
    for result, wanted in zip(D.to_velocity_x0_noise(how, output, x, t), (velocity, x0, noise)):
        assert torch.allclose(result, wanted, atol=1e-10)
    drift, score = sample.drift_score(how, D.to_velocity_x0_noise(how, output, x, t), t)
    assert torch.allclose(drift, velocity)
    assert torch.allclose(score, -noise / D.interpolant(path, t)[1])
    for weighting in ("none", "velocity", "likelihood", "min-snr"):
        error = D.squared_error(how._replace(weighting=weighting), output, x0, noise, t)
        assert error.shape == x0.shape and error.max() < 1e-20


@pytest.mark.parametrize("path, prediction", EVERY)
def test_a_weighted_error_is_that_of_what_it_is_named_for(path, prediction):
    how, (x0, noise, t) = D.Objective(prediction, path), drawn()
    x, output = D.interpolate(how, x0, noise, t), torch.ones_like(x0)
    alpha, sigma, *_ = D.interpolant(path, t)
    answer = D.to_velocity_x0_noise(how, output, x, t)
    (velocity, data, _), (_, score) = answer, sample.drift_score(how, answer, t)
    truth = D.target(D.Objective("velocity", path), x0, noise, t)
    error = {name: D.squared_error(how._replace(weighting=name), output, x0, noise, t)
             for name in ("velocity", "likelihood", "min-snr")}
    snr, drift_var = alpha ** 2 / sigma ** 2, sample.diffusion(path, "SBDM", t)
    assert torch.allclose(error["velocity"], (velocity - truth) ** 2)
    assert torch.allclose(error["min-snr"], snr.clamp(max=5) * (data - x0) ** 2)
    assert torch.allclose(error["likelihood"], drift_var * (score + noise / sigma) ** 2)
    if prediction == "noise":                                # as Hang et al. print it
        assert torch.allclose(error["min-snr"], snr.clamp(max=5) / snr * (output - noise) ** 2)


@pytest.mark.parametrize("path, prediction", EVERY)
def test_a_perfect_model_of_one_video_leads_to_it(path, prediction):
    """Euler from noise, by any path and prediction, each token with a shift of its own."""
    how, (goal, noise, _) = D.Objective(prediction, path), (x.float() for x in drawn())

    def velocity(x, t):
        t = torch.as_tensor(t, dtype=torch.float32)
        alpha, sigma, *_ = D.interpolant(path, t)
        output = true_output(how, goal, (x - alpha * goal) / sigma, t)
        return D.to_velocity_x0_noise(how, output, x, t)[0]

    shift = D.token_shift(1.0, torch.arange(1, 8), 4)[:, None]
    span = D.interval(how, is_sampling=True)
    grid = lambda shift: span[0] + (span[1] - span[0]) * D.flow_grid(200, shift).float()
    *_, end = D.runge_kutta(velocity, noise, grid(shift))
    assert (end - goal).abs().max() < 0.05
    *_, alone = D.runge_kutta(lambda x, t: velocity(x.expand(7, -1), t)[3:4], noise[3:4], grid(1.0))
    assert torch.allclose(alone, end[3:4], atol=1e-4)        # token 3 has the shift 1


def test_laws_of_time():
    many = lambda *law, **at: np.array([D.draw_t(random, *law, **at) for _ in range(4000)])
    random = np.random.default_rng(0)
    uniform, shifted = many("uniform"), many("uniform", 3.0)
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(uniform.var() - 1 / 12) < 0.005
    assert abs(np.median(shifted) - 0.75) < 0.02
    normal = many("logit-normal", mean=0.5, std=2.0)
    logit = np.log(normal / (1 - normal))
    assert abs(logit.mean() - 0.5) < 0.1 and abs(logit.std() - 2) < 0.1
    span = D.interval(D.Objective("noise"))
    within = many("uniform", 1.0, span)
    assert span[0] <= within.min() < 0.01 and 0.99 < within.max() <= span[1]


def test_a_shift_fixes_the_ends_and_grows_with_the_root_of_tokens():
    assert [D.shifted(t, 5.0) for t in (0.0, 1.0)] == [0.0, 1.0] and D.shifted(0.3, 1.0) == 0.3
    assert math.isclose(D.shifted(D.shifted(0.3, 2.0), 3.0), D.shifted(0.3, 6.0))
    assert D.token_shift(1.5, 4096, 0) == D.token_shift(1.5, 1024, 1024) == 1.5
    assert D.token_shift(1.5, 4096, 1024) == 3.0


@pytest.mark.parametrize("respacing", ["", "ddim50", "10,15,20", "1,2"])
def test_respaced_tables_pass_through_the_same_noise_levels(respacing):
    whole, kept = D.ddpm_tables(), D.ddpm_tables("linear", respacing)
    steps = kept["timestep_map"]
    assert steps.unique().equal(steps) and steps[0] == 0
    assert torch.allclose(kept["alphas_cumprod"], whole["alphas_cumprod"][steps])
    assert torch.allclose((1 - kept["betas"]).cumprod(0), kept["alphas_cumprod"])
    assert (kept["posterior_log_variance_clipped"] <= kept["log_betas"] + 1e-12).all()


def test_ddpm_bits_are_least_for_the_truth():
    """A model that knows the noise and the posterior's variance pays nothing but the code length of
    the first step; a wrong variance or mean costs."""
    x0, noise = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    c = D.ddpm_at(D.ddpm_tables(), torch.tensor([0, 1, 500, 999])[:, None])
    x = c["alpha"] * x0 + c["sigma"] * noise
    bits = lambda eps, v: D.ddpm_bits(eps, torch.full_like(eps, v), x0, x, c).mean(1)
    best = bits(noise, -1.0)
    assert best[1:].abs().max() < 1e-3 and best[0] > 0
    assert (bits(noise, 1.0)[1:3] > best[1:3]).all() and (bits(noise + 1, -1.0) > best).all()


def test_ddpm_of_packed_tokens_is_that_of_each_latent():
    """Coefficients a token or a clip, the step found from our time; loss = squared error + bits."""
    x0, noise, out = torch.randn(3, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    v = out.tanh()
    how = D.Objective("ddpm", "ddpm")
    t = D.network_time(how, torch.tensor([0.00042, 0.9999]))
    assert t.tolist() == [0.0, torch.tensor(0.999).item()]
    packed = D.squared_error(how, torch.cat([out, v], -1).flatten(0, 1), x0.flatten(0, 1),
                             noise.flatten(0, 1), t.repeat_interleave(4)[:, None])
    c = D.ddpm_at(D.ddpm_tables(), torch.tensor([0, 999])[:, None, None])
    x = D.interpolate(how, x0, noise, t[:, None, None])
    alone = (out - noise) ** 2 + D.ddpm_bits(out, v, x0, x, c)
    assert torch.allclose(packed.reshape(2, 4, 3).mean((1, 2)), alone.mean((1, 2)))


def test_options_make_the_objective():
    assert D.objective_of(vars(D.parse_options(["demo", "--model", "dit-s-2"]))) == D.Objective(
        "ddpm", "ddpm")
    assert D.objective_of(vars(D.parse_options(["demo", "--model", "uvit-s-2-coco"]))) == (
        D.Objective("noise", "sd"))
    args = D.parse_options(["demo", "--objective", "noise", "--path", "vp", "--weighting",
                            "min-snr", "--shift_tokens", "64"])
    assert D.objective_of(vars(args)) == D.Objective("noise", "vp", "min-snr", 64)
    assert D.objective_of({"shift": 1.0}) == D.Objective() == D.objective_of(
        vars(D.parse_options(["demo"])))


def test_noise_at_each_step_of_stable_diffusion():
    """n counts factors from 1: at n = 1 one of them is in, at 1000 all."""
    how = D.Objective("noise", "sd")
    t = D.network_time(how, torch.tensor([0.0, 0.4996, 1.0]))
    assert (1000 * t).round().tolist() == [1, 500, 1000]
    kept = D.interpolate(how, torch.ones(3), torch.zeros(3), t).square()
    assert abs(kept[0] - (1 - 0.00085)) < 1e-6 and abs(kept[2] - 0.00466) < 1e-5
    x0, noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    x = D.interpolate(how, x0, noise, t)
    assert torch.allclose(D.to_velocity_x0_noise(how, noise, x, t)[1], x0, atol=1e-4)


def test_ddim_follows_a_perfect_model_to_the_data():
    x0, noise = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    for how, last in ((D.Objective("noise", "sd"), 1.0), (D.Objective("ddpm", "ddpm"), 0.999)):
        times = torch.linspace(last, 0.001, 7)
        alpha, sigma, *_ = D.interpolant(how.path, times)
        predict = lambda x, i: D.to_velocity_x0_noise(how, noise, x, times[i])[1:]
        *steps, x = D.ddim(predict, D.interpolate(how, x0, noise, times[0]), alpha, sigma)
        assert len(steps) == 5 and torch.allclose(x, alpha[-1] * x0 + sigma[-1] * noise, atol=1e-3)


@pytest.mark.parametrize("options", [["--objective", "ddpm"], ["--weighting", "likelihood"]])
def test_what_makes_no_sense_is_refused(options, capsys):
    with pytest.raises(SystemExit) as error:
        D.parse_options(["demo", *options])
    assert error.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
