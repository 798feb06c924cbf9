"""The same numbers as the reference implementations, from their own weights.

Walks every folder of $PARITY_DIR (default: tests/fixtures). A folder holds published-layout weights,
fixture.json and io.safetensors: `system` there and a check's `call` name the function below that
computes what was recorded. What is not built yet stands in TO_COME and is reported as skipped;
anything else that is unknown fails."""
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_dit as D

ROOT = Path(os.environ.get("PARITY_DIR") or Path(__file__).with_name("fixtures"))

# (system, call or "*"): why it is not checked yet
TO_COME = {
    ("dit", "*"): "published denoisers", ("sit", "*"): "published denoisers",
    ("uvit", "*"): "published denoisers", ("videogpt_gpt", "*"): "published denoisers",
    ("wan-denoiser", "*"): "published denoisers", ("t5_encoder", "*"): "text encoders",
    ("umt5_encoder", "*"): "text encoders", ("umt5", "*"): "text encoders",
    ("clip_text", "*"): "text encoders",
    ("dit", "p_sample_loop"): "samplers", ("dit", "ddim_sample_loop"): "samplers",
    ("sit", "sample_ode"): "samplers", ("sit", "sample_sde"): "samplers",
    ("sit_transport", "sample_ode"): "samplers", ("sit_transport", "sample_sde"): "samplers",
    ("uvit", "dpm_solver_pp_sample"): "samplers", ("schedulers", "*"): "samplers",
    ("wan-pipeline", "*"): "samplers", ("videogpt_gpt", "gpt_decode_cached"): "sampling with a cache",
    ("autoencoder_kl", "*"): "published autoencoders", ("videogpt_vqvae", "*"): "published autoencoders",
    ("wan-vae", "*"): "published autoencoders", ("caption-metrics", "*"): "caption metrics",
    **{(family, "*"): "published captioners and language models" for family in (
        "cogvlm", "cogvlm2", "internlm2", "internvl", "internvl-orig", "llama", "llama3rope",
        "llava15", "llavanext", "minicpmv2", "mistral", "omnilmm", "qwen2", "qwen25vl", "qwen2vl",
        "qwen3", "qwen3vl", "qwenvl", "videollava", "xcomposer2", "yivl")},
}
HANDLERS = {}


def handles(system, call="*"):
    """Registers a function of a Case that returns {"out.NAME" or "grad.NAME": tensor}."""
    def register(function):
        HANDLERS[system, call] = function
        return function
    return register


class Case:
    """One check of one folder; `case["in.x"]` and the like are its tensors, None where it has none.
    Folders without a list of checks are one check, named by nothing, whose tensors have plain names."""

    def __init__(self, folder, check):
        self.folder, self.check = folder, check
        self.about = json.loads((folder / "fixture.json").read_text())
        self.system, self.args = self.about["system"], self.about.get("args", {})
        self.call = check["call"] if check else "*"
        self.kwargs = check.get("kwargs", {}) if check else {}
        self.weights = folder / self.about["weights"] if self.about.get("weights") else folder
        self.id = f"{folder.name}-{check['name']}" if check else folder.name

    def load(self):
        prefix = f"{self.check['name']}." if self.check else ""
        self.tensors = {name[len(prefix):]: tensor for name, tensor
                        in load_file(self.folder / "io.safetensors").items()
                        if name.startswith(prefix)}

    def __getitem__(self, name):
        return self.tensors.get(name)

    def wanted(self):
        """Names of all that must be computed."""
        if self.check:
            return [f"out.{n}" for n in self.check["out"]] + [f"grad.{n}" for n in
                                                              self.check.get("grad", ())]
        return [name for name in self.tensors if name.startswith(("out", "grad."))]

    def bound(self, recorded):
        """The largest error allowed in a tensor recorded as this one."""
        tolerance, largest = self.about["tolerance"], recorded.abs().max().item()
        if isinstance(tolerance, dict):
            return tolerance["atol"] + tolerance["rtol"] * largest
        return self.check.get("tolerance", tolerance) * max(1.0, largest)


def all_cases():
    for path in sorted(ROOT.glob("*/fixture.json")):
        checks = json.loads(path.read_text()).get("checks") or [None]
        yield from (Case(path.parent, check) for check in checks)


def compare(case, found):
    for name in case.wanted():
        recorded = case[name]
        assert name in found, f"{name} was not computed"
        ours = found[name].detach()
        assert ours.shape == recorded.shape, f"{name}: {tuple(ours.shape)}, {tuple(recorded.shape)}"
        if not recorded.is_floating_point():
            assert torch.equal(ours.to(recorded.dtype), recorded), name
            continue
        is_each = case.check and name.split(".", 1)[1] in case.check.get("per_step", ())
        pairs = zip(ours, recorded) if is_each else [(ours, recorded)]
        for i, (a, b) in enumerate(pairs):
            error = (a.double() - b.double()).abs().max().item()
            assert error <= case.bound(b), f"{name}[{i}]: {error:.3g} above {case.bound(b):.3g}"


# ------------------------------------------------------------------------------------------------
# Objectives
# ------------------------------------------------------------------------------------------------


@handles("gaussian_diffusion", "tables")
def diffusion_tables(case):
    tables = D.ddpm_tables(case.kwargs["noise_schedule"], case.kwargs["respacing"],
                           case.kwargs["diffusion_steps"])
    return {f"out.{name}": table for name, table in tables.items()}


def sit_case(case):
    """(objective, the analytic model as one of ours, times as ours, shaped to broadcast)."""
    how = D.Objective(case.kwargs.get("prediction", "velocity"), case.kwargs["path"].lower(),
                      case.kwargs.get("loss_weight") or "none")
    if how.prediction == "velocity":
        how = how._replace(weighting="none")                 # SiT weighs no velocity, even if asked
    a, b = case["in.a"], case["in.b"]
    model = D.from_sit(lambda x, t: a * x + b * torch.cos(3 * t), how.prediction)
    return how, model, (1 - case["in.t"]).view(-1, *[1] * a.ndim)


@handles("sit_transport", "training_losses")
def sit_losses(case):
    how, model, t = sit_case(case)
    x0, noise = case["in.x1"], case["in.x0"]                 # SiT numbers the ends by its own time
    x = D.interpolate(how, x0, noise, t)
    velocity = D.target(how._replace(prediction="velocity"), x0, noise, t)
    error = D.squared_error(how, model(x, t), x0, noise, t)
    return {"out.x_t": x, "out.u_t": -velocity, "out.loss": error.flatten(1).mean(1)}


@handles("sit_transport", "drift_score")
def sit_drift_score(case):
    how, model, t = sit_case(case)
    drift, score = D.drift_score(how, model(case["in.x"], t), case["in.x"], t)
    return {"out.drift": -drift, "out.score": score}


@handles("sit_transport", "compute_diffusion")
def sit_diffusion(case):
    t = 1 - case["in.t"]
    return {"out.diffusion": D.diffusion(case.kwargs["path"].lower(), case.kwargs["form"], t,
                                         case.kwargs["norm"])}


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.id)
def test_parity(case):
    reason = TO_COME.get((case.system, case.call)) or TO_COME.get((case.system, "*"))
    if reason:
        pytest.skip(f"to come: {reason}")
    case.load()
    handler = HANDLERS.get((case.system, case.call)) or HANDLERS.get((case.system, "*"))
    assert handler, f"nothing here computes {case.system} {case.call}"
    compare(case, handler(case))
