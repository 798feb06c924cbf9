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
    ("dit", "*"): "published denoisers", ("gaussian_diffusion", "*"): "DiT's diffusion",
    ("sit", "*"): "published denoisers", ("sit_transport", "*"): "SiT's objectives",
    ("wan-denoiser", "*"): "published denoisers", ("t5_encoder", "*"): "text encoders",
    ("umt5_encoder", "*"): "text encoders", ("umt5", "*"): "text encoders",
    ("clip_text", "*"): "text encoders",
    ("dit", "p_sample_loop"): "samplers", ("dit", "ddim_sample_loop"): "samplers",
    ("sit", "sample_ode"): "samplers", ("sit", "sample_sde"): "samplers",
    ("sit_transport", "sample_ode"): "samplers", ("sit_transport", "sample_sde"): "samplers",
    ("uvit", "dpm_solver_pp_sample"): "samplers", ("schedulers", "*"): "samplers",
    ("wan-pipeline", "*"): "samplers",
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


def gradients(case, model, loss):
    """{"grad.NAME": gradient of the loss} at what a check names."""
    loss.backward()
    return {f"grad.{name}": model.get_parameter(name).grad for name in case.check.get("grad", ())}


def packed(case, name, patch):
    """(tokens [N, C*P], shapes) of the images [B, C, H, W] of this name."""
    clips = list(case[name][:, :, None])
    return D.patchify(clips, patch), [tuple(z.shape) for z in clips]


def unpacked(tokens, shapes, patch):
    return torch.cat(D.unpatchify(tokens, shapes, patch), 1).transpose(0, 1)


def open_uvit(case):
    """(U-ViT, condition, what stands for none): a text, a label, or None."""
    args = case.args
    model, options = D.load_uvit(case.weights, args["num_heads"], args.get("num_clip_token", 77))
    assert options["qkv_bias"] == args.get("qkv_bias", False)
    assert options["conv"] == args.get("conv", True)
    condition, null = case["in.context"], case["in.empty_context"]
    if options["classes"]:
        condition = case["in.y"]
        null = torch.tensor(case.kwargs.get("null_class", options["classes"] - 1))
    return model, condition, null


@handles("uvit", "forward")
def uvit_forward(case):
    model, condition, _ = open_uvit(case)
    x, shapes = packed(case, "in.x", model.patch)
    out = unpacked(model(x, case["in.t"], condition, shapes), shapes, model.patch)
    if case["in.probe"] is None:
        return {"out.out": out}
    return {"out.out": out, **gradients(case, model, (out * case["in.probe"]).sum())}


@handles("uvit", "training_losses")
def uvit_training_losses(case):
    model, condition, _ = open_uvit(case)
    schedule, start, end, steps = (case.kwargs[name] for name in (
        "schedule", "beta_start", "beta_end", "n_timestep"))
    assert schedule == "stable_diffusion"
    (x0, shapes), (noise, _) = (packed(case, f"in.{name}", model.patch) for name in ("x0", "eps"))
    x_n, losses = D.noise_losses(model, x0, noise, case["in.n"], condition, shapes,
                                 D.sd_alpha_bars(start, end, steps))
    return {"out.x_n": unpacked(x_n, shapes, model.patch), "out.loss": losses,
            **gradients(case, model, losses.mean())}


@handles("uvit", "cfg")
def uvit_cfg(case):
    model, condition, null = open_uvit(case)
    x, shapes = packed(case, "in.x", model.patch)
    out = D.uvit_guided(model, x, case["in.t"], condition, null, case.kwargs["scale"], shapes)
    return {"out.out": unpacked(out, shapes, model.patch)}


@handles("videogpt_gpt", "gpt_forward")
def gpt_forward(case):
    model, _, _ = D.load_gpt(case.weights)
    logits, loss = (f(case["in.codes"], case["in.label"]) for f in (model, model.loss))
    return {"out.logits": logits, "out.loss": loss, **gradients(case, model, loss)}


@handles("videogpt_gpt", "gpt_decode_cached")
def gpt_decode_cached(case):
    model, _, _ = D.load_gpt(case.weights)
    assert (case.kwargs.get("block", 32), case.kwargs.get("num_local_blocks", 4)) == (32, 4)
    codes, caches = case["in.codes"].flatten(1), []
    with torch.no_grad():
        logits = [model.step(codes[:, place - 1], place, caches, case["in.label"])
                  for place in range(codes.shape[1])]
    return {"out.logits": torch.stack(logits, 1).unflatten(1, case["in.codes"].shape[1:])}


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.id)
def test_parity(case):
    reason = TO_COME.get((case.system, case.call)) or TO_COME.get((case.system, "*"))
    if reason:
        pytest.skip(f"to come: {reason}")
    case.load()
    handler = HANDLERS.get((case.system, case.call)) or HANDLERS.get((case.system, "*"))
    assert handler, f"nothing here computes {case.system} {case.call}"
    compare(case, handler(case))
