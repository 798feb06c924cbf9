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

import caption

ROOT = Path(os.environ.get("PARITY_DIR") or Path(__file__).with_name("fixtures"))

# (system, call or "*"): why it is not checked yet
TO_COME = {
    ("dit", "*"): "published denoisers", ("gaussian_diffusion", "*"): "DiT's diffusion",
    ("sit", "*"): "published denoisers", ("sit_transport", "*"): "SiT's objectives",
    ("uvit", "*"): "published denoisers", ("videogpt_gpt", "*"): "published denoisers",
    ("wan-denoiser", "*"): "published denoisers",
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
    Folders without a list of checks are one check, named by nothing, whose tensors have plain names;
    what a handler takes from there by `case[...]` counts as an input."""

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
        self.inputs = set()

    def __getitem__(self, name):
        self.inputs.add(name)
        return self.tensors.get(name)

    def wanted(self):
        """Names of all that must be computed."""
        if self.check:
            return [f"out.{n}" for n in self.check["out"]] + [f"grad.{n}" for n in
                                                              self.check.get("grad", ())]
        outs = [name for name in self.tensors if name.startswith("out")]
        if outs:
            return outs + [name for name in self.tensors if name.startswith("grad.")]
        return sorted(set(self.tensors) - self.inputs)

    def bound(self, recorded):
        """The largest error allowed in a tensor recorded as this one."""
        tolerance, largest = self.about["tolerance"], recorded.abs().max().item()
        if isinstance(tolerance, dict):
            return tolerance["atol"] + tolerance["rtol"] * largest
        return self.check.get("tolerance", tolerance) * max(1.0, largest)


@handles("t5_encoder", "text_encode")
@handles("umt5_encoder", "text_encode")
@handles("clip_text", "text_encode")
@handles("t5_encoder", "text_encode_ids")
@handles("umt5_encoder", "text_encode_ids")
@handles("clip_text", "text_encode_ids")
def text_encode(case):
    encoder = caption.open_text_encoder(case.weights)
    ids, mask = case["in.ids"], case["in.mask"]
    if case.call == "text_encode":
        most = case.kwargs.get("max_length", case.args.get("max_length"))
        ours = encoder.ids(case.about["texts"], most)
        assert torch.equal(ours[0], ids) and (mask is None or torch.equal(ours[1], mask))
    hidden, before = encoder(ids, mask)
    return {"out.hidden": hidden, "out.penultimate": before,
            "out.pooled": encoder.pooled(ids, hidden) if case.system == "clip_text" else None}


@handles("umt5")
def wan_text(case):
    """Of a folder's names: after_blockN and embeds hold a text's first rows only."""
    encoder, about, blocks = caption.open_text_encoder(case.weights), case.about, {}
    cleaned = [caption.clean_prompt(prompt) for prompt in about["prompts"]]
    assert cleaned == about["cleaned"]
    ids, mask = encoder.ids(cleaned, about["max_length"])
    hooks = [layer.register_forward_hook(lambda *call, i=i: blocks.update({i: call[-1]}))
             for i, layer in enumerate(encoder.layers)]
    encoder(ids, mask)
    for hook in hooks:
        hook.remove()
    embeds = torch.zeros(*ids.shape, encoder.embed.embedding_dim)
    for i, text in enumerate(encoder.encode(cleaned, about["max_length"])):
        embeds[i, :len(text)] = text
    found = {f"after_block{i}": x * mask[:, :, None] for i, x in blocks.items()} | {
        "input_ids": ids, "attention_mask": mask, "lengths": mask.sum(1), "embeds": embeds,
        "embeds_sum_over_tokens": embeds.sum(1)}
    return {name: found[name][:, :x.shape[1]] if x.dim() == 3 else found[name]
            for name, x in case.tensors.items()}


def all_cases():
    for path in sorted(ROOT.glob("*/fixture.json")):
        checks = json.loads(path.read_text()).get("checks") or [None]
        yield from (Case(path.parent, check) for check in checks)


def compare(case, found):
    for name in case.wanted():
        recorded = case.tensors[name]
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


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.id)
def test_parity(case):
    reason = TO_COME.get((case.system, case.call)) or TO_COME.get((case.system, "*"))
    if reason:
        pytest.skip(f"to come: {reason}")
    case.load()
    handler = HANDLERS.get((case.system, case.call)) or HANDLERS.get((case.system, "*"))
    assert handler, f"nothing here computes {case.system} {case.call}"
    compare(case, handler(case))
