"""Stage 5: a prompt, an image or a video -> a video; how well a run keeps to its prompts.

In:   runs/NAME (train_dit.py) and the autoencoder that it was trained with; or published weights:
      DiT, SiT and U-ViT files, VideoGPT's, Wan folders in either layout.
Out:  runs/NAME/samples/PROMPT-sSEED.mp4 (H.264; or .gif, .webp, frames; a still: .png; of a task
      its name; of settings that are not the run's own a hash behind the seed), .png (a sheet of
      its frames), .json (all that it takes to make it again); index.html plays them all, sheet.png
      has the newest 64; runs/NAME/eval*.json and eval-*.png (--eval).

The idea: start from noise and follow the learned velocity from t = 1 to t = 0. Each step is guided
(classifier-free guidance): away from the unconditional output, towards the conditional one. Videos
of different prompts, sizes and lengths share one packed row. Every task is a timeline of segments.
A segment is a clip that is denoised while conditioning frames (its first or last frame, or the end
of the segment before) stand in the row as clean tokens, so a long video is made part by part.

    python sample.py tests/demo --prompt "a red circle moves left"      # a small model is here: 8 s
    python sample.py demo --prompt "a cyan triangle moves up" --size 48x32 --seconds 2 --seed 7
    python sample.py demo --prompt "a red circle moves left" --image FILE --extend 3
    python sample.py demo --eval demo                        # a minute on two cores
    torchrun --nproc_per_node 8 -- sample.py mine --prompts prompts.jsonl --sampler unipc --steps 12

Tasks (of a run trained with --given; of Wan's I2V and TI2V --image):
    --prompt P --frames 1           a picture
    --prompt P --image FILE         its first frame; --last FILE: its last
    --prompt P --extend N           N more parts; --video A --extend N, below 0 backwards
    --prompt P --then Q R           several prompts over time
    --video A --to B, --loop        between two videos; a ring, also of --prompt P
    --video A --strength S          video to video
A row of --prompts: prompt, negative, seed, size, frames or seconds, fps, motion, image, last,
video, to, extend, then, loop, strength.

Axes: B clips, T frames, H W pixels, C channels, P patch volume, N tokens of a row; T' H' W' the
latent grid; K codebook size. Time runs from t = 0, clean, to t = 1, noise.
Papers: Ho & Salimans 2022 (guidance, 2207.12598); Kynkaanniemi 2024 (its interval, 2404.07724);
Lin 2023 (rescaled, 2305.08891); Ma 2024 (SiT, 2401.08740); beside each sampler its own.
"""
import prepare_data  # noqa: F401  first of all: Ctrl-C, and what is not installed, in a line
import argparse
import contextlib
import functools
import hashlib
import html
import itertools
import json
import math
import os
import re
import shlex
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from caption import (CLIP, CLIP_MEAN, CLIP_TOWER, TOWER_MARK, WAN_T5, Scorer, clip_tower, crop,
                     image_processor, load_strictly, normal, open_vlm, published_tensors,
                     read_as_config, read_published, rewrite, to_ours)
from kernels.patchify import patchify, unpatchify
from prepare_data import (COLOURS, DEMO_SIZES, DIRECTIONS, FORMS, GAP, PICTURE_ERRORS, STILLS,
                          Unreadable, Video, atomic, contact_sheet, dataset_dir, is_animated,
                          is_left_out, lines_of, number, one_line, open_dataset, read_clip,
                          read_still, read_text, refuse, render_shot, rng, script, spelled, sweep,
                          true_times, write_fault, write_text, write_video)
from train_dit import (CONDITIONS, RUNGE_KUTTA, STEPPED, Denoiser, Objective, Packed,
                       averaged_weights, count_texts, ddim, ddpm_at, ddpm_tables, flow_grid,
                       generate_codes, guide, interpolant, interval, load_denoiser, load_gpt,
                       load_published, open_reader, open_text_encoder, runge_kutta, sample_codes,
                       shifted, target, to_velocity_x0_noise, token_shift, words_of)
from train_vae import (barrier, bench, decode_long, encode_long, frechet, gaussian, gaussians,
                       is_run, load_autoencoder, model_path, normaliser, open_detector,
                       option_parser, read_class, read_config, read_tensors, refuse_others,
                       save_file, say_once, setup, sheet_frames, to_frames, to_tensor)


# -- the samplers ----------------------------------------------------------------------------------


# alpha, sigma: float64 [n + 1], or [n + 1, N, 1] where each clip has its own times. The network is
# evaluated at the first n points, where x = alpha x_0 + sigma noise; the last point is the result.
# predict(x, i) -> (x_0, noise, learned variance's share or None) at point i; draw(i): fresh noise.
def sde(drift_score, x, times, strength, draw, method="euler", last="mean", path="linear"):
    """SiT's stochastic samplers: the flow plus noise of strength(t), which the score removes again.
    drift_score(x, t) -> (velocity, score). last: the final step is without noise ("mean"), along
    the flow alone ("euler"), the estimate of x_0 ("tweedie"), or left out (None)."""
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


def dpm_pp(predict, x, alpha, sigma, order=2, lower=True, euler=False):
    """DPM-Solver++(2M) (Lu et al. 2022, 2211.01095). The last step is of first order where it ends
    without noise, in fewer than 15 steps (`lower`), or with `euler`."""
    half_snr, n, before = (alpha / sigma).log(), len(alpha) - 1, None
    for i in range(n):
        x0, h = predict(x, i)[0], half_snr[i + 1] - half_snr[i]
        ahead = x0
        is_low = i == n - 1 and (euler or lower and n < 15 or not sigma[n].all())
        if before is not None and order > 1 and not is_low:
            ahead = x0 + (h / (half_snr[i] - half_snr[i - 1]) / 2).to(x) * (x0 - before)
        x = (sigma[i + 1] / sigma[i]).to(x) * x - (alpha[i + 1] * torch.expm1(-h)).to(x) * ahead
        before = x0
        yield x


def unipc(predict, x, alpha, sigma, order=2, kind="bh2", uncorrected=()):
    """UniPC (Zhao et al. 2023, 2302.04867) of order 1 to 3: each new x_0 corrects the last step,
    then predicts the next. uncorrected: steps without the corrector. kind: B(h) is exp(-h) - 1
    (bh2) or -h (bh1)."""
    half_snr, n = (alpha / sigma).log(), len(alpha) - 1
    start, x0s = None, []                      # the sample each step began at; x_0, latest first

    def step(x, i, order, new=None):
        """From point i to i + 1 by the last `order` x_0 (predictor) and, if given, the `new` x_0
        at point i + 1 (corrector)."""
        h = half_snr[i + 1] - half_snr[i]
        b = torch.expm1(-h)
        r = [(half_snr[i - k] - half_snr[i]) / h for k in range(1, order)]
        slopes = [(x0s[k] - x0s[0]) / r[k - 1].to(x) for k in range(1, order)]
        if new is not None:
            r, slopes = [*r, torch.ones_like(h)], [*slopes, new - x0s[0]]
        scale, total = b if kind == "bh2" else -h, 0.0
        if len(r) == 1:
            total = 0.5 * slopes[0]
        elif r:
            phi, rows, values = -b / h - 1, [], []
            for k in range(len(r)):
                rows.append(torch.stack([ratio ** k for ratio in r], -1))
                values.append(phi * math.factorial(k + 1) / scale)
                phi = -phi / h - 1 / math.factorial(k + 2)
            weights = torch.linalg.solve(torch.stack(rows, -2), torch.stack(values, -1))
            total = sum(w.to(x) * slope for w, slope in zip(weights.unbind(-1), slopes))
        ahead = (alpha[i + 1] * b).to(x) * x0s[0]
        ahead = ahead + (alpha[i + 1] * scale).to(x) * total if r else ahead
        return (sigma[i + 1] / sigma[i]).to(x) * x - ahead

    now = 0
    for i in range(n):
        x0 = predict(x, i)[0]
        if i and i - 1 not in uncorrected:
            x = step(start, i - 1, now, x0)
        x0s, start, now = [x0, *x0s[:order - 1]], x, min(order, n - i, i + 1)
        x = step(x, i, now)
        yield x


def drift_score(objective, answer, t):
    """(velocity, score) of an output (velocity, x_0, noise, …) at time t."""
    return answer[0], -answer[2] / interpolant(objective.path, t)[1]


def diffusion(path, form, t, norm=1.0):
    """SiT's diffusion coefficients w(t): the strength of a stochastic sampler's noise."""
    alpha, sigma, d_alpha, d_sigma = interpolant(path, t)
    return {"constant": norm * torch.ones_like(t), "sigma": norm * sigma, "linear": norm * t,
            "SBDM": norm * sigma * (d_sigma - d_alpha * sigma / alpha),
            "decreasing": (1 - norm * torch.cos(math.pi * t)) ** 2 / 4,
            "increasing-decreasing": norm * torch.sin(math.pi * t) ** 2}[form]


FORMS_OF_NOISE = ("constant", "sigma", "linear", "SBDM", "decreasing", "increasing-decreasing")
FLOW_SAMPLERS = (*RUNGE_KUTTA, "sde", "ddim", "dpm++", "unipc")
STEPPED_SAMPLERS = ("ddpm", "ddim", "dpm++", "unipc", "dpm-fast")


def flow_points(args, objective, shift):
    """float64 [steps + 1] times on a path without steps; shift: a float, or [N, 1]."""
    low, high = interval(objective, True)
    ends = args.ends
    if args.sampler == "sde":            # SiT's: the last step is one of its own
        first = 1 - 1e-3 * (args.form == "SBDM")
        ends = first, 0.04 - (first - 0.04) / max(1, args.steps - 1)
    times = (wan_points(args, shift) if args.grid in WAN_GRIDS else
             low + (high - low) * flow_grid(args.steps, shift, *ends))
    times = respread(times, args.rules) if args.rules else times
    return times.clamp(max=1 - 1e-6) if args.sampler == "unipc" else times   # it takes log alpha


def skipped(args, strength):
    """The number of first steps that video to video of this strength leaves out."""
    return min(args.steps - 1, round(args.steps * (1 - strength)))


def count_steps(args, strength=1.0):
    """How often `trajectory` yields."""
    n = args.steps - skipped(args, strength)
    return n // 3 + 1 if args.sampler == "dpm-fast" else n


def trajectory(args, objective, read, noise, start, strength, shift, draw):
    """Yields x [N, C*P] after each step of --sampler. read(x, the network's timestep, time or
    (alpha, sigma)) -> (velocity, x_0, noise, variance's share). noise: tokens [N, C*P]; start:
    those of the video to change, or None; strength: share of the steps; shift: a float, or [N, 1];
    draw(i): fresh noise."""
    skip = skipped(args, strength)
    if objective.path in STEPPED:
        timesteps, alpha, sigma = (values[skip:] for values in stepped_points(args, objective))
        at = lambda i: (alpha[i].to(noise), sigma[i].to(noise))
    else:
        times = flow_points(args, objective, shift)[skip:]
        timesteps = torch.floor(1000 * times) / 1000 if args.grid in WAN_GRIDS else times
        alpha, sigma, _, _ = interpolant(objective.path, times)
        at = lambda i: times[i].to(noise)
    x = noise if start is None else alpha[0].to(noise) * start + sigma[0].to(noise) * noise
    predict = lambda x, i: read(x, timesteps[i].to(x), at(i))[1:]
    if args.sampler in RUNGE_KUTTA:
        return runge_kutta(lambda x, t: read(x, t, t)[0], x, times.to(x).unbind(), args.sampler)
    if args.sampler == "sde":
        return sde(lambda x, t: drift_score(objective, read(x, t, t), t), x, times.to(x).unbind(),
                   lambda t: diffusion(objective.path, args.form, t, args.norm), draw,
                   path=objective.path)
    if args.sampler == "ddpm":
        tables = ddpm_tables(STEPPED[objective.path], str(args.steps))
        return ddpm(predict, x, {name: table[:len(alpha) - 1] for name, table in tables.items()},
                    draw)
    if args.sampler == "ddim":
        stride = objective.path in STEPPED and strides_back(
            STEPPED[objective.path], args.steps, timesteps[:len(alpha) - 1], args.spacing)
        return ddim(predict, x, alpha, sigma, args.eta, draw, stride or None)
    return {"dpm++": dpm_pp, "unipc": unipc, "dpm-fast": dpm_fast}[args.sampler](
        predict, x, alpha, sigma, **args.rules.get("solver", {}))


# -- guidance --------------------------------------------------------------------------------------


class SamplingJob(NamedTuple):
    """A clip to denoise."""
    shape: tuple                    # (C, T', H', W')
    fps: float
    text: object                    # prompt embeddings or token ids, as lay_out takes them
    negative: object                # likewise, of the negative prompt or the empty one
    noise: torch.Tensor             # [C, T', H', W']
    cond_latents: list = []         # [(normalised latent, seconds from the clip's first frame)]
    conditions: list = []                # values of the run's conditions
    first_latent: torch.Tensor = None   # [C, 1, H', W']: the clip's first latent, where it is fixed
    start: torch.Tensor = None      # [C, T', H', W']: the video to change (video to video)
    strength: float = 1.0           # share of the steps, from its noised latents on
    extra: torch.Tensor = None      # [C', T', H', W']: input channels beside the clip's own
    image: torch.Tensor = None      # [n, width]: image embeddings for cross-attention
    key: tuple = ()                 # (seed, segment, prompt) that key its random draws
    position_scale: float = 1.0     # factor on its tokens' positions: see `position_scale`


class Guided(Packed):
    """A packed row of clips under classifier-free guidance."""

    def __init__(self, model, jobs, args, time_stride, device, guidance=None):
        self.jobs, self.args, self.time_stride, self.device = jobs, args, time_stride, device
        self.scale = args.cfg if guidance is None else guidance
        of_jobs = lambda name: [getattr(job, name) for job in jobs]
        move = lambda tensors: [x.to(device) for x in tensors]
        cond_latents = [[(z.to(device), at) for z, at in cond] for cond in of_jobs("cond_latents")]
        super().__init__(model, of_jobs("shape"), of_jobs("fps"), of_jobs("text"),
                         of_jobs("negative") if self.scale != 1 else [], move(of_jobs("noise")),
                         time_stride, cond_latents, of_jobs("conditions"))
        scale = torch.tensor(of_jobs("position_scale") * self.n)
        scale = scale.repeat_interleave(self.row.cu_seqlens.cpu().diff())
        self.row.coords[:, 1:] *= scale[:, None].to(device)
        self.start = self.tokens[self.targets]                   # noise
        self.cond_tokens = torch.zeros_like(self.start)            # tokens of known first latents
        self.cond_mask = torch.zeros_like(self.start[:, :1], dtype=torch.bool)
        for start, z in zip(self.first.tolist(), of_jobs("first_latent")):
            if z is not None:
                part = patchify([z.to(device)], model.dit.patch)
                self.cond_tokens[start:start + len(part)] = part
                self.cond_mask[start:start + len(part)] = True
        self.extra, self.momentum, self.unguided = None, None, None
        if model.kind == "wan":
            adapt_to_wan(self, of_jobs, move)

    def network(self, x, timesteps):
        if self.model.kind == "wan":
            x = torch.where(self.cond_mask, self.cond_tokens, x)
        x = x if self.extra is None else torch.cat([x, self.extra], 1)
        with torch.autocast(self.device.type, torch.bfloat16, self.args.dtype == "bf16"):
            return super().network(x, timesteps).float()

    def __call__(self, x, timesteps, at):
        """(velocity or None, x_0, noise, share of the variance or None) at `at`: times, or (alpha,
        sigma) of a path in steps."""
        objective, args = self.model.objective, self.args
        column = lambda t: torch.as_tensor(t, dtype=torch.float32, device=self.device).expand(
            len(x), 1)
        timesteps = column(timesteps)
        if objective.path not in STEPPED:
            at = column(at)
        inside = (args.cfg_interval[0] <= timesteps) & (timesteps <= args.cfg_interval[1])
        if self.n == 2 and not inside.any():             # one pass is enough here
            self.unguided = self.unguided or Guided(self.model, self.jobs, args, self.time_stride,
                                              self.device, guidance=1)
            return self.unguided(x, timesteps, at)
        output = self.network(x, timesteps)
        if self.n == 2:
            scale = torch.where(inside, self.scale, 1.0)
            output = self.guide(objective, *output.chunk(2), scale, x, at)
        velocity, x0, noise = to_velocity_x0_noise(objective, output, x, at)
        if objective.path not in STEPPED and self.model.kind != "wan":   # of known frames
            d_alpha, d_sigma = interpolant(objective.path, at)[2:]
            x0 = torch.where(self.cond_mask, self.cond_tokens, x0)
            noise = torch.where(self.cond_mask, self.start, noise)
            velocity = torch.where(self.cond_mask, d_alpha * x0 + d_sigma * noise, velocity)
        share = (output[:, x.shape[1]:] + 1) / 2 if objective.prediction == "ddpm" else None
        return velocity, x0, noise, share

    def guide(self, objective, cond, uncond, scale, x, at):
        """The guided output; scale: [N, 1]."""
        args, width = self.args, x.shape[1]
        if args.apg:
            x0, other = (to_velocity_x0_noise(objective, output, x, at)[1]
                         for output in (cond, uncond))
            x0 = x0 + (scale - 1) * self.project(x0 - other, x0)
            return back(objective, x0, x, at, cond)
        channels = (args.cfg_channels or self.shapes[0][0]) * width // self.shapes[0][0]
        out = guide(cond, uncond, scale, channels)
        if args.rescale:                                     # of the deviation, clip by clip
            ratio = self.deviation(cond[:, :width]) / self.deviation(out[:, :width])
            scaled = out[:, :width] * (1 + args.rescale * (ratio[self.clip] - 1))
            out = torch.cat([scaled, out[:, width:]], 1)
        return out

    def sums(self, values):
        """[B, 1]: sums over each clip's values [N, K]."""
        return values.new_zeros(len(self.jobs)).index_add(0, self.clip, values.sum(1))[:, None]

    def deviation(self, values):
        n = self.lengths[:, None] * values.shape[1]
        mean = self.sums(values) / n
        return (self.sums((values - mean[self.clip]).square()) / n).sqrt()

    def project(self, step, x0):
        """Adaptive projected guidance (Sadat et al. 2024, 2410.02416): guidance's update of x_0
        with a momentum of -0.5, at most --apg long, without its component along x_0."""
        step = self.momentum = step if self.momentum is None else step - 0.5 * self.momentum
        size = self.sums(step.square()).sqrt()
        step = step * (self.args.apg / size).clamp(max=1.0)[self.clip]
        along = self.sums(step * x0) / self.sums(x0.square())
        return step - along[self.clip] * x0

    def latents(self, x):
        """Each clip's latents [C, T', H', W'] from target tokens, fixed first latents put in."""
        x = torch.where(self.cond_mask, self.cond_tokens, x)
        return unpatchify(x, self.shapes, self.model.dit.patch)


def back(objective, x0, x, at, output):
    """The network output of this x_0; further channels are those of `output`."""
    alpha, sigma = at if objective.path in STEPPED else interpolant(objective.path, at)[:2]
    noise = (x - alpha * x0) / sigma
    if objective.path in STEPPED:
        return torch.cat([noise, output[:, x.shape[1]:]], 1)
    out = target(objective, x0, noise, at)
    return out / sigma if objective.prediction == "score" else out


# -- requests: segments of a timeline, packed by their sizes ---------------------------------------


class Parts:
    """Text encoder, denoiser and autoencoder, opened on first use; with `offload` only one of them
    is in memory."""

    def __init__(self, openers, offload):
        self.openers, self.offload, self.opened = openers, offload, {}

    def __call__(self, name):
        if name not in self.opened:
            if self.offload:
                self.opened.clear()
            self.opened[name] = self.openers[name]()
        return self.opened[name]


@dataclass
class Segment:
    """A part of a timeline: normalised latents [C, T', H', W'], or frames uint8 [T, H, W, 3]. The
    video shows its frames from `start` to `stop`."""
    stop: int
    latents: torch.Tensor = None
    frames: object = None
    start: int = 0


class Timeline:
    """A request's segments of n frames, the steps [(role, prompt)] that sample them, and the media
    files that they are conditioned on."""

    def __init__(self, request, shape, n_frames, todo, files):
        self.request, self.shape, self.n, self.todo = request, shape, n_frames, todo
        self.segments, self.files = [], files

    def count(self):
        """Frames of the whole video."""
        total = sum(segment.stop - segment.start for segment in self.segments)
        return min(total, self.request["frames"]) if len(self.segments) == 1 else total


def position_scale(data, height, width):
    """The factor on y and x positions that brings a frame's sides and area back to the largest of
    training: beyond them a shape appears twice (position interpolation, 2306.15595)."""
    if not data:
        return 1.0
    side, area = (max(how(size[:2]) for size in data["sizes"]) for how in (max, math.prod))
    return min(1.0, side / max(height, width), math.sqrt(area / (height * width)))


def todo_of(request):
    """[(role, prompt)] of the segments to sample for a request, in order."""
    prompt, extend = request["prompt"], request.get("extend", 0)
    first = "change" if request.get("strength") else None if request.get("video") else "new"
    todo = [(first, prompt)] if first else []
    todo += [("before" if extend < 0 else "after", prompt)] * abs(extend)
    todo += [("after", then) for then in request.get("then", ())]
    return todo + ([("between", prompt)] if request.get("loop") or request.get("to") else [])


def groups_of(requests):
    """[(strength, k, indices of the requests)] whose segment k is sampled in one packed row. Video
    to video has rows of its own, since it takes fewer steps."""
    groups, todos = {}, [todo_of(request) for request in requests]
    for k in range(max(map(len, todos))):
        for i, todo in enumerate(todos):
            if k < len(todo):
                is_change = todo[k][0] == "change"
                strength = requests[i]["strength"] if is_change else 1.0
                groups.setdefault((strength, k, is_change), []).append(i)
    return [(strength, k, members) for (strength, k, _), members in groups.items()]


class Sampler:
    """A model that samples requests (see `request_of`)."""

    def __init__(self, args, device, config=None):
        openers, info = (open_run(args, config, device) if config else
                          open_foreign(args, device))
        self.args, self.device, self.info = args, device, info
        self.part, self.bar = Parts(openers, args.offload), None
        vae, self.vae_config = self.part("vae")
        self.stride, self.time_stride, self.z_dim = vae.stride, vae.time_stride, vae.z_dim
        del vae                          # or --offload would hold it beside the denoiser
        model = self.part("denoiser")
        self.patch, self.kind = model.dit.patch, model.kind
        self.width = max(min(p.shape) for p in model.dit.parameters() if p.ndim == 2)
        self.mean, self.std = normaliser(self.vae_config)
        resolve(args, info, model.objective, self.stride)

    def latent_shape(self, frames, height, width):
        """(C, T', H', W') of the smallest grid that covers the video."""
        pt, ph, pw = self.patch
        up = lambda n, stride, patch: -(-n // (stride * patch)) * patch
        return (self.z_dim, up(frames - 1 + self.time_stride, self.time_stride, pt),
                up(height, self.stride, ph), up(width, self.stride, pw))

    @torch.no_grad()
    def encode(self, frames):
        """Normalised latents [C, T', H', W'] of uint8 [T, H, W, 3], the posterior's mean."""
        video = to_tensor(frames)[None].to(self.device)
        return (encode_long(self.part("vae")[0], video)[0][0].cpu() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents):
        """Yields uint8 [t, H, W, 3], chunk by chunk."""
        z = (latents * self.std + self.mean)[None].to(self.device)
        for part in decode_long(self.part("vae")[0], z, self.args.chunk):
            yield to_frames(part[0])

    def open_timeline(self, request):
        """A request's Timeline, with its media files opened."""
        asked = {name for name in ("image", "last", "extend", "then", "to", "loop")
                 if name in request}
        if "adapt" in self.info:
            asked -= {"image", "extend", "then"}
        elif self.info.get("takes"):
            asked = ()
        if asked:
            refuse(f"--{min(asked)}: {self.args.name} was not trained with conditioning frames "
                   "(train_dit.py --given)")
        C, T, H, W = self.latent_shape(request["frames"], request["height"], request["width"])
        raw = "image" if "reads_image" in self.info else None           # `give_image` scales it
        files = {name: read_media(request[name], request["fps"], *((None, None) if name == raw else
                                                             (H * self.stride, W * self.stride)))
                 for name in GIVEN_FILES if request.get(name)}
        todo = todo_of(request)
        if request.get("strength"):
            video = files["video"][:1 + (T - 1) * self.time_stride]
            T = 1 + (len(video) - 1) // self.time_stride
            files["video"] = video[:1 + (T - 1) * self.time_stride]
            request = {**request, "frames": min(len(files["video"]), request["frames"])}
        timeline = Timeline(request, (C, T, H, W), 1 + (T - 1) * self.time_stride, todo, files)
        if "video" in files and not request.get("strength"):
            timeline.segments.append(Segment(len(files["video"]), None, files["video"]))
        return timeline

    def context(self, timeline, segment, at_end):
        """(latents, number of frames) of a segment's last or first frames, encoded separately: half
        a clip's latents, as in training. With more, or latents that saw a past, shapes dissolve."""
        frames = segment.frames
        most = self.args.context or 1 + (max(2, timeline.shape[1] // 2) - 1) * self.time_stride
        if frames is None:               # decoded in parts, the last frames are kept
            frames = np.zeros((0, 1, 1, 3), np.uint8)
            for part in self.decode(segment.latents):
                frames = np.concatenate([frames[-most:], part]) if len(frames) else part
                if len(frames) >= most and not at_end:
                    break
        n = 1 + (min(len(frames), most) - 1) // self.time_stride * self.time_stride
        return self.encode(frames[-n:] if at_end else frames[:n]), n

    def edge(self, segment, at_end):
        """A segment's last or first frame, uint8 [1, H, W, 3]."""
        frames = segment.frames
        if frames is None:
            frames = np.concatenate(list(self.decode(segment.latents)))[segment.start:segment.stop]
        return frames[-1:] if at_end else frames[:1]

    def conditioning(self, timeline, role):
        """(conditioning latents, first frame or None) of a timeline's next segment of this role."""
        first, end, fps, segments = None, None, timeline.request["fps"], timeline.segments
        if role == "new":
            first, end = (timeline.files[name][:1] if name in timeline.files else None
                          for name in ("image", "last"))
        elif role == "between":
            first = self.edge(segments[-1], True)
            end = (timeline.files["to"][:1] if "to" in timeline.files else
                   self.edge(segments[0], False))
        elif role == "before":
            return [(self.context(timeline, segments[0], False)[0], timeline.n / fps)], None
        elif role == "after" and "adapt" in self.info:      # Wan's: the last frame is an image
            first = self.edge(segments[-1], True)
        elif role == "after":
            z, n = self.context(timeline, segments[-1], True)
            return [(z, -n / fps)], None
        if "reads_image" in self.info:
            return [], first
        ends = ((first, 0.0), (end, (timeline.n - 1) / fps))
        return [(self.encode(frame), at) for frame, at in ends if frame is not None], first

    def job(self, timeline, k, texts):
        """The SamplingJob of a timeline's segment k."""
        (role, prompt), request = timeline.todo[k], timeline.request
        cond_latents, first = self.conditioning(timeline, role)
        draws = gaussians("sample", request["seed"], k, [request["prompt"]], [timeline.shape])
        changed = () if role != "change" else (
            self.encode(timeline.files["video"]), request["strength"])
        first_latent = cond_latents[0][0] if cond_latents and first is not None else None
        conditions = [CONDITIONS[name](request) for name in self.info.get("conditions", ())]
        job = SamplingJob(
            timeline.shape, request["fps"], texts[prompt], texts[request["negative"]], draws[0],
            cond_latents, conditions, first_latent, *changed,
            key=(request["seed"], k, request["prompt"]), position_scale=position_scale(
                self.info.get("data"), request["height"], request["width"]))
        return self.info["adapt"](self, job, first) if "adapt" in self.info else job

    @torch.no_grad()
    def denoise(self, jobs, progress=None, watch=None):
        """Normalised latents [C, T', H', W'] of each job. watch(packed, value) is called with each
        output of the network, which it returns, and with each x."""
        model, args = self.part("denoiser"), self.args
        packed = Guided(model, jobs, args, self.time_stride, self.device)
        objective = model.objective
        shift = args.shift
        if objective.shift_tokens:                           # each clip by its length
            shift = token_shift(shift, packed.lengths, objective.shift_tokens)
            shift = shift[packed.clip, None].double()
        tokens = lambda latents: patchify([z.to(self.device) for z in latents], self.patch)

        def draw(i):
            return tokens([gaussians("fresh", seed, i, [f"{k} {prompt}"], [job.shape])[0]
                           for job in jobs for seed, k, prompt in (job.key,)])
        start = tokens([job.start for job in jobs]) if jobs[0].start is not None else None
        read = packed if watch is None else lambda *at: watch(packed, packed(*at))
        for x in trajectory(args, objective, read, packed.start, start, jobs[0].strength, shift,
                            draw):
            if progress is not None:
                progress.update()
            if watch is not None:
                watch(packed, x)
        return [z.cpu() for z in packed.latents(x)]

    def __call__(self, requests):
        """Samples all requests and returns their timelines."""
        timelines = [self.open_timeline(request) for request in requests]
        prompts = [request["negative"] for request in requests] + [
            prompt for timeline in timelines for _, prompt in timeline.todo]
        texts = {prompt: self.part("text")(prompt) for prompt in dict.fromkeys(prompts)}
        with self.shown([requests]) as bar:
            for strength, k, members in groups_of([timeline.request for timeline in timelines]):
                group = [timelines[i] for i in members]
                jobs = [self.job(timeline, k, texts) for timeline in group]
                for timeline, z in zip(group, self.denoise(jobs, bar)):
                    self.add(timeline, timeline.todo[k][0], z)
        return timelines

    def shown(self, batches):
        """The progress bar of the whole call if there is one, else one of these batches."""
        return self.progress(batches) if self.bar is None else contextlib.nullcontext(self.bar)

    def progress(self, batches):
        """A progress bar of the steps that these batches of requests take in all."""
        total = sum(count_steps(self.args, group[0]) for requests in batches
                    for group in groups_of(requests))
        return tqdm(desc="sample", unit="step", total=total, disable=self.args.quiet)

    def add(self, timeline, role, z):
        """Adds the sampled segment; frames that its neighbours hold too are not shown."""
        is_repeat = role == "between" or role == "after" and "adapt" in self.info
        segment = Segment(timeline.n, z, start=int(is_repeat))
        if role == "between":
            segment.stop = max(2, timeline.n - 1)
        timeline.segments.insert(0 if role == "before" else len(timeline.segments), segment)
        if role == "between" and "to" in timeline.files:
            end = timeline.files["to"]
            timeline.segments.append(Segment(len(end), None, end))

    def frames(self, timeline):
        """Yields a timeline's frames, uint8 [H, W, 3], cropped to the size of the request."""
        left = timeline.count()
        for segment in timeline.segments:
            parts = [segment.frames] if segment.latents is None else self.decode(segment.latents)
            for at, frame in enumerate(itertools.chain.from_iterable(parts)):
                if segment.start <= at < segment.stop and left:
                    left -= 1
                    yield center_crop(frame[None], timeline.request)[0]


def center_crop(video, request):
    """Frames [T, H, W, 3], cropped about the centre to a request's size."""
    top, left = ((side - want) // 2 for side, want in
                 zip(video.shape[1:3], (request["height"], request["width"])))
    return video[:, top:top + request["height"], left:left + request["width"]]


def resize_and_crop(frame, height, width):
    """uint8 [1, height, width, 3]: a frame scaled to cover that size, cropped about the centre."""
    sides = frame.shape[1::-1]
    scale = max(height / sides[1], width / sides[0])
    size = [max(want, round(side * scale)) for side, want in zip(sides, (width, height))]
    if size != list(sides):
        frame = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))
    return center_crop(frame[None], {"height": height, "width": width})


def read_media(path, fps, height, width):
    """A video at `fps` or a still, resized and cropped unless height is None: uint8
    [T, height, width, 3], or a Film where that is large."""
    path = Path(path)
    try:
        if path.suffix.lower() in STILLS and not is_animated(path):
            pixels = read_still(path)
            return resize_and_crop(pixels, height, width) if height else pixels[None]
        film = Film(path, fps, height, width)
        return film[:] if math.prod(film.shape) <= FILM_BYTES else film
    except (Unreadable, *PICTURE_ERRORS) as error:
        refuse(f"{path} cannot be read: {' '.join(map(str, error.args))}")


FILM_BYTES = 2**27           # bytes of a video that is held in memory


class Film:
    """A video's frames at `fps`, decoded on access; indexed like an array uint8
    [T, height, width, 3]."""

    def __init__(self, path, fps, height, width):
        video = Video(path)
        stamps = [[math.nan if one is None else one for one in (frame.pts, frame.dts)]
                  for frame in video]
        if not stamps:
            refuse(f"{path} holds no frame that can be read")
        times = true_times(np.transpose(stamps) * video.tick, video.step)
        times = np.cumsum([0, *np.diff(times).clip(max=GAP)])
        length = times[-1] + (times[-1] / (len(times) - 1) if len(times) > 1 else 1 / fps)
        wanted = np.arange(max(1, round(length * fps))) / fps
        self.path = path
        self.frame_numbers = np.searchsorted((times[1:] + times[:-1]) / 2, wanted + 1e-6)
        sides = (height, width) if height else video.rgb(next(iter(video))).shape[:2]
        self.shape = len(self.frame_numbers), *sides, 3

    def __len__(self):
        return self.shape[0]

    def __iter__(self):
        return self.walk(self.frame_numbers)

    def __getitem__(self, at):
        return np.stack(list(self.walk(self.frame_numbers[at])))

    def walk(self, numbers):
        """Yields the frames of these numbers, which must not decrease."""
        video, n, (height, width) = Video(self.path), -1, self.shape[1:3]
        frames, fitted = iter(video), None
        for number in numbers:
            while n < number:
                frame, n = next(frames), n + 1
                fitted = n == number and resize_and_crop(video.rgb(frame), height, width)[0]
            yield fitted


# -- files: prompts in, videos and a page out ------------------------------------------------------

GIVEN_FILES = ("image", "last", "video", "to")
TASKS = (*GIVEN_FILES, "extend", "then", "loop", "strength")
REQUEST_FIELDS = ("prompt", "negative", "seed", "fps", "motion", *TASKS)


def request_of(args, row):
    """A request: a dict of prompt, negative, frames, height, width, fps, seed and TASKS. Values
    come from `row`, which has at least a prompt, else from the options."""
    request = {name: row.get(name, getattr(args, name, None)) for name in REQUEST_FIELDS}
    request["height"], request["width"] = row.get("size", args.size)
    seconds = row.get("seconds", args.seconds)
    request["frames"] = row.get("frames") or (None if "seconds" in row else args.frames) or max(
        1, round(seconds * request["fps"]))
    request = {name: value for name, value in request.items()
               if value not in (None, False, 0, []) or name in ("prompt", "seed", "negative")}
    if re.search("[\ud800-\udfff]", "".join([request["prompt"], request["negative"] or "",
                                              *request.get("then", ())])):
        refuse(f"{request['prompt']!a} is no text in UTF-8")
    has = lambda *names: [f"--{name}" for name in names if request.get(name)]
    if empty := [name for name in GIVEN_FILES if request.get(name) == ""]:
        refuse(f"--{empty[0]} names no file: it is empty")
    for both in (("video", "image"), ("video", "last"), ("to", "loop"), ("strength", "to"),
                 ("strength", "loop")):
        if len(has(*both)) == 2:
            refuse(f"{' and '.join(has(*both))} do not go together")
    if has("strength") and not has("video"):
        refuse("--strength changes a video: name it by --video")
    if has("video") and not has("extend", "then", "to", "loop", "strength"):
        refuse("--video FILE needs one of --extend, --then, --to, --loop, --strength")
    is_odd = request["height"] % 2 or request["width"] % 2
    if is_odd and args.format == "mp4" and (
            request["frames"] > 1 or has("video", "to", "loop", "extend", "then")):
        asked = f"{request['height']}x{request['width']}"
        request |= {name: max(2, request[name] // 2 * 2) for name in ("height", "width")}
        print(f"an MP4 has even sides: {asked} is cropped to {request['height']}x"
              f"{request['width']} (--format png keeps it)", file=sys.stderr)
    for name in has(*GIVEN_FILES):
        path = Path(request[name[2:]])
        if not path.is_file():
            refuse(f"{name} {path} is a folder: name a file in it" if path.is_dir() else
                   f"{name} {path}: no such file")
    return request


def read_prompts(args):
    """The requests of --prompts FILE: .jsonl, a dict a line, or text, a prompt a line. Values are
    parsed like options."""
    path, requests, names = Path(args.prompts), [], (*REQUEST_FIELDS, "size", "seconds", "frames")
    if not path.is_file():
        refuse(f"--prompts {path}: no such file")
    if path.suffix.lower() in (".csv", ".tsv", ".json"):
        refuse(f"--prompts {path}: give text, a prompt a line, or .jsonl, a dict a line such as "
               '{"prompt": "a boat"}')
    lines = lines_of(read_text(path, "--prompts"))
    parser = option_parser(__doc__)
    add_requests(parser)
    parser.error = lambda why: refuse(f"--prompts {path}, line {i}: {why}")
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line) if path.suffix == ".jsonl" else {"prompt": line.strip()}
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise ValueError("not a dict with a prompt, a text")
        except (ValueError, RecursionError) as error:
            parser.error(error)
        if {"frames", "seconds"} <= {*row}:
            parser.error("frames and seconds both give the length: leave one out")
        if {*row} - {*names}:
            parser.error(f"{', '.join(sorted({*row} - {*names}))}: known are {', '.join(names)}")
        row = {name: value for name, value in row.items() if value is not None}
        words = [f"--{name}" if value is True else f"--{name}={value}" for name, many in row.items()
                 for value in (many if isinstance(many, list) else [many]) if value is not False]
        read = vars(parser.parse_args([args.name, *words]))
        row = {name: read[name] for name in row} | {"prompt": row["prompt"]}
        requests.append(request_of(args, row))
    return requests or refuse(f"--prompts {path} holds no prompt")


SETTINGS = ("sampler", "steps", "cfg", "cfg_interval", "cfg_channels", "rescale", "apg", "shift",
            "eta", "form", "norm", "spacing", "context", "temperature", "dtype", "crf", "format")
SOURCES = ("vae", "checkpoint", "text_encoder", "heads")


def settings_of(request, args):
    """{name: value} of a request's settings and of options that differ from their defaults."""
    usual, plain = args.defaults, lambda value: list(value) if isinstance(value, tuple) else value
    now = {name: plain(getattr(args, name)) for name in SETTINGS} | {
        name: args.explicit[name] for name in SOURCES if name in args.explicit}
    now |= {name: request.get(name) for name in (*REQUEST_FIELDS[1:], "frames") if name != "seed"}
    now["size"], length = [request["height"], request["width"]], usual.get("frames") or max(
        1, round((usual.get("seconds") or 0) * usual["fps"]))
    return {name: value for name, value in now.items() if value is not None and
            value != (length if name == "frames" else plain(usual.get(name)))}


def hash_of(facts):
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def stem_of(request, args):
    """The name of a video's files: prompt (at most 120 bytes; names of symbols where it has no
    letters), seed, tasks, and a hash of settings that are not the defaults."""
    text = unicodedata.normalize("NFC", request["prompt"])
    if not any(unicodedata.category(c)[0] in "LN" for c in text):
        text = " ".join(spelled(c) for c in text if unicodedata.category(c)[0] == "S")
    text = "".join(c if unicodedata.category(c)[0] in "LMN" else "-" for c in text)
    slug = re.sub("-+", "-", text).strip("-")[:60].encode()[:120].decode(errors="ignore")
    settings = settings_of(request, args)
    tasks = [name for name in TASKS if name in request]
    return "-".join([slug or "empty", f"s{request['seed']}", *tasks,
                     *([hash_of(settings)] if settings else [])])


def read_facts(path):
    """The dict of a sample's JSON file, {} where it cannot be read."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {"file": None}


def path_of(sampler, request, path, args):
    """`path`, or with a hash appended where its JSON file describes another sample, such as one
    of an older checkpoint."""
    facts = facts_of(sampler, request, args)
    now = {name: facts[name] for name in ("wish", "how", "weights", "autoencoder")}
    there = read_facts(path.with_suffix(".json"))
    is_free = not there or all(there.get(name) == value for name, value in now.items())
    return path if is_free else path.with_name(f"{path.name}-{hash_of(now)}")


def facts_of(sampler, request, args):
    """What reproduces a video: request, settings, weights, command, versions."""
    how = {name: getattr(args, name) for name in SETTINGS}
    sources = {name: sampler.info.get(name) for name in ("weights", "autoencoder")}
    options = [str(args.name), "--prompt", request["prompt"], "--size",
               f"{request['height']}x{request['width']}", "--frames", str(request["frames"])]
    own = {name: value for name, value in args.explicit.items() if name in (
        *SETTINGS, *SOURCES, "chunk", "device", "offload")}
    asked = {name: request[name] for name in REQUEST_FIELDS[1:] if name in request}
    for name, value in {**asked, **own}.items():
        many = value if isinstance(value, (list, tuple)) else [] if value is True else [value]
        options += [f"--{name}", *map(str, many)]
    command = " ".join(["python sample.py", *map(shlex.quote, options)])
    return json.loads(json.dumps({                           # with lists for tuples, as in the file
        "wish": request, "how": how, **sources, "model": str(args.name), "command": command,
        "versions": {"torch": torch.__version__, "numpy": np.__version__}}))


class Delays(list):
    """The pictures' durations, ms, multiples of the format's unit (10 ms in a GIF); they alternate
    so that their mean is right."""

    def __init__(self, fps, unit):
        self.at = lambda n: round(n * 1000 / (fps * unit)) * unit

    def __getitem__(self, n):
        return self.at(n + 1) - self.at(n)


def save_frames(path, frames, fps, args):
    """Writes frames, uint8 [H, W, 3], in --format; returns path.mp4, .gif, .webp, or for png the
    folder path/."""
    pictures = (Image.fromarray(np.ascontiguousarray(frame)) for frame in frames)
    if args.format == "mp4":
        write_video(path.with_suffix(".mp4"), frames, fps, args.crf)
    elif args.format == "png":
        for i, picture in enumerate(pictures):
            with atomic(path / f"{i:05d}.png") as part:
                picture.save(part, "PNG")
        return path
    else:
        with atomic(path.with_suffix(f".{args.format}")) as part:
            next(pictures).save(part, args.format, save_all=True, append_images=pictures, loop=0,
                                duration=Delays(fps, 10 if args.format == "gif" else 1), quality=90)
    return path.with_suffix(f".{args.format}")


def write_timeline(sampler, timeline, path, args, request):
    """Writes a timeline's video while it is decoded, its contact sheet and, last, its JSON file
    with `request` as the user gave it; returns the video's path."""
    n, shown, means, moves = timeline.count(), [], [], []
    wanted = set(np.linspace(0, n - 1, 8).round().astype(int).tolist())

    def frames():
        before = None
        for i, frame in enumerate(sampler.frames(timeline)):
            if i in wanted:
                shown.append(frame)
            means.append(frame.mean((0, 1)))
            moves.append(0.0 if before is None else apart(frame, before))
            yield (before := frame)
    if n == 1:
        video = path.with_suffix(".png")
        with atomic(video) as part:
            Image.fromarray(next(frames())).save(part, "PNG")
    else:
        video = save_frames(path, frames(), timeline.request["fps"], args)
        contact_sheet(path.with_suffix(".png"), [(shown, label_of(timeline.request))])
        if len(timeline.segments) == 1 and timeline.files.keys() & {"image", "last"}:
            warn_of_leaps(sampler, timeline, video, shown[-1], moves)
    facts = facts_of(sampler, request, args) | {
        "file": video.name, "n_frames": n, "settings": settings_of(request, args)}
    if len(timeline.segments) > 2:
        facts["drift"] = drift(path.with_name(f"{path.name}-drift.png"), timeline, np.array(means))
    write_text(path.with_suffix(".json"), json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return video


def apart(a, b):
    """Mean difference of two pictures, levels of 255."""
    return float(np.abs(np.float32(a) - b).mean())


def warn_of_leaps(sampler, timeline, video, last, moves):
    """Warns where a clip does not keep to its conditioning frames, as with pictures unlike the
    training data."""
    texts = []
    if "image" in timeline.files and len(moves) > 2 and (
            moves[1] > max(10, 4 * np.median(moves[2:]))):
        texts.append(f"leaves --image after its first frame, by {moves[1]:.0f} of 255 levels")
    if "last" in timeline.files:
        seen = next(iter(sampler.decode(sampler.encode(timeline.files["last"][:1]))))
        if (off := apart(last, center_crop(seen, timeline.request)[0])) > 10:
            texts.append(f"ends {off:.0f} of 255 levels off --last")
    if texts:
        tqdm.write(f"warning: {video.name} {' and '.join(texts)}: take pictures like the training "
                   f"data of {sampler.args.name}, and a prompt that suits them", sys.stderr)


def drift(path, timeline, means, width=640, height=240):
    """Plots the frames' mean red, green and blue [T, 3] over time, with a line at each new segment;
    returns each segment's, [segments, 3]."""
    ends = np.cumsum([segment.stop - segment.start for segment in timeline.segments])[:-1]
    image = Image.new("RGB", (width, height), "white")
    draw, low, high = ImageDraw.Draw(image), means.min() - 2, means.max() + 2
    point = lambda t, level: (40 + (width - 60) * t / max(1, len(means) - 1),
                              height - 20 - (height - 40) * (level - low) / (high - low))
    for end in ends:
        draw.line([point(end - 0.5, low), point(end - 0.5, high)], fill=(220, 220, 220))
    for channel, colour in enumerate(((220, 60, 50), (40, 160, 60), (50, 90, 230))):
        points = [point(t, level) for t, level in enumerate(means[:, channel])]
        draw.line(points, fill=colour, width=2)
    for level in (low + 2, high - 2):
        draw.text((6, point(0, level)[1] - 6), f"{level:.0f}", fill="black")
    draw.text((44, 4), f"mean level of red, green and blue, {len(means)} frames", fill="black")
    with atomic(path) as part:
        image.save(part, "PNG")
    return [part.mean(0).round(3).tolist() for part in np.split(means, ends) if len(part)]


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ margin: 16px; background: #16181c; color: #d6d8dc; font: 14px/1.45 system-ui, sans-serif }}
h1 {{ font-size: 18px; font-weight: 600; overflow-wrap: anywhere }}
button {{ font: 13px system-ui, sans-serif; margin-left: 8px; padding: 3px 10px; color: inherit;
  background: #2b2f37; border: 1px solid #454b57; border-radius: 4px }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 12px }}
.wide {{ overflow-x: auto; margin-bottom: 24px }}
th {{ font-weight: 400; text-align: left; vertical-align: top; padding: 0 8px 6px 0;
  min-width: 120px; max-width: 220px }}
td {{ vertical-align: top; padding: 0 12px 12px 0; min-width: 200px }}
figure {{ margin: 0 0 8px; background: #22252b; border-radius: 6px; overflow: hidden }}
video, img {{ display: block; width: 100%; aspect-ratio: 3 / 2; object-fit: contain;
  image-rendering: {rendering}; background: #000 }}
figcaption {{ padding: 8px 10px }}
.prompt {{ display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3;
  overflow: hidden; overflow-wrap: anywhere; cursor: pointer }}
.open {{ display: block }}
small {{ color: #8d939e; display: block; overflow-wrap: anywhere }}
a {{ color: #8ab4f8 }}</style></head><body>
<h1>{title}: {count} <button onclick="for (const v of document.querySelectorAll('video'))
 v.currentTime = 0">play all from the start</button></h1>
{figures}
<script>
const visible = new IntersectionObserver(entries => {{ for (const entry of entries)
  entry.isIntersecting ? entry.target.play().catch(() => {{}}) : entry.target.pause() }});
for (const video of document.querySelectorAll('video')) visible.observe(video);
for (const prompt of document.querySelectorAll('.prompt'))
  prompt.onclick = () => prompt.classList.toggle('open');
</script></body></html>
"""


def plain(text):
    """HTML of a text: markup is escaped, characters that do not print become spaces."""
    return html.escape("".join(c if c.isprintable() else " " for c in str(text)))


def prompt_of(request):
    text = plain(request["prompt"] or "(no prompt)")
    return f'<div class="prompt" title="{text}">{text}</div>'


def read_samples(folder):
    """([(JSON file, facts, settings as texts)] of a folder's samples, the newest first; names of
    .json files that describe no sample)."""
    samples, others = [], []
    for path in folder.glob("[!.]*.json"):       # those with a dot in front are being written
        facts = read_facts(path)
        try:
            age, settings = -path.stat().st_mtime_ns, texts_of(facts)
            prompt, name = facts["wish"]["prompt"], facts["file"]
            if Path(name).name != name or not isinstance(prompt, str):
                raise ValueError(path)
        except (KeyError, TypeError, ValueError, AttributeError, OSError):
            others.append(path.name)
            continue
        if (folder / facts["file"]).exists():
            samples.append((age, path, facts, settings))
    return [row for _, *row in sorted(samples, key=lambda row: row[:2])], sorted(others)


def tasks_of(request):
    return [key if value is True else f"{key} {' | '.join(value)}" if key == "then" else
            f"{key} {Path(str(value)).name}" for key, value in request.items() if key in TASKS]


def label_of(request):
    """A sample's label on a sheet."""
    tasks = ", ".join(tasks_of(request))
    return f"{tasks}{': ' * bool(tasks)}{request['prompt']} (seed {request['seed']})"


def texts_of(facts):
    """A sample's settings as texts, without its prompt and seed."""
    request, how, more = facts["wish"], facts["how"], facts.get("settings", {})
    texts = [f"{facts['n_frames']} frames of {request['height']}x{request['width']} at "
             f"{request['fps']:g}/s"]
    texts += tasks_of(request)
    if how["steps"]:
        texts += [f"{how['sampler']} {how['steps']} steps", f"guidance {how['cfg']}"]
    texts += [f"{key} {value}" for key, value in more.items() if key not in (
        *TASKS, "size", "frames", "fps", "sampler", "steps", "cfg", "crf", "format")]
    checkpoint = Path(str(facts.get("weights"))).name
    return (*texts, *[checkpoint] * checkpoint.startswith("step-"))


def figure(path, facts, settings, with_prompt=True):
    """HTML of a sample."""
    name, kind = quote(facts["file"]), Path(facts["file"]).suffix
    shows = f'<video src="{name}" preload="metadata" muted loop playsinline controls></video>' \
        if kind == ".mp4" else f'<img src="{name if kind else f"{name}/00000.png"}" alt="">'
    caption = ", ".join([f"seed {facts['wish']['seed']}", *settings])
    return (f"<figure>{shows}<figcaption>{prompt_of(facts['wish']) if with_prompt else ''}"
            f'<small>{plain(caption)}</small><small><a href="{quote(path.name)}">settings</a>'
            "</small></figcaption></figure>")


def write_page(folder, samples):
    """Writes folder/index.html: all samples, the newest first; prompts with several settings in a
    table, a row a prompt, a column a setting."""
    prompts = {}
    for row in samples:
        prompts.setdefault(row[1]["wish"]["prompt"], {}).setdefault(row[2], []).append(row)
    grid = {prompt: by for prompt, by in prompts.items() if len(by) > 1}
    columns, parts = list(dict.fromkeys(settings for by in grid.values() for settings in by)), []
    if grid:
        common = set.intersection(*map(set, columns))
        names = [", ".join(text for text in settings if text not in common) or "otherwise the same"
                 for settings in columns]
        rows = [f"<th></th>{''.join(f'<th>{plain(name)}</th>' for name in names)}"]
        for by in grid.values():
            request = next(iter(by.values()))[0][1]["wish"]
            cells = ["".join(figure(*row, with_prompt=False) for row in by.get(settings, ()))
                     for settings in columns]
            rows.append(f"<th>{prompt_of(request)}</th>" + "".join(f"<td>{x}</td>" for x in cells))
        table = "\n".join(f"<tr>{row}</tr>" for row in rows)
        parts.append(f'<div class="wide"><table>\n{table}\n</table></div>')
    singles = [figure(*row) for row in samples if row[1]["wish"]["prompt"] not in grid]
    parts += [f"<main>\n{chr(10).join(singles)}\n</main>"] * bool(singles)
    width = max([64, *(facts["wish"]["width"] for _, facts, _ in samples)])
    write_text(folder / "index.html", PAGE.format(
        title=plain(folder.parent if folder.name == "samples" else folder),
        count=f"{len(samples)} sample{'s' * (len(samples) != 1)}", figures="\n".join(parts),
        rendering="pixelated" if width < 200 else "auto"))


def frames_of_sheet(path, is_still):
    """The frames on a sample's contact sheet (squares of 96 px); of a still the picture."""
    with Image.open(path) as sheet:
        sheet = sheet.convert("RGB")
    if is_still:
        return [np.asarray(sheet)]
    return [np.asarray(sheet.crop((12 + left, 8, 108 + left, sheet.height - 42)))
            for left in range(0, sheet.width - 120, 100)]


def finish(out, most=64):
    """Writes index.html and sheet.png of all samples in a folder, also those of earlier calls."""
    samples, others = read_samples(out)
    if not samples:
        return
    write_page(out, samples)
    rows, newest = [], [row for row in samples[:most] if row[0].with_suffix(".png").is_file()]
    for path, facts, _ in newest:
        with contextlib.suppress(OSError):       # one that cannot be read
            rows.append((frames_of_sheet(path.with_suffix(".png"), facts["n_frames"] == 1),
                         label_of(facts["wish"])))
    if len(rows) > 1:
        contact_sheet(out / "sheet.png", rows)
    if others:
        print(f"{out}: {', '.join(map(ascii, others[:4]))}{', …' * (len(others) > 4)}: not of "
              "samples, ignored", file=sys.stderr)
    sheet = f"; sheet.png the newest {len(rows)}" if len(rows) > 1 else ""
    print(f"{out / 'index.html'} shows the {len(samples)} sample{'s' * (len(samples) > 1)} of this "
          f"folder{sheet}", file=sys.stderr)


def outside_of_training(requests, data, labels=None):
    """What in the requests lies outside of the run's training data, as texts."""
    outside, vocabulary = [], set(data["words"])
    for name, unit, values in (
            ("side", " px", [one[side] for one in requests for side in ("height", "width")]),
            ("frames", " frames a part", [one["frames"] for one in requests]),
            ("fps", " frames/s", [one["fps"] for one in requests if one["frames"] > 1])):
        low, high = data[f"{name}_range"] or (None, None)
        off = sorted({value for value in values if low and not low <= value <= high})
        if off:
            outside.append(f"{', '.join(f'{value:g}' for value in off[:4])}{unit} (trained on "
                         f"{low:g}{f' to {high:g}' if high > low else ''})")
    texts = [text for request in requests for text in (request["prompt"], *request.get("then", ()))]
    if not data["text"]:
        return outside + ["prompts (trained without text)"] * (not labels and any(texts))
    words = [word for word in dict.fromkeys(words_of(" ".join(texts))) if word not in vocabulary]
    more = f" and {len(words) - 8} more" if len(words) > 8 else ""
    text = f"the word{'s' * (len(words) > 1)} {', '.join(words[:8])}{more}"
    return outside + [text] * bool(words)


def sample(args, folder):
    rank, world, device = setup(args)
    args.quiet = rank > 0
    sampler = open_sampler(args, device)
    requests = read_prompts(args) if args.prompts else [
        {**request_of(args, {"prompt": prompt}), "seed": args.seed + i}
        for prompt in args.prompt for i in range(args.n)]
    requests = rewritten(args, requests, device) if args.rewrite else requests
    if any("motion" in request for request in requests) and "motion" not in (
            sampler.info.get("conditions") or ()):
        refuse(f"--motion: {args.name} was not trained with --conditions motion: leave it out")
    data = sampler.info.get("data")
    if data and rank == 0 and (
            strange := outside_of_training(requests, data, sampler.info.get("labels"))):
        print(f"warning: outside of the training data of {args.name}, expect less: "
              f"{'; '.join(strange)}", file=sys.stderr)
    stems = [stem_of(request, args) for request in requests]
    if args.prompts or len({stem.casefold() for stem in stems}) < len(stems):
        stems = [f"{i:05d}-{stem}" for i, stem in enumerate(stems)]
    batches = [range(len(requests))[i:i + args.batch] for i in range(0, len(requests), args.batch)]
    out = Path(args.out or folder / "samples")
    paths = [path_of(sampler, request, out / stem, args) for request, stem in zip(requests, stems)]
    # whole batches: what a video shares a row with must not depend on where a call stopped
    batches = [batch for batch in batches[rank::world] if not args.prompts or not all(
        is_made(sampler, requests[i], paths[i], args) for i in batch)]
    todo = [[requests[i] for i in batch] for batch in batches]
    check_memory(sampler, todo)
    get_ready(sampler, sum(todo, []))
    sweep(out)
    try:
        with sampler.progress(todo) as sampler.bar:
            for batch in batches:
                for i, timeline in zip(batch, sampler([requests[i] for i in batch])):
                    path = write_timeline(sampler, timeline, paths[i], args, requests[i])
                    tqdm.write(str(path), sys.stdout)
                    sys.stdout.flush()
    except KeyboardInterrupt:
        if rank == 0:
            finish(out)
        raise
    barrier()
    if rank == 0:
        finish(out)
    barrier()


def get_ready(sampler, requests):
    """Opens what the requests need and reads their classes, so that wrong ones are refused before
    the progress bar appears; with --offload later."""
    if not requests or sampler.args.offload or not hasattr(sampler, "part"):
        return
    read, info = sampler.part("text"), sampler.info
    for request in () if info.get("reads_text", not info.get("labels")) else requests:
        read(request["prompt"]), read(request["negative"])
    if info.get("reads_image"):
        sampler.part("image")


def rewritten(args, requests, device):
    """--rewrite: the requests with prompts that a language model rewrote, like the captions of the
    run's data set where that exists; `asked` holds the original prompt."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32   # as captions are made
    lm, texts, config = open_vlm(args.rewrite, device, dtype), {}, config_of(args.name)
    data = config["args"].get("name") if config else None
    is_here = data and (dataset_dir(data) / "manifest.json").is_file()
    rows = open_dataset(dataset_dir(data)) if is_here else []
    examples = [row["captions"][0]["text"] for row in rows if row["captions"]][:4]
    for prompt in sorted({request["prompt"] for request in requests}):
        texts[prompt] = rewrite(lm, prompt, examples, args.seed)
        print(f"{prompt} -> {texts[prompt]}", file=sys.stderr)
    return [{**request, "prompt": texts[request["prompt"]], "asked": request["prompt"]}
            for request in requests]


def is_made(sampler, request, path, args):
    """Whether a sample exists and its JSON file, which is written last, describes this request."""
    facts = read_facts(path.with_suffix(".json"))
    return (path.parent / str(facts.get("file"))).exists() and all(
        facts.get(name) == value for name, value in facts_of(sampler, request, args).items())


def made(sampler, requests, args, rank=0, world=1):
    """Yields (index, uint8 [T, H, W, 3]) of this rank's share of the requests' videos."""
    for start in range(0, len(requests), args.batch)[rank::world]:
        for i, timeline in enumerate(sampler(requests[start:start + args.batch]), start):
            yield i, np.stack(list(sampler.frames(timeline)))


# -- the command line ------------------------------------------------------------------------------


def resolve(args, info, objective, stride):
    """Fills in the options that depend on the model, and refuses unused ones."""
    is_own, data = info["kind"] == "own", info.get("data")
    defaults = {"shift": info.get("shift", 1.0), "fps": 10.0, "negative": info.get("negative", ""),
                "rescale": 0.0, **KINDS[info["kind"]]}
    defaults["sampler"] = "ddim" if is_own and objective.path in STEPPED else info.get(
        "sampler", defaults["sampler"])
    if data:                             # the most frequent ones
        defaults |= {"size": tuple(data["size"]), "fps": data["fps"] or defaults["fps"]}
        defaults["seconds"] = data["frames"] / defaults["fps"]
        defaults |= {} if data["text"] else {"cfg": 1.0}        # no conditioning: one pass
    args.defaults |= {"size": (info.get("cells", 0) * stride,) * 2} | defaults
    has_length = args.frames or args.seconds
    for name, value in defaults.items():
        if getattr(args, name) is None and not (has_length and name in ("frames", "seconds")):
            setattr(args, name, value)
    args.size = args.size or (info["cells"] * stride,) * 2
    uses = {"text_encoder": info.get("reads_text"), "heads": not is_own, "checkpoint": is_own,
            "temperature": False, "eta": args.sampler == "ddim", "form": args.sampler == "sde",
            "norm": args.sampler == "sde", "spacing": objective.path in STEPPED and
            args.sampler in ("ddim", "dpm++", "unipc")}
    for name in uses:
        if name in args.explicit and not uses[name]:
            refuse(f"--{name} is not used by {args.name} with {args.sampler}: leave it out")
    may = STEPPED_SAMPLERS if objective.path in STEPPED else FLOW_SAMPLERS
    may = [name for name in may if name != "dpm-fast" or objective.path == "sd"]
    if args.sampler not in may:
        refuse(f"--sampler {args.sampler} is not for the path of {args.name}, {objective.path}: "
               f"take {', '.join(may)}")
    if args.apg and args.cfg_channels:
        args.cfg_channels = None                             # APG is over whole clips
    args.grid, args.rules = (info.get("layout"), args.sampler), info.get("rules", {})
    args.ends = grid_ends(args)


def size_of(text):
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or not all(2 <= int(side) <= 16384 for side in match.groups()):
        raise argparse.ArgumentTypeError(f"'{text}' is not HxW, 2 to 16384 px each, such as 32x48")
    return int(match[1]), int(match[2])


def parse_options(argv=None):
    parser = option_parser(__doc__)
    add_requests(parser)
    add_settings(parser)
    args = parser.parse_args(argv)
    if any(getattr(args, name) for name in GIVEN_FILES) and not (args.prompt or args.prompts):
        args.prompt = [""]
    if not (args.prompt or args.prompts or args.eval):
        refuse('nothing to do: give --prompt "…", --prompts FILE or --eval demo')
    if args.frames and args.seconds:
        refuse("--frames and --seconds both give the length: leave one out")
    explicit = {name: value for name, value in vars(args).items()
                if value != parser.get_default(name)}
    args.explicit, args.quiet, args.grid, args.rules = explicit, False, None, {}
    args.defaults = {name: parser.get_default(name) for name in vars(args)}
    return args


def add_requests(parser):
    parser.add_argument("name", help="run: runs/NAME, or a path with a slash; or published: "
                        "a DiT's, SiT's or U-ViT's file, VideoGPT's .ckpt, a Wan folder")
    add = parser.add_argument_group("what to sample").add_argument
    add("--prompt", nargs="+", help="prompts, each in quotes; a class by its number or label")
    add("--prompts", metavar="FILE", help="a request a line: .jsonl with prompt, seed, size and so "
        "on, or text; divided among the ranks; finished ones are skipped")
    add("--rewrite", metavar="DIR", help="language model that rewrites the prompts first (none)")
    add("--negative", help="negative prompt (empty; Wan: its own)")
    add("--size", type=size_of, help="HxW, px (the run's most frequent, or 32x48; published: own)")
    add("--seconds", type=number(float, 0.001),
        help="length of each segment, s (the run's most frequent, or 1.3)")
    add("--frames", type=number(int, 1), help="length in frames, instead of --seconds")
    add("--fps", type=number(float, 0.1, 1000),
        help="frames a second, to 1000 (the run's most frequent, or 10; Wan 16, TI2V 24)")
    add("--motion", type=number(float, 0),
        help="motion score of a run trained with --conditions motion (none)")
    add("--n", type=number(int, 1), default=1, help="videos a prompt, seeds count up (%(default)s)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of the noise (%(default)s)")
    add = parser.add_argument_group("from images and videos (of a run trained with "
                                    "--given)").add_argument
    add("--image", metavar="FILE", help="the first frame, like the training data's (none)")
    add("--last", metavar="FILE", help="the last frame, likewise (none)")
    add("--video", metavar="FILE", help="the video to extend or to change (none)")
    add("--extend", type=number(int, -1000, 1000), default=0, metavar="N",
        help="extend N times by --seconds, below 0: backwards (%(default)s)")
    add("--then", nargs="+", action="extend", default=[], metavar="PROMPT",
        help="extend once under each of these prompts (none)")
    add("--to", metavar="FILE", help="connect to this video (none)")
    add("--loop", action="store_true", help="connect the end to the beginning")
    add("--strength", type=number(float, 0, 1),
        help="video to video: share of the steps made on --video, 0 to 1 (none)")
    add("--context", type=number(int, 1), help="frames of the segment before that an extension is "
        "conditioned on (as in training: half a segment's latents, at least two)")


def add_settings(parser):
    add = parser.add_argument_group("how").add_argument
    add("--sampler", choices=list(dict.fromkeys(FLOW_SAMPLERS + STEPPED_SAMPLERS)),
        help="(euler; ddim for paths in steps; of published weights their own)")
    add("--steps", type=number(int, 1), help="steps of the sampler (20; published: 50 or 250)")
    add("--shift", type=number(float, 0.01, 100), help="timestep shift towards noise (the run's)")
    add("--eta", type=number(float, 0, 1), default=0.0,
        help="share of fresh noise in DDIM, 0 to 1 (%(default)s)")
    add("--form", choices=FORMS_OF_NOISE, default="sigma", help="of sde's noise (%(default)s)")
    add("--norm", type=number(float, 0), default=1.0, help="its strength (%(default)s)")
    add("--spacing", choices=["linspace", "leading", "trailing", "karras"], default="linspace",
        help="of ddim, dpm++ and unipc on paths in steps (%(default)s)")
    add("--cfg", type=number(float, 0, 100),
        help="guidance scale, 0 to 100, 1: none (3; published: 1.4 to 5)")
    add("--cfg_interval", type=number(float, 0, 1), nargs=2, default=(0.0, 1.0),
        metavar=("FROM", "TO"), help="times of guidance, 0 clean to 1 noise (all)")
    add("--cfg_channels", type=number(int, 1),
        help="channels to guide, the first ones (all; DiT and SiT as published: 3)")
    add("--rescale", type=number(float, 0, 1),
        help="rescaling of the guided deviation, 0 to 1 (1; published: 0)")
    add("--apg", type=number(float, 0), default=0.0, metavar="RADIUS",
        help="adaptive projected guidance, its longest step a clip, 0: plain (%(default)s)")
    add("--temperature", type=number(float, 0.01), default=1.0, help="VideoGPT's (%(default)s)")
    add = parser.add_argument_group("where and in what").add_argument
    add("--vae", help="autoencoder: a run, or published (the one of the model's training)")
    add("--checkpoint", choices=["best", "last"], default="best",
        help="a run's weights: of the lowest held-out loss, or the last (%(default)s)")
    add("--text_encoder", help="folder of published weights' text encoder (their own folder)")
    add("--heads", type=number(int, 1), help="of published weights, if not 64 wide (none)")
    add("--out", metavar="DIR", help="folder to write to (runs/NAME/samples; --eval: runs/NAME)")
    add("--format", choices=["mp4", "gif", "webp", "png"], default="mp4",
        help="of videos; png: a folder of frames (%(default)s)")
    add("--crf", type=number(int, 0, 51), default=12, help="of H.264, 0 to 51 (%(default)s)")
    add("--batch", type=number(int, 1), help="videos a packed row (16; Wan: 1)")
    add("--chunk", type=number(int, 1), default=8, help="latent frames per decoding (%(default)s)")
    add("--offload", action="store_true",
        help="keep one of text encoder, denoiser and autoencoder in memory at a time")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="of products (%(default)s)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="(%(default)s)")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval", choices=["demo", "chain", "fid", "fvd", "clip"],
        help="measure, and write eval-*.json; chain: the demo's forms over segments (none)")
    add("--n_eval", type=number(int, 1), default=48,
        help="prompts of each kind, or real clips (%(default)s)")
    add("--data", help="data set of the real clips and their captions (none)")
    add("--detector", metavar="FILE", help="TorchScript network of features to compare (none)")
    add("--trust", action="store_true", help="run the code in a --detector's file")
    add("--clip", metavar="DIR", help="CLIP or SigLIP folder, to compare video and prompt (none)")


@one_line
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:
        return bench("bench_sampling", argv[1:])
    args = parse_options(argv)
    path = model_path(args.name)
    folder = path if is_run(path) else Path("runs", path.stem)
    folder = Path(args.out) if args.eval and args.out else folder
    out = folder if args.eval else Path(args.out or folder / "samples")
    if fault := write_fault(out):
        refuse(f"cannot write to {out}: {fault}: name another by --out")
    try:
        {None: sample, "demo": evaluate_demo, "chain": evaluate_chain}.get(
            args.eval, evaluate_real)(args, folder)
    except KeyboardInterrupt:
        print(f"sample.py: stopped; finished samples stay in {out}", file=sys.stderr)
        sys.exit(130)


# -- prompt adherence on the demo, by image analysis -----------------------------------------------


def hue(rgb):
    """[..., 3] to degrees; where all three are equal, 0."""
    r, g, b = np.moveaxis(rgb.astype(np.float64), -1, 0)
    return np.degrees(np.arctan2(math.sqrt(3) * (g - b), 2 * r - g - b)) % 360


def dilated(mask, steps=2):
    """A bool mask [T, H, W] grown by `steps` pixels in its frames."""
    for _ in range(steps):
        wide = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
        mask = (mask | wide[:, 2:, 1:-1] | wide[:, :-2, 1:-1] | wide[:, 1:-1, 2:]
                | wide[:, 1:-1, :-2])
    return mask


def form_coverage(form, x, y, radius, height, width):
    """[H, W]: the share of each pixel that a form centred at (x, y) covers, drawn like the demo."""
    shape = dict(form=form, colour="yellow", radius=radius, start=(x, y), stop=(x, y))
    shot = dict(shapes=[shape], frames=1, width=width, height=height, cell=4, texture="plain",
                level="black", tint=[0, 0, 0])
    level = render_shot(shot)[0, :, :, 0].astype(np.float64)
    return (level - level.min()) / max(1.0, COLOURS["yellow"][0] - level.min())


@functools.cache
def form_scale(form):
    """(area, centre's offset y) of a form of radius 1."""
    cover = form_coverage(form, 32, 32, 20, 64, 64)
    y = (np.arange(64) + 0.5)[:, None]
    return cover.sum() / 400, ((cover * y).sum() / cover.sum() - 32) / 20


def coverage(frames):
    """{colour: [T, H, W] from 0 to 1}: the share of each pixel that a shape of that colour covers,
    for the demo's colours that occur. Saturated pixels belong to a shape of the nearest hue, since
    backgrounds are grey."""
    frames = frames.astype(np.float64)
    saturation = frames.max(-1) - frames.min(-1)
    vivid = saturation > 80
    ground = np.median(frames[~dilated(vivid)], 0) if (~vivid).any() else np.zeros(3)
    away = np.stack([np.abs((hue(frames) - hue(np.array(rgb)) + 180) % 360 - 180)
                     for rgb in COLOURS.values()])
    nearest, by_colour = away.argmin(0), {}
    for i, (name, rgb) in enumerate(COLOURS.items()):
        mask = vivid & (nearest == i)
        if mask.sum((1, 2)).mean() < 0.01 * mask[0].size:
            continue
        axis = np.array(rgb, dtype=np.float64) - ground
        by_colour[name] = ((frames - ground) @ axis / (axis @ axis)).clip(0, 1) * dilated(mask, 1)
    return by_colour


def describe(frames):
    """The shapes in a clip of the demo's kind, by image analysis: dicts of colour, form, direction
    and area, the largest first. The form is the one that, drawn at the shape's centre with its
    area, covers the pixels best."""
    shapes = [{"colour": name, **form_and_direction(cover), "area": float(cover.sum((1, 2)).mean())}
             for name, cover in coverage(frames).items()]
    return sorted(shapes, key=lambda shape: -shape["area"])


RADII = (0.25, 0.29)     # of the demo's single shapes, shares of the shorter side: see demo_shot


def overlap(frames, colour, form, radii=RADII):
    """[T]: each frame's intersection over union (IoU) of the pixels of this colour and the ideal
    form, at the position and radius (shares of the shorter side) where it fits best."""
    T, H, W = frames.shape[:3]
    cover = coverage(frames).get(colour, np.zeros((T, H, W)))
    mask = torch.from_numpy(cover > 0.5).float()[:, None]
    best, half = torch.zeros(T), math.ceil(max(radii) * min(H, W)) + 1
    steps = [i / 4 for i in range(4)]                        # the centre, in quarters of a pixel
    for radius in np.linspace(*radii, 5) * min(H, W):
        drawn = torch.from_numpy(np.stack([
            form_coverage(form, half + x, half + y, radius, 2 * half + 1, 2 * half + 1) > 0.5
            for y in steps for x in steps])).float()[:, None]
        both = F.conv2d(F.pad(mask, [half] * 4), drawn)
        either = mask.sum((1, 2, 3))[:, None, None, None] + drawn.sum((1, 2, 3))[:, None, None]
        best = torch.maximum(best, (both / (either - both)).amax((1, 2, 3)))
    return best.numpy()


def form_and_direction(cover):
    """Form and direction of one shape from its coverage [T, H, W], 0 to 1."""
    mass, (rows, cols) = cover.sum((1, 2)), (np.arange(n) + 0.5 for n in cover.shape[1:])
    x, y = ((cover * at).sum((1, 2)) / np.maximum(mass, 1e-6) for at in (cols, rows[:, None]))
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
            drawn = form_coverage(form, x[t], y[t] - offset * radius, radius, *cover.shape[1:])
            total += np.abs(drawn - cover[t]).sum() / mass[t]
        errors[form] = total
    return {"form": min(errors, key=errors.get), "direction": direction}


def demo_prompts(n=48):
    """{"seen": [(colour, form, direction)], "left_out": […]}, n of each, always the same ones."""
    every = [(c, f, d) for c in COLOURS for f in FORMS for d in DIRECTIONS]
    prompts = {}
    for name, left_out in (("seen", False), ("left_out", True)):
        pool = [combination for combination in every if is_left_out(*combination) == left_out]
        order = np.random.Generator(np.random.Philox(5)).permutation(len(pool))
        prompts[name] = [pool[order[i % len(pool)]] for i in range(n)]
    return prompts


def demo_request(args, i, prompt, **tasks):
    width, height = DEMO_SIZES[i % len(DEMO_SIZES)]
    return dict(prompt=prompt, frames=13, fps=10.0, width=width, height=height, seed=args.seed + i,
                negative="", **tasks)


def evaluate_demo(args, folder):
    """Samples the fixed prompts, reads the pixels, writes eval.json: shares from 0 to 1."""
    _, _, device = setup(args)
    sampler, result = open_sampler(args, device), {}
    for name, combinations in demo_prompts(args.n_eval).items():
        requests = [demo_request(args, i, f"a {colour} {form} moves {direction}")
                    for i, (colour, form, direction) in enumerate(combinations)]
        rows, right = [], []
        for i, video in made(sampler, requests, args):
            shape = (describe(video) or [{}])[0]
            seen = [shape.get(k) for k in ("colour", "form", "direction")]
            right.append([a == b for a, b in zip(seen, combinations[i])])
            says = "right" if all(right[-1]) else f"WRONG: {' '.join(map(str, seen))}"
            rows.append((sheet_frames(video), f"{requests[i]['prompt']}: {says}"))
        shares = np.array(right).mean(0)
        result[name] = {"n": len(right), "form": shares[1], "colour": shares[0],
                        "direction": shares[2], "all": float(np.all(right, 1).mean())}
        contact_sheet(folder / f"eval-{name}.png", rows)
        print(name, " ".join(f"{key} {value:.3g}" for key, value in result[name].items()))
    write_text(folder / "eval.json", json.dumps(result, indent=1) + "\n")


def evaluate_chain(args, folder):
    """Samples timelines of three segments, there and back (`then`) or further under the same prompt
    (`extend`), and loops of two. Writes eval-chain.json: each frame's IoU, the median over the
    prompts; the lowest of these, and of the first segment's; the share of segments whose form,
    colour and, where the prompt names it, direction are right; and pictures eval-chain-*.png."""
    _, _, device = setup(args)
    sampler, result = open_sampler(args, device), {"parts": [0, 13, 26]}
    reverse = dict(zip(DIRECTIONS, ("right", "left", "down", "up")))
    prompts = demo_prompts(args.n_eval)["seen"]
    says = lambda i, way: f"a {' '.join(prompts[i][:2])} moves {way}"
    for kind in ("then", "extend", "loop"):
        requests, directions = [], []
        for i, (*_, way) in enumerate(prompts):
            directions.append([way, reverse[way], way] if kind == "then" else [way, None, None])
            task = {"then": [says(i, way) for way in directions[-1][1:]],
                    "extend": 2, "loop": True}[kind]
            requests.append(demo_request(args, i, says(i, way), **{kind: task}))
        overlaps, right, rows = [], [], []
        for i, video in made(sampler, requests, args):
            overlaps.append(overlap(video, *prompts[i][:2]))
            for part, way in zip(np.split(video, range(13, len(video), 13)), directions[i]):
                seen = (describe(part) or [{}])[0]
                right.append([seen.get(name) for name in ("colour", "form")] == [*prompts[i][:2]]
                             and way in (None, seen["direction"]))
            rows.append((video[::2], f"{requests[i]['prompt']}: lowest {overlaps[-1].min():.2f}"))
        medians = np.median(np.float64(overlaps), 0).round(3)
        result[kind] = {"n": len(requests), "lowest": float(medians.min()), "first":
                        float(medians[:13].min()), "right": float(np.mean(right)),
                        "overlap": medians.tolist()}
        contact_sheet(folder / f"eval-chain-{kind}.png", rows)
        print(kind, " ".join(f"{name} {result[kind][name]:.3f}"
                             for name in ("lowest", "first", "right")))
    write_text(folder / "eval-chain.json", json.dumps(result, indent=1) + "\n")


# == published networks: distances to real clips, schedules, folders ===============================


# -- distances to real clips -----------------------------------------------------------------------


def gathered(n, width, rows):
    """[n, width] on every rank, from each rank's rows (index, [width])."""
    table = torch.zeros(n, width)
    for i, row in rows:
        table[i] = row
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(table)
    return table


def real_clips(args):
    """(data set's folder, rows of the real clips to compare with)."""
    folder = dataset_dir(args.data)
    rows = [row for row in open_dataset(folder) if row["frames"] / (row["fps"] or 1) * args.fps
            >= args.frames - 0.5 or args.frames == 1]
    if not rows:
        refuse(f"{folder} has no clip of {args.frames} frames at {args.fps:g} frames/s: give fewer "
               "--frames")
    order = rng(0, "eval").permutation(len(rows))[:args.n_eval]
    return folder, [rows[i] for i in order]


def clip_at(folder, row, args):
    """uint8 [T, H, W, 3]: a row's clip from its start, in the samples' size, length and rate."""
    try:
        frames, fps = read_clip(folder, row), row["fps"] or 1.0
    except Unreadable as error:
        refuse(f"{error}: prepare the data set again")
    nearest = np.rint(np.arange(args.frames) * fps / args.fps).astype(int).clip(max=len(frames) - 1)
    return np.concatenate([resize_and_crop(frames[i], *args.size) for i in nearest])


def evaluate_real(args, folder):
    """Samples a data set's captions. Writes eval-fvd.json or eval-fid.json (distance to its real
    clips, and between two halves of these) or eval-clip.json (mean cosine of video and caption, for
    samples and real clips), with the protocol and its hash. Features of the real clips are cached
    in eval-real-HASH.safetensors."""
    rank, world, device = setup(args)
    args.quiet, kind = rank > 0, args.eval
    file, option = (args.clip, "clip") if kind == "clip" else (args.detector, "detector")
    if not file or not args.data:
        refuse(f"--eval {kind} needs --{option} (see --help) and --data NAME (real videos)")
    sampler, is_image = open_sampler(args, device), kind == "fid"
    args.frames = 1 if is_image else args.frames or max(1, round(args.seconds * args.fps))
    source, rows = real_clips(args)
    say = lambda row: row["label"] if sampler.info.get("labels") else (
        row["captions"] or [{"text": ""}])[0]["text"]
    if kind == "clip":
        scorer = Scorer(argparse.Namespace(clip=file, aesthetics=None), source, rows, device)
        digest, width = scorer.text.hash, 1
        measure = lambda i, video: torch.tensor([scorer.score(
            video[np.linspace(0, len(video) - 1, 4).astype(int)], say(rows[i]))["clip"]])
    else:
        features, digest = open_detector(file, device, "--detector", args.trust)
        measure = lambda i, video: features(video[None], is_image)[0]
        width = len(measure(0, np.zeros((args.frames, *args.size, 3), np.uint8)))
    real = {"data": hashlib.sha256(b"".join(p.read_bytes() for p in sorted(source.glob(
        "shard-*[0-9].jsonl")))).hexdigest()[:16], option: digest[:16], "n": len(rows),
        "size": list(args.size), "frames": args.frames, "fps": args.fps,
        "clips": "drawn by hash, from their start", "resize": "Lanczos to cover, centre crop"}
    n, cache = len(rows), folder / f"eval-real-{hash_of(real)}.safetensors"
    if not cache.exists():
        mine = tqdm(range(rank, n, world), desc="real", unit="clip", disable=args.quiet)
        true = gathered(n, width, ((i, measure(i, clip_at(source, rows[i], args))) for i in mine))
        if rank == 0:
            with atomic(cache) as part:
                save_file({"features": true}, part)
        barrier()
    true = load_file(cache)["features"]
    requests = [{**request_of(args, {"prompt": say(row)}), "seed": args.seed + i}
              for i, row in enumerate(rows)]
    features_made = gathered(n, width, ((i, measure(i, video)) for i, video in made(
        sampler, requests, args, rank, world)))
    protocol = {"real": real, "made": {name: getattr(args, name) for name in (
        "sampler", "steps", "cfg", "shift", "seed")}, "weights": sampler.info["weights"]}
    if kind == "clip":
        figure, more = features_made.mean().item(), {"real": true.mean().item()}
    else:
        figure = frechet(gaussian(features_made), gaussian(true))
        more = {"real_real": frechet(gaussian(true[::2]), gaussian(true[1::2])),
                "real_itself": frechet(gaussian(true), gaussian(true))}
    result = {kind: figure, "protocol": protocol, "hash": hash_of(protocol), **more}
    if rank == 0:
        write_text(folder / f"eval-{kind}.json", json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))
    barrier()


# -- published models ------------------------------------------------------------------------------


def ddpm(predict, x, tables, draw):
    """Ancestral sampling over the steps of `tables` (ddpm_tables), the noisiest first. The variance
    is beta or, where the network predicts a share, interpolated between the posterior's and
    beta."""
    n = len(tables["betas"])
    for i in range(n):
        x0, _, share = predict(x, i)
        c = ddpm_at(tables, torch.tensor(n - 1 - i))
        share = 1.0 if share is None else share
        logvar = share * c["log_betas"] + (1 - share) * c["posterior_log_variance_clipped"]
        x = c["posterior_mean_coef1"] * x0 + c["posterior_mean_coef2"] * x
        x = x + (0.5 * logvar).exp() * draw(i) if i < n - 1 else x
        yield x


def dpm_fast(predict, x, alpha, sigma):
    """Singlestep DPM-Solver++ of order 3, with steps of order 2 and 1 at the end, as U-ViT samples.
    A step covers as many points of the grid as its order; r: where between its ends a point
    lies."""
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


def stepped_grid(schedule, n, spacing="linspace", final=(1.0, 0.0), ends=None, offset=1,
                 with_first=False):
    """(int64 [n] timesteps out of 1000 as diffusers counts them, alpha, sigma) of a schedule of
    betas. spacing: diffusers' "linspace", "leading" (from `offset` on) or "trailing", or "karras".
    final: alpha and sigma of the last point, None: those of timestep 0. with_first: "linspace" ends
    at timestep 0, as in diffusers' DDIM."""
    tables = ddpm_tables(schedule, "", 1000, ends)
    alpha, sigma = tables["alpha"], tables["sigma"]
    if spacing == "karras":              # evenly in the 7th root of sigma / alpha
        ratio = sigma / alpha
        high, low = ratio[-1] ** (1 / 7), ratio[0] ** (1 / 7)
        ratio = torch.lerp(high, low, torch.linspace(0, 1, n, dtype=torch.float64)) ** 7
        position = np.interp(ratio.log(), (sigma / alpha).log(), np.arange(1000))
        alpha, steps = (1 + ratio.square()).rsqrt(), torch.from_numpy(position).round().long()
        sigma = alpha * ratio
    else:
        even = np.linspace(0, 999, n) if with_first else np.linspace(0, 999, n + 1)[1:]
        steps = {"linspace": torch.from_numpy(even).flip(0),
                 "leading": torch.arange(n).flip(0) * (1000 // n) + float(offset),
                 "trailing": torch.from_numpy(1000 - np.arange(n) * (1000 / n)).round() - 1}[
                     spacing].round().long()
        alpha, sigma = alpha[steps], sigma[steps]
    ends = (tables["alpha"][:1], tables["sigma"][:1]) if final is None else alpha.new_tensor(final)
    return steps, torch.cat([alpha, ends[0].view(1)]), torch.cat([sigma, ends[1].view(1)])


def level_grid(n, schedule="scaled_linear", last=1e-3, ends=None):
    """(times, alpha, sigma), each float64 [n + 1], evenly spaced from 1 to `last`. A schedule's
    1000 steps lie at 0.001, 0.002, …, and log alpha is linear between them (U-ViT's)."""
    times = np.linspace(1, last, n + 1)
    log_alphas = ddpm_tables(schedule, "", 1000, ends)["alpha"].log()
    log_alpha = torch.from_numpy(np.interp(times, np.arange(1, 1001) / 1000, log_alphas))
    return torch.from_numpy(times), log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()


def stepped_points(args, objective):
    """(the network's timesteps, alpha, sigma), float64 [steps + 1], of a schedule of 1000 steps."""
    schedule, n, is_ddim = STEPPED[objective.path], args.steps, args.sampler == "ddim"
    if args.sampler == "dpm-fast":
        return level_grid(n, schedule)
    if args.sampler == "ddpm":
        tables = ddpm_tables(schedule, str(n))
        timesteps, alpha, sigma = (tables[name].flip(0)
                                   for name in ("timestep_map", "alpha", "sigma"))
        alpha, sigma = F.pad(alpha, (0, 1), value=1.0), F.pad(sigma, (0, 1))
    else:
        timesteps, alpha, sigma = stepped_grid(schedule, n, args.spacing, with_first=is_ddim)
    return (timesteps + int(objective.path == "sd")) / 1000, alpha, sigma


def strides_back(schedule, n, timesteps, spacing):
    """(alpha, sigma) that diffusers' DDIM steps to from these timesteps: 1000 // n steps further,
    which is not always the next point of the grid."""
    if spacing == "karras":
        return None
    tables = ddpm_tables(schedule)
    steps = (1000 * timesteps).round().long() - 1000 // n - int(schedule == "scaled_linear")
    return tuple(torch.where(steps < 0, end, tables[name][steps.clamp(min=0)])
                 for name, end in (("alpha", 1.0), ("sigma", 0.0)))


def grid_ends(args):
    """The first time, and the time after the last one, of an even grid: diffusers' Euler shifts
    its last time twice, and reaches it."""
    if args.grid != ("diffusers", "euler") or args.steps == 1:
        return 1.0, 0.0
    least = float(shifted(np.float32(0.001), args.shift))
    return 1.0, least - (1 - least) / (args.steps - 1)


def wan_points(args, shift):
    """[n + 1] times of Wan's published code and pipelines, in their order of operations, which
    decides where a time is rounded down to."""
    times = shifted(torch.from_numpy(WAN_GRIDS[args.grid](args.steps).copy()), shift)
    return F.pad(times, (0, 1))


def respread(times, rules):
    """[n + 1] times with the rules of a folder's scheduler: stretched to end at `terminal`, spaced
    evenly in the 7th root ("karras") or the logarithm ("exponential"), the last one `final` (-1: as
    the last but one)."""
    times, n = times.clone(), len(times) - 1
    if rules.get("terminal") and n > 1:
        times[:-1] = 1 - (1 - times[:-1]) / ((1 - times[-2]) / (1 - rules["terminal"]))
    way = torch.linspace(0, 1, n, dtype=torch.float64)
    if rules.get("spread") == "karras":
        times[:-1] = torch.lerp(times[0] ** (1 / 7), times[-2] ** (1 / 7), way) ** 7
    elif rules.get("spread") == "exponential":
        times[:-1] = torch.lerp(times[0].log(), times[-2].log(), way).exp()
    final = rules.get("final", 0.0)
    times[-1] = times[-2] if final < 0 else final
    return times


class CodeSampler(Sampler):
    """VideoGPT, or a run of ours of its kind: a prior over an autoencoder's codes, sampled one by
    one."""

    def __init__(self, args, device, config=None):
        self.args, self.device, self.model, vae, self.bar = args, device, None, args.vae, None
        if config:
            self.model, self.read, _ = load_denoiser(args.name, device, config, args.checkpoint)
            vae = own_vae(args, config)
        elif not vae:
            refuse(f"{args.name} predicts codes: name the VQ-VAE that they are of by --vae FILE")
        self.prior = self.model.dit if self.model else load_gpt(args.name)[0].to(device)
        self.vae, _ = load_autoencoder(vae, device)
        shape, codes = self.prior.shape, self.prior.codebook
        if self.vae.n_codes != len(codes):
            refuse(f"--vae {vae} has {self.vae.n_codes} codes, {args.name} knows {len(codes)}")
        self.size = [self.vae.first + (shape[0] - 1) * self.vae.time_stride,
                     *(n * self.vae.stride for n in shape[1:])]
        weights = config and averaged_weights(model_path(args.name), args.checkpoint)[1]
        self.info = {"weights": weights or str(args.name), "autoencoder": str(vae)}
        args.frames, args.size = args.frames or self.size[0], args.size or tuple(self.size[1:])
        args.defaults |= {"frames": self.size[0], "size": self.size[1:], "fps": 8.0, "negative": ""}
        args.fps, args.negative, args.batch = args.fps or 8.0, "", args.batch or 8
        if args.frames > self.size[0] or any(a > b for a, b in zip(args.size, self.size[1:])):
            refuse(f"{args.name} makes at most {self.size[0]} frames of "
                   f"{self.size[1]}x{self.size[2]} px")

    @torch.no_grad()
    def __call__(self, requests):
        n = math.prod(self.prior.shape)
        draws = [rng(request["seed"], "codes", 0, request["prompt"]).random(n)
                 for request in requests]
        draws = torch.from_numpy(np.stack(draws)).float().to(self.device)
        label = None
        if not self.model and "w" in dict(self.prior.norm.named_children()):
            n = self.prior.norm.w.in_features
            label = torch.tensor([class_number(request["prompt"], n) for request in requests],
                                 device=self.device)

        def bar(steps):
            with self.shown([requests]) as shown:
                for step in steps:
                    yield step
                    shown.update()
        if self.model:
            texts = [self.read(request["prompt"]) for request in requests]
            videos = sample_codes(self.model, self.vae, texts, draws, self.args.temperature, bar)
        else:
            codes = generate_codes(self.prior, draws, label, self.args.temperature, bar)
            videos = map(to_frames, self.vae.decode_codes(codes))
        timelines = []
        for request, frames in zip(requests, videos):
            timelines.append(Timeline(request, None, len(frames), [], {}))
            timelines[-1].segments.append(Segment(len(frames), None, frames))
        return timelines

    def progress(self, batches):
        total = len(batches) * math.prod(self.prior.shape)
        return tqdm(desc="sample", unit="code", total=total, disable=self.args.quiet)


# What a model is asked for unless the options say otherwise; size None: that of its positions.
KINDS = {
    "own": dict(sampler="euler", steps=20, cfg=3.0, rescale=1.0, size=(32, 48), fps=10.0,
                seconds=1.3, batch=16),
    "dit": dict(sampler="ddpm", steps=250, cfg=4.0, cfg_channels=3, frames=1, batch=16),
    "sit": dict(sampler="sde", steps=250, cfg=4.0, cfg_channels=3, frames=1, batch=16),
    "uvit": dict(sampler="dpm-fast", steps=50, cfg=1.4, frames=1, batch=16),
    "wan": dict(sampler="unipc", steps=50, cfg=5.0, size=(480, 832), fps=16.0, frames=81, batch=1),
    "i2v": dict(sampler="unipc", steps=40, cfg=5.0, size=(480, 832), fps=16.0, frames=81, batch=1),
    "ti2v": dict(sampler="unipc", steps=50, cfg=5.0, size=(704, 1280), fps=24.0, frames=121,
                 batch=1),
}
WAN_NEGATIVE = (        # negative prompt of the published pipeline
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")
WAN_GRIDS = {           # by layout and sampler: the n times of n steps before the shift
    ("diffusers", "unipc"): lambda n: np.linspace(1, 1 / 1000, n + 1)[:-1],
    ("diffusers", "dpm++"): lambda n: (1 - np.linspace(1, 1 / 1000, n + 1))[:0:-1],
    ("wan", "unipc"): lambda n: np.linspace(float(np.float32(0.999)), 0, n + 1)[:-1],
    ("wan", "dpm++"): lambda n: np.linspace(1, 0, n + 1)[:-1]}
PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline")
# Schedulers of diffusers' folders: {class: {key: the class's default}}; what a class has beside
# these does not reach the times or steps of a flow. SCHEDULED: values that alone are read.
FLOW = dict(num_train_timesteps=1000, use_dynamic_shifting=False, use_karras_sigmas=False,
            use_exponential_sigmas=False, use_beta_sigmas=False)
SOLVER = dict(FLOW, solver_order=2, prediction_type="epsilon", thresholding=False, flow_shift=1.0,
              use_flow_sigmas=False, final_sigmas_type="zero", lower_order_final=True)
SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": dict(
        FLOW, shift=1.0, shift_terminal=0.0, invert_sigmas=False, stochastic_sampling=False),
    "UniPCMultistepScheduler": dict(
        SOLVER, predict_x0=True, solver_type="bh2", disable_corrector=[], solver_p="",
        shift_terminal=0.0),
    "DPMSolverMultistepScheduler": dict(
        SOLVER, algorithm_type="dpmsolver++", solver_type="midpoint", euler_at_final=False,
        use_lu_lambdas=False, beta_start=0.0001, beta_schedule="linear", trained_betas=[])}
SCHEDULED = dict(
    num_train_timesteps=[1000], use_dynamic_shifting=[False], use_beta_sigmas=[False],
    invert_sigmas=[False], stochastic_sampling=[False], thresholding=[False], predict_x0=[True],
    solver_p=[""], prediction_type=["flow_prediction"], use_flow_sigmas=[True],
    algorithm_type=["dpmsolver++"], use_lu_lambdas=[False], solver_order=[1, 2, 3],
    final_sigmas_type=["zero", "sigma_min"])
SCHEDULED_BY = {                # of one class only
    "UniPCMultistepScheduler": dict(
        lower_order_final=[True], use_karras_sigmas=[False], use_exponential_sigmas=[False],
        solver_type=["bh1", "bh2", "midpoint", "heun", "logrho"]),
    "DPMSolverMultistepScheduler": dict(
        solver_order=[1, 2], use_karras_sigmas=[False], use_exponential_sigmas=[False],
        solver_type=["midpoint", "bh1", "bh2", "logrho"])}


def read_scheduler(path, sampler, shift=None):
    """What a diffusers folder's scheduler says: {"sampler", "shift", "rules"}; {} where there is
    none. What is not read is refused by name; where another `sampler` is asked for, the shift alone
    is taken, and where a shift is too, a scheduler of any class will do."""
    pipeline = read_published(path / "model_index.json", {}).get("_class_name", PIPELINES[0])
    if pipeline not in PIPELINES:
        refuse(f"{path} is a {pipeline}, which is not read here: {', '.join(PIPELINES)} are")
    file = path / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return {}
    said = read_published(file).get("_class_name")
    if said not in SCHEDULERS and None not in (sampler, shift):
        say_once(f"{file} is of class {said}, which is not read: --sampler and --shift are taken")
        return {}
    if isinstance(said, str) and said not in SCHEDULERS:
        refuse(f"{file} is of class {said}, which is not read here, but {', '.join(SCHEDULERS)}: "
               "give both --sampler and --shift")
    name, c, _ = read_class(file, SCHEDULERS)
    own = {"FlowMatchEulerDiscreteScheduler": "euler", "UniPCMultistepScheduler": "unipc",
           "DPMSolverMultistepScheduler": "dpm++"}[name]
    shift = c["shift" if own == "euler" else "flow_shift"]
    if not 0 < shift <= 1000:
        refuse(f"{file}: a shift of {shift} is none: above 0, to 1000")
    if sampler not in (None, own):
        return {"sampler": own, "shift": shift}
    for key, legal in {**SCHEDULED, **SCHEDULED_BY.get(name, {})}.items():
        if key in c and c[key] not in legal:
            refuse(f"{file}: {key} {json.dumps(c[key])[:40]} is not read here, only "
                   f"{' or '.join(map(json.dumps, legal))}: name another way by --sampler")
    solver, final = {}, 0.0
    if own == "unipc":
        solver = dict(order=c["solver_order"], uncorrected=c["disable_corrector"],
                      kind="bh1" if c["solver_type"] == "bh1" else "bh2")
    elif own == "dpm++":
        solver = dict(order=c["solver_order"], lower=c["lower_order_final"],
                      euler=c["euler_at_final"])
    if c.get("final_sigmas_type") == "sigma_min":        # DPM's is that of DDPM's first step
        if own == "dpm++" and (not 0 < c["beta_start"] < 1 or c["trained_betas"]
                               or "linear" not in c["beta_schedule"]):
            refuse(f"{file}: final_sigmas_type sigma_min of other betas than linear or "
                   "scaled_linear is not read here: name another way by --sampler")
        final = -1.0 if own == "unipc" else (c["beta_start"] / (1 - c["beta_start"])) ** 0.5
    dilated = {"karras": c["use_karras_sigmas"], "exponential": c["use_exponential_sigmas"]}
    return {"sampler": own, "shift": shift, "rules": dict(
        solver=solver, final=final, terminal=c.get("shift_terminal"),
        spread=next((way for way, is_on in dilated.items() if is_on), ""))}


def config_of(name):
    """config.json of the run of this name; None: it is published weights."""
    path = model_path(name)
    return read_config(path, "denoiser") if is_run(path) else None


def check_weights(path, what):
    """Refuses a file that does not begin as weights do: .pt and its like are ZIPs or pickles, of a
    .safetensors a dict follows 8 bytes."""
    if Path(path).is_file():
        refuse_others(Path(path))
        with open(path, "rb") as file:
            head = file.read(9)
        if head[:2] != b"PK" and head[:1] != b"\x80" and head[8:] != b"{":
            refuse(f"{what} {path} is no file of weights, nor a run's or a published folder")


def memory(device):
    """Bytes of memory: of the GPU what is free, else of this machine, or of this container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(
        os, "sysconf") else []
    with contextlib.suppress(OSError, ValueError):
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits, default=math.inf)


def decoder_bytes(vae, z_dim, device):
    """What the decoder's largest layer reads and writes, bytes a latent's cell, measured on few."""
    most, cells = [0], (4, 8, 8)

    def see(module, inputs, output):
        tensors = [x for x in (*inputs, output) if torch.is_tensor(x)]
        most.append(sum(x.numel() * x.element_size() for x in tensors))
    hooks = [part.register_forward_hook(see) for part in vae.modules() if not list(part.children())]
    with torch.no_grad():
        vae.decode(torch.zeros(1, z_dim, *cells, device=device), {})
    for hook in hooks:
        hook.remove()
    return max(most) / math.prod(cells)


def check_memory(sampler, batches):
    """Prints tokens and GiB of large batches; refuses those that cannot fit. A token of
    the denoiser takes some 36 floats of its width, a cell 16 times its decoder's largest layer:
    measured on the demo from 256x256 to 512x512 px, where that is up to a third too much."""
    if not hasattr(sampler, "width") or not batches:         # of codes the sizes are the model's
        return
    args, n_tok, n_cells = sampler.args, 0, 0
    for batch in batches:
        shapes = [sampler.latent_shape(request["frames"], request["height"], request["width"])[1:]
                  for request in batch]
        parts = [1 + (len(todo_of(request)) > 1 or "video" in request) for request in batch]
        n_tok = max(n_tok, sum(n * math.prod(shape) for n, shape in zip(parts, shapes))
                    // math.prod(sampler.patch) * (1 + (args.cfg != 1)))
        n_cells = max([n_cells, *(min(T, args.chunk) * H * W for T, H, W in shapes)])
    size = 36 * 4 * sampler.width * n_tok
    if n_cells > 2**13:
        size = max(size, 16 * n_cells * decoder_bytes(sampler.part("vae")[0], sampler.z_dim,
                                                      sampler.device))
    there, says = memory(sampler.device), f"{n_tok:,} tokens a row, about {size / 2**30:.3g} GiB"
    if size > there:
        refuse(f"{says} beside the weights, of {there / 2**30:.3g} GiB here: give less --size, "
               "--seconds, --fps, --batch or --chunk")
    if n_tok > 100_000 or size > there / 4:
        print(f"{args.name}: {says}, of {there / 2**30:.3g} GiB here", file=sys.stderr)


def open_sampler(args, device):
    check_weights(args.name, "model")
    check_weights(args.vae or "", "--vae")
    config = config_of(args.name)
    is_codes = config["model"].get("kind") == "gpt" if config else args.name.endswith(".ckpt")
    return (CodeSampler if is_codes else Sampler)(args, device, config)


def own_vae(args, config):
    """The name of a run's autoencoder: --vae, or beside the run, or among the runs."""
    beside = model_path(args.name).parent / config["vae"]["run"]
    return args.vae or (str(beside) if beside.is_dir() else config["vae"]["run"])


def open_run(args, config, device):
    """({"text", "denoiser", "vae": what opens it}, facts) of a run of ours."""
    folder, wanted, name = model_path(args.name), config["vae"], own_vae(args, config)

    def open_vae():
        vae, result = load_autoencoder(name, device)
        if result["hash"] != wanted["hash"]:
            refuse(f"run {folder} was trained on latents of autoencoder {wanted['hash']}, {name} "
                   f"is {result['hash']}: name the right one by --vae")
        return vae, result
    return {"denoiser": lambda: load_denoiser(folder, device, config, args.checkpoint)[0],
            "vae": open_vae, "text": lambda: open_reader(folder, config, device)}, {
        "kind": "own", "weights": averaged_weights(folder, args.checkpoint)[1],
        "autoencoder": wanted["hash"],
        "conditions": config["args"].get("conditions", ()), "shift": config["args"]["shift"],
        "labels": config.get("labels"), "takes": bool(config["args"].get("given")),
        "data": config.get("data")}


def class_number(prompt, n):
    """The class that a prompt names by its number, of n; n where it is empty: no class."""
    if prompt and not (prompt.isdecimal() and int(prompt) < n):
        refuse(f"'{prompt}' is no class: " + (f"give a number from 0 to {n - 1}" if n else
                                              "this model has none, leave the prompt empty"))
    return int(prompt) if prompt else n


def text_width(path):
    """The width of a text encoder's embeddings by its config.json, or None."""
    if (path / WAN_T5).is_file():
        return read_tensors(path / WAN_T5).get("token_embedding.weight", torch.empty(0)).shape[-1]
    folder = path / "text_encoder" if (path / "text_encoder").is_dir() else path
    config = read_published(folder / "config.json", {})
    config = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    return None if "_class_name" in config else config.get("d_model", config.get("hidden_size"))


def open_foreign(args, device):
    """`open_run` of published weights."""
    path = Path(args.name)
    if (lora := path / "pytorch_lora_weights.safetensors").is_file():
        say_once(f"{lora} is not used: merge it into the transformer first")
    scheduled = read_scheduler(path, args.sampler, args.shift) if path.is_dir() else {}
    first = [load_published(path, args.heads)]               # it tells what all else depends on
    _, layout, options = first[0]
    said = getattr(first[0][0], "trained", {})
    kind = said.get("kind", "uvit" if layout == "uvit" else "wan")
    is_fixed = options.get("channels") == options.get("out_channels")     # no learned variance
    how = {"dit": Objective("noise" if is_fixed else "ddpm", "ddpm"),
           "sit": Objective(said.get("objective", "velocity"), said.get("path", "linear")),
           "uvit": Objective("noise", "sd")}
    if kind == "uvit" and options["channels"] == 3:
        refuse(f"{path} is a U-ViT of pixels, which is not sampled here: those of latents are")
    inside = path / "vae" if (path / "vae").is_dir() else next(iter(sorted(path.glob(
        "Wan2.*_VAE.pth"))), None)
    vae = args.vae or inside or refuse(f"{path} has no autoencoder of its own: name it by --vae")

    def open_denoiser():
        network = (first.pop() if first else load_published(path, args.heads))[0]
        with torch.device("meta"):
            model = Denoiser(kind=kind, **options)
        model.dit, model.objective = network.requires_grad_(False), how.get(kind, Objective())
        return model.eval().to(device)

    def open_vae():
        model, config = load_autoencoder(vae, device)
        z = options["out_channels" if kind == "wan" else "channels"]
        if model.z_dim != z:
            refuse(f"{vae} has latents of {model.z_dim} channels, {path} makes {z}: give the "
                   "autoencoder that it was published with by --vae")
        return model, config

    reads_text = kind == "wan" or bool(options.get("clip"))
    reader = args.text_encoder or (path if kind == "wan" or not reads_text else refuse(
        f"{path} reads CLIP's tokens: name its folder by --text_encoder"))

    def check_width(wide):
        wants = options.get("text_dim") or options["clip"][0]
        if wide not in (None, wants):
            refuse(f"{reader} makes embeddings {wide} wide, {path} reads {wants}: give the text "
                   "encoder that it was published with by --text_encoder")

    def open_text():
        if reads_text:
            encoder = open_text_encoder(reader, device, is_wan=kind == "wan")
            check_width(encoder.embed.embedding_dim)
            return lambda prompt: encoder.encode([prompt])[0]
        return lambda prompt: class_number(prompt, max(0, options["classes"] - 1))
    if reads_text:                       # before anything large is read
        check_width(text_width(Path(reader)))
    info = {"kind": kind, "weights": str(path), "autoencoder": str(vae), "layout": layout,
             "reads_text": reads_text}
    openers = {"denoiser": open_denoiser, "text": open_text,
               "vae": open_vae,
               "image": lambda: open_image_encoder(path, device)}
    if kind != "wan":
        info["cells"] = options["size"][1] if kind == "uvit" else (
            options["grid"][0] * options["patch"][1])
        return openers, info
    info |= wan_facts(args, path, options)
    if not scheduled:
        scheduled = {"shift": usual_shift(args, path, info["kind"], layout)}
    return openers, info | scheduled


def wan_facts(args, path, options):
    """What sample.py knows of a Wan's kind, its image and its usual shift; refuses other kinds."""
    if options["image_tokens"]:
        refuse(f"{path} takes a first and a last frame (FLF2V), which is not known here: take an "
               "I2V or a TI2V")
    info = {"negative": "镜头晃动，" * bool(options["image_dim"]) + WAN_NEGATIVE, "kind": "wan"}
    n, n_out = options["channels"], options["out_channels"]
    if n not in (n_out, 2 * n_out + 4):
        refuse(f"{path} sees {n} channels of {n_out} (Fun-Control, VACE or another kin of Wan's), "
               f"which is not read here: T2V has {n_out}, I2V {2 * n_out + 4}")
    if n > n_out:
        info |= {"adapt": give_image, "kind": "i2v", "reads_image": bool(options["image_dim"])}
        if options["image_dim"]:
            where, config, _ = tower_config(path)
            if config["hidden_size"] != options["image_dim"]:
                refuse(f"{where} makes tokens {config['hidden_size']} wide, {path} reads "
                       f"{options['image_dim']}: they were not published together")
    elif options["channels"] == 48 or is_expanded(path):
        info |= {"adapt": give_image, "kind": "ti2v"}
    return info


def usual_shift(args, path, kind, layout):
    """The shift of a Wan folder that has no scheduler, as it was published: 5; 3 up to 480 px of
    an I2V, and in diffusers' layout of a T2V. Says so: nothing in the folder does."""
    is_small = min(args.size or KINDS[kind]["size"]) <= 480
    shift = 3.0 if is_small and (kind == "i2v" or (kind, layout) == ("wan", "diffusers")) else 5.0
    if args.shift is None:
        why = "has no scheduler/: shift {} is assumed, as published (480 px: 3, 720 px and TI2V: 5)"
        if layout == "wan":
            why = ("names no shift: {} is assumed, as in Wan's own code (I2V of 480 px: 3, else 5; "
                   "its README for a 1.3B: 8 to 12)")
        say_once(f"{path} {why.format(f'{shift:g}')}; --shift takes another")
    return shift


def is_expanded(path):
    """Whether a diffusers folder says that a given first frame has a time of its own (TI2V)."""
    return bool(read_published(path / "model_index.json", {}).get("expand_timesteps"))


def as_frame(picture, height, width, cell, layout):
    """uint8 [h, w, 3] as a first frame [3, 1, height, width], -1 to 1: by Lanczos, or in Wan's own
    layout by bicubic without a filter, as the codes of both do. They distort a picture of another
    shape: here it is scaled to cover and cut about the centre if that costs a `cell`, px, or
    more."""
    sides = picture.shape[:2]
    scale = max(height / sides[0], width / sides[1])
    size = [max(want, round(side * scale)) for side, want in zip(sides, (height, width))]
    if max(size[0] - height, size[1] - width) < cell:
        size = [height, width]
    if layout == "wan":
        x = F.interpolate(to_tensor(picture[None])[None, :, 0], tuple(size), mode="bicubic")
        x = center_crop(x[0].movedim(0, -1)[None], {"height": height, "width": width})
        return x.movedim(-1, 0)
    picture = np.array(picture if tuple(size) == sides else Image.fromarray(picture).resize(
        size[::-1], Image.Resampling.LANCZOS))
    return to_tensor(center_crop(picture[None], {"height": height, "width": width}))


def give_image(sampler, job, picture):
    """A Job as Wan's published models take an image [1, h, w, 3]: TI2V as its first latent, clean;
    I2V as channels beside the noise, with a mask, the frames after it grey, and 2.1's as tokens
    too: these are of the picture itself, before it is scaled to the video."""
    if sampler.info["kind"] == "ti2v":
        return job._replace(cond_latents=[])
    if picture is None:
        refuse(f"{sampler.args.name} makes videos of images: give --image")
    _, T, H, W = job.shape
    video = torch.zeros(3, 1 + (T - 1) * sampler.time_stride, H * sampler.stride,
                        W * sampler.stride)
    video[:, :1] = as_frame(picture[0], *video.shape[2:], sampler.stride * sampler.patch[1],
                            sampler.info["layout"])
    with torch.no_grad():
        z = encode_long(sampler.part("vae")[0], video[None].to(sampler.device))[0][0].cpu()
    mask = torch.zeros(4, T, H, W)
    mask[:, 0] = 1
    extra = torch.cat([mask, (z - sampler.mean) / sampler.std])
    image = sampler.part("image")(picture[0]) if sampler.info["reads_image"] else None
    return job._replace(cond_latents=[], first_latent=None, extra=extra, image=image)


def adapt_to_wan(packed, of_jobs, move):
    """A Guided row as Wan's published models read it: known frames as clean tokens, each text's
    padding as one row that counts as often, an image as channels and as tokens."""
    jobs, row = packed.jobs, packed.row
    if packed.cond_mask.any():
        is_known = packed.cond_mask[:, 0].repeat(packed.n)
        row.table_index[row.targets[is_known]] = packed.n_rows
        packed.n_rows += 1
    texts = move(of_jobs("text") + of_jobs("negative"))[:packed.n * len(jobs)]
    row.text, row.cu_text, row.counts = count_texts(texts)
    if jobs[0].extra is not None:
        packed.extra = patchify(move(of_jobs("extra")), packed.model.dit.patch)
        packed.tokens = torch.cat([packed.tokens, packed.extra], 1)
    if jobs[0].image is not None:
        images = move(of_jobs("image")) * packed.n
        row.image, n = torch.cat(images), len(images[0])
        row.cu_image = n * torch.arange(len(images) + 1, dtype=torch.int32, device=row.image.device)


WAN_CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
WAN_TOWER = (           # names in that file, before those that caption.py knows
    (r"^visual\.", "tower."), (r"^tower\.transformer\.", "tower.layers."),
    (r"^tower\.cls_embedding", "tower.cls"), (r"^tower\.pos_embedding", "tower.position"),
    (r"^tower\.patch_embedding\.", "tower.patch."), (r"^tower\.pre_norm\.", "tower.pre."),
    (r"\.attn\.to_qkv\.", ".qkv."), (r"\.mlp\.0\.", ".up."), (r"\.mlp\.2\.", ".down."))


def tower_config(path):
    """(file or folder, config, weights or None) of the CLIP of an I2V folder of either layout: its
    vision tower's, also where it is a whole CLIP's."""
    where = path / WAN_CLIP
    if not where.is_file():
        where = path / "image_encoder"
        if not (where / "config.json").is_file():
            refuse(f"{path} has no image encoder, which this I2V reads: put image_encoder/ of "
                   "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers (every 2.1 I2V has the same), or the file "
                   f"{WAN_CLIP}, into it")
        names = {None: "CLIPVisionModel", "clip": "CLIPVisionModel",
                 "clip_vision_model": "CLIPVisionModel"}
        guess = lambda c: names.get(c.get("model_type"), str(c.get("model_type")))
        return where, read_class(where / "config.json", {"CLIPVisionModel": CLIP}, guess,
                                 "vision_config")[1], None
    weights = read_tensors(where)        # it has a text tower too, and no config
    with read_as_config(where):
        weights = {name: x for name, x in weights.items() if name.startswith("visual.")}
        width, _, patch, _ = weights["visual.patch_embedding.weight"].shape
        depth = len({name.split(".")[2] for name in weights if ".transformer." in name})
        config = dict(hidden_size=width, patch_size=patch, num_hidden_layers=depth,
                      image_size=patch * math.isqrt(weights["visual.pos_embedding"].shape[1]),
                      intermediate_size=len(weights["visual.transformer.0.mlp.0.bias"]),
                      num_attention_heads=max(1, width // 80), hidden_act="gelu")
    return where, config, {name: x for name, x in weights.items()
                           if not name.startswith(f"visual.transformer.{depth - 1}.")}


def open_image_encoder(path, device):
    """uint8 [H, W, 3] -> [1 + patches, width]: what Wan 2.1's I2V reads of its image, the hidden
    states before the last layer of CLIP's vision tower, in a folder of either layout. Wan's own
    scales the whole picture to a square, diffusers' cuts the middle square out."""
    where, config, weights = tower_config(path)
    is_wan, size, mean_std = weights is not None, config["image_size"], CLIP_MEAN
    weights = weights or published_tensors(where, TOWER_MARK)
    beside = path / "image_processor"
    with read_as_config(beside if beside.is_dir() else where, "preprocessor_config.json"):
        if not is_wan:
            _, mean_std = image_processor(beside if beside.is_dir() else where, size)
    with read_as_config(where):
        with torch.device("meta"):
            model = nn.Module()
            model.tower = clip_tower(config, -2, keep_cls=True)()
        weights = to_ours(weights, model, WAN_TOWER if is_wan else (CLIP_TOWER,))
    load_strictly(model, weights, [(".*", r"\g<0>")], r"(text_model|text_projection|"
                  r"logit_scale|visual_projection|tower\.(post|post_norm|head|layers\.\d+))\..*",
                  torch.float32, device, where)

    @torch.no_grad()
    def read(picture):
        x = F.interpolate(normal(picture, CLIP_MEAN)[None], (size, size), mode="bicubic") if (
            is_wan) else crop(picture, size, mean_std)[0][0][None]
        return model.tower(x.to(device))[0].cpu()
    return read


if __name__ == "__main__":
    script(main)
