"""The same numbers as the reference implementations, from their own weights.

Walks every folder of $PARITY_DIR (default: tests/fixtures). A folder holds published-layout weights,
fixture.json and io.safetensors: `system` there and a check's `call` name the function below that
computes what was recorded. What is not built yet stands in TO_COME and is reported as skipped;
anything else that is unknown fails."""
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import caption
import sample
import train_dit as D
import train_vae as V

ROOT = Path(os.environ.get("PARITY_DIR") or Path(__file__).with_name("fixtures"))

# (system, call or "*"): why it is not checked yet
TO_COME = {
    **{(family, "*"): "published captioners" for family in (
        "cogvlm2", "internvl", "internvl-orig", "llavanext", "qwen3vl")},
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
        io = self.folder / "io.safetensors"
        self.tensors = {name[len(prefix):]: tensor for name, tensor
                        in (load_file(io) if io.exists() else {}).items() if name.startswith(prefix)}
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

    def bound(self, name, recorded):
        """The largest error allowed in a tensor recorded as this one."""
        tolerance, largest = self.about["tolerance"], recorded.abs().max().item()
        if isinstance(tolerance, dict) and "pixel_values" in tolerance:
            kind = next((kind for kind in ("pixel_values", "logits") if kind in name), "features")
            return tolerance[kind] * max(1.0, largest)
        if isinstance(tolerance, dict):
            return tolerance["atol"] + tolerance["rtol"] * largest
        return self.check.get("tolerance", tolerance) * max(1.0, largest)


# ---- denoisers: DiT, SiT, Wan


def denoise(model, clips, times, texts=None, images=None, labels=None):
    """A network's output for each of the clips [C, T', H', W'], all in one packed row. times: one a
    clip, or one a token; texts, images: [L, width] a clip."""
    shapes = [tuple(clip.shape) for clip in clips]
    row = D.lay_out(shapes, [None] * len(clips), [[]] * len(clips), None, model.patch)
    lengths = row.cu_seqlens.diff().tolist()
    each = [t.expand(n) if t.dim() == 0 else t[:n] for t, n in zip(times, lengths)]
    if labels is None:
        times, rows = torch.unique(torch.cat(each), return_inverse=True)
        row.table_index = rows.int()
    row.labels = labels
    packed, row.cu_text = (None, None) if texts is None else D.fill_texts(texts)
    if images is not None:
        row.cu_image = torch.arange(len(clips) + 1, dtype=torch.int32) * len(images[0])
        images = torch.cat(list(images))
    out = model(D.patchify(clips, model.patch), torch.as_tensor(times), row, packed, images)
    return D.unpatchify(out, [(model.out_channels, *shape[1:]) for shape in shapes], model.patch)


def gradients(case, model, layout):
    """The parameters' gradients under their published names, as the case asks for them."""
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad
             for name, p in model.named_parameters()}
    grads = D.to_published(grads, layout, model)
    return {f"grad.{name}": grad for name, grad in grads.items()}


@handles("dit", "forward")
@handles("sit", "forward")
def dit_forward(case):
    model, layout, _ = D.load_published(case.weights, case.args.get("num_heads"))
    model.requires_grad_(True)
    y = denoise(model, list(case["in.x"][:, :, None]), case["in.t"], labels=case["in.y"])
    out = torch.stack(y)[:, :, 0]
    out = out[:, :case["in.x"].shape[1]] if case.system == "sit" else out
    if case["in.probe"] is not None:
        (out * case["in.probe"]).sum().backward()
    return {"out.out": out, **gradients(case, model, layout)}


@handles("dit", "forward_with_cfg")
@handles("sit", "forward_with_cfg")
def dit_cfg(case):
    model, _, _ = D.load_published(case.weights, case.args.get("num_heads"))
    half, channels = case["in.x"].chunk(2)[0], case["in.x"].shape[1]
    clips = list(torch.cat([half, half])[:, :, None])
    out = torch.stack(denoise(model, clips, case["in.t"], labels=case["in.y"]))[:, :, 0]
    out = out[:, :channels] if case.system == "sit" else out
    with_label, without = out.chunk(2)
    scale, n = case.kwargs["cfg_scale"], case.kwargs["cfg_channels"]
    # the other half's guided channels are the same, seen from the other side
    return {"out.out": torch.cat([D.guide(with_label, without, scale, n),
                                  D.guide(without, with_label, 1 - scale, n)])}


@handles("dit", "training_losses")
def dit_losses(case):
    model, layout, _ = D.load_published(case.weights, case.args.get("num_heads"))
    model.requires_grad_(True)
    x0, noise, n = case["in.x_start"], case["in.noise"], case["in.t"]
    tables = D.ddpm_tables("linear", case.kwargs["respacing"])
    c = D.ddpm_at(tables, n.view(-1, 1, 1, 1))
    x = c["alpha"] * x0 + c["sigma"] * noise
    times = tables["timestep_map"][n].float()
    out = torch.stack(denoise(model, list(x[:, :, None]), times, labels=case["in.y"]))[:, :, 0]
    eps, v = out.chunk(2, 1) if case.args["learn_sigma"] else (out, None)
    terms = {"mse": (eps - noise).square().flatten(1).mean(1)}
    if v is not None:
        terms["vb"] = D.ddpm_bits(eps.detach(), v, x0, x, c).flatten(1).mean(1)
    terms["loss"] = sum(terms.values())
    terms["loss"].mean().backward()
    return {**{f"out.{name}": term for name, term in terms.items()},
            **gradients(case, model, layout)}


@handles("sit", "training_losses")
def sit_network_losses(case):
    model, layout, _ = D.load_published(case.weights, case.args.get("num_heads"))
    model.requires_grad_(True)
    how = D.Objective(case.kwargs["prediction"], case.kwargs["path"].lower(),
                      case.kwargs["loss_weight"] or "none")
    how = how._replace(weighting="none") if how.prediction == "velocity" else how
    x0, noise, t = case["in.x1"], case["in.x0"], (1 - case["in.t"]).view(-1, 1, 1, 1)

    def network(x, t):
        out = denoise(model, list(x[:, :, None]), t.flatten(), labels=case["in.y"])
        return torch.stack(out)[:, :x.shape[1], 0]
    x = D.interpolate(how, x0, noise, t)
    output = D.from_sit(network, how.prediction)(x, t)
    loss = D.squared_error(how, output, x0, noise, t).flatten(1).mean(1)
    loss.mean().backward()
    sign = -1 if how.prediction == "velocity" else 1
    return {"out.loss": loss, "out.pred": sign * output, **gradients(case, model, layout)}


@handles("wan-denoiser")
def wan_forward(case):
    """Clips come as a batch (x, context, timestep) or one by one (x0, context0, timestep0, …)."""
    model, layout, _ = D.load_published(case.folder)
    model.requires_grad_(True)
    result = {}
    if case["x"] is not None:
        x = case["x"].requires_grad_()
        outs = denoise(model, list(x), case["timestep"], list(case["context"]), case["image_tokens"])
        result["out"] = torch.stack(outs)
        (result["out"] * case["probe"]).sum().backward()
        result["grad.x"] = x.grad
        for name, clips in (("image", case["x_image"]), ("uniform", case["x"])):
            times = case[f"timestep_{name}"]
            if times is not None:
                texts = list(case["context"])[:len(times)]
                result[f"out_{name}"] = torch.stack(denoise(model, list(clips), times, texts))
    else:
        n = sum(f"x{i}" in case.tensors for i in range(99))
        each = lambda name: [case[f"{name}{i}"] for i in range(n)]
        clips, times = each("x"), case["timestep"]
        clips = [torch.cat(pair) for pair in zip(clips, each("y"))] if case["y0"] is not None else clips
        times = each("timestep") if times is None else times
        outs = denoise(model, clips, times, each("context"), case["image_tokens"])
        sum((out * probe).sum() for out, probe in zip(outs, each("probe"))).backward()
        result = {f"out{i}": out for i, out in enumerate(outs)}
    return {**gradients(case, model, layout), **result}


# ---- text encoders

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
    result = {f"after_block{i}": x * mask[:, :, None] for i, x in blocks.items()} | {
        "input_ids": ids, "attention_mask": mask, "lengths": mask.sum(1), "embeds": embeds,
        "embeds_sum_over_tokens": embeds.sum(1)}
    return {name: result[name][:, :x.shape[1]] if x.dim() == 3 else result[name]
            for name, x in case.tensors.items()}

# ---- published captioners and language models

SEEN = (r"(<\|vision_start\|>)?(<image>|<video>|<image_placeholder>|<img>.*?</img>|<ImageHere>|"
        r"{image}|<\|(image|video)_pad\|>)(<\|vision_end\|>)?")


def read_prompts(case, model):
    """[(prefix of the names, Request, pixels, is_video)]: the prompts that a folder records, read as
    the script reads them."""
    about, result = case.about, []
    main, images = about["prompt"], about.get("images", [])
    if case.system == "videollava":
        asked = [("", main, about["frames"], True), ("image_", about["image_prompt"], images, False)]
    else:
        asked = [("", main, images, False)]
        if "video_prompt" in about:
            asked.append(("video_", about["video_prompt"], about["frames"], True))
    for prefix, prompt, files, is_video in asked:
        frames = [np.asarray(Image.open(case.folder / name).convert("RGB")) for name in files]
        text = re.sub(SEEN, "\0", prompt)
        text = "\0" + text if files and "\0" not in text else text       # CogVLM: pictures first
        read = model.read(text, frames, is_video, about.get("second_per_grid", 1.0))
        request, = model.requests([prefix], [read])
        result.append((prefix, request, read[1], is_video))
    return result


def published_ids(case, name, request):
    """What the reference's ids say where something is seen does not matter; elsewhere ours."""
    recorded = case.tensors[name]
    if len(recorded) == len(request.ids):
        ours = torch.tensor(request.ids)
        return torch.where(ours < 0, recorded, ours)
    marks, text = recorded < 0, [i for i in request.ids if i >= 0]       # -200: all of a picture
    assert [i for i in recorded.tolist() if i >= 0] == text
    first = request.ids.index(-1)
    assert marks.nonzero().flatten().tolist() == [first]
    return recorded


def seen_of(case, model, prefix, request, pixels, is_video):
    """Pixels and features under the names that folders use."""
    result, seen = {}, torch.tensor(request.ids) < 0
    features = request.x[seen]
    taken, tower = {}, model.video_tower if is_video and model.video_tower else model.tower
    hook = tower.register_forward_hook(lambda *call: taken.update(out=call[-1]))
    model.features(pixels, is_video)
    hook.remove()
    for name, recorded in case.tensors.items():
        kind = name.split("_")[-1]
        if name.startswith("pixel_values"):
            of_video = kind == "videos"
            if of_video == is_video and (kind != "images" or prefix):
                parts = [each[0] if isinstance(each, tuple) else each for each in pixels]
                result[name] = parts[int(kind)] if kind.isdigit() else (
                    parts[0] if recorded.dim() == 2 else torch.stack(parts).view(recorded.shape))
        elif name.endswith("grid_thw") and name.startswith("video" if is_video else "image"):
            result[name] = torch.tensor([pixels[0][1]])
        elif name == ("video_features" if is_video else "image_features"):
            result[name] = features.view(recorded.shape)
        elif name == "vision_features" or name == ("vision_features_video" if is_video else
                                                   "vision_features_image"):
            lacks = recorded.shape[1] - taken["out"].shape[1]            # CLS, which nothing reads
            result[name] = torch.cat([recorded[:, :lacks], taken["out"]], 1)
    return result


@handles("llama")
@handles("llama3rope")
@handles("mistral")
@handles("qwen2")
@handles("qwen3")
@handles("internlm2")
@handles("llava15")
@handles("yivl")
@handles("qwenvl")
@handles("xcomposer2")
@handles("cogvlm")
@handles("minicpmv2")
@handles("omnilmm")
@handles("videollava")
@handles("qwen2vl")
@handles("qwen25vl")
@torch.no_grad()
def published_model(case):
    """Ids, pixels, features, positions, logits, and the greedy tokens: alone, and in a batch with
    rows of other lengths, one of which ends early and makes room."""
    model = caption.open_vlm(case.folder)
    spec, result = model.spec, {}
    for prefix, request, pixels, is_video in read_prompts(case, model):
        result[f"{prefix}input_ids"] = published_ids(case, f"{prefix}input_ids", request)
        if pixels:
            result.update(seen_of(case, model, prefix, request, pixels, is_video))
        result[f"{prefix}position_ids"] = request.positions
        if spec.stack.expert < 0:
            result["vision_expert_mask"] = request.image
            result["token_type_ids"] = torch.tensor(request.ids) < 0
        ids, seen = torch.tensor(request.ids), torch.tensor(request.ids) < 0
        if "image_bounds" in case.tensors:
            edges = F.pad(seen.int(), (1, 1)).diff()
            result["image_bounds"] = torch.stack([(edges == 1).nonzero()[:, 0],
                                                 (edges == -1).nonzero()[:, 0]], 1)
        h = model.decoder(request.x[None], request.positions[..., None, :], prompts=torch.tensor(
            [len(ids)]), image=request.image[None] if spec.stack.expert else None)
        recorded = case.tensors[f"{prefix}logits"]
        result[f"{prefix}logits"] = model.decoder.logits(h)[0, -len(recorded):]
        texts = [model.request(f"{n}", *model.read("x" * n), []) for n in (1, 30, 7)]
        alone = list(caption.generate(model.decoder, [request], 1, 12))
        mixed = list(caption.generate(model.decoder, [texts[0], request, *texts[1:]], 2, 12))
        for row, tokens, score in mixed + alone:
            if row is request:
                assert result.setdefault(f"{prefix}generated", torch.tensor(tokens)).tolist() == tokens
    return result


@handles("caption-metrics")
def published_scores(case):
    about = case.about
    ours = caption.score_captions({key: texts[0] for key, texts in about["candidates"].items()},
                                  about["references"], str.split)
    for name in ("bleu", "rouge_l", "cider"):
        torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(about[name]),
                                   atol=about["tolerance"], rtol=0)
    for name in ("bleu_each", "rouge_l_each", "cider_each"):
        each = torch.tensor([ours[name][key] for key in about["order"]])
        recorded = torch.tensor(about[name])
        torch.testing.assert_close(each, recorded.T if recorded.dim() > 1 else recorded,
                                   atol=about["tolerance"], rtol=0)
    return {}


# ---- autoencoders

def published_gradients(model, layout):
    """{name in a file: gradient}, with an image model's queries, keys and values apart."""
    result = {}
    for own, name in V.published_names(model, layout).items():
        p = model.get_parameter(own)
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        parts = grad.chunk(3) if layout == "image" and ".to_qkv." in name else [grad]
        names = [name] if len(parts) == 1 else [name.replace("to_qkv", f"to_{p}") for p in "qkv"]
        result.update(zip(names, parts))
    return result


@handles("autoencoder_kl", "encode")
@handles("autoencoder_kl", "decode")
def image_autoencoder(case):
    folders = [case.weights, *([case.folder / "vae_old_names"] if
                               (case.folder / "vae_old_names").exists() else [])]
    (model, config), *others = [V.load_published(folder) for folder in folders]
    assert all(other["hash"] == config["hash"] for _, other in others)
    mean, std = V.normaliser(config)
    scale, shift = case.args["scaling_factor"], case.args.get("shift_factor") or 0.0
    assert torch.allclose(std * scale, torch.ones(())) and torch.allclose(mean, torch.tensor(shift))
    if case.call == "encode":
        mean, logvar = (part[:, :, 0] for part in model.encode(case["in.x"][:, :, None]))
        return {"out.mean": mean, "out.logvar": logvar,
                "out.sample": mean + (0.5 * logvar).exp() * case["in.noise"]}
    x = model.decode(case["in.z"][:, :, None])[:, :, 0]
    if case["in.probe"] is None:
        return {"out.x": x}
    (x * case["in.probe"]).sum().backward()
    return {"out.x": x, **{f"grad.{name}": grad for name, grad in
                           published_gradients(model, "image").items()}}


@handles("wan-vae")
def wan_autoencoder(case):
    """The intermediate values are the levels' outputs; odd sizes are encoded only."""
    model, config = V.load_published(case.weights)
    assert config["latents_mean"] == pytest.approx(case.about["latents_mean"])
    (mean, std), result = V.normaliser(config), {}
    for name in [n.removeprefix("video") for n in case.tensors if n.startswith("video")]:
        seen = {}
        spots = {**{f"{side}_{i}": level for side in ("encoder", "decoder")
                    for i, level in enumerate(getattr(model, side))}}
        hooks = [level.register_forward_hook(lambda *call, spot=spot: seen.update({spot: call[-1]}))
                 for spot, level in spots.items()]
        means, logvar = model.encode(case[f"video{name}"])
        result[f"moments{name}"] = torch.cat([means, logvar], 1)
        result[f"latents{name}"] = (means - mean) / std
        if case[f"z{name}"] is not None:
            z = case[f"z{name}"] * std + mean
            result[f"decoded{name}"] = model.decode(z).clamp(-1, 1)
        for hook in hooks:
            hook.remove()
        if case[f"probe_decoded{name}"] is not None:
            # in float64: what was recorded lies within 0.8 of the tolerance of that already
            video, z, *probes = (case[f"{part}{name}"].double() for part in (
                "video", "z", "probe_moments", "probe_decoded"))
            exact = V.load_published(case.weights)[0].double()
            moments = torch.cat(exact.encode(video), 1)
            x = exact.decode(z * std + mean).clamp(-1, 1)
            ((moments * probes[0]).sum() + (x * probes[1]).sum()).backward()
            result.update({f"grad{name}.{published}": grad.reshape(
                case.tensors.get(f"grad{name}.{published}", grad).shape) for published, grad in
                published_gradients(exact, case.about["layout"]).items()})
        last = len(model.encoder) - 1
        for mid, spot in (("enc_conv1", "encoder_0"), ("enc_conv_in", "encoder_0"),
                          ("enc_middle", f"encoder_{last}"), ("enc_mid", f"encoder_{last}"),
                          ("dec_conv1", "decoder_0"), ("dec_middle", "decoder_1"),
                          ("dec_mid", "decoder_1"), ("dec_up0", "decoder_2"),
                          ("dec_up1", "decoder_3")):
            result[f"mid{name}.{mid}"] = seen.get(spot)
    return result


@handles("videogpt_vqvae", "encode")
@handles("videogpt_vqvae", "decode")
@handles("videogpt_vqvae", "vqvae_forward")
def videogpt_autoencoder(case):
    """Its videos are in [-0.5, 0.5], ours in [-1, 1]."""
    model = V.load_published(case.weights)[0].eval()
    if case.call == "decode":
        return {"out.video": model.decode_codes(case["in.codes"]) / 2}
    x = 2 * case["in.x"]
    h = model.features(x)
    z, codes, commitment = model.bottleneck(h)
    if case.call == "encode":
        return {"out.codes": codes, "out.embeddings": model.bottleneck.lookup(codes)}
    y = model.decode(z) / 2
    recon, commitment = (y - x / 2).square().mean() / 0.06, commitment.mean()
    return {"out.recon": y, "out.recon_loss": recon, "out.commitment_loss": commitment,
            "out.loss": recon + commitment, "out.perplexity": V.perplexity(codes, model.n_codes),
            **own_gradients(case, model, recon + commitment)}


@handles("videogpt_vqvae", "codebook_update")
def codebook_update(case):
    book = V.Codebook(*case["in.embeddings"].shape)
    for own, name in (("codebook", "embeddings"), ("counts", "N"), ("sums", "z_avg")):
        getattr(book, own).copy_(case[f"in.{name}"])
    codes = book.codes(case["in.z"])
    book.update(case["in.z"].movedim(1, -1).flatten(0, -2), codes.flatten(), case.kwargs["decay"])
    used = book.counts >= case.kwargs["restart_below"]
    return {"out.codes": codes, "out.N": book.counts, "out.z_avg": book.sums, "out.used": used,
            "out.embeddings_used": book.codebook * used[:, None]}


def all_cases():
    for path in sorted(ROOT.glob("*/fixture.json")):
        checks = json.loads(path.read_text()).get("checks") or [None]
        yield from (Case(path.parent, check) for check in checks)


def compare(case, result):
    for name in case.wanted():
        recorded = case.tensors[name]
        assert name in result, f"{name} was not computed"
        ours = result[name].detach()
        assert ours.shape == recorded.shape, f"{name}: {tuple(ours.shape)}, {tuple(recorded.shape)}"
        if not recorded.is_floating_point():
            assert torch.equal(ours.to(recorded.dtype), recorded), name
            continue
        is_each = case.check and name.split(".", 1)[1] in case.check.get("per_step", ())
        pairs = zip(ours, recorded) if is_each else [(ours, recorded)]
        for i, (a, b) in enumerate(pairs):
            error = (a.double() - b.double()).abs().max().item()
            bound = case.bound(name, b)
            assert error <= bound, f"{name}[{i}]: {error:.3g} above {bound:.3g}"


# ---- U-ViT and VideoGPT's prior

def own_gradients(case, model, loss):
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
    model, _, options = D.load_published(case.weights, args["num_heads"],
                                         args.get("num_clip_token", 77))
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
    return {"out.out": out, **own_gradients(case, model, (out * case["in.probe"]).sum())}


@handles("uvit", "training_losses")
def uvit_training_losses(case):
    model, condition, _ = open_uvit(case)
    start, end, steps = (case.kwargs[name] for name in ("beta_start", "beta_end", "n_timestep"))
    assert case.kwargs["schedule"] == "stable_diffusion"
    (x0, shapes), (noise, _) = (packed(case, f"in.{name}", model.patch) for name in ("x0", "eps"))
    lengths = torch.tensor([len(x0) // len(shapes)] * len(shapes))
    c = D.ddpm_at(D.ddpm_tables("scaled_linear", "", steps, (start, end)),
                  (case["in.n"] - 1).repeat_interleave(lengths)[:, None])
    x_n = c["alpha"] * x0 + c["sigma"] * noise
    error = (model(x_n, case["in.n"], condition, shapes) - noise).square().mean(1)
    losses = torch.stack([part.mean() for part in error.split(lengths.tolist())])
    return {"out.x_n": unpacked(x_n, shapes, model.patch), "out.loss": losses,
            **own_gradients(case, model, losses.mean())}


@handles("uvit", "cfg")
def uvit_cfg(case):
    model, condition, null = open_uvit(case)
    x, shapes = packed(case, "in.x", model.patch)
    both = torch.cat([condition, null.expand_as(condition)])
    out = model(x.repeat(2, 1), case["in.t"].repeat(2), both, shapes * 2)
    out = D.guide(*out.chunk(2), 1 + case.kwargs["scale"])   # U-ViT counts from 0, none
    return {"out.out": unpacked(out, shapes, model.patch)}


@handles("videogpt_gpt", "gpt_forward")
def gpt_forward(case):
    model, _, _ = D.load_gpt(case.weights)
    logits = model(case["in.codes"], case["in.label"])
    loss = model.losses(case["in.codes"], case["in.label"]).mean()
    return {"out.logits": logits, "out.loss": loss, **own_gradients(case, model, loss)}


@handles("videogpt_gpt", "gpt_decode_cached")
def gpt_decode_cached(case):
    model, _, _ = D.load_gpt(case.weights)
    assert (case.kwargs.get("block", 32), case.kwargs.get("num_local_blocks", 4)) == (32, 4)
    codes, caches = case["in.codes"].flatten(1), []
    with torch.no_grad():
        logits = [model.step(codes[:, place - 1], place, caches, case["in.label"])
                  for place in range(codes.shape[1])]
    return {"out.logits": torch.stack(logits, 1).unflatten(1, case["in.codes"].shape[1:])}


# ---- objectives


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
    answer = D.to_velocity_x0_noise(how, model(case["in.x"], t), case["in.x"], t)
    drift, score = sample.drift_score(how, answer, t)
    return {"out.drift": -drift, "out.score": score}


@handles("sit_transport", "compute_diffusion")
def sit_diffusion(case):
    t = 1 - case["in.t"]
    return {"out.diffusion": sample.diffusion(case.kwargs["path"].lower(), case.kwargs["form"], t,
                                         case.kwargs["norm"])}


# ---- samplers: the recorded trajectories

def steps_of(sampler):
    """[n, ...]: what a sampler yields."""
    return torch.stack(list(sampler))


def drawn(case):
    noise = case["in.noise"]
    return None if noise is None else lambda i: noise[i]


def guided(case, run):
    """run(x, t) with guidance over the batch's two halves, of which the recorded kinds differ: DiT
    and SiT denoise the first half's x and hand each half its own unguided channels."""
    scale, n = case.kwargs.get("cfg_scale"), case.kwargs.get("cfg_channels")
    if scale is None:
        return run

    def both(x, t):
        half = x.chunk(2)[0]
        near, far = run(torch.cat([half, half]), t).chunk(2)
        return torch.cat([D.guide(near, far, scale, n), D.guide(far, near, 1 - scale, n)])
    return both


def images_of(case, channels=None):
    """A DiT's or SiT's network of images x [B, C, H, W] at network times t [B]."""
    model, _, _ = D.load_published(case.weights, case.args.get("num_heads"))
    model.requires_grad_(False)

    def run(x, t):
        t = torch.as_tensor(t, dtype=torch.float32).expand(len(x))
        return torch.stack(denoise(model, list(x[:, :, None]), t, labels=case["in.y"]))[:, :channels, 0]
    return run


@handles("dit", "p_sample_loop")
@handles("dit", "ddim_sample_loop")
def dit_sampling(case):
    run, tables = guided(case, images_of(case)), D.ddpm_tables("linear", case.kwargs["respacing"])
    told = tables["timestep_map"].flip(0)
    if "timestep_map" in case.kwargs:
        assert tables["timestep_map"].tolist() == case.kwargs["timestep_map"]
    level = lambda name, last: torch.cat([tables[name].flip(0), torch.tensor([last]).double()])
    alpha, sigma = level("alpha", 1.0), level("sigma", 0.0)

    def predict(x, i):
        noise, *share = run(x, told[i]).split(x.shape[1], 1)
        x0 = (x - sigma[i].to(x) * noise) / alpha[i].to(x)
        if case.kwargs["clip_denoised"]:
            x0 = x0.clamp(-1, 1)
            noise = (x - alpha[i].to(x) * x0) / sigma[i].to(x)
        return x0, noise, (share[0] + 1) / 2 if share else None
    if case.call == "ddim_sample_loop":
        steps = sample.ddim(predict, case["in.z"], alpha, sigma, case.kwargs["eta"], drawn(case))
    else:
        steps = sample.ddpm(predict, case["in.z"], tables, drawn(case))
    return {"out.samples": steps_of(steps)}


def sit_sampling(case, model, how):
    """What SiT's two samplers yield from a network of ours."""
    a, kwargs = case["in.z"], case.kwargs
    times = (1 - torch.linspace(kwargs["t0"], kwargs["t1"], kwargs["num_steps"]).double())
    times = times.to(a.dtype).unbind()
    field = lambda x, t: sample.drift_score(how, D.to_velocity_x0_noise(how, model(x, t), x, t), t)
    if case.call == "sample_ode":
        velocity = lambda x, t: field(x, t)[0]
        if kwargs["method"] == "dopri5":             # to its tolerance: the end of any fine grid
            times = torch.linspace(1 - kwargs["t0"], 1 - kwargs["t1"], 33).unbind()
            return steps_of(sample.runge_kutta(velocity, a, times, "rk4"))[-1:]
        method = {"heun2": "heun"}.get(kwargs["method"], kwargs["method"])
        return steps_of(sample.runge_kutta(velocity, a, times, method))
    strength = lambda t: sample.diffusion(how.path, kwargs["diffusion_form"], t,
                                          kwargs["diffusion_norm"])
    last = kwargs["last_step"] and kwargs["last_step"].lower()
    times = [*times, times[-1] - (kwargs["last_step_size"] if last else 0)]
    return steps_of(sample.sde(field, a, times, strength, drawn(case),
                               kwargs["sampling_method"].lower(), last, how.path))


@handles("sit", "sample_ode")
@handles("sit", "sample_sde")
def sit_network_sampling(case):
    how = D.Objective(case.kwargs["prediction"], case.kwargs["path"].lower())
    run = guided(case, images_of(case, case["in.z"].shape[1]))
    return {"out.samples": sit_sampling(case, D.from_sit(run, how.prediction), how)}


@handles("sit_transport", "sample_ode")
@handles("sit_transport", "sample_sde")
def sit_transport_sampling(case):
    how = D.Objective(case.kwargs["prediction"], case.kwargs["path"].lower())
    a, b = case["in.a"], case["in.b"]
    model = D.from_sit(lambda x, t: a * x + b * torch.cos(3 * t), how.prediction)
    return {"out.samples": sit_sampling(case, model, how)}


@handles("uvit", "dpm_solver_pp_sample")
def uvit_sampling(case):
    model, condition, _ = open_uvit(case)
    x, shapes = packed(case, "in.z", model.patch)
    wanted = dict(predict_x0=True, solver_type="dpm_solver", method="fast", order=3,
                  skip_type="time_uniform", T=1.0)
    assert {name: case.kwargs[name] for name in wanted} == wanted
    times, alpha, sigma = sample.level_grid(case.kwargs["steps"], last=case.kwargs["eps"])

    def predict(x, i):
        noise = model(x, (1000 * times[i]).float().expand(len(shapes)), condition, shapes)
        return (x - sigma[i].to(x) * noise) / alpha[i].to(x), noise, None
    with torch.no_grad():
        out = steps_of(sample.dpm_fast(predict, x, alpha, sigma))[-1]
    return {"out.out": unpacked(out, shapes, model.patch)}


@handles("wan-pipeline")
def wan_pipeline(case):
    """A published folder from prompt to pixels, through sample.py's own Sampler."""
    about, result, noise = case.about, {}, case["noise"]
    batched = noise.dim() == 5
    noise = noise[0] if batched else noise
    whole = lambda z: z[None] if batched else z
    for name, run in about["runs"].items():
        solver = {"dpmpp": "dpm++"}.get(name.split("_")[-1], name.split("_")[-1])
        args = sample.parse_options([
            str(case.folder), "--prompt", about["prompt"], "--steps", str(run["steps"]), "--shift",
            str(run["shift"]), "--cfg", str(run["guidance_scale"]), "--sampler", solver, "--frames",
            str(about["num_frames"]), "--size", f"{about['height']}x{about['width']}"])
        sampler = sample.Sampler(args, torch.device("cpu"))
        if solver == "euler":                # diffusers' own grid shifts its small end twice
            least = float(D.shifted(0.001, run["shift"]))
            args.ends = 1.0, least - (1 - least) / (run["steps"] - 1)
        read, first = sampler.part("text"), None
        near, far = read(about["prompt"]), read(about["negative_prompt"])
        if "i2v" in name:
            mean, _ = sampler.part("vae")[0].encode(case["image"][:, :, None])
            result["image_latents"] = (mean - sampler.mean) / sampler.std
            first = result["image_latents"][0]
        assert tuple(noise.shape) == sampler.latent_shape(*(about[key] for key in (
            "num_frames", "height", "width")))
        job = sample.SamplingJob(tuple(noise.shape), 16.0, near, far, noise, first_latent=first)
        velocities, steps = [], []

        def watch(packed, seen):
            x = seen[0] if isinstance(seen, tuple) else seen
            x = D.unpatchify(x, packed.shapes, packed.model.dit.patch)[0]
            (velocities if isinstance(seen, tuple) else steps).append(whole(x))
            return seen
        latents, = sampler.denoise([job], watch=watch)
        times = sample.flow_points(args, sampler.part("denoiser").objective, run["shift"])
        told = 1000 * times[:-1]
        video = torch.cat(list(D.decode_long(sampler.part("vae")[0], (
            latents * sampler.std + sampler.mean)[None])), 2).clamp(-1, 1)
        result |= {f"{name}.latents": whole(latents), f"{name}.sigmas": times, f"{name}.timesteps":
                  told.floor() if args.grid in sample.WAN_GRIDS else told,
                  f"{name}.video": video if batched else video[0]}
        result |= {f"{name}.{what}_step{i}": x for what, each in (("v", velocities), ("latents", steps))
                  for i, x in enumerate(each)}
    return {**result, "prompt_embeds": whole(near), "negative_embeds": whole(far)}


@handles("schedulers", "scheduler")
def scheduler(case):
    """diffusers' schedulers with the analytic model a x + b cos(0.003 t)."""
    kwargs, config, n = case.kwargs, case.kwargs["config"], case.kwargs["steps"]
    a, b, shift = case["in.a"], case["in.b"], config.get("flow_shift", config.get("shift", 1.0))
    kind = config.get("prediction_type", "flow_prediction")
    if kwargs["scheduler"] == "FlowEuler" or config.get("use_flow_sigmas"):
        least = 1 / config["num_train_timesteps"]
        if kwargs["scheduler"] == "FlowEuler":       # down to the least, itself among the points
            shift = math.exp(kwargs["mu"]) if "mu" in kwargs else shift
            least = least if "mu" in kwargs else float(D.shifted(least, shift))
            ends = 1.0, least - (1 - least) / (n - 1)
        else:
            ends = (1.0, least) if kwargs["scheduler"] == "UniPC" else (1 - least, 0.0)
        sigma = sample.flow_grid(n, shift, *ends)
        sigma[0] = min(sigma[0], 1.0 if kwargs["scheduler"] == "FlowEuler" else 1 - 1e-6)
        alpha, told = 1 - sigma, 1000 * sigma[:-1]
        told = told if kwargs["scheduler"] == "FlowEuler" else told.floor()
        result = {"out.sigmas": sigma}
    else:
        spacing = "karras" if config.get("use_karras_sigmas") else config["timestep_spacing"]
        final = (1.0, 0.0) if config.get("set_alpha_to_one", True) else None
        ends = config["beta_start"], config["beta_end"]
        told, alpha, sigma = sample.stepped_grid(config["beta_schedule"], n, spacing, final, ends,
                                                 config.get("steps_offset", 0))
        result = {"out.sigmas": sigma / alpha}

    def predict(x, i):
        out, (s, c) = a * x + b * torch.cos(0.003 * told[i].float()), (sigma[i].to(x), alpha[i].to(x))
        if kind == "epsilon":
            return (x - s * out) / c, out, None
        if kind == "v_prediction":
            return c * x - s * out, c * out + s * x, None
        return x - s * out, x + c * out, None
    z = case["in.z"]
    if kwargs["scheduler"] == "DDIM":
        steps, tables = [z], D.ddpm_tables(config["beta_schedule"], "", 1000, ends)
        for i in range(n):                   # diffusers goes to a whole stride before each step
            before = int(told[i]) - 1000 // n
            arrive = [torch.stack([tables[name][told[i].int()], tables[name][before] if before >= 0
                                   else last[-1]]) for name, last in (("alpha", alpha), ("sigma", sigma))]
            steps += sample.ddim(lambda x, _: predict(x, i), steps[-1], *arrive, kwargs.get("eta", 0.0),
                                 lambda _: case["in.noise"][i])
        steps = steps[1:]
    elif kwargs["scheduler"] == "FlowEuler":
        numbers = dict(zip(sigma.tolist(), range(n)))
        velocity = lambda x, t: a * x + b * torch.cos(0.003 * told[numbers[float(t)]].float())
        steps = sample.runge_kutta(velocity, z, sigma.unbind())
    else:
        steps = {"DPM": sample.dpm_pp, "UniPC": sample.unipc}[kwargs["scheduler"]](
            predict, z, alpha, sigma)
    return {**result, "out.timesteps": told.float(), "out.samples": steps_of(steps)}


@pytest.mark.parametrize("case", list(all_cases()), ids=lambda case: case.id)
def test_parity(case):
    reason = TO_COME.get((case.system, case.call)) or TO_COME.get((case.system, "*"))
    if reason:
        pytest.skip(f"to come: {reason}")
    case.load()
    handler = HANDLERS.get((case.system, case.call)) or HANDLERS.get((case.system, "*"))
    assert handler, f"nothing here computes {case.system} {case.call}"
    compare(case, handler(case))
