"""Stage 5: a prompt -> a video; and how well a run keeps to its prompts.

In:   runs/NAME (train_dit.py) and the autoencoder that it was trained with.
Out:  runs/NAME/samples/PROMPT-sSEED.mp4 (H.264) and .png (a sheet of its frames);
      runs/NAME/eval.json and eval-*.png (--eval demo).

The idea: start from noise and follow the learned velocity from t = 1 to t = 0 (Euler's method),
each step guided: away from what the model does without a caption, towards what it does with it.
Prompts, sizes and lengths that differ share one packed row.

    python sample.py demo --prompt "a red circle moves left"
    python sample.py demo --prompt "a cyan triangle moves up" --size 48x32 --seconds 2 --seed 7
    python sample.py demo --eval demo                        # a minute on two cores

Axes: T frames, H W pixels; T' H' W' the latent grid. Guidance: Ho & Salimans 2022 (2207.12598).
"""
import argparse
import json
import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from prepare_data import (COLOURS, DEMO_SIZES, DIRECTIONS, FORMS, atomic, contact_sheet,
                          is_left_out, number, refuse, render_shot, run_dir, write_video)
from train_dit import (ddpm_at, ddpm_tables, generate, interpolant, load_denoiser, read_output,
                       shifted)
from train_vae import gaussians, load_autoencoder, option_parser, setup, sheet_frames

# ------------------------------------------------------------------------------------------------
# Samplers: generators that yield x after each of their steps, from noise to data
# ------------------------------------------------------------------------------------------------

# alpha and sigma are float64 [n + 1], or [n + 1, N, 1] where every clip has times of its own: x is
# alpha x_0 + sigma noise at the n points at which the network is asked, and at the last one.
# predict(x, i) -> (x_0, noise, variance's share or None) at point i; draw(i): standard normal, as x.


RUNGE_KUTTA = {         # weights of the slopes so far at each further stage, and of all in the end
    "euler": ((), (1.0,)), "heun": (((1.0,),), (0.5, 0.5)), "midpoint": (((0.5,),), (0.0, 1.0)),
    "rk4": (((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8))}


def runge_kutta(velocity, x, times, method="euler"):
    """Follows dx/dt = velocity(x, t) along `times`, from the first to the last."""
    stages, last = RUNGE_KUTTA[method]
    for now, after in zip(times, times[1:]):
        step, slopes = after - now, [velocity(x, now)]
        for row in stages:
            ahead = sum(weight * slope for weight, slope in zip(row, slopes))
            slopes.append(velocity(x + step * ahead, now + sum(row) * step))
        x = x + step * sum(weight * slope for weight, slope in zip(last, slopes))
        yield x


def sde(drift_score, x, times, strength, draw, method="euler", last="mean", path="linear"):
    """SiT's stochastic samplers: the flow, and noise of strength(t) that the score takes away
    again. drift_score(x, t) -> (velocity, score). The last of `times` ends it: by one step without
    noise ("mean"), along the flow ("euler"), by jumping to x_0 ("tweedie") or not at all (None)."""
    def slope(x, t):
        velocity, score = drift_score(x, t)
        return velocity - strength(t) * score

    *times, before_last, stop = times
    for i, (now, after) in enumerate(zip(times, [*times[1:], before_last])):
        step, kick = after - now, (2 * strength(now) * (now - after)).sqrt() * draw(i)
        if method == "heun":
            x = x + kick
            first = slope(x, now)
            x = x + step * (first + slope(x + step * first, after)) / 2
        else:
            x = x + step * slope(x, now) + kick
        yield x
    if last == "tweedie":
        alpha, sigma, _, _ = interpolant(path, before_last)
        x = x / alpha + sigma.square() / alpha * drift_score(x, before_last)[1]
    elif last:
        move = slope if last == "mean" else lambda x, t: drift_score(x, t)[0]
        x = x + (stop - before_last) * move(x, before_last)
    yield x


def ddim(predict, x, alpha, sigma, eta=0.0, draw=None):
    """x_0 and noise are read off and mixed again for the next point, a share `eta` of the noise
    anew (Song et al. 2021, 2010.02502)."""
    for i in range(len(alpha) - 1):
        x0, noise, _ = predict(x, i)
        fresh = eta * sigma[i + 1] / sigma[i] * (1 - (alpha[i] / alpha[i + 1]).square()).sqrt()
        kept = (sigma[i + 1].square() - fresh.square()).sqrt()
        x = alpha[i + 1].to(x) * x0 + kept.to(x) * noise
        x = x + fresh.to(x) * draw(i) if eta else x
        yield x


def ddpm(predict, x, tables, draw):
    """Ancestral sampling over the kept steps of `tables` (ddpm_tables), the noisiest first; the
    variance is the posterior's, or between that and beta by the share that the network tells."""
    n = len(tables["betas"])
    for i in range(n):
        x0, _, share = predict(x, i)
        c = ddpm_at(tables, torch.tensor(n - 1 - i))
        least = c["posterior_log_variance_clipped"]
        logvar = least if share is None else share * c["log_betas"] + (1 - share) * least
        x = c["posterior_mean_coef1"] * x0 + c["posterior_mean_coef2"] * x
        x = x + (0.5 * logvar).exp() * draw(i) if i < n - 1 else x
        yield x


def dpm_pp(predict, x, alpha, sigma):
    """DPM-Solver++(2M) (Lu et al. 2022, 2211.01095): the x_0 of the step before gives its slope."""
    half_snr, n, before = (alpha / sigma).log(), len(alpha) - 1, None
    for i in range(n):
        x0, h = predict(x, i)[0], half_snr[i + 1] - half_snr[i]
        ahead = x0
        if before is not None and (i < n - 1 or (n >= 15 and sigma[n].all())):
            ahead = x0 + (h / (half_snr[i] - half_snr[i - 1]) / 2).to(x) * (x0 - before)
        x = (sigma[i + 1] / sigma[i]).to(x) * x - (alpha[i + 1] * torch.expm1(-h)).to(x) * ahead
        before = x0
        yield x


def dpm_fast(predict, x, alpha, sigma):
    """DPM-Solver++ in single steps of order 3, the rest in steps of order 2 and 1: U-ViT's. Each
    takes as many points of the grid as its order; r is where on the way a point lies."""
    half_snr, n, i = (alpha / sigma).log(), len(alpha) - 1, 0
    orders = [3] * (n // 3 - 1) + [2, 1] if n % 3 == 0 else [3] * (n // 3) + [n % 3]
    for order in orders:
        h = half_snr[i + order] - half_snr[i]
        # from point i to point j, with a correction by the difference of x_0 at two points
        reach = lambda j, first, slope=0.0: (
            (sigma[j] / sigma[i]).to(x) * x + (alpha[j] * bend(j)).to(x) * first
            + alpha[j].to(x) * slope)
        bend = lambda j: -torch.expm1(half_snr[i] - half_snr[j])
        r = [((half_snr[i + k] - half_snr[i]) / h).to(x) for k in range(order)]
        second = lambda way: (1 - bend(way) / (half_snr[way] - half_snr[i])).to(x)
        x0 = predict(x, i)[0]
        if order == 1:
            x = reach(i + 1, x0)
        elif order == 2:
            middle = predict(reach(i + 1, x0), i + 1)[0]
            x = reach(i + 2, x0, bend(i + 2).to(x) / (2 * r[1]) * (middle - x0))
        else:
            middle = predict(reach(i + 1, x0), i + 1)[0]
            later = reach(i + 2, x0, r[2] / r[1] * second(i + 2) * (middle - x0))
            x = reach(i + 3, x0, second(i + 3) / r[2] * (predict(later, i + 2)[0] - x0))
        i += order
        yield x


def unipc(predict, x, alpha, sigma):
    """UniPC of order 2 with B2(h) (Zhao et al. 2023, 2302.04867): each new x_0, before it takes
    part in the next step, corrects the step that led to it."""
    half_snr, n = (alpha / sigma).log(), len(alpha) - 1
    start, found, order = None, [], 0                # the sample each step began at, every x_0
    for i in range(n):
        x0 = predict(x, i)[0]
        if i:
            h = half_snr[i] - half_snr[i - 1]
            b = torch.expm1(-h)
            p, q = 0.0, torch.full_like(b, 0.5)
            if order == 2:                           # of [[1, 1], [r, 1]] (p, q) = (b1, b2)
                r = (half_snr[i - 2] - half_snr[i - 1]) / h
                b1, b2 = (-b / h - 1) / b, 2 * ((-b / h - 1) / -h - 0.5) / b
                p = (b1 - b2) / (1 - r)
                q = b1 - p
                p = (p / r).to(x) * (found[-2] - found[-1])
            move = found[-1] + p + q.to(x) * (x0 - found[-1])
            x = (sigma[i] / sigma[i - 1]).to(x) * start - (alpha[i] * b).to(x) * move
        found, start, order = [*found[-1:], x0], x, min(2, n - i, i + 1)
        h, ahead = half_snr[i + 1] - half_snr[i], x0
        if order == 2:
            r = (half_snr[i - 1] - half_snr[i]) / h
            ahead = x0 + (found[0] - x0) / (2 * r).to(x)
        x = (sigma[i + 1] / sigma[i]).to(x) * x - (alpha[i + 1] * torch.expm1(-h)).to(x) * ahead
        yield x


def flow_grid(n, shift=1.0, first=1.0, last=0.0):
    """float64 [n + 1] times of a straight path: n shifted ones evenly from `first` on towards
    `last`, which is not reached, then 0."""
    return F.pad(shifted(torch.linspace(first, last, n + 1, dtype=torch.float64)[:-1], shift), (0, 1))


def stepped_grid(schedule, n, spacing="linspace", final=(1.0, 0.0), ends=None, offset=1):
    """(int64 [n] steps out of 1000 as diffusers counts them, alpha, sigma) of a schedule of betas:
    "linspace", "leading" (from `offset` on) or "trailing" as diffusers names them, or "karras".
    `final`: alpha and sigma of the last point, None: those of step 0."""
    tables = ddpm_tables(schedule, "", 1000, ends)
    alpha, sigma = tables["alpha"], tables["sigma"]
    if spacing == "karras":              # evenly in the 7th root of sigma / alpha
        ratio = sigma / alpha
        high, low = ratio[-1] ** (1 / 7), ratio[0] ** (1 / 7)
        ratio = torch.lerp(high, low, torch.linspace(0, 1, n, dtype=torch.float64)) ** 7
        place = np.interp(ratio.log(), (sigma / alpha).log(), np.arange(1000))
        alpha, steps = (1 + ratio.square()).rsqrt(), torch.from_numpy(place).round().long()
        sigma = alpha * ratio
    else:
        steps = {"linspace": torch.linspace(0, 999, n + 1, dtype=torch.float64)[1:].flip(0),
                 "leading": torch.arange(n).flip(0) * (1000 // n) + float(offset),
                 "trailing": 999 - torch.arange(n) * (1000 / n)}[spacing].round().long()
        alpha, sigma = alpha[steps], sigma[steps]
    ends = (tables["alpha"][:1], tables["sigma"][:1]) if final is None else alpha.new_tensor(final)
    return steps, torch.cat([alpha, ends[0].view(1)]), torch.cat([sigma, ends[1].view(1)])


def level_grid(n, schedule="scaled_linear", last=1e-3, ends=None):
    """(times, alpha, sigma), each float64 [n + 1], evenly from 1 to `last`, where a schedule's 1000
    steps stand at 0.001, 0.002, … and the logarithm of alpha is straight between them (U-ViT's)."""
    times = np.linspace(1, last, n + 1)
    known = ddpm_tables(schedule, "", 1000, ends)["alpha"].log()
    log_alpha = torch.from_numpy(np.interp(times, np.arange(1, 1001) / 1000, known))
    return torch.from_numpy(times), log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()


# ------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------


class Sampler:
    """A run and its autoencoder, ready to turn prompts into videos."""

    def __init__(self, name, vae=None, device="cpu"):
        self.device = device
        self.model, self.read, self.config = load_denoiser(name, device)
        wanted = self.config["vae"]
        self.vae, self.vae_config = load_autoencoder(vae or wanted["run"], device)
        if self.vae_config["hash"] != wanted["hash"]:
            refuse(f"run {name} was trained on latents of autoencoder {wanted['hash']}, "
                   f"{vae or wanted['run']} is {self.vae_config['hash']}: name the right one "
                   "by --vae")

    def latent_shape(self, frames, height, width):
        """The smallest grid that covers the video: what is too much is cut off after decoding."""
        pt, ph, pw = self.model.dit.patch
        up = lambda n, stride, patch: -(-n // (stride * patch)) * patch
        return (self.vae.z_dim, up(frames - 1 + self.vae.time_stride, self.vae.time_stride, pt),
                up(height, self.vae.stride, ph), up(width, self.vae.stride, pw))

    def told(self, wish):
        """What a run that was trained with conditions is told of a wish."""
        known = {**wish, "seconds": wish["frames"] / wish["fps"]}
        return [known.get(name) for name in self.config["args"].get("conditions", ())]

    def __call__(self, wishes, n_steps, guidance, batch=16):
        """`wishes`: dicts of prompt, frames, height, width, fps, seed. Returns uint8 [T, H, W, 3]
        of each, exactly as asked for. The noise of a wish depends on itself and its seed alone."""
        videos = []
        shift = self.config["args"]["shift"]
        batches = [wishes[i:i + batch] for i in range(0, len(wishes), batch)]
        with tqdm(total=n_steps * len(batches), desc="sample", unit="step") as progress:
            for part in batches:
                shapes = [self.latent_shape(w["frames"], w["height"], w["width"]) for w in part]
                noises = [gaussians("sample", w["seed"], 0, [w["prompt"]], [shape])[0]
                          for w, shape in zip(part, shapes)]
                noises = [noise.to(self.device) for noise in noises]
                texts = [self.read(w["prompt"]) for w in part]
                decoded = generate(self.model, self.vae, self.vae_config, shapes,
                                   [w["fps"] for w in part], texts, noises, n_steps, guidance,
                                   shift, self.vae.time_stride, progress, self.read(""),
                                   about=[self.told(w) for w in part])
                videos += [cut(video, w) for video, w in zip(decoded, part)]
        return videos


def drift_score(how, output, x, t):
    """(dx/dt of the flow, gradient of log density at x), for stochastic samplers."""
    velocity, _, noise = read_output(how, output, x, t)
    return velocity, -noise / interpolant(how.path, t)[1]


def diffusion(path, form, t, norm=1.0):
    """SiT's strengths w(t) of the noise that a stochastic sampler adds and its score takes away."""
    alpha, sigma, d_alpha, d_sigma = interpolant(path, t)
    return {"constant": norm * torch.ones_like(t), "sigma": norm * sigma, "linear": norm * t,
            "SBDM": norm * sigma * (d_sigma - d_alpha * sigma / alpha),
            "decreasing": (1 - norm * torch.cos(math.pi * t)) ** 2 / 4,
            "increasing-decreasing": norm * torch.sin(math.pi * t) ** 2}[form]


@torch.no_grad()
def generate_codes(model, draws, label=None, temperature=1.0, progress=iter):
    """Codes int64 [B, T', H', W'], one by one. draws [B, L]: uniform numbers in [0, 1);
    temperature: above 0; progress: what to wrap the loop in, such as tqdm."""
    caches, codes = [], torch.zeros_like(draws, dtype=torch.int64)
    for place in progress(range(draws.shape[1])):
        logits = model.step(codes[:, place - 1], place, caches, label)               # [B, K]
        below = (logits.float() / temperature).softmax(-1).cumsum(-1)
        codes[:, place] = (below < draws[:, place, None] * below[:, -1:]).sum(-1)
    return codes.unflatten(1, model.shape)


def cut(video, wish):
    """The frames and, about the centre, the pixels that were asked for."""
    top, left = ((side - want) // 2 for side, want in
                 zip(video.shape[1:3], (wish["height"], wish["width"])))
    return video[:wish["frames"], top:top + wish["height"], left:left + wish["width"]]


def sample(args, folder):
    _, _, device = setup(args)
    sampler = Sampler(args.name, args.vae, device)
    height, width = args.size
    frames = args.frames or max(1, round(args.seconds * args.fps))
    wishes = [dict(prompt=prompt, frames=frames, height=height, width=width, fps=args.fps,
                   seed=args.seed + i, motion=args.motion)
              for prompt in args.prompt for i in range(args.n)]
    videos, rows = sampler(wishes, args.steps, args.cfg), []
    for wish, video in zip(wishes, videos):
        slug = re.sub(r"[^A-Za-z0-9]+", "-", wish["prompt"]).strip("-")[:60] or "empty"
        path = folder / "samples" / f"{slug}-s{wish['seed']}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, video, wish["fps"], crf=12)
        rows.append((sheet_frames(video, 8), f"{wish['prompt']} (seed {wish['seed']})"))
        contact_sheet(path.with_suffix(".png"), rows[-1:])
        print(path)
    if len(rows) > 1:
        contact_sheet(folder / "samples" / "sheet.png", rows)


# ------------------------------------------------------------------------------------------------
# The demo's adherence: form, colour and direction, read off the pixels
# ------------------------------------------------------------------------------------------------


def hue(rgb):
    """[..., 3] to degrees; where all three are equal, 0."""
    r, g, b = np.moveaxis(rgb.astype(np.float64), -1, 0)
    return np.degrees(np.arctan2(math.sqrt(3) * (g - b), 2 * r - g - b)) % 360


def spread(mask, steps=2):
    """A bool mask [T, H, W] grown by `steps` pixels in its frames."""
    for _ in range(steps):
        grown = mask.copy()
        grown[:, 1:] |= mask[:, :-1]
        grown[:, :-1] |= mask[:, 1:]
        grown[:, :, 1:] |= mask[:, :, :-1]
        grown[:, :, :-1] |= mask[:, :, 1:]
        mask = grown
    return mask


def form_cover(form, x, y, radius, height, width):
    """[H, W]: how much of each pixel a form about (x, y) covers, drawn as the demo draws it."""
    shape = dict(form=form, colour="yellow", radius=radius, start=(x, y), stop=(x, y))
    shot = dict(shapes=[shape], frames=1, width=width, height=height, cell=4, texture="plain",
                level="black", tint=[0, 0, 0])
    level = render_shot(shot)[0, :, :, 0].astype(np.float64)
    return (level - level.min()) / max(1.0, COLOURS["yellow"][0] - level.min())


def form_scale(form):
    """(area, centre's offset y) of a form of radius 1."""
    cover = form_cover(form, 32, 32, 20, 64, 64)
    y = (np.arange(64) + 0.5)[:, None]
    return cover.sum() / 400, ((cover * y).sum() / cover.sum() - 32) / 20


def centres(cover):
    """[T, H, W] weights to (x, y, mass), each [T]."""
    mass = cover.sum((1, 2))
    y, x = (np.arange(n) + 0.5 for n in cover.shape[1:])
    safe = np.maximum(mass, 1e-6)
    return (cover * x).sum((1, 2)) / safe, (cover * y[:, None]).sum((1, 2)) / safe, mass


def describe(frames):
    """What moves in a clip of the demo's kind, by plain image analysis: dicts of colour, form,
    direction and area, the largest first. Grounds are grey, so a shape is what is saturated; its
    colour is its hue's nearest; its direction is the way of its centre; its form is the one that,
    drawn at that centre with that area, covers most nearly the same pixels."""
    frames = frames.astype(np.float64)
    saturation = frames.max(-1) - frames.min(-1)
    vivid = saturation > 80
    ground = np.median(frames[~spread(vivid)], 0) if (~vivid).any() else np.zeros(3)
    names = list(COLOURS)
    away = np.stack([np.abs((hue(frames) - hue(np.array(COLOURS[name])) + 180) % 360 - 180)
                     for name in names])
    nearest, found = away.argmin(0), []
    for i, name in enumerate(names):
        mask = vivid & (nearest == i)
        if mask.sum((1, 2)).mean() < 0.01 * mask[0].size:
            continue
        axis = np.array(COLOURS[name], dtype=np.float64) - ground
        cover = ((frames - ground) @ axis / (axis @ axis)).clip(0, 1) * spread(mask, 1)
        found.append({"colour": name, **follow(cover), "area": float(cover.sum((1, 2)).mean())})
    return sorted(found, key=lambda shape: -shape["area"])


def follow(cover):
    """Form and direction of one shape from the pixels that it covers, [T, H, W] from 0 to 1."""
    x, y, mass = centres(cover)
    seen = mass > 0.5 * np.median(mass)
    frames, time = np.flatnonzero(seen), np.arange(len(mass))[seen]
    dx, dy = (np.polyfit(time, p[seen], 1)[0] * len(mass) if len(time) > 1 else 0 for p in (x, y))
    direction = None
    if max(abs(dx), abs(dy)) > 0.12 * min(cover.shape[1:]) and max(abs(dx), abs(dy)) > 1.5 * min(
            abs(dx), abs(dy)):
        flat = abs(dx) > abs(dy)
        step = (int(np.sign(dx)), 0) if flat else (0, int(np.sign(dy)))
        direction = next(name for name, way in DIRECTIONS.items() if way == step)
    errors = {}
    for form in FORMS:
        area, offset = form_scale(form)
        total = 0.0
        for t in frames[::max(1, len(frames) // 6)]:
            radius = math.sqrt(mass[t] / area)
            drawn = form_cover(form, x[t], y[t] - offset * radius, radius, *cover.shape[1:])
            total += np.abs(drawn - cover[t]).sum() / mass[t]
        errors[form] = total
    return {"form": min(errors, key=errors.get), "direction": direction}


def demo_prompts(n=48):
    """{"seen": [(colour, form, direction)], "left_out": […]}, n each, the same every time; where
    there are fewer, they come again (at another size and seed)."""
    every = [(c, f, d) for c in COLOURS for f in FORMS for d in DIRECTIONS]
    prompts = {}
    for name, left_out in (("seen", False), ("left_out", True)):
        pool = [combination for combination in every if is_left_out(*combination) == left_out]
        order = np.random.Generator(np.random.Philox(5)).permutation(len(pool))
        prompts[name] = [pool[order[i % len(pool)]] for i in range(n)]
    return prompts


def evaluate_demo(args, folder):
    """Samples the fixed prompts, reads the pixels, writes eval.json: shares from 0 to 1."""
    _, _, device = setup(args)
    sampler, result = Sampler(args.name, args.vae, device), {}
    for name, combinations in demo_prompts(args.n_eval).items():
        wishes = []
        for i, (colour, form, direction) in enumerate(combinations):
            width, height = DEMO_SIZES[i % len(DEMO_SIZES)]
            wishes.append(dict(prompt=f"a {colour} {form} moves {direction}", frames=13, fps=10.0,
                               width=width, height=height, seed=args.seed + i))
        videos, rows, right = sampler(wishes, args.steps, args.cfg), [], []
        for wish, video, wanted in zip(wishes, videos, combinations):
            shapes = describe(video)
            found = shapes[0] if shapes else {}
            found = tuple(found.get(k) for k in ("colour", "form", "direction"))
            right.append([a == b for a, b in zip(found, wanted)])
            says = "right" if all(right[-1]) else f"WRONG: {' '.join(map(str, found))}"
            rows.append((sheet_frames(video), f"{wish['prompt']}: {says}"))
        shares = np.array(right).mean(0)
        result[name] = {"n": len(right), "form": shares[1], "colour": shares[0],
                        "direction": shares[2], "all": float(np.all(right, 1).mean())}
        contact_sheet(folder / f"eval-{name}.png", rows)
        print(name, " ".join(f"{key} {value:.3g}" for key, value in result[name].items()))
    with atomic(folder / "eval.json") as path:
        path.write_text(json.dumps(result, indent=1) + "\n")


def size_of(text):
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or min(int(match[1]), int(match[2])) < 2:
        raise argparse.ArgumentTypeError(f"'{text}' is not HxW in px, such as 32x48")
    return int(match[1]), int(match[2])


def parse_options(argv=None):
    parser = option_parser(__doc__)
    parser.add_argument("name", help="trained run: runs/NAME, or a path with a slash")
    add = parser.add_argument_group("what to sample").add_argument
    add("--prompt", nargs="+", help="one or more prompts, each in quotes")
    add("--eval", choices=["demo"], help="measure how a fixed list of prompts is kept to")
    add("--size", type=size_of, default=(32, 48), help="HxW, px (32x48)")
    add("--seconds", type=number(float, 0.001), default=1.3, help="length, s (%(default)s)")
    add("--frames", type=number(int, 1), help="length in frames, in the place of --seconds")
    add("--fps", type=number(float, 0.1), default=10.0, help="frames a second (%(default)s)")
    add("--motion", type=number(float, 0),
        help="motion score to ask for, of a run trained with --conditions motion (none)")
    add("--n", type=number(int, 1), default=1,
        help="videos a prompt, seeds counting up (%(default)s)")
    add("--n_eval", type=number(int, 1), default=48,
        help="with --eval: prompts of each kind (%(default)s)")
    add = parser.add_argument_group("how").add_argument
    add("--steps", type=number(int, 1), default=20, help="steps of the sampler (%(default)s)")
    add("--cfg", type=number(float, 0), default=3.0, help="guidance, 1: none (%(default)s)")
    add("--seed", type=number(int, 0), default=0, help="of the noise (%(default)s)")
    add("--vae", help="autoencoder's run, where it is not the one named in the config")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="(%(default)s)")
    args = parser.parse_args(argv)
    if not args.prompt and not args.eval:
        refuse('nothing to do: give --prompt "…" or --eval demo')
    return args


def main(argv=None):
    args = parse_options(argv)
    folder = run_dir(args.name)
    (evaluate_demo if args.eval else sample)(args, folder)


if __name__ == "__main__":
    main()
