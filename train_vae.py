"""Stage 2: clips -> a causal video autoencoder, and every clip's latents.

In:   data/NAME/ as prepare_data.py left it.
Out:  runs/NAME-vae/  config.json (options; the latents' mean and std a channel, once it ends),
                      log.jsonl, samples/ (originals beside reconstructions), step-000100/,
                      held_out.txt (keys of the held-out clips, which a run keeps)
      data/NAME/shard-00000.latents-HASH8.safetensors   (--encode): float16 [2 C, T', H', W'] a
                      clip, mean and log-variance, and of parts of it (see `separate_parts`); with
                      a codebook int32 codes [T', H', W']; HASH8 identifies the autoencoder
      runs/NAME-vae/eval.json, eval.png                 (--eval): figures with their protocol

The idea: causal 3D convolutions. Every layer sees only the present and the past, so the first frame
becomes one latent, each further latent covers four frames, and an image is a clip of one
frame. A long clip can be encoded or decoded in chunks that carry two frames of state a layer, with
the same result as in one piece; hence no norm takes statistics over time or space.

    python train_vae.py demo                     # a minute on two cores
    python train_vae.py demo --encode            # seconds
    python train_vae.py demo --eval              # seconds
    python train_vae.py demo --run quick --steps 10                      # under a minute
    torchrun --nproc_per_node 8 -- train_vae.py mine --model vae-b --size 256   # one node
    python train_vae.py mine --run vq --bottleneck vq --codes 1024     # or fsq --codes 8 5 5 5
    python train_vae.py mine --run big --init mine-vae --decoder_only --size 256 # then the decoder

Models (--model; --init and --vae also take a published folder or file; a latent's T x H x W):
    vae-xxs, -xs, -xs-48, -s, -b    ours, in Wan 2.2's shape, 0.8M to 132M, 4 x 8 x 8
    wan-2.1, wan-2.2                127M, 4 x 8 x 8; 705M, 4 x 16 x 16; diffusers' layout or Wan's
    sd-vae                          AutoencoderKL (Stable Diffusion, SD3, FLUX), 84M, 1 x 8 x 8
    (a file)                        VideoGPT's VQ-VAE, a Lightning checkpoint

Axes: B clips, T frames, H W pixels, C channels; T' H' W' on the latent grid.
Papers: Kingma & Welling 2013 (VAE, 1312.6114); Rombach et al. 2021 (latent diffusion, 2112.10752);
Yu et al. 2023 (MAGVIT-v2's causal convolutions, 2310.05737); Wan 2025 (this shape, 2503.20314).
"""
import prepare_data  # noqa: F401  first: it handles Ctrl-C and missing packages
import atexit
import contextlib
import datetime
import hashlib
import itertools
import json
import math
import os
import platform
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, wraps
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from kernels.conv import Conv3d, causal_conv3d, regroup
from kernels.linear import Linear
from kernels.memory import fetched, keep_memory, moved
from kernels.optim import MuonAdamW
from prepare_data import (Parser, Unreadable, atomic, contact_sheet, dataset_dir, drawn_split,
                          is_sole, lines_of, number, one_line, open_dataset, read_clip, read_text,
                          refuse, refuse_pointer, rng, run_dir, script, sweep, where, writable,
                          write_rows, write_text)


# -- the autoencoder -------------------------------------------------------------------------------

# dim: channels of the first level; dec_dim: the decoder's, if different; mults: multiples of dim, a
# level each; downs: a level ends with half the size ("s"), half the frames ("t"), or both; n_res:
# residual blocks a level; patch: side of the pixel blocks that become channels of the input.
WAN = dict(mults=(1, 2, 4, 4), downs=("s", "st", "st"), n_res=2)
MODELS = {
    "vae-xs": dict(dim=32, mults=(1, 2, 2), downs=("t", "st"), n_res=1, patch=4, z_dim=24,
                   linear=True),
    "vae-xs-48": dict(dim=32, mults=(1, 2, 2), downs=("t", "st"), n_res=1, patch=4, z_dim=48,
                      linear=True),              # for real footage, which has more detail
    "vae-xxs": dict(dim=16, mults=(1, 2, 2), downs=("t", "st"), n_res=1, patch=4, z_dim=24,
                    linear=True),                # tests/demo-vae
    "vae-s": dict(dim=48, mults=(1, 2, 4), downs=("st", "st"), n_res=1, patch=2, z_dim=16),
    "vae-b": dict(dim=96, z_dim=16, **WAN),
    "wan-2.1": dict(dim=96, z_dim=16, residual=False, **WAN),
    "wan-2.2": dict(dim=160, dec_dim=256, z_dim=48, patch=2, **WAN),
    "sd-vae": dict(dim=128, mults=(1, 2, 4, 4), downs=("s", "s", "s"), n_res=2, z_dim=4,
                   residual=False, groups=32),
}
DECODER = ("decoder", "decoder_norm", "to_pixels", "unquant", "post_vq_conv")


class Norm(nn.Module):
    """RMS norm over the channels of each position; with `groups`, group norm over each frame."""

    def __init__(self, dim, groups=0):
        super().__init__()
        self.groups, self.gamma = groups, nn.Parameter(torch.ones(dim))
        self.beta = nn.Parameter(torch.zeros(dim)) if groups else None

    def forward(self, x):
        if self.groups:
            B, T = x.shape[0], x.shape[2]
            frames = x.transpose(1, 2).flatten(0, 1)
            frames = F.group_norm(frames, self.groups, self.gamma, self.beta, 1e-6)
            return frames.unflatten(0, (B, T)).transpose(1, 2)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = x.shape[1]**0.5 / wide.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return x * scale.to(x.dtype) * self.gamma.view(-1, 1, 1, 1)


class CausalConv3d(Conv3d):
    """A causal convolution over [B, C, T, H, W], after `norm` and SiLU where a norm is given.
    `state` maps each layer to its last input frames, which are zeros before the first chunk."""

    def __init__(self, c_in, c_out, kernel):
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(c_in, c_out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x, state, norm=None):
        is_fused = norm is not None and not norm.groups          # norm and SiLU in the kernel
        x = x if norm is None or is_fused else F.silu(norm(x))
        y, past = causal_conv3d(x, self.weight, self.bias, state.get(self),
                                norm.gamma if is_fused else None)
        if past is not None:
            state[self] = past
        return y


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, kernel, groups):
        super().__init__()
        self.norm1, self.conv1 = Norm(c_in, groups), CausalConv3d(c_in, c_out, kernel)
        self.norm2, self.conv2 = Norm(c_out, groups), CausalConv3d(c_out, c_out, kernel)
        self.shortcut = CausalConv3d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x, state):
        h = self.conv1(x, state, self.norm1)
        h = self.conv2(h, state, self.norm2)
        return h.add_(x if self.shortcut is None else self.shortcut(x, state))


class FrameAttention(nn.Module):
    """Self-attention with one head over the positions of each frame, with a residual."""

    def __init__(self, dim, groups):
        super().__init__()
        self.norm, self.qkv, self.out = Norm(dim, groups), Linear(dim, 3 * dim), Linear(dim, dim)
        nn.init.zeros_(self.out.weight)

    def forward(self, x, state):
        B, C, T, H, W = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 4, 1).reshape(B * T, H * W, C)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        y = self.out(F.scaled_dot_product_attention(q, k, v))
        return x + y.view(B, T, H, W, C).permute(0, 4, 1, 2, 3)


def to_blocks(x, time, space):
    """[B, C, T, H, W] to blocks, [B, T / time, H / space, W / space, C * time * space**2]."""
    B, C, T, H, W = x.shape
    x = x.reshape(B, C, T // time, time, H // space, space, W // space, space)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def from_blocks(x, C, time, space):
    """The inverse of `to_blocks`, to [B, C, T, H, W]."""
    B, T, H, W, _ = x.shape
    x = x.reshape(B, T, H, W, C, time, space, space).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(B, C, T * time, H * space, W * space)


def resized(x, n):
    """The last axis brought to n channels: groups are averaged, or each channel is repeated."""
    times = n // x.shape[-1]
    return x.repeat_interleave(times, -1) if times else x.unflatten(-1, (n, -1)).mean(-1)


def fold(x, c_out, time, space):
    """Downsampling shortcut: [B, C, T, H, W] to [B, c_out, T / time, H / space, W / space]. Blocks
    of pixels become channels, which are averaged, or repeated where c_out asks for more."""
    return resized(to_blocks(x, time, space), c_out).permute(0, 4, 1, 2, 3)


def unfold(x, c_out, time, space):
    """Upsampling shortcut: channels are repeated, or averaged, and become blocks of pixels."""
    x = resized(x.permute(0, 2, 3, 4, 1), c_out * time * space**2)
    return from_blocks(x, c_out, time, space)


class Down(nn.Module):
    """Downsampling: half the size where `space`; where `time`, the first frame unchanged, then one
    frame for every two. Chunks may have any number of frames: the state keeps a remainder."""

    def __init__(self, dim, space, time):
        super().__init__()
        self.conv = Conv3d(dim, dim, (1, 3, 3), stride=(1, 2, 2)) if space else None
        self.time_conv = Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x, state):
        if self.conv is not None:
            x = self.conv(F.pad(x, (0, 1, 0, 1)))
        if self.time_conv is None:
            return x
        first = x[:, :, :int(self not in state)]
        x = x if self not in state else torch.cat([state[self], x], 2)
        n = (x.shape[2] - 1) // 2
        state[self] = x[:, :, 2 * n:].clone()
        return torch.cat([first, self.time_conv(x[:, :, :2 * n + 1])], 2) if n else first


class Up(nn.Module):
    """Upsampling: twice the size where `space`; where `time`, two frames for each but the first,
    which stays unchanged and does not enter the others (as in Wan)."""

    def __init__(self, dim, c_out, space, time):
        super().__init__()
        self.space = space
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if time else None
        self.conv = Conv3d(dim, c_out, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x, state):
        if self.time_conv is not None:
            n = int(self not in state)
            start, rest = x[:, :, :n], x[:, :, n:]
            if rest.shape[2]:
                B, C, T, H, W = rest.shape
                rest = self.time_conv(rest, state).view(B, 2, C, T, H, W)
                rest = rest.permute(0, 2, 3, 1, 4, 5).reshape(B, C, 2 * T, H, W)
            x = torch.cat([start, rest], 2)
        state[self] = True
        if self.space:
            x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
        return self.conv(x)


class Level(nn.Module):
    """The layers of one resolution; the last may change it. shortcut: (time, space) by which the
    input is folded (with `grows`: unfolded) and added to the output. growth: elements out for each
    element in, for `regroup`."""

    def __init__(self, layers, c_out, shortcut=None, grows=False, growth=1):
        super().__init__()
        self.layers, self.c_out = nn.ModuleList(layers), c_out
        self.shortcut, self.grows, self.growth = shortcut, grows, growth

    def forward(self, x, state):
        y = x
        for layer in self.layers:
            y = layer(y, state)
        if self.shortcut is None:
            return y
        time, space = self.shortcut
        if self.grows:
            x = unfold(x, self.c_out, time, space)
            x = x[:, :, time - 1:] if self not in state else x
            state[self] = True
            return y + x
        if time > 1:                                 # a zero frame before the first
            x = torch.cat([state.get(self, torch.zeros_like(x[:, :, :1])), x], 2)
            n = x.shape[2] // time * time
            x, state[self] = x[:, :, :n], x[:, :, n:].clone()
        return y + fold(x, self.c_out, time, space) if y.shape[2] else y


def stream(levels, last, norm, x, state):
    """Runs `levels`, then `norm` and the convolution `last`, over x [B, C, T, H, W] in chunks of a
    size that suits each level (see `regroup`). Returns the chunks of the output."""
    pieces, ending, is_first = [x], lambda piece, state: last(piece, state, norm), not state
    for run, growth in (*((level, level.growth) for level in levels), (ending, 1)):
        pieces = map(lambda piece, run=run: run(piece, state), regroup(pieces, growth, is_first))
    return [piece for piece in pieces if piece.shape[2]]


class Codebook(nn.Module):
    """Vector quantisation (van den Oord et al. 2017, 1711.00937): each latent vector becomes the
    nearest of K vectors [K, C], which are moving averages of the latents assigned to them."""

    def __init__(self, n_codes, dim):
        super().__init__()
        self.n_codes = n_codes
        self.register_buffer("codebook", torch.randn(n_codes, dim))
        self.register_buffer("counts", torch.zeros(n_codes))
        self.register_buffer("sums", torch.zeros(n_codes, dim))

    def codes(self, z):
        """[B, C, T, H, W] to int64 [B, T, H, W]"""
        flat = z.movedim(1, -1)
        away = self.codebook.square().sum(1) - 2 * flat @ self.codebook.T
        return away.argmin(-1)

    def lookup(self, codes):
        return self.codebook[codes].movedim(-1, 1)

    def forward(self, z):
        """(the chosen vectors, with the gradient of z; codes; commitment loss [B])"""
        codes = self.codes(z.detach())
        chosen = self.lookup(codes)
        loss = 0.25 * (z - chosen).square().mean((1, 2, 3, 4))
        return z + (chosen - z).detach(), codes, loss

    @torch.no_grad()
    def update(self, z, codes, decay=0.99):
        """Updates the moving averages with a step's latents z [N, C] and codes [N] of all ranks."""
        hits = F.one_hot(codes, self.n_codes).to(z.dtype)
        both = torch.cat([hits.sum(0)[:, None], hits.T @ z], 1)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(both)
        self.counts.lerp_(both[:, 0], 1 - decay)
        self.sums.lerp_(both[:, 1:], 1 - decay)
        total = self.counts.sum()
        share = (self.counts + 1e-7) / (total + self.n_codes * 1e-7) * total
        self.codebook.copy_(self.sums / share[:, None])

    @torch.no_grad()
    def restart(self, candidates):
        """Replaces dead codes by `candidates` [M, C], the same on all ranks."""
        dead = (self.counts < min(1.0, 0.1 * self.counts.mean().item())).nonzero()[:, 0]
        n = torch.arange(len(dead), device=dead.device)
        vectors = candidates[n % len(candidates)]
        vectors = vectors * (1 + 1e-3 * (n // len(candidates)))[:, None]      # copies then diverge
        self.codebook[dead], self.sums[dead], self.counts[dead] = vectors, vectors, 1.0


def perplexity(codes, n_codes):
    """exp(entropy) of int64 codes: the number of equally likely codes with that entropy."""
    share = torch.bincount(codes.flatten(), minlength=n_codes).double() / codes.numel()
    return (-(share * share.clamp_min(1e-10).log()).sum()).exp().float()


class FSQ(nn.Module):
    """Finite scalar quantisation (Mentzer et al. 2023, 2309.15505): channel i is bounded and
    rounded to one of levels[i] values, a codebook without parameters."""

    def __init__(self, levels):
        super().__init__()
        self.n_codes = math.prod(levels)
        levels = torch.tensor(levels)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("basis", torch.cumprod(torch.tensor([1, *levels[:-1]]), 0),
                             persistent=False)

    @property
    def codebook(self):
        return self.lookup(torch.arange(self.n_codes, device=self.levels.device))

    def rounded(self, z):
        """Integers about 0, as floats with z's gradient, [..., C] last."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = 0.5 * (self.levels % 2 == 0)
        bounded = torch.tanh(z + torch.atanh(offset / half)) * half - offset
        return bounded + (bounded.round() - bounded).detach()

    def codes(self, z):
        digits = self.rounded(z.movedim(1, -1)).round().long() + self.levels // 2
        return (digits * self.basis).sum(-1)

    def lookup(self, codes):
        digits = codes[..., None] // self.basis % self.levels
        half = self.levels // 2
        return ((digits - half) / half).movedim(-1, 1)

    def forward(self, z):
        chosen = self.rounded(z.movedim(1, -1)) / (self.levels // 2)
        return chosen.movedim(-1, 1), self.codes(z.detach()), z.new_zeros(len(z))


class PatchCode(nn.Module):
    """A linear autoencoder of patches: the first frame's patches of 1 x s x s pixels and the later
    ones' of t x s x s pixels to C channels and back. `fit` finds the best one in closed form (PCA),
    and the network learns a correction to it: several dB within minutes of training."""

    def __init__(self, z_dim, stride, time_stride):
        super().__init__()
        self.z_dim, self.stride, self.times = z_dim, stride, (1, time_stride)
        sizes = [3 * t * stride**2 for t in self.times]
        self.to_code = nn.ModuleList(nn.Linear(size, z_dim) for size in sizes)
        self.to_patch = nn.ModuleList(nn.Linear(z_dim, size) for size in sizes)

    def parts(self, x, state, times):
        """[(index of the code, frames)]: the first frame if the clip begins here, then complete
        groups of frames; the state keeps an incomplete group."""
        n = 0 if self in state else 1
        first, x = x[:, :, :n], x[:, :, n:]
        x = x if n or state[self] is None else torch.cat([state[self], x], 2)
        n_frames = x.shape[2] // times[1] * times[1]
        state[self] = x[:, :, n_frames:].clone() if x.shape[2] > n_frames else None
        return [(i, part) for i, part in ((0, first), (1, x[:, :, :n_frames])) if part.shape[2]]

    def encode(self, video, state):
        B, _, _, H, W = video.shape
        codes = [video.new_zeros(B, 0, H // self.stride, W // self.stride, self.z_dim)]
        codes += [self.to_code[i](to_blocks(part, self.times[i], self.stride))
                  for i, part in self.parts(video, state, self.times)]
        return torch.cat(codes, 1).permute(0, 4, 1, 2, 3)

    def decode(self, z, state):
        return torch.cat([from_blocks(self.to_patch[i](part.permute(0, 2, 3, 4, 1)), 3,
                                      self.times[i], self.stride)
                          for i, part in self.parts(z, state, (1, 1))], 2)

    @torch.no_grad()
    def fit(self, videos):
        """Fits the principal components of the patches of `videos`, a list of [3, T, H, W], rotated
        so that all channels have like variance, but not whitened: distances between codes are
        distances between pixels, and coarse structure stays large, which a denoiser settles first.
        The first frame's components are rotated to match the others' mean over time."""
        z_dim, bases = self.to_code[0].out_features, []
        for t, later in zip(self.times, (False, True)):
            parts = [video[None, :, later:] if later else video[None, :, :1] for video in videos]
            parts = [part for part in parts if part.shape[2]] or [       # stills: no motion
                video[None, :, :1].repeat_interleave(t, 2) for video in videos]
            x = torch.cat([to_blocks(part, t, self.stride).flatten(0, 3)
                           for part in parts]).double()
            mean = x.mean(0)
            variances, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
            bases.append((mean, vectors[:, -z_dim:], variances[-z_dim:].mean() / t))
        over_time = bases[1][1].view(3, self.times[1], -1, z_dim).sum(1).flatten(0, 1)
        u, _, v = torch.linalg.svd(bases[0][1].T @ over_time)
        rotation = torch.linalg.qr(torch.randn(z_dim, z_dim, dtype=torch.float64,
                                               generator=torch.Generator().manual_seed(0)))[0]
        rotations, scale = (u @ v @ rotation, rotation), bases[1][2].sqrt()
        for i, (t, rotation, (mean, vectors, _)) in enumerate(zip(self.times, rotations, bases)):
            basis, size = vectors @ rotation, scale * t**0.5
            self.to_code[i].weight.copy_(basis.T / size)
            self.to_code[i].bias.copy_(-(mean @ basis) / size)
            self.to_patch[i].weight.copy_(basis * size)
            self.to_patch[i].bias.copy_(mean)


class Autoencoder(nn.Module):
    """Video [B, 3, T, H, W] in [-1, 1] to latents [B, C, T', H', W'] and back, with T' = 1 + (T -
    1) // time_stride (frames beyond are dropped) and H' = H / stride. Options are the columns of
    MODELS; bottleneck: "kl" mean and log-variance, "vq" a codebook of `codes` vectors, "fsq" one of
    prod(codes) points. Wan's two autoencoders and Stable Diffusion's are this class."""

    def __init__(self, dim, mults, downs, n_res, z_dim, patch=1, dec_dim=None, residual=True,
                 groups=0, quant=True, linear=False, bottleneck="kl", codes=()):
        super().__init__()
        self.patch, self.z_dim = patch, z_dim
        self.stride = patch * 2 ** sum("s" in down for down in downs)
        self.time_stride, self.first = 2 ** sum("t" in down for down in downs), 1
        self.bottleneck = None if bottleneck == "kl" else (
            Codebook(codes[0], z_dim) if bottleneck == "vq" else FSQ(codes))
        self.n_codes = self.bottleneck.n_codes if self.bottleneck else 0
        space, pixels = (1, 3, 3) if groups else 3, 3 * patch**2     # the image model sees a frame
        block = lambda c_in, c_out: ResBlock(c_in, c_out, space, groups)
        middle = lambda width: Level([block(width, width), FrameAttention(width, groups),
                                      block(width, width)], width)
        steps = [("s" in down, "t" in down) for down in downs]
        factors = [(1 + t, 1 + s) for s, t in steps] + [(1, 1)]

        widths = [dim * m for m in mults]
        levels, width = [Level([CausalConv3d(pixels, dim, space)], dim, growth=dim / pixels)], dim
        for i, c_out in enumerate(widths):
            layers = [block(width if j == 0 else c_out, c_out) for j in range(n_res)]
            layers += [Down(c_out, *steps[i])] if i < len(steps) else []
            levels.append(Level(layers, c_out, factors[i] if residual else None,
                                growth=c_out / width))
            width = c_out
        self.encoder = nn.ModuleList([*levels, middle(width)])
        moments = z_dim if self.bottleneck else 2 * z_dim
        self.encoder_norm = Norm(width, groups)
        self.to_moments = CausalConv3d(width, moments, space)
        self.quant = CausalConv3d(moments, moments, 1) if quant else None

        self.unquant = CausalConv3d(z_dim, z_dim, 1) if quant else None
        widths = [(dec_dim or dim) * m for m in mults]
        width = widths[-1]
        levels = [Level([CausalConv3d(z_dim, width, space)], width), middle(width)]
        for i, c_out in reversed(list(enumerate(widths))):
            layers = [block(width if j == 0 else c_out, c_out) for j in range(n_res + 1)]
            growth, out = max(1, c_out / width), c_out
            if i:
                out = c_out if residual or groups else c_out // 2            # Wan 2.1 halves here
                layers.append(Up(c_out, out, *steps[i - 1]))
                growth *= math.prod(factors[i - 1]) * factors[i - 1][1]
            levels.append(Level(layers, out, factors[i - 1] if residual and i else None, True,
                                growth))
            width = out
        self.decoder = nn.ModuleList(levels)
        self.decoder_norm, self.to_pixels = Norm(width, groups), CausalConv3d(width, pixels, space)
        self.linear = PatchCode(z_dim, self.stride, self.time_stride) if linear else None
        self.initialise()

    def initialise(self):
        """Torch's initial values, but: attention's output is zero; a model with a linear code
        starts as that code; log-variances start at -6, little noise."""
        last = self.quant or self.to_moments
        if self.linear is not None:
            for layer in (last, self.to_pixels):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        if self.bottleneck is None:
            nn.init.constant_(last.bias[self.z_dim:], -6.0)

    def features(self, video, state=None):
        """The bottleneck's input: moments [B, 2 C, T', H', W'], or [B, C, T', H', W']. With a
        `state` dict carried from call to call, a clip may come in chunks of any number of frames; a
        latent is returned once its frames are complete."""
        state, (B, _, _, H, W), x = {} if state is None else state, video.shape, video
        if self.patch > 1:                               # Wan's order: the column before the row
            x = to_blocks(video.mT, 1, self.patch).permute(0, 4, 1, 3, 2).contiguous()
        parts = stream(self.encoder, self.to_moments, self.encoder_norm, x, state)
        code = [] if self.linear is None else self.linear.encode(video, state)
        if not parts:
            return video.new_zeros(B, self.to_moments.out_channels, 0, H // self.stride,
                                   W // self.stride)
        h = torch.cat(parts, 2)
        h = h if self.quant is None else self.quant(h, state)
        if self.linear is None:
            return h
        return torch.cat([h[:, :self.z_dim] + code, h[:, self.z_dim:]], 1)

    def encode(self, video, state=None):
        """(mean, logvar), each [B, C, T', H', W']; with a codebook the codes' vectors, no noise."""
        h = self.features(video, state)
        if self.bottleneck is not None:
            z = self.bottleneck.lookup(self.bottleneck.codes(h))
            return z, torch.full_like(z, -30)
        mean, logvar = h.chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def encode_codes(self, video, state=None):
        """int64 [B, T', H', W'] below n_codes"""
        return self.bottleneck.codes(self.features(video, state))

    def decode_codes(self, codes, state=None):
        return self.decode(self.bottleneck.lookup(codes), state)

    def decode(self, z, state=None):
        """Video [B, 3, T, H, W]; with a `state` dict carried along, in chunks of any length."""
        state = {} if state is None else state
        x = z if self.unquant is None else self.unquant(z, state)
        x = torch.cat(stream(self.decoder, self.to_pixels, self.decoder_norm, x, state), 2)
        if self.patch > 1:
            x = from_blocks(x.permute(0, 2, 4, 3, 1), 3, 1, self.patch).mT.contiguous()
        return x if self.linear is None else x + self.linear.decode(z, state)


# -- its losses, and training's draws --------------------------------------------------------------


def gaussians(purpose, seed, step, keys, shapes):
    """Standard normal draws, a tensor a clip, by its key: independent of packing and ranks."""
    draws = (rng(seed, purpose, step, key).standard_normal(tuple(shape), np.float32)
             for key, shape in zip(keys, shapes))
    return [torch.from_numpy(draw) for draw in draws]


class Discriminator(nn.Module):
    """A 3D PatchGAN (Isola et al. 2017, 1611.07004): a logit for each patch of a video."""

    def __init__(self, dim=32):
        super().__init__()
        widths = [3, dim, 2 * dim, 4 * dim, 4 * dim]
        self.convs = nn.ModuleList(nn.Conv3d(a, b, (3, 4, 4), (1 if i == 0 else 2, 2, 2), 1)
                                   for i, (a, b) in enumerate(zip(widths[:3], widths[1:4])))
        self.convs.append(nn.Conv3d(*widths[3:], 3, padding=1))
        self.norms = nn.ModuleList(Norm(width) for width in widths[2:])
        self.out = nn.Conv3d(widths[-1], 1, 1)

    def forward(self, x):
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x = F.leaky_relu(x if i == 0 else self.norms[i - 1](x), 0.2)
        return self.out(x)


def reconstruct(model, videos, noises):
    """Encodes and decodes clips, with gradients: [(indices of the clips, x, y, z, codes,
    bottleneck's loss [B])], a batch for each shape; z: the bottleneck's input."""
    groups = []
    for group, x in by_shape(videos):
        h = model.features(x)
        if model.bottleneck is None:
            mean, logvar = h.chunk(2, 1)
            logvar = logvar.clamp(-30, 20)
            z = mean + (0.5 * logvar).exp() * torch.stack([noises[i] for i in group])
            loss = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean((1, 2, 3, 4))
            codes = None
        else:
            z, codes, loss = model.bottleneck(h)
        groups.append((group, x, model.decode(z), h, codes, loss))
    return groups


def losses(decoded, perceptual=None):
    """{term of the loss: sum over the clips of each clip's mean}"""
    terms = {"l1": 0.0, "mse": 0.0, "latent": 0.0}
    for _, x, y, _, _, loss in decoded:
        parts = {"l1": (y - x).abs().mean((1, 2, 3, 4)),
                 "mse": (y - x).square().mean((1, 2, 3, 4)), "latent": loss}
        if perceptual is not None:
            parts["perceptual"] = perceptual(y, x)
        terms = {name: terms.get(name, 0.0) + part.sum() for name, part in parts.items()}
    return terms


def adaptive_weight(loss, adversarial, last):
    """The adversarial loss's weight: the ratio of the losses' gradient norms at the weights `last`,
    over all ranks (Esser et al. 2020, 2012.09841)."""
    grads = [torch.autograd.grad(term, last, retain_graph=True)[0] for term in (loss, adversarial)]
    both = torch.stack(grads)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(both)
    a, b = both.flatten(1).norm(dim=1)
    return (a / (b + 1e-4)).clamp(max=1e4)


def discriminate(discriminator, decoded, n_clips):
    """The discriminator's hinge loss on the decoded clips, with its backward pass."""
    loss = sum((F.relu(1 - discriminator(x)).mean((1, 2, 3, 4)).sum()
                + F.relu(1 + discriminator(y.detach())).mean((1, 2, 3, 4)).sum()) / 2
               for _, x, y, *_ in decoded) / n_clips
    loss.backward()
    return loss.detach()


@torch.no_grad()
def update_codebook(book, decoded, keys, seed, step):
    """The codebook's update: moving averages, and restarts from latents of all ranks' clips."""
    flat = torch.cat([z.movedim(1, -1).flatten(0, 3) for _, _, _, z, _, _ in decoded])
    book.update(flat, torch.cat([codes.flatten() for *_, codes, _ in decoded]))
    candidates, is_shared = [], torch.distributed.is_initialized()
    for group, _, _, z, _, _ in decoded:
        for i, positions in zip(group, z.movedim(1, -1).flatten(1, 3)):
            picked = rng(seed, "restart", step, keys[i]).permutation(len(positions))[:64]
            part = positions[moved(torch.from_numpy(picked), z.device)]
            candidates.append((keys[i], part.cpu() if is_shared else part))
    if is_shared:
        lists = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(lists, candidates)
        candidates = [pair for part in lists for pair in part]
    candidates.sort(key=lambda pair: pair[0])
    book.restart(torch.cat([positions for _, positions in candidates]).to(flat.device))


# -- clips of any size, videos of any length -------------------------------------------------------


def fit_sides(frames, stride):
    """Crops frames about the centre to multiples of the stride (a side below one stride is padded
    with its edge). Returns the view and (top, left, height, width)."""
    H, W = (max(side, stride) for side in frames.shape[1:3])
    if (H, W) != frames.shape[1:3]:
        pad = [(0, 0), (0, H - frames.shape[1]), (0, W - frames.shape[2]), (0, 0)]
        frames = np.pad(frames, pad, mode="edge")
    h, w = H // stride * stride, W // stride * stride
    top, left = (H - h) // 2, (W - w) // 2
    return frames[:, top:top + h, left:left + w], (top, left, h, w)


def fit_time(n_frames, time_stride, first=1):
    """How many of n frames are encoded: first + k * time_stride, where a first latent covers
    `first` frames; a shorter clip is extended to these (`filled`)."""
    return first + max(0, n_frames - first) // time_stride * time_stride


def to_tensor(frames):
    """uint8 [T, H, W, 3] to float32 [3, T, H, W] in [-1, 1]."""
    frames = np.require(frames, requirements=["C", "W"])
    return torch.from_numpy(frames).permute(3, 0, 1, 2) / 127.5 - 1


def to_frames(video):
    """[3, T, H, W] in [-1, 1] to uint8 [T, H, W, 3]."""
    video = (video.float().clamp(-1, 1) + 1) * 127.5
    return video.round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def sheet_frames(video, n=6):
    """At most n frames, evenly from the first to the last, of uint8 [T, H, W, 3]."""
    return list(video[np.unique(np.linspace(0, len(video) - 1, n).round().astype(int))])


def window_shape(shape, max_frames, size, model):
    """(T, H, W) of a training window of a clip of `shape`."""
    n = fit_time(min(max_frames, shape[0]), model.time_stride, model.first)
    return n, *(max(model.stride, min(side, size) // model.stride * model.stride)
                for side in shape[1:3])


def draw_window(frames, random, max_frames, size, model):
    """A random window of at most `max_frames` and `size` pixels a side, drawn by `random`."""
    frames, _ = fit_sides(frames, model.stride)
    n, h, w = window_shape(frames.shape, max_frames, size, model)
    t, y, x = (int(random.integers(0, max(0, most - part) + 1))
               for most, part in zip(frames.shape, (n, h, w)))
    return to_tensor(filled(frames[t:t + n, y:y + h, x:x + w], n))


def filled(frames, n):
    """Extends clips shorter than n frames by their last frame."""
    missing = n - len(frames)
    return np.concatenate([frames, frames[-1:].repeat(missing, 0)]) if missing > 0 else frames


def by_shape(videos, most=None):
    """Batches of equal shape: [(indices, [B, 3, T, H, W])]. With `most`, of that many clips or of
    one: each new shape costs a set-up, so sizes in between are avoided."""
    groups = {}
    for i, video in enumerate(videos):
        groups.setdefault(video.shape, []).append(i)
    batches = []
    for group in groups.values():
        n = most or len(group)
        n_full = len(group) // n * n
        batches += [group[i:i + n] for i in range(0, n_full, n)] + [[i] for i in group[n_full:]]
    return [(batch, torch.stack([videos[i] for i in batch])) for batch in batches]


@torch.no_grad()
def encode_long(model, video, tile=None):
    """(mean, logvar) of [B, 3, T, H, W]; memory is bounded in T, with a `tile` (px) in H and W."""
    encode = lambda part, _: torch.cat(model.encode(part), 1)
    return tiled(encode, video, tile, 1 / model.stride).chunk(2, 1)


@torch.no_grad()
def decode_long(model, z, chunk=8, tile=None):
    """Yields the video of latents [B, C, T', H', W'] in chunks [B, 3, T, H, W]; with a `tile` (px)
    frames are decoded in overlapping tiles, which are blended."""
    states = {}
    for t in range(0, z.shape[2], chunk):
        decode = lambda part, corner: model.decode(part, states.setdefault(corner, {}))
        yield tiled(decode, z[:, :, t:t + chunk], tile and tile // model.stride, model.stride)


def tiled(run, x, tile, scale):
    """run(part, corner) over square tiles of `tile` cells of x's last two axes; neighbours overlap
    by a quarter, where they are blended. `scale`: the result's side over x's."""
    sides = x.shape[-2:]
    if tile is None or max(sides) <= tile:
        return run(x, 0)
    strip, total, shares = max(1, tile // 4), None, None
    starts = [sorted({*range(0, max(1, side - tile), tile - strip), max(0, side - tile)})
              for side in sides]
    for corner in itertools.product(*starts):
        top, left = corner
        part = run(x[..., top:top + tile, left:left + tile], corner)
        fades = [fade(n, round(strip * scale), start > 0, start + tile < side).to(x.device)
                 for n, start, side in zip(part.shape[-2:], corner, sides)]
        if total is None:
            total = part.new_zeros(*part.shape[:-2], *(round(side * scale) for side in sides))
            shares = torch.zeros_like(total[0, 0, 0])
        spot = (..., *(slice(round(start * scale), round(start * scale) + n)
                       for start, n in zip(corner, part.shape[-2:])))
        share = fades[0][:, None] * fades[1]
        total[spot] += part * share
        shares[spot] += share
    return total / shares


def fade(n, strip, comes_in, goes_out):
    """Weights [n] that rise over the first `strip` if comes_in, fall over the last if goes_out."""
    rise = ((torch.arange(n) + 0.5) / max(1, strip)).clamp(max=1)
    return (rise if comes_in else 1) * (rise.flip(0) if goes_out else torch.ones(n))


# -- scores and held-out clips ---------------------------------------------------------------------


def psnr(video, other):
    """Peak signal-to-noise ratio of [..., 3, T, H, W] in [-1, 1], in dB: one figure a clip."""
    error = (video.clamp(-1, 1) - other).square().mean((-4, -3, -2, -1))
    return 10 * torch.log10(4 / error.clamp_min(1e-10))


def ssim(video, other):
    """Structural similarity (Wang et al. 2004) of [B, 3, T, H, W] in [-1, 1]: [B], over windows of
    11 x 11 px inside the frame with Gaussian weights of 1.5 px, channel by channel."""
    frames = [x.clamp(-1, 1).movedim(2, 1).flatten(0, 2)[:, None] for x in (video, other)]
    n = min(11, *video.shape[-2:])
    line = torch.exp(-(torch.arange(n, device=video.device) - (n - 1) / 2).square() / (2 * 1.5**2))
    line = (line / line.sum()).to(video.dtype)

    def blur(x):
        return F.conv2d(F.conv2d(x, line.view(1, 1, 1, n)), line.view(1, 1, n, 1))
    x, y = frames
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return value.view(len(video), -1).mean(1)


def flicker(video, other):
    """[B]: mean error of the change from frame to frame, in 8-bit levels."""
    change = (video.clamp(-1, 1) - other).diff(dim=2).abs() * 127.5
    return change.mean((1, 2, 3, 4)) if video.shape[2] > 1 else change.new_zeros(len(video))


def gaussian(features):
    """(mean [D], covariance [D, D]) of features [N, D], float64."""
    x = features.double()
    return x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0)) / max(1, len(x) - 1)


def frechet(one, other):
    """The squared Fréchet distance of two Gaussians (mean, covariance), as in FID and FVD:
    |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) (Heusel et al. 2017, 1706.08500)."""
    (mean, cov), (mean2, cov2) = one, other
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float((mean - mean2).square().sum() + cov.trace() + cov2.trace() - 2 * cross)


@torch.no_grad()
def evaluate(model, videos, keys, path, detectors={}):
    """{figure: mean over held-out clips}, each at its full length and size; writes a contact sheet
    of a few to `path`. detectors: {"rfid" or "rfvd": frames of a clip -> features [B, D]}."""
    measures, decoded, used = {"psnr": psnr, "ssim": ssim, "flicker": flicker}, {}, []
    figures = {name: {} for name in measures}                            # by clip
    for group, x in by_shape(videos, 8):
        if model.n_codes:
            codes = model.encode_codes(x)
            used.append(codes.flatten())
            y = model.decode_codes(codes)
        else:
            y = model.decode(model.encode(x)[0])
        decoded.update(zip(group, map(to_frames, y)))
        for name, measure in measures.items():
            figures[name].update(zip(group, measure(y, x).tolist()))
    contact_sheet(path, [row for i in range(min(6, len(videos))) for row in (
        (sheet_frames(to_frames(videos[i])), keys[i]),
        (sheet_frames(decoded[i]), f"decoded, {figures['psnr'][i]:.1f} dB"))])
    result = {name: sum(values.values()) / len(values) for name, values in figures.items()}
    if used:
        codes = torch.cat(used)
        result["usage"] = len(codes.unique()) / model.n_codes
        result["perplexity"] = perplexity(codes, model.n_codes).item()
    for name, detector in detectors.items():
        sides = ([to_frames(videos[i]) for i in decoded], decoded.values())
        result[name] = frechet(*(gaussian(torch.cat([detector(frames) for frames in side]))
                                 for side in sides))
    return result


def latent_statistics(model, videos):
    """(mean, std) of each latent channel over `videos`, as lists of floats."""
    cells = []
    for _, x in by_shape(videos, 8):
        mean, logvar = encode_long(model, x)
        cells.append(torch.stack([mean, logvar.exp()]).transpose(1, 2).flatten(2))
    mean, variance = torch.cat(cells, 2).double().unbind(0)              # each [C, cells]
    std = (mean.var(1, unbiased=False) + variance.mean(1)).sqrt()
    return mean.mean(1).tolist(), std.tolist()


def split_rows(rows, folder, run=None):
    """(training rows, held-out rows) by the data set's own split. A split that prepare_data.py drew
    is extended (`draw_held_out`), except for a run older than that rule. A run keeps its held-out
    clips (`same_held_out`)."""
    is_drawn = all(row["split"] == drawn_split(row.get("source", row["key"])) for row in rows)

    def draw():
        held_out = [row for row in rows if row["split"] != "train"]
        if run and has_older_split(run):
            order = epoch_order(rows, lambda row: row["key"], "held out", 0)
            return held_out or order[:max(1, len(rows) // 20) if len(rows) > 1 else 0]
        return draw_held_out(rows, held_out, folder) if is_drawn or not held_out else held_out

    held_out = same_held_out(run, rows, draw)
    keys = {row["key"] for row in held_out}
    train = [row for row in rows if row["key"] not in keys and (
        is_drawn or row["split"] == "train")]
    if not train:
        refuse(f"{folder} has no clip in its training split")
    return train, held_out or train


def same_held_out(run, rows, draw):
    """A run's held-out rows: those in its file HELD_OUT, so that its losses stay comparable when
    clips are added; else draw(), which a run that trains writes there."""
    path, known = Path(run or "", HELD_OUT), {row["key"]: row for row in rows}
    keys = lines_of(read_text(path)) if run and path.is_file() else ()
    held_out = [known[key] for key in keys if key in known]
    if not held_out:
        held_out = draw()
        if held_out and str(run) in HELD:
            write_text(path, "".join(f"{row['key']}\n" for row in held_out))
    return held_out


def has_older_split(run):
    try:
        config = json.loads(Path(run, "config.json").read_text())
        return "kind" in config and "split" not in config
    except (OSError, ValueError):
        return False


def draw_held_out(rows, held_out, folder):
    """`held_out`, extended by hash to five files, or a twentieth of a set without a split, with at
    most a quarter of the clips. If that quarter has fewer files, shots are drawn, and if it has
    fewer than two shots, clips, which resemble the training clips; a line says so."""
    if len(held_out) > len(rows) / 4:                        # one long file, or nearly all clips
        held_out = []
    for what in ("files", "shots", "clips"):
        unit_of = {"files": lambda row: row.get("source", row["key"]), "clips": lambda r: r["key"],
                   "shots": lambda r: f"{r.get('source', r['key'])}|{r.get('shot_start')}"}[what]
        sizes = Counter(map(unit_of, rows))
        taken = set(map(unit_of, held_out))
        wanted = 5 if held_out else max(5, len(sizes) // 20)
        if len(taken) >= wanted and what == "files":
            return held_out
        n = sum(sizes[unit] for unit in taken)
        for unit in epoch_order(sizes, str, "held out", 0):
            if len(taken) < wanted and unit not in taken and n + sizes[unit] <= len(rows) / 4:
                taken, n = taken | {unit}, n + sizes[unit]
        if len(taken) == wanted if what == "files" else len(taken) > 1:
            break
    if not taken and len(rows) > 1:                          # two or three clips
        taken = {min(sizes)}
    if not int(os.environ.get("RANK", 0)):
        why = "" if what == "files" else ", since five files are more than a quarter of the clips"
        print(f"{folder}: {len(taken)} of {len(sizes)} {what} are held out{why}" if taken else
              f"{folder}: its only clip is trained and evaluated on, none is held out",
              file=sys.stderr)
    return epoch_order([row for row in rows if unit_of(row) in taken], lambda row: row["key"],
                       "held out", 0)


def held_out_bank(model, clips, rows, seed, n=48):
    """(rows, videos on the model's device) of n held-out clips, full size, at most 65 frames."""
    shown = Stream(rows, seed).take(0, min(len(rows), n))
    length = lambda frames: fit_time(min(len(frames), 65), model.time_stride, model.first)
    return shown, [to_tensor(filled(fit_sides(frames[:length(frames)], model.stride)[0],
                                    length(frames))).to(next(model.parameters()).device)
                   for frames in map(clips, shown)]


def evaluate_run(args):
    """--eval: writes an autoencoder's figures on held-out clips, with their protocol."""
    _, _, device = setup(args, coding=True)
    folder, name = dataset_dir(args.name), args.vae or f"{Path(args.name).name}-vae"
    rows = split_rows(open_dataset(folder), args.name, model_path(name))[1]
    model, config = load_autoencoder(name, device)
    shown, bank = held_out_bank(model, ClipCache(folder), rows, args.seed, args.n_eval)
    opened = {key: open_detector(getattr(args, key), device, f"--{key}", args.trust)
              for key in ("rfid", "rfvd") if getattr(args, key)}
    detectors = {"rfid": lambda frames: opened["rfid"][0](frames[:, None], True),
                 "rfvd": lambda frames: opened["rfvd"][0](frames[None], False)}
    keys = [row["key"] for row in shown]
    out = model_path(name)
    out = out if is_run(out) else Path("runs") / f"{folder.name}-eval"
    writable(out)
    out.mkdir(parents=True, exist_ok=True)
    result = evaluate(model, bank, keys, out / "eval.png", {key: detectors[key] for key in opened})
    mean, std = latent_statistics(model, bank)
    digest = hashlib.sha256(b"".join(row["source"].encode() + to_frames(video).tobytes()
                                     for row, video in zip(shown, bank))).hexdigest()[:16]
    sizes = sorted({tuple(video.shape[1:]) for video in bank})
    protocol = {"autoencoder": config["hash"], "data": digest, "clips": len(bank),
                "frames_height_width": [sizes[0], sizes[-1]], "range": "RGB, 8 bit",
                **{key: digest[:16] for key, (_, digest) in opened.items()}}
    write_text(out / "eval.json", json.dumps({**result, "latents_mean": mean, "latents_std": std,
                                              "protocol": protocol}, indent=1) + "\n")
    print(" ".join(f"{key} {value:.4g}" for key, value in result.items()))
    print("protocol: " + ", ".join(f"{key} {value}" for key, value in protocol.items()))


# -- the training loop -----------------------------------------------------------------------------


class Budget:
    """The clips of a step. An epoch's clips, in its order, are divided into steps of about as many
    pixels each, so a step has more of small clips and stills. Steps have random access."""

    def __init__(self, rows, seed, batch, stills, shape, world):
        """batch: windows of the largest size a step; shape(row): a window's (T, H, W)."""
        self.rows, self.seed, self.stills, self.shape = rows, seed, stills, shape
        most = max(math.prod(shape(row)) for row in rows)
        total = sum(map(self.pixels, rows))
        self.n_steps = max(1, round(total / (batch * most)))
        if total / self.n_steps < world * max(map(self.pixels, rows)) and world > 1:
            refuse(f"--batch {batch} leaves a rank of {world} without a clip: raise it")

    def pixels(self, row):
        T, H, W = self.shape(row)
        return (self.stills + (1 - self.stills) * T) * H * W             # of a still T = 1

    @lru_cache(2)
    def cut(self, epoch):
        """(the epoch's rows in order, the index of each step's first)"""
        order = epoch_order(self.rows, lambda row: row["key"], self.seed, epoch)
        ends = np.cumsum([self.pixels(row) for row in order])
        begins = np.concatenate([[0], ends[:-1]]) / ends[-1] * self.n_steps
        return order, np.searchsorted(begins, np.arange(self.n_steps + 1) - 1e-9)

    def __call__(self, step):
        """[(row, is_still)]"""
        epoch, position = divmod(step, self.n_steps)
        order, cuts = self.cut(epoch)
        return [(row, self.stills > 0 and rng(self.seed, "still", epoch, row["key"]).random()
                 < self.stills) for row in order[cuts[position]:cuts[position + 1]]]


def finish(model, args, folder, rows, window):
    """Writes the latents' statistics and the autoencoder's hash to config.json."""
    sample = Stream(rows, args.seed).take(0, min(len(rows), 256))
    mean, std = latent_statistics(model, [window(row, False, "statistics").to(
        next(model.parameters()).device) for row in sample])
    write_config(folder, {**read_config(folder, "vae"), "latents_mean": mean, "latents_std": std,
                          "hash": weights_hash(model, mean, std)})


def initial_model(args):
    """(the model's options, initial weights or None) by --init, or --model and --bottleneck."""
    if args.init:
        model, config = load_autoencoder(args.init)
        return config["model"], model.state_dict()
    options = dict(MODELS[args.model or "vae-xs"])
    if args.bottleneck != "kl":
        options.update(bottleneck=args.bottleneck, codes=args.codes)
    if args.bottleneck == "fsq":
        options["z_dim"] = len(args.codes)
    return options, None


def train_step(args, step, data, parts, optimizers, perceptual):
    """A training step on data (keys, number of clips of all ranks, videos, noises); see `fit`."""
    keys, n_clips, videos, noises = data
    model, device = parts["model"], next(parts["model"].parameters()).device
    videos, noises = ([moved(x, device) for x in tensors] for tensors in (videos, noises))
    decoded = reconstruct(model, videos, noises)
    terms = {name: term / n_clips for name, term in losses(decoded, perceptual).items()}
    loss = terms["l1"] + terms["mse"] + terms.get("perceptual", 0.0)
    total = loss + (args.kl if model.bottleneck is None else 1.0) * terms["latent"]
    discriminator = parts.get("discriminator") if step >= args.gan_start else None
    if discriminator is not None:
        discriminator.requires_grad_(False)
        logits = (discriminator(y).mean((1, 2, 3, 4)).sum() for _, _, y, *_ in decoded)
        terms["gan"] = -sum(logits) / n_clips
        weight = adaptive_weight(loss, terms["gan"], model.to_pixels.weight)
        total = total + args.gan * weight * terms["gan"]
    total.backward()
    norm = take_step(model, optimizers["model"], lr_at(step, args))
    if discriminator is not None:
        discriminator.requires_grad_(True)
        terms["discriminator"] = discriminate(discriminator, decoded, n_clips)
        take_step(discriminator, optimizers["discriminator"], lr_at(step, args))
    if isinstance(model.bottleneck, Codebook) and not args.decoder_only:
        update_codebook(model.bottleneck, decoded, keys, args.seed, step)
    return {name: term.detach() for name, term in terms.items()}, norm, keys


def open_parts(args, options, device):
    """({"model": network, perhaps "discriminator"}, their optimizers, LPIPS or None)"""
    parts = {"model": build(options).to(device)}
    if args.gan:
        parts["discriminator"] = Discriminator().to(device)
    if args.decoder_only:
        for name, p in parts["model"].named_parameters():
            p.requires_grad_(name.split(".")[0] in DECODER)
    parts["model"].train(not isinstance(parts["model"], VideoGPT))       # its batch norms stay
    perceptual = Perceptual(*args.perceptual).to(device) if args.perceptual else None
    return parts, {name: MuonAdamW(part, plain=("to_pixels", "linear"))
                   for name, part in parts.items()}, perceptual


HELD = {}               # {folder of a run of this process: (lock file, whether it is new)}


def one_run(train):
    """Decorates a stage's train(args, folder): releases the run's lock at the end, and removes a
    folder in which nothing was saved."""
    @wraps(train)
    def run(args, folder):
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            return train(args, folder)
        finally:
            signal.signal(signal.SIGTERM, before)
            lock, is_new = HELD.pop(str(folder), (None, False))
            if lock:
                Path(lock.name).unlink(missing_ok=True)
                if is_new and not any(Path(folder).glob("step-*")) and not read_log(folder):
                    for name in ("config.json", "tokenizer.json", "log.jsonl", HELD_OUT):
                        Path(folder, name).unlink(missing_ok=True)
                    with contextlib.suppress(OSError):           # it has other files
                        Path(folder).rmdir()
                lock.close()
    return run


@one_run
def train(args, folder):
    rank, world, device = setup(args, args.batch, "--batch")
    claim(folder)
    rows = chosen(open_dataset(dataset_dir(args.name)), args)
    train_rows, held_out = split_rows(rows, args.name, folder)
    options, weights = (read_config(folder, "vae")["model"], None) if last_step(
        folder) else initial_model(args)                     # a resumed run does not open --init
    checkpoint = start_run(folder, {"kind": "vae", "args": vars(args), "model": options})
    name = checkpoint and read_config(folder, "vae").get("hash")
    if name and is_finished(checkpoint, args):
        return
    if name and (latents := sorted(dataset_dir(args.name).glob(f"shard-*.latents-{name}.*"))):
        refuse(f"{folder} made {latents[0]} and its like, for which runs may have been trained: go "
               f"on under another name (--run NAME --init {args.run or folder.name})")
    torch.manual_seed(args.seed)
    parts, optimizers, perceptual = open_parts(args, options, device)
    model, clips, start = parts["model"], ClipCache(dataset_dir(args.name)), 0

    def shape(row):
        sides = [row[side] for side in ("frames", "height", "width")]
        return window_shape(sides, args.frames, args.size, model)

    def window(row, is_still, *purpose):
        frames = model.first if is_still else args.frames
        return draw_window(clips(row), rng(args.seed, *purpose, row["key"]), frames, args.size,
                           model)

    budget = Budget(train_rows, args.seed, args.batch, args.stills, shape, world)
    if checkpoint:
        start, saved = load_step(checkpoint)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
            restore_optimizer(optimizers[name], part, saved[f"{name}-optimizer"])
    elif weights is not None:
        model.load_state_dict(weights)
    elif model.linear is not None:
        sample = Stream(train_rows, args.seed).take(0, min(len(train_rows), 512))
        model.linear.fit([window(row, False, "fit") for row in sample])
    shown, bank = held_out_bank(model, clips, held_out, args.seed)
    if rank == 0:
        print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, "
              f"{len(train_rows)} training clips, {budget.n_steps} steps an epoch, "
              f"{len(held_out)} held-out clips, {device}, {'' if perceptual else 'no '}LPIPS "
              "(--perceptual)", file=sys.stderr)

    def batch(step):
        picked = budget(step)
        mine = picked[rank::world]
        keys = [row["key"] for row, _ in mine]
        videos = [window(row, is_still, "window", step) for row, is_still in mine]
        shapes = [(model.z_dim, 1 + (T - model.first) // model.time_stride, H // model.stride,
                   W // model.stride) for _, T, H, W in (video.shape for video in videos)]
        return keys, len(picked), videos, gaussians("posterior", args.seed, step, keys, shapes)

    def tensors():
        return {name: tensor for key, part in parts.items() for name, tensor in (
            (key, part.state_dict()),
            (f"{key}-optimizer", optimizer_tensors(optimizers[key], part)))}

    fit(args, folder, start, batch,
        lambda step, data: train_step(args, step, data, parts, optimizers, perceptual),
        lambda done: evaluate(model, bank, [row["key"] for row in shown],
                              folder / "samples" / f"step-{done:06d}.png"), tensors)
    if rank == 0:
        finish(model, args, folder, train_rows, window)
    barrier()


# -- latents of a data set: --encode ---------------------------------------------------------------


def build(options):
    """A new model with a config's options."""
    return (VideoGPT if "downsample" in options else Autoencoder)(**options)


def weights_hash(model, mean, std):
    """8 hex digits of an autoencoder's weights and latent statistics, which latents' files name."""
    digest = hashlib.sha256(json.dumps([mean, std]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def load_autoencoder(name, device="cpu"):
    """(model in eval mode, config) of a trained run, or of a published folder or file."""
    folder = model_path(name)
    if not is_run(folder):
        model, config = load_published(folder)
    else:
        config = read_config(folder, "vae")
        if "hash" not in config:
            refuse(f"{folder} has not finished training: run its train_vae.py command again")
        model = build(config["model"])
        model.load_state_dict(load_file(last_step(folder) / "model.safetensors"))
    return model.to(device).eval().requires_grad_(False), config


def normaliser(config, device="cpu"):
    """(mean, std), each [C, 1, 1, 1]: (latents - mean) / std has unit variance in each channel."""
    return tuple(torch.tensor(config[key], device=device).view(-1, 1, 1, 1)
                 for key in ("latents_mean", "latents_std"))


def latents_path(folder, shard, name):
    return Path(folder) / f"{shard}.latents-{name}.safetensors"


def pieces(key, n_frames, cells_a_frame, max_cells, time_stride, first=1):
    """Cuts a clip of too many latent cells in time: [(key, first frame, frames)]. Each piece is
    encoded as a clip; their keys are KEY+0, KEY+1, …"""
    most = max(1, max_cells // cells_a_frame)                            # latents a piece
    length, cut = first + (most - 1) * time_stride, []
    if fit_time(n_frames, time_stride, first) <= length:
        return [(key, 0, fit_time(n_frames, time_stride, first))]
    for start in range(0, n_frames, length):
        n = fit_time(min(length, n_frames - start), time_stride, first)
        cut.append((f"{key}+{len(cut)}", start, n))
    return cut


def separate_parts(key, first, n, time_stride):
    """Conditioning frames of a clip of n frames for train_dit.py --given, each encoded separately:
    [(key, first frame, frames)]. KEY:last: the last frame (the first is KEY's first latent); from
    4 latents on KEY:a, KEY:b: the halves; KEY:c, KEY:d: the last two parts of two latents."""
    latents, short = 1 + (n - 1) // time_stride, 1 + time_stride
    parts = [(f"{key}:last", first + n - 1, 1)] if latents > 1 else []
    if latents >= 4:
        half = 1 + (latents // 2 - 1) * time_stride
        parts += [(f"{key}:a", first, half),
                  (f"{key}:b", first + half, fit_time(n - half, time_stride)),
                  (f"{key}:c", first + n - 2 * short, short),
                  (f"{key}:d", first + n - short, short)]
    return parts


def blocks(rows, mib=512):
    """Yields rows in groups of at most 256 and of frames of at most `mib`, or one by one."""
    block, size_sum = [], 0
    for row in rows:
        size = 3 * row["frames"] * row["height"] * row["width"]
        if block and (size_sum + size > mib * 2**20 or len(block) == 256):
            yield block
            block, size_sum = [], 0
        block, size_sum = [*block, row], size_sum + size
    if block:
        yield block


@torch.no_grad()
def encode_shard(model, config, folder, shard, rows, args, device):
    """Writes the latents of one shard, with each one's frames and crop in the metadata. The next
    clips are decoded while the model runs."""
    tensors, info, lost = {}, {"clips": {}, "alone": {}}, {}
    runs = list(blocks(rows))

    def load(i):
        videos = {"clips": {}, "alone": {}}
        for row in runs[i]:
            try:
                frames, crop = fit_sides(read_clip(folder, row), model.stride)
            except Unreadable as error:
                lost[row["key"]] = str(error)
                continue
            cells = crop[2] * crop[3] // model.stride**2
            cut = pieces(row["key"], len(frames), cells, args.max_cells, model.time_stride,
                         model.first)
            more = [] if model.n_codes else [part for piece in cut
                                             for part in separate_parts(*piece, model.time_stride)]
            for kind, parts in (("clips", cut), ("alone", more)):
                for key, first, n in parts:                  # views, except of short clips
                    part = filled(frames[first:first + n], n)
                    videos[kind][key] = torch.from_numpy(part), {
                        "clip": row["key"], "first_frame": first, "frames": n, "fps": row["fps"],
                        "crop": crop}
        return videos

    for _, videos in prefetch(load, 0, len(runs), ahead=2):
        for kind, part_of in videos.items():
            info[kind].update((key, facts) for key, (_, facts) in part_of.items())
            keys = list(part_of)
            for picked, x in by_shape([video for video, _ in part_of.values()], 8):
                x = x.to(device).permute(0, 4, 1, 2, 3).contiguous() / 127.5 - 1
                coded = (model.encode_codes(x).int() if model.n_codes else
                         torch.cat(encode_long(model, x, args.tile), 1).half())
                tensors.update((keys[i], m.clone(memory_format=torch.contiguous_format))
                               for i, m in zip(picked, coded.cpu()))
    header = {"format": RUN_FORMAT, "autoencoder": config["hash"], "stride": model.stride,
              "time_stride": model.time_stride, "max_cells": args.max_cells, "tile": args.tile,
              **({"codes": model.n_codes} if model.n_codes else {}), **info,
              "sums": {key: tensor_sum(x) for key, x in tensors.items()},
              **({"lost": dict(sorted(lost.items()))} if lost else {})}
    with atomic(latents_path(folder, shard, config["hash"])) as path:
        save_file(tensors, path, {"nanosora": json.dumps(header, sort_keys=True)})


def bytes_of(x):
    """A tensor's bytes as they stand in a file, uint8 [n]."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def tensor_sum(x):
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(bytes_of(x))


def checked(x, total, path, name):
    """x, a tensor of a file; refuses it if its CRC-32 is not `total` (None in older files)."""
    if total not in (None, tensor_sum(x)):
        refuse(f"{path} is damaged at {name}: remove it, and run the command that wrote it")
    return x


def read_header(path):
    """The header of a latents file; refuses a format that this version does not know."""
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("nanosora", "{}"))
    except (SafetensorError, ValueError) as error:
        refuse(f"{path} is damaged ({error}): remove it and encode again")
    if header.get("format") != RUN_FORMAT:
        refuse(f"{path} has format {header.get('format')}, this version reads {RUN_FORMAT}: remove "
               "it and encode again")
    return header


def encode(args):
    rank, world, device = setup(args, coding=True)
    folder = dataset_dir(args.name)
    rows = open_dataset(folder)
    writable(folder)
    if rank == 0:
        sweep(folder)
    model, config = load_autoencoder(args.vae or f"{Path(args.name).name}-vae", device)
    shards = {name: [*part] for name, part in itertools.groupby(rows, lambda row: row["shard"])}
    todo = []
    for shard in sorted(shards)[rank::world]:
        path = latents_path(folder, shard, config["hash"])
        was = read_header(path) if path.exists() else {}
        for option in ("max_cells", "tile"):
            if was and was.get(option) != getattr(args, option):
                refuse(f"{path} was encoded with --{option} {was.get(option)}: repeat that option, "
                       "or remove the file")
        if "alone" not in was:                               # older files hold complete clips only
            todo.append(shard)
    for shard in tqdm(todo, desc="encode", unit="shard", disable=rank > 0):
        encode_shard(model, config, folder, shard, shards[shard], args, device)
    barrier()
    if rank == 0:
        lost = [why for shard in sorted(shards) for why in read_header(
            latents_path(folder, shard, config["hash"])).get("lost", {}).values()]
        print(f"{folder}: latents of {len(rows) - len(lost)} clips by autoencoder {config['hash']}"
              + (f"; warning: {len(lost)} are left out, such as {lost[0]}" if lost else ""),
              file=sys.stderr)


# -- the command line ------------------------------------------------------------------------------


def parse_options(argv=None):
    parser = option_parser(__doc__)
    parser.add_argument("name", help="data set: data/NAME, or a path with a slash")
    add = parser.add_argument_group("what to do").add_argument
    add("--run", help="run to train: runs/RUN, or a path with a slash (NAME-vae)")
    add("--init", help="run, or published folder or file, to initialise the weights from (none)")
    add("--encode", action="store_true", help="write the latents of all clips, without training")
    add("--eval", action="store_true", help="measure on the held-out clips, without training")
    add("--vae", help="with --encode, --eval: the trained run, or a published folder (NAME-vae)")
    add("--max_cells", type=number(int, 1), default=2048,
        help="with --encode: longer clips are cut into pieces of so many latent cells T'H'W', "
        "which fit a packed row of train_dit.py (%(default)s)")
    add("--tile", type=number(int, 64),
        help="with --encode: larger frames in blended tiles of this side, px (whole frames)")
    add("--rfid", metavar="FILE", help="with --eval: TorchScript Inception, for rFID (none)")
    add("--rfvd", metavar="FILE", help="with --eval: TorchScript I3D, for rFVD (none)")
    add("--trust", action="store_true", help="run the code in the --rfid and --rfvd files")
    add("--n_eval", type=number(int, 2), default=48, help="with --eval: clips (%(default)s)")
    add = parser.add_argument_group("model and data (fixed at the first start, like all below but "
                                    "--steps, --keep and --skip_clips)").add_argument
    add("--model", choices=sorted(MODELS), help="size (vae-xs, or what --init has)")
    add("--bottleneck", default="kl", choices=["kl", "vq", "fsq"],
        help="kl: mean and variance; vq: a learned codebook; fsq: rounding (%(default)s)")
    add("--codes", type=number(int, 2), nargs="+",
        help="vectors of a vq codebook (1024), or levels a channel of fsq (8 5 5 5)")
    add("--frames", type=number(int, 1), default=9,
        help="most frames of a training window, 1 or more (%(default)s)")
    add("--size", type=number(int, 8), default=32,
        help="largest side of a training window, px, 8 or more (%(default)s)")
    add("--stills", type=number(float, 0, 1), default=0.0,
        help="share of the windows that are one frame (%(default)s)")
    add("--decoder_only", action="store_true", help="train the decoder, keep the encoder of --init")
    add = training_options(parser, steps=600, lr=4e-3, warmup=30, eval_every=300)
    add("--batch", type=number(int, 1), default=8,
        help="windows a step, all ranks, of the largest size; more of smaller (%(default)s)")
    add("--kl", type=number(float, 0), default=1e-5, help="weight of the KL term (%(default)s)")
    add("--perceptual", nargs=2, metavar=("VGG", "LPIPS"),
        help="torchvision's vgg16 and lpips' vgg weights, for the LPIPS term (off)")
    add("--gan", type=number(float, 0), default=0.0,
        help="weight of the adversarial term, 0: none (%(default)s)")
    add("--gan_start", type=number(int, 0), default=0,
        help="first step with the adversarial term (%(default)s)")
    args = parser.parse_args(argv)
    if args.init and (args.model or args.bottleneck != "kl"):
        refuse("--init has its own model and bottleneck: leave --model and --bottleneck out")
    args.codes = args.codes or {"kl": None, "vq": [1024], "fsq": [8, 5, 5, 5]}[args.bottleneck]
    if args.bottleneck == "kl" and args.codes:
        refuse("--codes belongs to --bottleneck vq or fsq")
    if args.bottleneck == "vq" and len(args.codes) != 1:
        refuse("--codes: a vq codebook has one number, such as 1024")
    if args.decoder_only and not args.init:
        refuse("--decoder_only needs --init, whose encoder it keeps")
    return args


@one_line
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:
        return bench("bench_autoencoder", argv[1:])
    args = parse_options(argv)
    if args.encode or args.eval:
        return (encode if args.encode else evaluate_run)(args)
    folder = run_dir(args.run or f"{Path(args.name).name}-vae")
    train(args, folder)
    print(f"{folder}: trained, autoencoder {read_config(folder, 'vae')['hash']}", file=sys.stderr)


# -- what other stages borrow: the plumbing of a run -----------------------------------------------

RUN_FORMAT = 1                  # of a run's folder and of a latents file
HELD_OUT = "held_out.txt"       # in a run's folder: its held-out clips' keys, one a line


def setup(args, parts=None, option=None, coding=False):
    """Returns (rank, world, device) and joins torchrun's process group, if any. parts, option: a
    step's number of parts, set by that option, which must not be below the number of ranks.
    coding: see `keep_memory`."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if parts is not None and parts < world:
        refuse(f"{option}: a step of {parts} cannot be shared by {world} ranks: raise it")
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(filter(has.get, has)) if args.device == "auto" else args.device
    if not has[name]:
        refuse(f"--device {name}: torch sees no such device here; use --device cpu")
    if name == "cuda":
        mine, here = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if mine >= here:
            refuse(f"rank {mine} of this machine has no GPU, there are {here}: start fewer ranks, "
                   "or give --device cpu")
        torch.cuda.set_device(mine)
        # `fit` trains with deterministic kernels; cuBLAS needs this before its first call
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False
    if name == "cpu":
        keep_memory(coding)
    WATCH.start(rank, world)
    if world > 1 and not torch.distributed.is_initialized():
        # figures go over gloo: over NCCL they would wait for the GPU. No timeout: ranks' shards may
        # differ by hours
        backend = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo"
        with WATCH:
            torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=365))
        WATCH.meet()
    return rank, world, torch.device(name)


PATIENCE = 60           # seconds until a line says for which ranks this one waits


class Watch:
    """Says which ranks a collective waits for (there is no timeout), and ends the rank when its
    torchrun was killed. `with WATCH:` encloses every collective."""

    def __init__(self):
        self.n, self.since, self.seen, self.is_on = 0, None, {}, False
        self.over = threading.Event()

    def __enter__(self):
        self.n, self.since = self.n + 1, time.monotonic()

    def __exit__(self, *_):
        self.since = None

    def start(self, rank, world):
        self.rank, self.world = rank, world
        parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        if not self.is_on and (world > 1 or parent):
            self.is_on = True
            threading.Thread(target=self.watch, args=(parent,), daemon=True).start()

    def watch(self, parent):
        reported = 0
        while not self.over.wait(1):
            if parent and os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            n, since, seen = self.n, self.since, dict(self.seen)
            if since is None or n == reported or time.monotonic() - since < PATIENCE:
                continue
            reported, others = n, set(range(self.world)) - {self.rank}
            late = sorted(rank for rank in others if seen.get(rank, 0) < n)
            if self.rank < min(others - set(late), default=self.world):
                tqdm.write(f"{Path(sys.argv[0]).name}: rank {self.rank} has waited {PATIENCE:g} s "
                           f"for rank {', '.join(map(str, late or sorted(others)))}, which is "
                           "busy, stopped or gone, and still waits", file=sys.stderr)

    def meet(self):
        """Starts the thread that exchanges the ranks' numbers of collectives."""
        thread = threading.Thread(target=self.exchange, daemon=True, args=(
            torch.distributed.distributed_c10d._get_default_store(),))
        thread.start()
        atexit.register(lambda: (self.over.set(), thread.join(2)))   # not while it asks the store

    def exchange(self, store):
        with contextlib.suppress(Exception):           # the store ends with the rank that holds it
            while not self.over.wait(PATIENCE / 12):
                store.set(f"waits/{self.rank}", str(self.n))
                self.seen = {rank: int(store.get(f"waits/{rank}")) for rank in range(self.world)
                             if store.check([f"waits/{rank}"])}


WATCH = Watch()


def option_parser(doc):
    """An argparse parser that refuses wrong options in one line, status 2."""
    return Parser(description=doc.splitlines()[0], allow_abbrev=False)


def bench(function, argv, file="peers.py", beside="diffusers"):
    """Runs a function of tests/FILE, which compares this stage with other projects."""
    try:
        functions = runpy.run_path(str(Path(__file__).with_name("tests") / file))
    except ImportError as error:
        refuse(f"bench needs {beside}: pip install {beside} ({error})")
    return functions[function](argv)


def barrier():
    if torch.distributed.is_initialized():
        with WATCH:
            torch.distributed.barrier()


def sum_over_ranks(*values):
    """Python floats summed over all ranks."""
    if not torch.distributed.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64)
    with WATCH:
        torch.distributed.all_reduce(total)
    return tuple(total.tolist())


def sum_gradients(model):
    """All-reduces gradients in one flat buffer; each rank's loss is its share of the global mean.
    A rank of stills alone has none for the layers over time."""
    if torch.distributed.is_initialized():
        params = list(model.parameters())
        counts = sum_over_ranks(*(float(p.grad is not None) for p in params))
        used = [p for p, n in zip(params, counts) if n]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in used]
        flat = torch.cat([g.flatten() for g in grads])
        with WATCH:
            torch.distributed.all_reduce(flat)
        for p, grad, part in zip(used, grads, flat.split([g.numel() for g in grads])):
            p.grad = grad.copy_(part.view_as(grad))


def read_config(folder, kind):
    """A run's config.json; refuses what is no run, or of another kind or format."""
    path = Path(folder) / "config.json"
    if not path.exists():
        refuse(f"{folder} is no run {what_to_name(path.parent)}")
    try:
        config = json.loads(path.read_text())
        identity, _ = (config["format"], config["kind"]), dict(config["args"])
    except (ValueError, KeyError, TypeError):
        refuse(f"{path} is damaged: it does not hold a run's format, kind and args")
    if identity[0] != RUN_FORMAT:
        refuse(f"{folder} has run format {identity[0]}, this version reads {RUN_FORMAT}")
    if identity[1] != kind:
        refuse(f"{folder} is a run of kind '{identity[1]}', not '{kind}'")
    return config


def write_config(folder, config):
    write_text(Path(folder) / "config.json", json.dumps(config, indent=1, sort_keys=True) + "\n")


def claim(folder):
    """Locks a run's folder for this process and its ranks, or refuses on all of them."""
    fault = "" if int(os.environ.get("RANK", 0)) or str(folder) in HELD else lock_run(Path(folder))
    is_refused, = sum_over_ranks(float(bool(fault)))
    if is_refused:
        refuse(fault) if fault else sys.exit(2)


def lock_run(folder):
    """Locks folder/.lock until this process ends, however it ends; returns an error, or ''."""
    try:
        is_new = not (folder / "config.json").exists()
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            lock = open(folder / ".lock", "a")
            if not is_sole(lock):
                return (f"{folder} is in use by another process: wait until it ends, or name "
                        "another --run")
            with contextlib.suppress(FileNotFoundError):     # its last holder may have removed it
                if os.path.samestat(os.stat(lock.name), os.fstat(lock.fileno())):
                    break
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror}; name another --run"
    HELD[str(folder)] = lock, is_new
    return ""


def start_run(folder, config, resumable=("steps", "skip_clips", "keep", "estimate",
                                     "price_per_hour", "trust")):
    """Opens or makes a run's folder; returns its last checkpoint's folder or None. config: "kind",
    "args" and what else a loader needs. A run continues only with the options that it started with,
    except those in `resumable`."""
    folder, rank = Path(folder), int(os.environ.get("RANK", 0))
    claim(folder)
    if (folder / "config.json").exists():
        old = read_config(folder, config["kind"])
        for name in sorted(set(old["args"]) | set(config["args"])):
            was, now = old["args"].get(name), config["args"].get(name)
            if name not in resumable and was != now:
                refuse(f"{folder} was begun with --{name} {was}, not {now}: use another --run, "
                       "or remove the folder")
    elif rank == 0:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        versions = {"python": platform.python_version(), "torch": torch.__version__,
                    "numpy": np.__version__}
        hardware = {"device": device, "machine": platform.machine(), "cores": os.cpu_count()}
        write_config(folder, {"format": RUN_FORMAT, "split": "files", **config,
                              "git": git_revision(), "versions": versions, "hardware": hardware})
    barrier()
    return last_step(folder, also_optimizer=True)


def git_revision():
    """The git commit of this code, or None without git or a repository."""
    with contextlib.suppress(OSError):
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).resolve().parent,
                              capture_output=True, text=True).stdout.strip() or None


def last_checkpoint(folder):
    """The newest checkpoint's folder; refuses a run without one."""
    return last_step(folder) or refuse(f"{folder} has no checkpoint yet: run its command again")


def is_finished(checkpoint, args):
    """Whether a checkpoint is at --steps or beyond."""
    return checkpoint is not None and int(checkpoint.name.split("-")[1]) >= args.steps


def last_step(folder, also_optimizer=False):
    """The newest undamaged checkpoint's folder, or None without checkpoints; refuses a run whose
    checkpoints are all damaged."""
    bad = []
    for path in sorted(Path(folder).glob("step-*"), reverse=True):
        files = tuple(sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns)
                             for file in path.iterdir()))
        what = damaged(path, files, also_optimizer)
        if not what:
            if bad and not int(os.environ.get("RANK", 0)):
                say_once(f"{folder}: damaged: {', '.join(bad)}; continues from {path.name}")
            return path
        bad.append(f"{path.name}/{what}")
    if bad:
        refuse(f"{folder}: all of its checkpoints are damaged ({', '.join(bad)}): restore one from "
               "a copy, or remove the folder")


@lru_cache(64)
def say_once(line):
    print(line, file=sys.stderr)


@lru_cache(64)
def damaged(path, files, also_optimizer):
    """The first file of a checkpoint that differs from what was written, or ''. Checksums are in
    state.json; files without one (of older runs, or copied there) are only opened. An optimizer's
    file is read only where it is used."""
    name = "state.json"
    try:
        sums = dict.fromkeys(name for name, *_ in files)
        if also_optimizer or name in sums or not files:
            state = json.loads((path / name).read_text())
            sums = state.pop("sums", sums)
        for name, total in sums.items():
            if name == "state.json":
                is_fine = state["step"] == int(path.name.split("-")[1]) and (
                    total in (None, zlib.crc32(json.dumps(state).encode())))
            elif "optimizer" in name and not also_optimizer and total is not None:
                is_fine = (path / name).exists()
            elif total is None:
                with safe_open(path / name, "pt"):
                    is_fine = True
            else:
                is_fine = sum_of(path / name) == total
            if not is_fine:
                return name
        return ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return name


def sum_of(path):
    """CRC-32 of a file."""
    return zlib.crc32(np.memmap(path, np.uint8, "r"))


DTYPES = {torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32",
          torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16", torch.int8: "I8",
          torch.uint8: "U8", torch.bool: "BOOL"}


def save_file(tensors, path, metadata=None):
    """Writes safetensors, byte for byte like the library's save_file, and returns their CRC-32. The
    library renames a temporary file over `path`, which ignores the umask and locks and stays behind
    when killed. `path` must not be a file that tensors are mapped from."""
    order = list(DTYPES)                                             # the library's
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header, at = {"__metadata__": metadata} if metadata else {}, 0
    for name in names:
        x = tensors[name]
        header[name] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape),
                        "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    total = 0
    with open(path, "wb") as file:
        for part in (len(text).to_bytes(8, "little"), text,
                     *(bytes_of(tensors[name]) for name in names)):
            file.write(part)
            total = zlib.crc32(part, total)
    return total


def save_step(folder, step, tensors, keep=2, log=None):
    """Writes folder/step-000100/: one safetensors file for each of `tensors` {name: {key: tensor}},
    and state.json with their checksums and `log` (see `Means`). The folder is renamed when all is
    on disk; then all but the last `keep` checkpoints are removed, so a full disk costs none."""
    if int(os.environ.get("RANK", 0)):
        return
    final, part = Path(folder) / f"step-{step:06d}", Path(folder) / f".step-{step:06d}.part"
    for stale in [*Path(folder).glob(".step-*.part"), *([final] if final.exists() else [])]:
        shutil.rmtree(stale)
    state = {"step": step, **({"log": log} if log else {})}
    sums = {"state.json": zlib.crc32(json.dumps(state).encode())}
    try:
        part.mkdir(parents=True)
        for name, group in tensors.items():
            sums[f"{name}.safetensors"] = save_file(group, part / f"{name}.safetensors")
        (part / "state.json").write_text(json.dumps({**state, "sums": sums}))
        for path in [*part.iterdir(), part]:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        part.rename(final)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        refuse(f"step {step} could not be saved in {folder} ({error}); the checkpoint before it is "
               "intact: make room and run the same command again")
    older = [path for path in sorted(Path(folder).glob("step-*")) if path <= final]
    for path in older[:-keep]:               # later ones are damaged, or training began before them
        shutil.rmtree(path)


def load_step(path):
    """(step, {name: {key: tensor}}) of a checkpoint's folder."""
    step = json.loads((Path(path) / "state.json").read_text())["step"]
    return step, {file.stem: load_file(file) for file in sorted(Path(path).glob("*.safetensors"))}


def optimizer_tensors(optimizer, model):
    """An optimizer's state as a flat dict: NAME.exp_avg and so on, by the parameter's name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {f"{names[id(p)]}.{key}": value for p, state in optimizer.state.items()
            for key, value in state.items() if isinstance(value, torch.Tensor)}


def restore_optimizer(optimizer, model, tensors):
    """The inverse of `optimizer_tensors`; every name must be one of the model's."""
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter, key = name.rsplit(".", 1)
        p = parameters[parameter]            # the step counter stays on the CPU, where it is read
        optimizer.state[p][key] = value.clone() if key == "step" else value.to(p.device).clone()


def read_log(folder):
    """The records of log.jsonl, without an incomplete last line; NaN becomes None."""
    path, rows = Path(folder) / "log.jsonl", []
    text = path.read_text(errors="replace") if path.exists() else ""
    for n, line in enumerate(text.split("\n")[:-1], 1):
        try:
            row = json.loads(line, parse_constant=lambda _: None)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError):
            refuse(f"{path}: line {n} is damaged: remove it, and run the command again")
    return rows


def lr_at(step, args):
    """Linear warm-up over args.warmup steps, then a cosine from args.lr to a hundredth of it, or
    args.lr to the end (--schedule constant)."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return args.lr * (1.0 if args.schedule == "constant" else cosine)


def take_step(model, optimizer, lr, clip=1.0):
    """All-reduces gradients, clips their norm, steps the optimizer; returns the norm before
    clipping. Ranks agree first whether a signal drops this step."""
    STOP.agree()
    sum_gradients(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


@torch.no_grad()
def ema_update(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, over parameters."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def peak_mib():
    """Peak memory in MiB: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss            # KiB, on macOS bytes
    return round(peak / 2**(20 if sys.platform == "darwin" else 10))


def mean_of(total, n):
    """total / n of a number; sum / count of [sum, count], or of a list of these; None if 0."""
    if isinstance(total, float):
        return total / n
    if isinstance(total[0], list):
        return [mean_of(pair, n) for pair in total]
    return total[0] / total[1] if total[1] else None


class Means:
    """Running means of the log's figures since its last row. A step's figure is a number, this
    rank's part of a sum over ranks, or sums and counts [2] or [n, 2]. Sums are float64, in which
    the sum of float32 numbers does not depend on their order: a resumed run logs the same."""

    def __init__(self, saved, is_new):
        self.is_new, self.found = is_new, saved               # is_new: the next step starts a row
        is_first = not int(os.environ.get("RANK", 0))
        self.sums = {name: (torch.tensor(total, dtype=torch.float64) * is_first, n)
                     for name, (total, n) in saved.items()}

    def add(self, figures):
        self.sums, self.is_new, self.found = {} if self.is_new else self.sums, False, None
        for name, value in figures.items():
            value, (total, n) = torch.as_tensor(value).detach(), self.sums.get(name, (0.0, 0))
            wide = torch.float32 if value.device.type == "mps" else torch.float64
            total = total.to(value.device) if isinstance(total, torch.Tensor) else total
            self.sums[name] = total + value.to(wide), n + 1

    def gather(self):
        """{figure: (sum over ranks, steps)} for a checkpoint. The sums move to the first rank;
        a second call without a step between needs no collective."""
        if self.found is None and self.sums:
            totals = [torch.as_tensor(total).cpu().double() for total, _ in self.sums.values()]
            sums = sum_over_ranks(*torch.cat([x.flatten() for x in totals]).tolist())
            split = torch.tensor(sums, dtype=torch.float64).split([x.numel() for x in totals])
            self.__init__({name: (part.view(x.shape).tolist(), n) for (name, (_, n)), x, part in
                           zip(self.sums.items(), totals, split)}, self.is_new)
        return self.found or {}

    def row(self):
        """{figure: mean}; the next step starts a new row."""
        means, self.is_new = self.gather(), True
        return {name: mean_of(*item) for name, item in means.items()}


class Stopped(BaseException):
    """Raised to drop the current step, save the run as it was before it, and end."""


class Stop:
    """Ctrl-C and SIGTERM in training. While gradients are computed (`is_open`) no weight has
    changed, and a signal drops the step at once; all ranks agree on that before weights change. A
    later signal takes effect at the next step; a second Ctrl-C ends the process at once."""

    def __init__(self):
        self.status, self.is_open, self.is_agreed = 0, False, True

    def __enter__(self):
        self.__init__()
        self.before = {number: signal.signal(number, self.caught)
                       for number in (signal.SIGINT, signal.SIGTERM)
                       if signal.getsignal(number) != signal.SIG_IGN}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.__init__()

    def caught(self, number, _):
        if self.status == 128 + number == 130:
            os._exit(130)
        self.status = 128 + number
        if self.is_open:
            self.is_open = False
            raise Stopped

    def begin(self):
        """From here to `agree` a step may be dropped."""
        self.is_open, self.is_agreed = True, False
        if self.status:
            self.is_open = False
            raise Stopped

    def agree(self):
        """All ranks drop the step, or none: once a step."""
        self.is_open = False
        if not self.is_agreed:
            self.is_agreed = True
            is_130, is_143 = sum_over_ranks(*(float(self.status == n) for n in (130, 143)))
            if is_130 or is_143:
                self.status = 143 if is_143 else 130
                raise Stopped


STOP = Stop()


def check_norms(unchecked, n_left, folder):
    """Ends the run after a gradient that is not finite, before its weights are saved."""
    while len(unchecked) > n_left:                   # a step late, so that the GPU is never idle
        size, wait, at, clips = unchecked.pop(0)
        wait()
        if not math.isfinite(size.item()):
            refuse(f"{folder}: the gradient of step {at} is not finite; its clips: "
                   f"{', '.join(clips)}. The last checkpoint is untouched; --skip_clips "
                   "leaves clips out")


class Log:
    """A run's log.jsonl, written by the first rank: a record every --log_every and --eval_every
    steps and at the end. work: see `fit`."""

    def __init__(self, args, folder, start, evaluate, work):
        self.args, self.folder, self.evaluate, self.work = args, Path(folder), evaluate, work
        self.rank, self.began = int(os.environ.get("RANK", 0)), time.time()
        self.clock, self.counted = self.began, start             # of the last row: time, step
        rows = [row for row in read_log(folder) if row["step"] <= start]
        state = self.folder / f"step-{start:06d}" / "state.json"
        saved = json.loads(state.read_text()).get("log", {}) if state.exists() else {}
        is_logged = any(row["step"] == start for row in rows)
        self.means = Means(saved, is_logged)
        self.is_due = bool(saved) and not is_logged and self.wants(start)[0]
        barrier()                                    # before the first rank cuts what others read
        if self.rank == 0:
            sweep(folder)
            sweep(self.folder / "samples")
            write_rows(self.folder / "log.jsonl", rows)

    def wants(self, done):
        """(whether a record is due after `done` steps, whether with held-out figures)"""
        is_evaluated = done % self.args.eval_every == 0 or done == self.args.steps
        return done % self.args.log_every == 0 or is_evaluated, is_evaluated

    def write(self, done):
        """Writes and returns the record after step `done`. A signal during an evaluation, except
        the last, ends the run; the resumed run writes the record."""
        row = dict(step=done, **self.means.row(), lr=lr_at(done - 1, self.args),
                   seconds=round(time.time() - self.began, 2))
        if done > self.counted:
            step_s = (time.time() - self.clock) / (done - self.counted)
            row["step_s"] = round(step_s, 5)
            if self.work:
                tokens, flops, peak = self.work
                row["tokens_s"] = round(tokens / step_s)
                row["mfu"] = round(flops / step_s / peak, 4) if peak else None
        row["peak_mib"] = peak_mib()
        if self.wants(done)[1] and self.rank == 0:
            if done < self.args.steps:
                STOP.begin()
            row.update(self.evaluate(done))
            STOP.is_open = False
        if self.rank == 0:
            with open(self.folder / "log.jsonl", "a") as file:
                # numbers that are not finite become null
                row = json.loads(json.dumps(row), parse_constant=lambda _: None)
                file.write(json.dumps(row) + "\n")
        self.clock, self.counted = time.time(), done
        return row


def fit(args, folder, start, batch, train_step, evaluate, tensors, work=None):
    """The training loop of every stage, from step `start` to args.steps.

    batch(step): this rank's data, loaded ahead in threads. train_step(step, data): backward passes
    and optimizer step; returns ({figure: this rank's part, see `Means`}, gradient norm, clip keys).
    evaluate(done): {figure: float}, on the first rank. tensors(): the checkpoint's contents. work:
    (tokens a step, its FLOPs, peak FLOP/s of all ranks or None) for the log's tokens_s, mfu."""
    rank, unchecked, done = int(os.environ.get("RANK", 0)), [], start
    log = Log(args, folder, start, evaluate, work)
    mode = "warn" if torch.cuda.is_initialized() else "default"          # of torch's determinism
    bar = tqdm(total=args.steps, initial=start, desc=Path(sys.argv[0]).stem, unit="step",
               disable=rank > 0)

    def save(gathered):
        since = time.time()
        save_step(folder, done, tensors(), args.keep, gathered)
        log.clock += time.time() - since

    with STOP:
        try:
            with bar, contextlib.closing(prefetch(batch, start, args.steps)) as data:
                if log.is_due:
                    log.write(start)
                for step in range(start, args.steps):
                    STOP.begin()
                    _, loaded = next(data)
                    torch.set_deterministic_debug_mode(mode)
                    figures, norm, keys = train_step(step, loaded)
                    STOP.agree()
                    torch.set_deterministic_debug_mode("default")    # samples are drawn with cumsum
                    log.means.add({**figures, "grad_norm": norm.detach() * (rank == 0)})
                    done, is_logged = step + 1, log.wants(step + 1)[0]
                    is_saved = done % args.save_every == 0 or done == args.steps
                    unchecked.append((*fetched(norm), step, keys))
                    check_norms(unchecked, 0 if is_logged or is_saved else 1, folder)
                    if is_logged:
                        row = log.write(done)
                        bar.set_postfix_str(", ".join(
                            f"{key} {row[key]:.4f}" for key in (*figures, "held_out", "psnr")
                            if isinstance(row.get(key), float)))
                    bar.update()
                    if is_saved:
                        save(log.means.gather())
        except Stopped:
            torch.set_deterministic_debug_mode("default")
            with contextlib.suppress(Stopped):
                STOP.agree()
            check_norms(unchecked, 0, folder)
            gathered = log.means.gather()
            if done > start and not (Path(folder) / f"step-{done:06d}").exists():
                save(gathered)
            barrier()                        # torchrun kills ranks that end long after the first
            if rank == 0:
                print(f"{folder}: stopped after step {done}"
                      + (", saved: run the same command to resume" if done else ""),
                      file=sys.stderr)
            sys.exit(STOP.status)


def training_options(parser, **defaults):
    """Adds the options that all training stages share, with a stage's own defaults."""
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=number(int, 1, 999999), help="optimizer steps (%(default)s)")
    add("--lr", type=number(float, 0, 1), help="peak learning rate, 0 to 1 (%(default)s)")
    add("--warmup", type=number(int, 0), help="steps of linear warm-up (%(default)s)")
    add("--schedule", default="cosine", choices=["cosine", "constant"],
        help="learning rate after the warm-up (%(default)s)")
    add("--seed", type=number(int, 0), default=0, help="of every random draw (%(default)s)")
    add("--log_every", type=number(int, 1), default=20, help="steps a log record (%(default)s)")
    add("--eval_every", type=number(int, 1), help="steps between held-out figures (%(default)s)")
    add("--save_every", type=number(int, 1), default=200,
        help="steps between checkpoints (%(default)s)")
    add("--keep", type=number(int, 1), default=2, help="checkpoints to keep (%(default)s)")
    add("--where", metavar="TEST",
        help="train on clips that pass this test, such as 'flow > 0.02 and fps >= 24' (all)")
    add("--skip_clips", metavar="FILE", help="keys of clips to leave out, one a line (none)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="(%(default)s)")
    parser.set_defaults(**defaults)
    return add


def chosen(rows, args):
    """The rows that --where selects, without those that the file --skip_clips names."""
    rows, path = where(rows, args.where) if args.where else rows, args.skip_clips
    if path is None:
        return rows
    if not Path(path).is_file():
        refuse(f"--skip_clips {path}: no such file; it lists keys of clips, one a line")
    skipped = set(read_text(path, "--skip_clips").split())
    missing = skipped - {row["key"] for row in rows}
    if missing:
        refuse(f"--skip_clips {path}: {min(missing)} is no clip of this data set")
    return [row for row in rows if row["key"] not in skipped]


def epoch_order(items, key, seed, epoch):
    """`items` in the order of sha256(seed, epoch, key(item))."""
    return sorted(items, key=lambda item: hashlib.sha256(
        f"{seed}|{epoch}|{key(item)}".encode()).digest())


class Stream:
    """An endless stream of rows in the order of `epoch_order`, with random access."""

    def __init__(self, rows, seed):
        self.rows, self.seed = rows, seed

    @lru_cache(4)
    def order(self, epoch):
        return epoch_order(self.rows, lambda row: row["key"], self.seed, epoch)

    def take(self, start, count):
        """`count` rows from position `start`."""
        positions = (divmod(n, len(self.rows)) for n in range(start, start + count))
        return [self.order(epoch)[n] for epoch, n in positions]


class ClipCache:
    """Decoded clips, cached up to `mib`: small data sets are decoded once."""

    def __init__(self, folder, mib=2048):
        self.folder, self.free_bytes, self.cached = folder, mib * 2**20, {}

    def __call__(self, row):
        """uint8 [T, H, W, 3]"""
        frames = self.cached.get(row["key"])
        if frames is None:
            try:
                frames = read_clip(self.folder, row)
            except Unreadable as error:
                refuse(f"{error}: prepare the data set again, or leave it out (--skip_clips)")
            if frames.nbytes <= self.free_bytes:     # two threads may count one clip twice
                self.cached[row["key"]] = frames
                self.free_bytes -= frames.nbytes
        return frames


def prefetch(make, start, stop, ahead=4):
    """Yields (step, make(step)) in order, each computed up to `ahead` steps early in a thread. The
    threads use no OpenMP threads of their own, which would compete with the step's for cores."""
    pool, futures = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)), deque()
    try:
        for step in range(start, stop):
            while len(futures) < min(ahead, stop - step):
                futures.append(pool.submit(make, step + len(futures)))
            yield step, futures.popleft().result()
    finally:                                     # a caller that stops early does not wait
        pool.shutdown(cancel_futures=True)


# == published weights: files, key maps, LPIPS, VideoGPT ===========================================


def is_run(folder):
    """Whether a folder is a run: its config.json has a kind, which published ones do not have."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return isinstance(config, dict) and "kind" in config
    except (OSError, ValueError, RecursionError):
        return not Path(folder).exists() or (Path(folder) / "log.jsonl").exists()


def model_path(name):
    """The path of a model: a run of that name, or else the name as a path."""
    is_file = Path(name).suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
    if is_file and not Path(name).exists() and not run_dir(name).exists():
        refuse(f"{name}: no such file")
    return Path(name) if Path(name).exists() and not run_dir(name).exists() else run_dir(name)


class Inert:
    """Replaces the objects in a checkpoint that are neither weights nor plain data."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


Namespace = type("Namespace", (), {})
STAND_INS = [           # classes in published checkpoints, read as data without their code
    (Namespace, "argparse.Namespace"), (Namespace, "types.SimpleNamespace"),
    *((Inert, name) for name in (
        "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
        "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath")),
    (dict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (dict, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]

WEIGHT_FILES = [("model", "safetensors"), ("diffusion_pytorch_model", "safetensors"),
                ("pytorch_model", "bin"), ("diffusion_pytorch_model", "bin")]
VARIANTS = ("", ".fp32", ".fp16", ".bf16")               # in a file's name, in order of preference
VARIANT = re.compile(r"\w+(?:-\d+-of-\d+)?(\.fp32|\.fp16|\.bf16)[.-].*(?:safetensors|bin)")

SHARD = re.compile(r"(\w+?)(\.\w+)?-\d+-of-(\d+)(\.\w+)?\.(\w+)")


def weight_files(folder):
    """A published folder's file of weights, or the index of its shards, as each version names it:
    diffusion_pytorch_model.safetensors, model.fp16.safetensors, ….safetensors.index.fp16.json; or
    shards without an index, all of one variant."""
    shards = {}
    for path in sorted(folder.glob("*-of-*")):
        if match := SHARD.fullmatch(path.name):
            stem, before, n, after, end = match.groups()
            shards.setdefault((before or after or "", stem, end), {}).setdefault(
                int(n), []).append(path)
    for variant in VARIANTS:
        sets = []
        for stem, end in WEIGHT_FILES:
            forms = ["{0}{2}.{1}", "{0}{2}.{1}.index.json", "{0}.{1}.index{2}.json"]
            if stem.startswith("diffusion"):     # diffusers reads an index first, and leaves a
                forms = forms[1:] + forms[:1]    # whole file there that it saved before
            for form in forms:
                if (path := folder / form.format(stem, end, variant)).is_file():
                    return [path]
            sets += shards.get((variant, stem, end), {}).items()
            complete = [parts for n, parts in sets if len(parts) == n]
            if len(complete) > 1:
                refuse(f"{folder} holds two sets of shards, {complete[0][0].name} and "
                       f"{complete[1][0].name}: remove one of them")
            if complete:
                return complete[0]
        for n, parts in sets:
            refuse(f"{folder} holds {len(parts)} of {n} shards {parts[0].name}, …: fetch the rest "
                   "of them")
    names = ", ".join(f"{stem}.{end}" for stem, end in WEIGHT_FILES)
    refuse(f"{folder} has no weights: none of {names}, of their .fp16 and .bf16 variants, nor an "
           f".index.json{lying_in(folder)}")


# Last parts of names that only quantized weights with scales have: fp8, int8, 4 bits.
SCALES = {"scaled_fp8", "scale_weight", "weight_scale", "weight_scale_inv", "scale_input",
          "input_scale", "comfy_quant", "SCB", "absmax", "quant_map", "qweight", "qzeros", "g_idx"}


def refuse_scaled(names, path):
    scaled = [name for name in names if str(name).rpartition(".")[2] in SCALES]
    if scaled:
        refuse(f"{path} holds {min(scaled)}: weights that are quantized with scales are not read, "
               "only float32, bfloat16, float16 and plain float8: take such a file")


def refuse_nan(tensors, path):
    """Refuses weights {name: tensor} that are not all finite, by their extremes, without a copy."""
    ends = {name: torch.stack(x.aminmax()).float() for name, x in tensors.items()
            if torch.is_tensor(x) and x.is_floating_point() and x.numel() and not x.is_meta}
    fine = torch.stack(list(ends.values())).isfinite().all(1).tolist() if ends else ()
    bad = [name for name, is_fine in zip(ends, fine) if not is_fine]
    if bad:
        n = tensors[bad[0]].isfinite().logical_not().sum().item()
        refuse(f"{path}: {bad[0]} holds {n:,} numbers that are NaN or infinite, one of {len(bad)} "
               "such tensors: fetch the file again, or take another")


LORA = re.compile(r"(^|[._])(lora_([AB]|up|down|unet|te\d?|magnitude_vector|embedding_[AB])|"
                  r"base_layer|dora_scale|lokr_w\d|hada_w\d)(?=[._]|$)")
MERGE = "merge it into its model (PEFT: merge_and_unload; diffusers: fuse_lora) and take that"


def refuse_lora(names, path):
    added = [name for name in map(str, names) if LORA.search(name)]
    if added:
        refuse(f"{path} holds {min(added)}: a LoRA that is not merged into its model: {MERGE}")


NOT_READ = {            # files found instead of weights, and what to do
    "*.gguf": "GGUF is quantized and not read: take a folder of safetensors",
    "*lora*.safetensors": f"a LoRA: {MERGE}", "adapter_model.*": f"a LoRA: {MERGE}",
    **dict.fromkeys((
        "*.incomplete", ".cache/huggingface/**/*.incomplete", "../../blobs/*.incomplete", "*.part",
        "*.crdownload", "*.aria2"), "a download that did not end: go on with it"),
    **dict.fromkeys(("*.h5", "*.msgpack", "*.onnx"), "a form that is not read: take safetensors")}


def lying_in(folder):
    """Text for the refusal of a folder without weights: a file of NOT_READ that it has."""
    result = ((next(folder.glob(form), None), what) for form, what in NOT_READ.items())
    return next((f"; {path.name} is there, {what}" for path, what in result if path), "")


def refuse_others(path):
    """Refuses a file that has no weights, by its first bytes or its name."""
    refuse_pointer(path)
    with open(path, "rb") as file:
        if file.read(4) == b"GGUF":
            refuse(f"{path}: {NOT_READ['*.gguf']}")
    if path.suffix == ".incomplete":
        refuse(f"{path}: {NOT_READ['*.incomplete']}")


def what_to_name(path):
    """Text for the refusal of a path that is no run: the folder that may be meant."""
    inside = [*sorted(path.glob("snapshots/*/config.json")),                 # of a hub's cache
              *sorted(path.glob("checkpoint-*/config.json"))]                # of transformers
    if path.is_file():
        return f"(it is a file): name {path.parent}"
    if not inside and (path / "adapter_config.json").is_file():
        return f"(it holds a LoRA alone): {MERGE}"
    return "(it has no config.json): " + (
        f"name {inside[-1].parent}" if inside else "train one first, or name another")


def read_tensors(path):
    """{name: tensor} of a published file or folder, perhaps in shards: safetensors, or .pt, .pth,
    .bin, .ckpt of tensors and plain data. Files are memory-mapped; no code of theirs is run."""
    path = Path(path)
    if path.is_dir():
        files = weight_files(path)
        tensors = {k: v for part in files for k, v in read_tensors(part).items()}
        spare = [result[0] for name in sorted(os.listdir(path))
                 if (result := VARIANT.fullmatch(name)) and result[1] not in files[0].name]
        if spare:
            say_once(f"{files[0]} is read; {spare[0]} beside it is not")
        return tensors
    if path.suffix == ".json":
        try:
            parts = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            is_near = all(Path(part).name == part and not part.endswith(".json") for part in parts)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            parts = is_near = ()
        if not parts or not is_near:
            refuse(f"{path} is damaged: it does not map names to files beside it")
        away = [part for part in parts if not path.with_name(part).exists()]
        if away:
            refuse(f"{path} names {len(parts)} files, of which {len(away)} are not there: fetch "
                   f"{away[0]}" + " and the others" * (len(away) > 1) + lying_in(path.parent))
        return {k: v for part in parts for k, v in read_tensors(path.with_name(part)).items()}
    try:
        refuse_others(path)
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                refuse_scaled(file.keys(), path)
                refuse_lora(file.keys(), path)
                sums = json.loads((file.metadata() or {}).get("nanosora", "{}")).get("sums", {})
                return {name: checked(file.get_tensor(name), sums.get(name), path, name)
                        for name in file.keys()}
        with torch.serialization.safe_globals(STAND_INS):
            is_zip = zipfile.is_zipfile(path)
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else ()
            if unknown:
                refuse(f"{path} holds more than weights: {', '.join(sorted(unknown))}")
            result = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except FileNotFoundError:
        refuse(f"{path}: no such file")
    except SafetensorError as error:
        refuse(f"{path} cannot be read as weights: {str(error).splitlines()[0]}")
    except Exception as error:   # torch raises any kind on other bytes, and advises to unpickle
        why = error.strerror if isinstance(error, PermissionError) else (
            "it is no file of tensors, or cut short" if path.stat().st_size else "it is empty")
        refuse(f"{path} cannot be read as weights: {why}")
    if not isinstance(result, dict):
        refuse(f"{path} cannot be read as weights: it holds no names")
    refuse_scaled(innermost(result), path)
    refuse_lora(innermost(result), path)
    return result


WRAPPER = r"(?:_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
WRAPPERS = re.compile(rf"^(?:{WRAPPER}|module\.|base_model\.model\.)+|\b{WRAPPER}")
BESIDE = re.compile(r"(vae|first_stage_model|cond_stage_model|text_encoders?|conditioner|model_ema)"
                    r"\.")                       # other networks of a checkpoint that holds several


def unwrapped(weights, mark, ours=""):
    """Tensors without the prefix that a wrapper (torch.compile, DDP, FSDP, PEFT, ComfyUI, a
    pipeline) adds to their names: the text before `mark`, the pattern of a name that every network
    of a kind has; the shortest of several. It is replaced by `ours`, unless the mark found begins
    with it."""
    weights = {WRAPPERS.sub("", str(name)): tensor for name, tensor in weights.items()}
    marks = filter(None, map(re.compile(rf"((?:.*?\.)??)({mark})").fullmatch, weights))
    before, mark = min((match.group(1, 2) for match in marks),
                       key=lambda result: (len(result[0]), result), default=("", ours))
    ours = "" if mark.startswith(ours) else ours
    return {ours + name[len(before):] if name.startswith(before) else name: tensor
            for name, tensor in weights.items()
            if name.startswith(before) or not BESIDE.match(name)}


def plain(weights, path, mark):
    """A network's published tensors, `unwrapped`, in float32."""
    tensors = unwrapped(weights, mark)
    for name, tensor in tensors.items():
        if not (torch.is_tensor(tensor) and tensor.is_floating_point()):
            kind = tensor.dtype if torch.is_tensor(tensor) else type(tensor).__name__
            refuse(f"{path}: {name} is {kind}, not floating-point numbers: this is quantized, or "
                   "no file of weights alone")
    return {name: tensor.float() for name, tensor in tensors.items()}


def innermost(tensors):
    """The state dict in a training checkpoint, of averaged weights if it has both."""
    for key in ("ema", "ema_model", "model_ema", "ema_state_dict", "state_dict_ema", "nnet_ema",
                "model", "module", "state_dict", "model_state_dict", "nnet"):
        if isinstance(tensors.get(key), dict):
            return innermost(tensors[key])
    return tensors


# Kinds of values in a published config.json. Integers above 2^20 and lists of more than 4096 values
# are a mistake or an attack, and refused before a model is made.
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word",
         list: "a list"}


def fits(value, default):
    """Whether a value is of the same kind as the default, and so are a list's items."""
    if isinstance(default, list):
        return isinstance(value, list) and len(value) <= 4096 and all(
            fits(item, (default or [0.0])[0]) for item in value)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float)) and abs(value) < 1e30
    return isinstance(value, type(default)) and (
        not isinstance(value, int) or min(default, 1) <= value <= 2**20)


def cleared(value, default):
    """A config's value as its default's kind: texts may be numbers or booleans, null is false."""
    if isinstance(default, list) and isinstance(value, list):
        return [cleared(item, (default or [0.0])[0]) for item in value]
    if isinstance(default, bool) and isinstance(value, (str, type(None))):
        return {"none": False, "false": False, "true": True}.get(str(value).lower(), value)
    if isinstance(default, bool) and value in (0, 1) and not isinstance(value, float):
        return bool(value)
    if isinstance(default, (int, float)) and isinstance(value, (str, float)):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
            return int(number) if isinstance(default, int) and number == int(number) else number
    return value


def refuse_quantized(path, config):
    """Refuses a published config that, itself or in a part, names a quantization method."""
    for how in (each["quantization_config"] for each in (
            config, config.get("text_config"), config.get("vision_config"))
            if isinstance(each, dict) and each.get("quantization_config")):
        how = how.get("quant_method", "?") if isinstance(how, dict) else how
        refuse(f"{path}: weights quantized by {str(how):.40} are not read, only float32, bfloat16, "
               "float16 and plain float8: take a folder without quantization_config")


def read_class(path, classes, guess=None, inner=None):
    """(class, its values, the keys that it has) of a published config.json, one of `classes`
    {class: {key: default}}: a key that is missing or null has its class's default, but a null
    boolean is false. Numbers and booleans may be texts. Refuses other classes, values of other
    kinds, and quantized weights. guess: the class of a config without a class's name; inner: the
    key of the config inside a larger model's."""
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(config, dict):
            raise ValueError
    except FileNotFoundError:
        refuse(f"{path}: no such file")
    except (ValueError, RecursionError):
        refuse_pointer(path)
        refuse(f"{path} is damaged: it is no JSON object")
    outer, config = config, config[inner] if isinstance(config.get(inner), dict) else config
    name = config.get("_class_name") or (guess and guess(config))
    if not isinstance(name, str) or name not in classes:
        refuse(f"{path} is of class {name}, which is not read here: {' and '.join(classes)} are" if
               isinstance(name, str) else f"{path} names no _class_name: fetch the published one, "
               f"or add \"_class_name\", one of {', '.join(classes)}")
    refuse_quantized(path, outer)
    explicit = {key for key, default in classes[name].items() if config.get(key) is not None
            or key in config and isinstance(default, bool)}
    values = classes[name] | {key: cleared(config[key], classes[name][key]) for key in explicit}
    for key, default in classes[name].items():
        if not fits(values[key], default):
            what = KINDS[type(default)] + (f", as {default}" if default else "")
            refuse(f"{path}: {key} is {json.dumps(config[key])[:60]}, which should be {what}")
    return name, values, explicit


class Perceptual(nn.Module):
    """LPIPS on VGG-16 (Zhang et al. 2018, 1801.03924), from torchvision's VGG-16 file and lpips'
    file of linear layers: the distance of videos in [-1, 1], the mean over a clip's frames."""

    WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, vgg, lpips):
        super().__init__()
        stages, width = [], 3
        self.features = nn.Sequential()                                  # numbered as torchvision's
        for i, widths in enumerate(self.WIDTHS):
            first = len(self.features)
            self.features.extend([nn.MaxPool2d(2)] if i else [])
            for c_out in widths:
                self.features.extend([nn.Conv2d(width, c_out, 3, padding=1), nn.ReLU()])
                width = c_out
            stages.append(slice(first, len(self.features)))
            self.add_module(f"lin{i}", nn.ModuleDict(
                {"model": nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))}))
        self.stages, tensors = stages, {**read_tensors(vgg), **read_tensors(lpips)}
        names = {name: name for name in self.state_dict()}
        load_names(self, names, {name: tensors[name] for name in names if name in tensors},
                   f"--perceptual {vgg} {lpips}")
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.requires_grad_(False)

    def forward(self, y, x):
        """[B]"""
        frames = torch.cat([y, x]).transpose(1, 2)                       # [2 B, T, 3, H, W]
        h, total = (frames.flatten(0, 1) - self.shift) / self.scale, 0
        for i, stage in enumerate(self.stages):
            h = self.features[stage](h)
            a, b = (h / (h.norm(dim=1, keepdim=True) + 1e-10)).chunk(2)
            linear = self.get_submodule(f"lin{i}.model.1")
            total = total + linear((a - b).square()).mean((1, 2, 3))
        return total.view(len(x), -1).mean(1)


def open_detector(path, device, option, is_trusted):
    """(clips uint8 [B, T, H, W, 3] -> features [B, D], sha256) of a TorchScript file: the published
    Inception (images) or I3D (videos), which rescale their input by an argument."""
    if not Path(path).is_file():
        refuse(f"{option} {path}: no such file")
    if not zipfile.is_zipfile(path):
        refuse(f"{option} {path} is no TorchScript file")
    if not is_trusted:
        refuse(f"{option} {path} is a program: it can read and write your files when it runs. Add "
               "--trust if you know where it comes from")
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        refuse(f"{option} {path} is no TorchScript file: {str(error).splitlines()[0]}")
    named = {argument.name for argument in network.forward.schema.arguments}
    options = {name: True for name in ("return_features", "rescale", "resize") if name in named}

    @torch.no_grad()
    def features(clips, is_image):
        x = torch.from_numpy(clips).to(device).permute(0, 4, 1, 2, 3)            # [B, 3, T, H, W]
        x = x[:, :, 0] if is_image else x.float()
        return network(x, **options).flatten(1).float()
    return features, digest


WAN_MEAN_16 = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715,
               0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
WAN_STD_16 = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526,
              2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]
WAN_MEAN_48 = [-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542,
               0.2813, 0.0891, 0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109,
               0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899,
               -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748,
               0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667]
WAN_STD_48 = [0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894,
              1.0901, 0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833,
              1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866,
              0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06,
              0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744]


class SamePad(nn.Module):
    """VideoGPT's convolutions: padded by the kernel less the stride, an odd rest in front; a
    transposed one pads its input likewise and crops what the kernel adds."""

    def __init__(self, c_in, c_out, kernel, strides=(1, 1, 1), transposed=False, bias=True):
        super().__init__()
        pads = [kernel - s for s in strides]
        self.pads = [n for p in reversed(pads) for n in (p // 2 + p % 2, p // 2)]
        if transposed:
            self.convt = nn.ConvTranspose3d(c_in, c_out, kernel, strides, padding=kernel - 1)
        else:
            self.conv = nn.Conv3d(c_in, c_out, kernel, strides, bias=bias)

    def forward(self, x):
        return (self.conv if hasattr(self, "conv") else self.convt)(F.pad(x, self.pads))


class AxialAttention(nn.Module):
    """The sum of attention with two heads over the width, the height and the time of
    [B, C, T, H, W]."""

    def __init__(self, dim, n_heads=2):
        super().__init__()
        self.n_heads = n_heads
        for axis in "wht":
            layers = {name: nn.Linear(dim, dim, bias=name == "fc") for name in
                      ("w_qs", "w_ks", "w_vs", "fc")}
            self.add_module(f"attn_{axis}", nn.ModuleDict(layers))

    def forward(self, x):
        x, total = x.movedim(1, -1), 0
        for axis, dim in (("w", 3), ("h", 2), ("t", 1)):
            layers, along = getattr(self, f"attn_{axis}"), x.movedim(dim, -2)
            q, k, v = (layers[name](along).unflatten(-1, (self.n_heads, -1)).transpose(-2, -3)
                       for name in ("w_qs", "w_ks", "w_vs"))
            y = F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)
            total = total + layers["fc"](y).movedim(-2, dim)
        return total.movedim(-1, 1)


class AxialBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        norm = nn.BatchNorm3d
        self.block = nn.Sequential(
            norm(dim), nn.ReLU(), SamePad(dim, dim // 2, 3, bias=False),
            norm(dim // 2), nn.ReLU(), SamePad(dim // 2, dim, 1, bias=False),
            norm(dim), nn.ReLU(), AxialAttention(dim))

    def forward(self, x):
        return x + self.block(x)


class VideoGPT(nn.Module):
    """VideoGPT's VQ-VAE (Yan et al. 2021, 2104.10157): video [B, 3, T, H, W] in [-1, 1] to codes
    [B, T / t, H / s, W / s]. It is not causal: clips are coded in one piece."""

    def __init__(self, dim, n_res, downsample, z_dim, codes):
        super().__init__()
        times, stride, _ = downsample
        self.stride, self.time_stride, self.first, self.z_dim = stride, times, times, z_dim
        n = [int(math.log2(d)) for d in downsample]
        steps = [tuple(2 if i < most else 1 for most in n) for i in range(max(n))]
        stack = lambda: nn.Sequential(*(AxialBlock(dim) for _ in range(n_res)),
                                      nn.BatchNorm3d(dim), nn.ReLU())
        widths = [3] + [dim] * len(steps)
        self.encoder = nn.ModuleDict({
            "res_stack": stack(), "convs": nn.ModuleList(
                SamePad(*ends, 4, step) for *ends, step in zip(widths, widths[1:], steps)),
            "conv_last": SamePad(dim, dim, 3)})
        widths.reverse()
        self.decoder = nn.ModuleDict({"res_stack": stack(), "convts": nn.ModuleList(
            SamePad(*ends, 4, step, transposed=True)
            for *ends, step in zip(widths, widths[1:], steps))})
        self.pre_vq_conv, self.post_vq_conv = SamePad(dim, z_dim, 1), SamePad(z_dim, dim, 1)
        self.bottleneck, self.n_codes, self.linear = Codebook(codes, z_dim), codes, None

    def features(self, video, state=None):
        x = video / 2
        for conv in self.encoder.convs:
            x = F.relu(conv(x))
        return self.pre_vq_conv(self.encoder.res_stack(self.encoder.conv_last(x)))

    def decode(self, z, state=None):
        x = self.decoder.res_stack(self.post_vq_conv(z))
        for i, conv in enumerate(self.decoder.convts):
            x = conv(F.relu(x) if i else x)
        return 2 * x

    encode, encode_codes = Autoencoder.encode, Autoencoder.encode_codes
    decode_codes = Autoencoder.decode_codes

    @property
    def to_pixels(self):
        return self.decoder.convts[-1].convt


RESIDUAL = dict(norm1="residual.0", conv1="residual.2", norm2="residual.3", conv2="residual.6",
                shortcut="shortcut")


def published_names(model, layout):
    """{our parameter's name: its name in a file} of an Autoencoder; layout: "original" (Wan's own),
    "diffusers" (Wan's), "image" (AutoencoderKL)."""
    names, is_original = {}, layout == "original"
    is_flat = layout != "image" and model.encoder[1].shortcut is None            # Wan 2.1
    for side, word in (("encoder", "down"), ("decoder", "up")):
        levels, flat = list(getattr(model, side)), 0
        middle = len(levels) - 1 if side == "encoder" else 1
        names[f"{side}.0.layers.0"] = f"{side}." + ("conv1" if is_original else "conv_in")
        for i, part in enumerate(("resnets.0", "attentions.0", "resnets.1")):
            names[f"{side}.{middle}.layers.{i}"] = f"{side}." + (
                f"middle.{i}" if is_original else f"mid_block.{part}")
        rest = [i for i in range(1, len(levels)) if i != middle]
        for level, i in enumerate(rest):
            for j, layer in enumerate(levels[i].layers):
                if is_original:
                    part = f"{word}samples."
                    part += f"{flat}" if is_flat else f"{level}.{part}{j}"
                elif is_flat and side == "encoder":
                    part = f"down_blocks.{flat}"
                else:
                    one = f"{word}sampler" + ("" if not is_flat and layout != "image" else "s.0")
                    one = f"resnets.{j}" if isinstance(layer, ResBlock) else one
                    part = f"{word}_blocks.{level}.{one}"
                names[f"{side}.{i}.layers.{j}"], flat = f"{side}.{part}", flat + 1
        ends = ("head.0", "head.2") if is_original else (
            ("conv_norm_out" if layout == "image" else "norm_out"), "conv_out")
        names[f"{side}_norm"] = f"{side}.{ends[0]}"
        names["to_moments" if side == "encoder" else "to_pixels"] = f"{side}.{ends[1]}"
    names["quant"], names["unquant"] = (("conv1", "conv2") if is_original else
                                        ("quant_conv", "post_quant_conv"))
    inner = {"qkv": "to_qkv", "out": "proj", "conv": "resample.1", "shortcut": "conv_shortcut"}
    if layout == "image":
        inner = {**inner, "norm": "group_norm", "conv": "conv", "out": "to_out.0",
                 "gamma": "weight", "beta": "bias"}
    inner = {**inner, **RESIDUAL} if is_original else inner
    result = {}
    for own in model.state_dict():
        prefix = max((p for p in names if own == p or own.startswith(p + ".")), key=len)
        parts = own[len(prefix) + 1:].split(".")
        result[own] = ".".join([names[prefix], *(inner.get(part, part) for part in parts)])
    return result


# Published autoencoders: {class: {key of config.json: the class's default}}.
CLASSES = {
    "AutoencoderKL": dict(
        in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"], block_out_channels=[64], layers_per_block=1,
        act_fn="silu", latent_channels=4, norm_num_groups=32, scaling_factor=0.18215,
        shift_factor=0.0, latents_mean=[], latents_std=[], use_quant_conv=True,
        use_post_quant_conv=True, mid_block_add_attention=True),
    "AutoencoderKLWan": dict(
        base_dim=96, decoder_base_dim=0, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
        attn_scales=[], temperal_downsample=[False, True, True], latents_mean=WAN_MEAN_16,
        latents_std=WAN_STD_16, is_residual=False, in_channels=3, out_channels=3, patch_size=0)}


def guess_class(config):
    """The class of a config.json without a class's name."""
    return next((name for key, name in (("block_out_channels", "AutoencoderKL"), (
        "temperal_downsample", "AutoencoderKLWan")) if key in config), None)


def check_class(name, config, n_tensors, path):
    """Refuses, in one line, a published autoencoder that `Autoencoder` cannot represent."""
    is_image = name == "AutoencoderKL"
    levels = len(config["block_out_channels" if is_image else "dim_mult"])
    n_res, z = (config[key] for key in (("layers_per_block", "latent_channels") if is_image else
                                        ("num_res_blocks", "z_dim")))
    if is_image:
        only = dict(down_block_types=["DownEncoderBlock2D"] * levels, act_fn="silu",
                    up_block_types=["UpDecoderBlock2D"] * levels, in_channels=3, out_channels=3,
                    mid_block_add_attention=True)
        if config["use_quant_conv"] != config["use_post_quant_conv"]:
            says = [f"{key} {json.dumps(config[key])}" for key in (
                "use_quant_conv", "use_post_quant_conv")]
            refuse(f"{path}: {' and '.join(says)}: both or neither are read")
        widths, groups = config["block_out_channels"], config["norm_num_groups"]
        if widths and any(width % widths[0] for width in widths):
            refuse(f"{path}: block_out_channels {widths}: only multiples of the first are read")
        if any(width % groups for width in widths):
            refuse(f"{path}: norm_num_groups {groups} does not divide block_out_channels {widths}")
    else:
        side = 3 * max(1, config["patch_size"])**2
        only = dict(attn_scales=[], in_channels=side, out_channels=side)
        width = max(config["base_dim"], config["decoder_base_dim"]) * max(config["dim_mult"] or [1])
        if width > 2**20:
            refuse(f"{path}: base_dim and dim_mult make {width} channels, more than weights have")
        if len(config["temperal_downsample"]) != levels - 1:
            refuse(f"{path}: temperal_downsample has {len(config['temperal_downsample'])} values, "
                   f"dim_mult {levels}: of the first there is one less")
    for key, value in only.items():
        if (config[key].lower().replace("swish", "silu") if key == "act_fn" else config[
                key]) != value:
            refuse(f"{path}: {key} {json.dumps(config[key])[:60]} is not read here, only "
                   f"{json.dumps(value)[:60]}")
    if not levels or 2 * levels * n_res > n_tensors:
        refuse(f"{path}: {levels} levels of {n_res} blocks, and weights of {n_tensors} tensors: "
               "they do not belong together")
    for key in ("latents_mean", "latents_std"):
        if len(config[key]) not in ((0, z) if is_image else (z,)):
            refuse(f"{path}: {key} has {len(config[key])} values, the latents {z} channels")
    if not config.get("scaling_factor", 1) or 0 in config["latents_std"]:
        refuse(f"{path}: a scaling_factor or a value of latents_std is 0, which no latents have")


def load_names(model, names, weights, path):
    """Strict: every parameter is filled and every tensor used; singleton axes may differ."""
    state = model.state_dict()
    missing, extra = sorted(set(names.values()) - set(weights)), set(weights) - set(names.values())
    if missing or extra:
        refuse(f"{path}: " + (f"{missing[0]} is missing" if missing else
                              f"{min(extra)} is not a part of this autoencoder"))
    slim = lambda shape: [n for n in shape if n > 1]
    for own, name in names.items():
        if slim(state[own].shape) != slim(weights[name].shape):
            refuse(f"{path}: {name} has shape {list(weights[name].shape)}, "
                   f"not {list(state[own].shape)}")
        state[own] = weights[name].float().reshape(state[own].shape)
    refuse_nan({name: weights[name] for name in names.values()}, path)
    if next(model.parameters()).is_meta:
        model.to_empty(device="cpu")
    model.load_state_dict(state)


def wan_options(weights, config):
    """(options, layout, mean, std) of Wan's autoencoders from their config.json, or from the
    weights' shapes where none is published."""
    if config is None:
        is_22 = any(name.startswith("encoder.downsamples.0.downsamples") for name in weights)
        z_dim, dec_dim = weights["conv2.weight"].shape[0], weights["decoder.head.0.gamma"].shape[0]
        dim, channels = weights["encoder.conv1.weight"].shape[:2]
        if z_dim not in (16, 48):
            refuse(f"latents of {z_dim} channels: Wan's autoencoders have 16 or 48, and files of "
                   "others do not tell their mean and deviation")
        options = dict(WAN, dim=dim, z_dim=z_dim, patch=math.isqrt(channels // 3), residual=is_22)
        if is_22:
            options["dec_dim"] = dec_dim
        statistics = {16: (WAN_MEAN_16, WAN_STD_16), 48: (WAN_MEAN_48, WAN_STD_48)}
        return options, "original", *statistics[z_dim]
    downs = tuple("st" if t else "s" for t in config["temperal_downsample"])
    options = dict(dim=config["base_dim"], mults=tuple(config["dim_mult"]), downs=downs,
                   n_res=config["num_res_blocks"], z_dim=config["z_dim"],
                   dec_dim=config["decoder_base_dim"] or None, patch=config["patch_size"] or 1,
                   residual=config["is_residual"])
    return options, "diffusers", config["latents_mean"], config["latents_std"]


def image_options(weights, config):
    """(options, layout, mean, std) of diffusers' AutoencoderKL; attention under its old names is
    renamed in `weights`, and queries, keys and values are joined."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    for name in [name for name in weights if name.count(".") > 1]:
        *prefix, part, kind = name.split(".")
        if part in old:
            weights[".".join([*prefix, old[part], kind])] = weights.pop(name)
    for name in [name for name in weights if ".to_q." in name]:
        parts = [weights.pop(name.replace(".to_q.", f".to_{part}.")) for part in "qkv"]
        weights[name.replace(".to_q.", ".to_qkv.")] = torch.cat(parts)
    widths = config["block_out_channels"]
    options = dict(dim=widths[0], mults=[width // widths[0] for width in widths],
                   downs=["s"] * (len(widths) - 1), n_res=config["layers_per_block"],
                   z_dim=config["latent_channels"], groups=config["norm_num_groups"],
                   residual=False, quant=config["use_quant_conv"])
    n, scale = options["z_dim"], config["scaling_factor"]
    mean, std = config["latents_mean"], config["latents_std"] or [1.0] * n
    return options, "image", mean or [config["shift_factor"]] * n, [value / scale for value in std]


def load_videogpt(path, saved):
    """(model, options) of a VideoGPT checkpoint, its GPT's too."""
    weights = {name.removeprefix("vqvae."): tensor for name, tensor in saved["state_dict"].items()
               if name.startswith("vqvae.") or not any("vqvae." in n for n in saved["state_dict"])}
    args = vars(saved["hyper_parameters"]["args"])
    if "downsample" not in args:
        refuse(f"{path} does not say its VQ-VAE's strides: name the VQ-VAE's own checkpoint")
    for name, own in (("embeddings", "codebook"), ("N", "counts"), ("z_avg", "sums")):
        weights[f"bottleneck.{own}"] = weights.pop(f"codebook.{name}")
    options = dict(dim=args["n_hiddens"], n_res=args["n_res_layers"], z_dim=args["embedding_dim"],
                   downsample=list(args["downsample"]), codes=args["n_codes"])
    model = VideoGPT(**options)
    load_names(model, {name: name for name in model.state_dict()}, weights, path)
    return model, options


WAN_FILES = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
MARK = r"encoder\.conv(1|_in)\.weight"


def load_published(path):
    """(model, config) of a published autoencoder: a folder of diffusers' (or one with vae/), Wan's
    own folder or file, a VideoGPT checkpoint."""
    path = Path(path)
    if (path / "vae" / "config.json").exists():
        path = path / "vae"
    path = next((path / name for name in WAN_FILES if (path / name).exists()), path)
    name, config = None, None
    if path.is_dir():
        if not (path / "config.json").exists():
            refuse(f"{path} holds no autoencoder: neither a run nor a published folder "
                   f"(config.json with weights, {' or '.join(WAN_FILES)}){lying_in(path)}")
        name, config, _ = read_class(path / "config.json", CLASSES, guess_class)
    weights = read_tensors(path)
    if "hyper_parameters" in weights:
        model, options = load_videogpt(path, weights)
        mean, std = [0.0] * model.z_dim, [1.0] * model.z_dim
    else:
        weights = plain(innermost(weights), path, MARK)
        if config:
            check_class(name, config, len(weights), path / "config.json")
        elif not {"encoder.conv1.weight", "conv2.weight", "decoder.head.0.gamma"} <= set(weights):
            refuse(f"{path} is no autoencoder known here: a file is Wan's or VideoGPT's, a folder "
                   f"with config.json {' or '.join(CLASSES)}")
        read = image_options if name == "AutoencoderKL" else wan_options
        options, layout, mean, std = read(weights, config)
        with torch.device("meta"):
            model = Autoencoder(**options)
        load_names(model, published_names(model, layout), weights, path)
    return model, {"model": options, "latents_mean": mean, "latents_std": std,
                   "hash": weights_hash(model, mean, std)}


if __name__ == "__main__":
    script(main)
