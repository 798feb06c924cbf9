"""Stage 3, captions: train a captioner on the captioned clips, or run a published one.

In:   data/NAME/ as prepare_data.py left it.
Out:  runs/NAME-captioner/  (--train) config.json, tokenizer.json (byte-level BPE of the captions),
                            log.jsonl, samples/ (held-out frames with captions), step-000100/
      data/NAME/shard-00000.captions-RUN.jsonl   one record per clip {"key", "caption", "prompt",
                            "scores": {"logprob": mean over the tokens, "sure": see --sure, …}};
                            data/NAME/captions-RUN.png; captions-RUN.eval.json (--eval)
      data/NAME/shard-00000.rejected-captions-RUN.jsonl   records that failed a check, with the
                            reason in "rejected"
      data/NAME/shard-00000.text-HASH8.safetensors   (encode_captions) prompt embeddings of the
                            captions by the text encoder HASH8

The idea: a vision tower turns frames into tokens, a connector maps these to the decoder's width,
and a causal decoder reads them as the prefix of the caption. Two additions make a few hundred clips
and two minutes enough: a second loss predicts from the visual tokens alone which words the caption
holds (the highest logit of all tokens counts), and some of the decoder's input tokens are masked,
so that it has to use the frames. Without the second loss, or with AdamW instead of Muon, the tower
stays far behind (tests/README.md).

Frames: --model sets their number. They are evenly spaced from a clip's first frame to its last (a
still image is repeated) and resized, bicubic, to fit a square, with black borders. In training they
span a random 70 to 100% of the clip, with zoom, shift, tint and noise, the same for all frames of a
clip. They are never mirrored, since a caption may say left or right.

    python caption.py demo --train --paste 0.1   # two minutes on two cores, after prepare_data.py
    python caption.py demo                       # captions the clips without one: seconds
    python caption.py demo --train --run quick --steps 10                # a trial, under a minute
    torchrun --nproc_per_node 8 caption.py mine --train --model captioner-s
    torchrun --nproc_per_node 8 caption.py mine --vlm ~/llava-1.5-7b --lm ~/qwen2.5 --frames fps:1
    python caption.py mine --train --init ~/llava-1.5-7b --tune lora --run mine-llava

Published captioners (--vlm DIR; FAMILIES lists them) take a video, or single frames whose captions
--lm merges into one. Records are generated in batches; a finished one frees its slot for the next
clip. Threads decode clips ahead; ranks share the shards.

Only captions of the data set's metadata are trained on, never generated ones; --vlm OTHER captions
the same clips again, into other files. After a kill the same command resumes; a finished shard is
skipped until its file is removed. Look at data/NAME/captions-RUN.png;
`rm data/NAME/shard-*captions-RUN.jsonl*` removes the captions of a bad run.

Training needs hundreds of captioned clips: a captioner that had memorized 64 called a baby a fish.
Fewer than 300 are refused (--few allows them; --init, which fine-tunes a published captioner, takes
any number). The log compares the held-out loss with that of guessing by word frequency.

Axes: B clips, n frames of a clip, S their side in px, N visual tokens, L text tokens, D width,
A heads, E head dim. Layers are pre-norm; all visual tokens share one rotary position.
Papers: Vaswani 2017 (1706.03762); Dosovitskiy 2020 (ViT, 2010.11929); Xiao 2021 (convolutional
stems, 2106.14881); Liu 2023 (visual tokens as a prefix, 2304.08485); Fang 2014 (words from regions,
1411.4952); Su 2021 (rotary positions, 2104.09864); Yu 2022 (Orca: continuous batching); Papineni
2002 (BLEU); Lin 2004 (ROUGE); Vedantam 2015 (CIDEr, 1411.5726).
"""
import prepare_data  # noqa: F401  first: handles Ctrl-C and missing packages
import argparse
import ast
import base64
import contextlib
import datetime
import functools
import hashlib
import html
import itertools
import json
import math
import os
import re
import string
import sys
import unicodedata
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from kernels.attention import attention
from kernels.decode import Cache, attend
from kernels.linear import Linear
from kernels.optim import MuonAdamW
from prepare_data import (Unreadable, atomic, contact_sheet, dataset_dir, faulted, frames_of,
                          is_machine_error, is_sole, json_line, lines_of, note_fault, number,
                          one_line, open_dataset, read_rows, read_text, refuse, refuse_pointer, rng,
                          run_dir, script, sweep, write_rows, write_text)
from train_vae import (RUN_FORMAT, Stream, barrier, bench, checked, chosen, claim, fit, innermost,
                       is_finished, last_step, load_step, lr_at, lying_in, moved, one_run,
                       optimizer_tensors, option_parser, prefetch, read_config, read_header,
                       read_log, read_tensors, refuse_nan, refuse_quantized, restore_optimizer,
                       same_held_out, save_file, say_once, setup, start_run, take_step, tensor_sum,
                       training_options, unwrapped)


PAD, BOS, EOS = 0, 1, 2
SPECIAL = ["<pad>", "<bos>", "<eos>"]
WORDS, BLANK = 2.0, 0.1     # training: weight of the words' loss, share of masked input tokens
TEMPERATURES = 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0      # see `certainty`
FEWEST = 300        # captioned clips to train on
UNREADABLE = "cannot be read"           # the reason that rejects a clip without frames
WITHOUT = ("Put captions beside the files (NAME.txt), use a published captioner (--vlm DIR), or "
           "leave this stage out: train_dit.py also trains without captions")
MODELS = {  # frames: side in px, number; tubelet: frames, px; stem: channels, blocks; layers
    "captioner-xs": dict(size=48, frames=4, t_patch=4, patch=8, channels=64, blocks=2, width=128,
                         heads=4, tower_depth=1, depth=2),
    "captioner-s": dict(size=112, frames=8, t_patch=2, patch=16, channels=96, blocks=3, width=384,
                        heads=6, tower_depth=6, depth=6),
}


# -- the tokenizer ---------------------------------------------------------------------------------


def train_tokenizer(texts, vocab_size):
    """Trains a byte-level BPE of at most `vocab_size` tokens on `texts`; returns a Tokenizer. Ids
    0, 1, 2 are <pad>, <bos>, <eos>; every byte is a token, so that decode inverts encode. The ids
    do not depend on the order of the texts."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    least = len(SPECIAL) + len(alphabet)
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size}: at least {least}, the bytes and special tokens")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=sorted(alphabet))
    tokenizer.train_from_iterator(sorted(texts), trainer)
    # the special tokens are not 'added tokens': "<eos>" in a caption is text
    plain = json.loads(tokenizer.to_str()) | {"added_tokens": []}
    return tokenizers.Tokenizer.from_str(json.dumps(plain))


def encode(tokenizer, text, most):
    """Token ids with BOS and EOS; a text of over `most` tokens is cut and has no EOS."""
    ids = tokenizer.encode(text).ids
    return [BOS, *ids, EOS] if len(ids) <= most else [BOS, *ids[:most]]


def pad(lists):
    """B lists or tensors [L, …] of different lengths to [B, L, …], padded with zeros (PAD)."""
    return nn.utils.rnn.pad_sequence([torch.as_tensor(ids) for ids in lists], True, PAD)


# -- one transformer layer -------------------------------------------------------------------------

@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a stack of transformer layers, ours or published."""
    width: int
    depth: int
    heads: int
    kv_heads: int = 0           # 0: as many as heads
    ffn: int = 0                # hidden width of the MLP; 0: 4 * width
    norm: str = "ln"            # "ln" or "rms"
    glu: bool = False           # gated MLP
    causal: bool = False
    rope: float = 1e4           # base of the rotary positions
    eps: float = 1e-5
    act: str = "gelu"           # activation of the MLP: a key of ACTS
    head: int = 0               # head dim; 0: width / heads
    bias: bool = True           # of the linear layers
    scale: float | None = None  # of the attention scores; None: head dim^-0.5
    qkv_bias: bool | None = None    # of q, k and v; None: as bias
    qk_norm: bool = False       # RMSNorm of each head's q and k before the rotation
    post_norm: bool = False     # norms after attention and MLP, inside the residual branches
    branch: float = 1.0         # factor of the residual branches
    window: int = 0             # sliding window in tokens, the query included; 0: none
    scaling: tuple = ()         # of rotary positions: (factor,), or Llama 3.1's four numbers
    sections: tuple = ()        # numbers of frequencies for t, y and x (Qwen's M-RoPE)
    trained: int = 0            # Qwen 1: context length beyond which base and queries are scaled
    expert: int = 0             # see ExpertLayer
    linear: type = nn.Linear    # kernels.linear's Linear is faster for wide layers

    def __post_init__(self):
        check_transformer(self)

    @property
    def head_dim(self):
        return self.head or self.width // self.heads

    def layers(self):
        return nn.ModuleList((ExpertLayer if self.expert else Layer)(self)
                             for _ in range(self.depth))

    def make_norm(self):
        return (nn.RMSNorm if self.norm == "rms" else nn.LayerNorm)(self.width, eps=self.eps)


def rotary(positions, stack, prompts=None):
    """`cos_sin` of positions [...]: angle i of a position is position * base^(-2i/E). Published
    models may scale the angles: `scaled_rotary`."""
    if stack.scaling or stack.sections or stack.trained:
        return scaled_rotary(positions, stack, prompts)
    i = torch.arange(0, stack.head_dim, 2, dtype=torch.float32, device=positions.device)
    return cos_sin(positions[..., None].float() * stack.rope ** (-i / stack.head_dim))


def cos_sin(angles):
    """(cos, sin) of angles [..., E/2], each [..., 1, E], the arguments of `rotate`."""
    cos, sin = angles.cos()[..., None, :], angles.sin()[..., None, :]
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, cos, sin):
    """Rotates x [..., A, E]; feature i is paired with feature i + E/2 (Llama's layout)."""
    return x * cos.to(x.dtype) + x.roll(x.shape[-1] // 2, -1) * sin.to(x.dtype)


class Layer(nn.Module):
    """A transformer layer: attention, then an MLP."""

    def __init__(self, stack):
        super().__init__()
        self.stack, width, ffn = stack, stack.width, stack.ffn or 4 * stack.width
        inner = stack.heads * stack.head_dim
        shared = (stack.kv_heads or stack.heads) * stack.head_dim
        linear = functools.partial(stack.linear, bias=stack.bias)
        qkv = functools.partial(linear, bias=stack.bias if stack.qkv_bias is None
                                else stack.qkv_bias)
        self.norm1, self.norm2 = stack.make_norm(), stack.make_norm()
        self.q, self.k, self.v = qkv(width, inner), *(qkv(width, shared) for _ in "kv")
        self.out = linear(inner, width)
        self.gate = linear(width, ffn) if stack.glu else None
        self.up, self.down = linear(width, ffn), linear(ffn, width)
        if stack.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(stack.head_dim, eps=stack.eps) for _ in "qk")

    def linear(self, name, x, image):
        """Applies a linear layer. An ExpertLayer has other weights for image tokens."""
        return getattr(self, name)(x)

    def attend(self, x, rotation, cu_seqlens, cache, bias, image):
        stack = self.stack
        q, k, v = (self.linear(name, x, image).unflatten(-1, (-1, stack.head_dim))
                   for name in "qkv")                                    # [B, N, A or KV, E]
        if stack.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation[:2]), rotate(k, *rotation[:2])    # [B, N, A or KV, E]
            q = q * rotation[2][..., None, None].to(q.dtype) if rotation[2:] else q
        if cu_seqlens is not None:                                       # packed: [L, A, E]
            o = attention(q, k, v, cu_seqlens, cu_seqlens, stack.scale).flatten(1)
            return self.linear("out", o, image)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self, k, v)
        if bias is not None and bias.is_floating_point():                # float32 scores
            q, k, v = q.float(), k.float(), v.float()
        o = attend(q, k, v, bias, stack.scale, stack.causal and bias is None)    # [B, A, N, E]
        return self.linear("out", o.transpose(1, 2).flatten(2).to(x.dtype), image)

    def mlp(self, x, image):
        act = ACTS[self.stack.act]
        if self.gate is None:
            return self.linear("down", act(self.linear("up", x, image)), image)
        gate, up = (self.linear(name, x, image) for name in ("gate", "up"))
        return self.linear("down", act(gate) * up, image)

    def forward(self, x, rotation=None, cu_seqlens=None, cache=None, bias=None, image=None):
        """x [B, N, D], or packed [L, D] with cu_seqlens int32 [B + 1]; rotation: `cos_sin` of the
        positions, for some models with a factor of the queries; bias: [B or 1, A or 1, N, N], a
        bool attention mask or float32 added to the scores; image: bool [B, N], image tokens."""
        stack = self.stack
        if stack.post_norm:
            x = x + self.norm1(self.attend(x, rotation, cu_seqlens, cache, bias, image))
            return x + self.norm2(self.mlp(x, image))
        h = self.attend(self.norm1(x), rotation, cu_seqlens, cache, bias, image)
        x = torch.add(x, h, alpha=stack.branch)
        return torch.add(x, self.mlp(self.norm2(x), image), alpha=stack.branch)


def initialise(model, depth):
    """Draws the initial values from torch's generator, in the order of the modules.

    module                              | law    | std
    nn.Embedding                        | normal | 1
    nn.Linear, nn.Conv2d                | normal | fan_in^-0.5
    out and down of a Layer             | normal | (2 * depth * fan_in)^-0.5
    position                            | normal | 0.02
    head, words                         | zero   |
    biases 0; the norms' weights 1
    """
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = module.weight[0].numel() * (2 * depth if last in ("out", "down") else 1)
            nn.init.normal_(module.weight, std=0 if last in ("head", "words") else fan_in**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, p in model.named_parameters():
        if name.endswith("position"):
            nn.init.normal_(p, std=0.02)


class TextTower(nn.Module):
    """A small bidirectional transformer over packed texts, trained together with the denoiser.

    ids int64 [L], concatenated texts; cu_seqlens int32 [B + 1], their bounds -> [L, width]. Rotary
    positions restart with each text, and no text attends to another. Tokens past cu_seqlens[-1] are
    padding. An empty prompt is one token, EOS."""

    def __init__(self, vocab, width, depth, heads):
        super().__init__()
        self.stack = TransformerConfig(width, depth, heads)
        self.embed = nn.Embedding(vocab, width)
        self.layers, self.norm = self.stack.layers(), self.stack.make_norm()
        initialise(self, depth)

    def forward(self, ids, cu_seqlens):
        positions = torch.arange(len(ids), device=ids.device, dtype=cu_seqlens.dtype)
        text = torch.searchsorted(cu_seqlens[1:], positions, right=True)
        rotation = rotary(positions - cu_seqlens[text.clamp(max=len(cu_seqlens) - 2)], self.stack)
        x = self.embed(ids)                                              # [L, D]
        for layer in self.layers:
            x = layer(x, rotation, cu_seqlens)                           # [L, D]
        return self.norm(x)


# -- the captioner ---------------------------------------------------------------------------------


class PixelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position of [B, C, H, W]."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """A residual convolution."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.wide = PixelNorm(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + self.down(F.gelu(self.wide(self.norm(x))))


class Encoder(nn.Module):
    """Frames float [B, n, 3, S, S] to tokens [B, N, D], N = n / t_patch * (S / patch)^2.

    Convolutions at half the patch size run on each frame; then t_patch frames become one tubelet.
    Appearance is learnt from every frame, motion from their order. (Stacking the frames' pixels
    first took twice as long to learn shapes.)"""

    def __init__(self, stack, size, frames, t_patch, patch, channels, blocks):
        super().__init__()
        self.t_patch, step = t_patch, patch // 2
        self.stem = nn.Conv2d(3, channels, 2 * step - 1, step, padding=step // 2)
        self.blocks = nn.Sequential(*[Block(channels) for _ in range(blocks)], PixelNorm(channels))
        self.tubelets = nn.Conv2d(t_patch * channels, stack.width, 3, 2, padding=1)
        tokens = frames // t_patch * (size // patch)**2
        self.position = nn.Parameter(torch.empty(tokens, stack.width))
        self.layers, self.norm = stack.layers(), stack.make_norm()

    def forward(self, frames):
        B, n = frames.shape[:2]
        x = frames.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        x = self.blocks(self.stem(x))                                    # [B n, C, 2S/p, 2S/p]
        x = self.tubelets(x.reshape(B * n // self.t_patch, -1, *x.shape[2:]))
        x = x.flatten(2).transpose(1, 2).reshape(B, -1, x.shape[1])      # [B, N, D]
        x = x + self.position
        for layer in self.layers:
            x = layer(x)                                                 # [B, N, D]
        return self.norm(x)


class Decoder(nn.Module):
    """A causal language model over embeddings: of tokens, or visual tokens as a prefix."""

    def __init__(self, stack, vocab, scales=(1.0, 1.0)):
        super().__init__()
        self.stack, self.embed = stack, nn.Embedding(vocab, stack.width)
        self.layers, self.norm = stack.layers(), stack.make_norm()
        self.head, self.scales = stack.linear(stack.width, vocab, bias=False), scales

    def read(self, ids):
        """Embeddings of ids, a list or nested lists."""
        return self.embed(torch.tensor(ids, dtype=torch.long,
                                       device=self.embed.weight.device)) * self.scales[0]

    def forward(self, x, positions, cache=None, image=None, prompts=None):
        """x [B, L, D] at positions [L] or [B, L] (with sections [3, B, L]) -> hidden states
        [B, L, D], for `logits`. image: bool [B, L], image tokens; prompts: prompt lengths [B]."""
        rotation = rotary(positions, self.stack, prompts)
        masks = cache or Cache()
        if cache is None:
            masks.plan([0], 0, x.shape[1])
        bias = masks.mask(x.shape[1], self.stack.window, x.device)
        for layer in self.layers:
            x = layer(x, rotation, cache=cache, bias=bias, image=image)  # [B, L, D]
        return self.norm(x)

    def logits(self, h):
        return self.head(h * self.scales[1])


class Request(NamedTuple):
    key: str
    ids: list                   # the n tokens of the prompt, -1 for visual tokens
    x: torch.Tensor             # float [n, D]
    positions: torch.Tensor     # int64 [n], or [3, n]
    image: torch.Tensor | None = None       # bool [n]: image tokens
    counted: list = []          # ids of the prompt that `penalised` counts


class Sequence:
    """The state of a text during generation."""

    def __init__(self, request, most, seed):
        self.request, self.ids, self.total = request, [], 0.0
        self.seen, self.grams, self.n_noted = {}, {}, 0                 # for `penalised`
        self.after = int(request.positions.max()) + 1
        self.draws = rng(seed, "token", 0, request.key).random(most)


def pad_requests(requests):
    """(x [B, L, D], positions [B, L] or [3, B, L], image [B, L] or None) of requests, padded at
    the end: a causal model is not affected."""
    positions = pad(request.positions.movedim(-1, 0) for request in requests)
    return (pad(request.x for request in requests),
            positions.movedim(-1, 0) if positions.dim() > 2 else positions,
            None if requests[0].image is None else pad(request.image for request in requests))


def prefill(decoder, cache, slots, rows):
    """Runs the prompts of `rows` into their slots of the cache: last hidden states [B, D]."""
    lengths = [len(row.request.ids) for row in rows]
    cache.plan(slots, 0, max(lengths) + min(len(rows[0].draws), 128))    # reserves capacity once
    start = fill_prefix(decoder, cache, slots, rows)
    # a GPU takes all prompts at once; on a CPU, a few hundred tokens fit the processor's cache
    most, last = 512 if rows[0].request.x.device.type == "cpu" else 2**16, []
    for part in in_groups(list(zip(slots, rows)), max(1, most // (max(lengths) - start))):
        slots, rows = zip(*part)
        x, positions, image = pad_requests([row.request for row in rows])
        counts = [len(row.request.ids) for row in rows]
        cache.plan(slots, start, x.shape[1] - start)
        h = decoder(x[:, start:], positions[..., start:], cache,
                    None if image is None else image[:, start:],
                    torch.tensor(counts, device=x.device))
        last.append(h[range(len(rows)), [count - start - 1 for count in counts]])
        for slot, count in zip(slots, counts):
            cache.lengths[slot] = count
    return torch.cat(last)


def choose(logits, draws, temperature, top_p, vocab, scores=None):
    """(token, log-probability) for each row of logits [B, V]: the most likely token, or with a
    temperature one of `nucleus`. `scores` replace the logits in the choice alone."""
    logprobs = logits.float().log_softmax(-1)
    if temperature:
        token = nucleus(logits.float() if scores is None else scores, draws, temperature, top_p,
                        vocab)
    else:
        token = (logprobs if scores is None else scores.log_softmax(-1)).argmax(-1, keepdim=True)
    return token[:, 0], logprobs.gather(1, token)[:, 0]


@torch.inference_mode()
def generate(decoder, requests, batch, most, stop=(), is_over=None, temperature=0.0, top_p=1.0,
             seed=0, vocab=None, penalties=None):
    """Yields (request, ids, mean log-probability) of each request when its text ends: at a token of
    `stop`, which ids leave out, where is_over(ids) is true, or after `most` tokens. Continuous
    batching: up to `batch` rows run together, and a finished one frees its slot for the next
    request. Draws depend on the seed and the request alone. penalties: arguments of `penalised`."""
    source, rows, cache = iter(requests), [], Cache()
    while True:
        free = [i for i, row in enumerate(rows) if row is None]
        fresh = dict(zip([*free, *range(len(rows), batch)], source))
        if fresh:
            rows += [None] * (max(fresh) + 1 - len(rows))
            for slot, request in fresh.items():
                rows[slot] = Sequence(request, most, seed)
            slots = list(fresh)
            h = prefill(decoder, cache, slots, [rows[slot] for slot in slots])
        else:
            if free:
                rows = [row for row in rows if row is not None]
                cache.select([i for i in range(len(free) + len(rows)) if i not in free])
            if not rows:
                return
            cache.plan()
            slots, x = list(range(len(rows))), decoder.read([[row.ids[-1]] for row in rows])
            at = torch.tensor([[row.after + len(row.ids) - 1] for row in rows], device=x.device)
            at = at.expand(3, -1, 1) if decoder.stack.sections else at
            prompts = torch.tensor([len(row.request.ids) for row in rows], device=x.device)
            h = decoder(x, at, cache, None, prompts)[:, -1]
            cache.lengths = [length + 1 for length in cache.lengths]
        draws = torch.tensor([rows[slot].draws[len(rows[slot].ids)] for slot in slots])
        logits = decoder.logits(h)
        scores = penalties and penalised(logits, [rows[slot] for slot in slots], *penalties)
        chosen = choose(logits, draws, temperature, top_p, vocab, scores)
        for slot, token, logprob in zip(slots, *(values.tolist() for values in chosen)):
            row = rows[slot]
            row.ids.append(token)
            row.total += logprob
            if token in stop or len(row.ids) == most or (is_over and is_over(row.ids)):
                rows[slot] = None
                yield (row.request, row.ids[:-1] if token in stop else row.ids,
                       row.total / len(row.ids))


class Captioner(nn.Module):
    """Frames float [B, n, 3, S, S] and the beginning of a caption -> the next token, at each."""

    def __init__(self, size, frames, t_patch, patch, channels, blocks, width, heads, tower_depth,
                 depth, vocab):
        super().__init__()
        self.tower = Encoder(TransformerConfig(width, tower_depth, heads), size, frames, t_patch,
                             patch, channels, blocks)
        self.connector = nn.Sequential(Linear(width, width), nn.GELU(), Linear(width, width))
        self.decoder = Decoder(TransformerConfig(width, depth, heads, causal=True), vocab)
        self.words = nn.Linear(width, vocab)
        initialise(self, tower_depth + depth)

    def positions(self, n_visual, n_text):
        """Visual tokens share position 0, so that attention finds them by content and not by their
        order; the text has positions 1, 2, …"""
        positions = torch.arange(n_visual + n_text, device=self.words.weight.device)
        return (positions - n_visual + 1).clamp(min=0)

    def forward(self, frames, ids):
        """ids int64 [B, L] -> logits of the next tokens [B, L, vocab], and of the tokens that the
        caption holds [B, vocab], the maximum over the visual tokens."""
        seen = self.tower(frames)                                        # [B, N, D]
        x = torch.cat([self.connector(seen), self.decoder.embed(ids)], 1)
        x = self.decoder(x, self.positions(seen.shape[1], ids.shape[1]))[:, seen.shape[1]:]
        return self.decoder.logits(x), self.words(seen).amax(1)

    @torch.no_grad()
    def generate(self, frames, most):
        """Greedy decoding of up to `most` tokens: [(ids, mean log-probability)] for each clip."""
        x = self.connector(self.tower(frames))
        start = self.decoder.embed(torch.full((len(x), 1), BOS, device=x.device))
        positions, ids = self.positions(x.shape[1], 1), [-1] * x.shape[1] + [BOS]
        requests = [Request(str(i), ids, prompt, positions)
                    for i, prompt in enumerate(torch.cat([x, start], 1))]
        answers = generate(self.decoder, requests, len(x), most, {EOS})
        return [answer[1:] for answer in sorted(answers, key=lambda answer: int(answer[0].key))]


# -- frames of any size ----------------------------------------------------------------------------


def spread(n, n_frames, start=0.0, stop=1.0):
    """Indices of n evenly spaced frames from `start` to `stop` (0..1) of a clip of n_frames."""
    return np.rint(np.linspace(start, stop, n) * (n_frames - 1)).astype(int)


def letterbox(frame, size):
    """Resizes uint8 [H, W, 3] to fit a square of `size` px, aspect ratio kept, centred on black."""
    H, W = frame.shape[:2]
    h, w = (max(1, round(size * side / max(H, W))) for side in (H, W))
    square, top, left = np.zeros((size, size, 3), np.uint8), (size - h) // 2, (size - w) // 2
    small = Image.fromarray(frame).resize((w, h), Image.Resampling.BICUBIC)
    square[top:top + h, left:left + w] = np.asarray(small)
    return square


class Frames:
    """The captioner's input: at most 4 n evenly spaced frames of each clip, as squares. Recently
    used clips are cached, up to `mib`."""

    def __init__(self, folder, rows, size, n, mib=1024):
        self.folder, self.rows = folder, {row["key"]: row for row in rows}
        self.size, self.n, clip_bytes = size, n, 4 * n * size * size * 3
        self.load = functools.lru_cache(maxsize=int(mib * 2**20 / clip_bytes))(self.load)

    def load(self, key):
        """uint8 [K, S, S, 3]"""
        row = self.rows[key]
        some = set(spread(min(4 * self.n, row["frames"]), row["frames"]).tolist())
        return np.stack([letterbox(frame, self.size)
                         for frame in frames_of(self.folder, row, some)])

    def __call__(self, key, start=0.075, stop=0.925):
        """uint8 [n, S, S, 3] from `start` to `stop` (0..1) of the clip; the default is the mean of
        training's random 70 to 100%."""
        frames = self.load(key)
        return frames[spread(self.n, len(frames), start, stop)]


def to_input(frames):
    """uint8 [B, n, S, S, 3] to the tower's input, float [B, n, 3, S, S]; black is -1.2."""
    return (frames.movedim(-1, -3).float() / 255 - 0.4) * 3


def draw_jitter(random):
    """Random augmentation of a clip, the same for all its frames: float32 [8], log zoom, shift x, y
    (half sides), log gain, level, and a tint of red, green, blue (normalised levels)."""
    most = np.array([0.3, 0.25, 0.25, 0.2, 0.2], np.float32)
    draws = [random.uniform(-1, 1, 5) * most, random.standard_normal(3) * 0.2]
    return np.concatenate(draws).astype(np.float32)


def augment(frames, jitter):
    """uint8 [B, n, S, S, 3] augmented by jitter [B, 8]: the tower's input."""
    B, n, S = frames.shape[:3]
    zoom, zero = (-jitter[:, 0]).exp(), torch.zeros_like(jitter[:, 0])
    theta = torch.stack([zoom, zero, jitter[:, 1], zero, zoom, jitter[:, 2]], 1).view(B, 2, 3)
    grid = F.affine_grid(theta, (B, 1, S, S), align_corners=False)
    x = frames.movedim(-1, -3).flatten(1, 2).float() / 255               # [B, 3 n, S, S]
    x = (F.grid_sample(x, grid, align_corners=False) - 0.4).view(B, n, 3, S, S) * 3
    light = (jitter[:, 4:5] + jitter[:, 5:]).view(B, 1, 3, 1, 1)
    return x * jitter[:, 3].exp().view(B, 1, 1, 1, 1) + light


# -- training on captioned clips -------------------------------------------------------------------


class Batch(NamedTuple):
    keys: list              # B keys of clips
    frames: torch.Tensor    # uint8 [B, n, S, S, 3]
    jitter: torch.Tensor    # float [B, 8]
    noise: torch.Tensor     # float [B, n, 3, S, S], standard normal
    ids: torch.Tensor       # int64 [B, L + 1]
    blank: torch.Tensor     # bool [B, L]: masked, the decoder reads PAD


def paste_moving(view, other, ground):
    """Pastes the moving objects of `other` onto the clip `view`, both uint8 [n, S, S, 3]: the
    pixels that differ from its darkest frame, `ground` [S, S, 3], except on `view`'s borders."""
    moves = np.abs(other.astype(int) - ground).max(-1) > 40
    return np.where((moves & (view.max((0, 3)) > 0))[..., None], other, view)


def draw_batch(rows, frames, texts, args, step, others):
    """The Batch of a step; every draw is keyed by the seed, its purpose, the step and the clip. A
    share of the clips, args.paste, gets the moving objects and the caption of one of `others`."""
    clips = []
    for row in rows:
        def random(purpose, key=row["key"]):
            return rng(args.seed, purpose, step, key)
        start = random("window")
        part = 1 - 0.3 * start.random()
        start = (1 - part) * start.random()
        view, text = frames(row["key"], start, start + part), pick_caption(row, args, step)["text"]
        if random("paste").random() < args.paste:      # short captions rarely name the background
            other = min((others[i] for i in random("other").integers(len(others), size=3)),
                        key=lambda row: len(row["captions"][0]["text"]))
            view = paste_moving(view, frames(other["key"], start, start + part),
                            frames.load(other["key"]).min(0))
            text = f"{other['captions'][0]['text']} and {text}"
        ids = texts(text)
        clips.append((view, draw_jitter(random("jitter")),
                      random("noise").standard_normal(view.shape, np.float32), ids,
                      random("blank").random(len(ids) - 1) < BLANK))
    *arrays, ids, blanks = zip(*clips)
    view, jitter, noise = (torch.from_numpy(np.stack(parts)) for parts in arrays)
    return Batch([row["key"] for row in rows], view, jitter, noise.movedim(-1, -3), pad(ids),
                 pad(blanks))


def caption_loss(logits, ids):
    """Cross entropy in nats, summed over all tokens: logits [B, L, vocab], ids [B, L + 1]."""
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD,
                           reduction="sum")


def losses(model, x, ids, blank=None):
    """[2]: the caption loss, summed over all tokens, and the words' loss, summed over clips and
    vocabulary, in nats. x float [B, n, 3, S, S]; ids int64 [B, L + 1]; blank bool [B, L]."""
    read, target = ids[:, :-1], ids[:, 1:]
    if blank is not None:
        read = read.masked_fill(blank & (read != BOS), PAD)
    logits, words = model(x, read)
    holds = torch.zeros_like(words).scatter_(1, target, 1.0)
    holds[:, :len(SPECIAL)] = 0
    presence = F.binary_cross_entropy_with_logits(words, holds, reduction="sum")
    return torch.stack([caption_loss(logits, ids), presence])


def own_captions(folder, rows):
    """The rows with the captions of the metadata alone, without generated ones."""
    written = {path.name.split(".captions-", 1)[1][:-len(".jsonl")]
               for path in Path(folder).glob("shard-*.captions-*.jsonl")}
    return [{**row, "captions": [c for c in row["captions"] if c["source"] not in written]}
            for row in rows]


def open_tokenizer(path, texts=None, vocab=None):
    """Reads the run's tokenizer; given `texts`, trains and writes it first where it is missing."""
    if texts is not None:
        if not path.exists():
            with atomic(path) as part:
                train_tokenizer(texts, vocab).save(str(part))
        barrier()
    if not path.exists():
        refuse(f"{path} is missing: train the run (again)")
    return tokenizer_of(tokenizers.Tokenizer.from_file, path)


def tokenizer_of(read, path):
    """read(path); refuses a file that is no tokenizer."""
    try:
        return read(str(path))
    except Exception as error:           # the libraries raise no narrower class
        refuse_pointer(path)
        refuse(f"{path} is no tokenizer: {error}")


def word_prior(model, texts):
    """Sets the bias of the words' head to the log-odds of each word; learning it from zero would
    take most of the run."""
    vocab = model.words.out_features
    counts = torch.stack([torch.bincount(torch.tensor(ids), minlength=vocab) > 0 for ids in texts])
    share = counts.double().mean(0).clamp(0.5 / len(texts), 1 - 0.5 / len(texts))
    with torch.no_grad():
        model.words.bias.copy_(torch.logit(share))


@torch.no_grad()
def held_out_loss(model, rows, frames, texts, size=64):
    """(Nats per token of the held-out clips, without augmentation, with their first captions; the
    one of TEMPERATURES with the lowest loss, which is high for an overconfident model.)"""
    totals, count, device = np.zeros(len(TEMPERATURES)), 0, model.words.weight.device
    for i in range(0, len(rows), size):
        part = rows[i:i + size]
        x = torch.from_numpy(np.stack([frames(row["key"]) for row in part])).to(device)
        ids = pad([texts(row["captions"][0]["text"]) for row in part]).to(device)
        logits = model(to_input(x), ids[:, :-1])[0]
        totals += [caption_loss(logits / t, ids).item() for t in TEMPERATURES]
        count += (ids[:, 1:] != PAD).sum().item()
    return float(totals[0] / count), TEMPERATURES[int(np.argmin(totals))]


@torch.no_grad()
def certainty(model, x, others, ids, temperature):
    """[B] in 0..1: the geometric mean of the token probabilities of captions ids [B, L + 1], given
    clips x float [B, n, 3, S, S]. A token's weight is its loss given other clips, `others`
    [B, K, n, 3, S, S]: words that fit any clip count little. The temperature is fitted on held-out
    clips, since an overfitted model is overconfident. (Agreement between augmented views separated
    right from wrong captions less well.)"""
    def logprobs(x):
        logits = model(x, ids[:, :-1])[0] / temperature
        return -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], ignore_index=PAD,
                                reduction="none")                        # [B, L]
    weights = (ids[:, 1:] != PAD) * 0.01 - sum(map(logprobs, others.unbind(1))) / others.shape[1]
    return ((weights * logprobs(x)).sum(1) / weights.sum(1)).exp()


def frequency_loss(train, held_out):
    """Nats per token of held-out captions under the token frequencies of the training captions, all
    lists of ids, with add-one smoothing and one class for all unseen tokens."""
    counts = Counter(itertools.chain.from_iterable(train))
    total = counts.total() + len(counts) + 1
    nats = [math.log(total / (counts[token] + 1)) for ids in held_out for token in ids]
    return sum(nats) / len(nats)


def report(folder, step, loss, by_frequency):
    """Prints the held-out loss beside `frequency_loss`; returns both for the log."""
    tqdm.write(f"{folder}: step {step}: held-out loss {loss:.3f} nats per token, guessing by word "
               f"frequency {by_frequency:.3f}", file=sys.stderr)
    if loss >= by_frequency:
        tqdm.write(f"{folder}: the captioner is no better than guessing words by their frequency: "
                   "do not use its captions; it needs more captioned clips, or use --vlm DIR",
                   file=sys.stderr)
    return {"held_out": loss, "held_out_by_frequency": by_frequency}


def write_sheet(path, folder, rows, captions):
    """Writes a contact sheet: four frames of each clip above its caption."""
    contact_sheet(path, [(frames_of(folder, row, set(spread(4, row["frames"]).tolist())), text)
                         for row, text in zip(rows, captions)])


def captioned(args, run):
    """(folder, training rows, at most 256 held-out rows), all with captions of the metadata. A new
    run with fewer than FEWEST clips needs --few, which is not kept in the run's config."""
    is_allowed = vars(args).pop("few") or args.init or (run / "config.json").exists()
    folder = dataset_dir(args.name)
    rows = chosen(own_captions(folder, open_dataset(folder)), args)
    rows = [row for row in rows if row["captions"]]
    training = [row for row in rows if row["split"] == "train"]
    if not training:
        refuse(f"{folder} has no captioned clip in its training split. {WITHOUT}")
    if len(training) < FEWEST and not is_allowed:
        refuse(f"{folder}: {len(training)} captioned clips are too few to train a captioner: at "
               f"least {FEWEST} are needed. {WITHOUT}. --few trains on them anyway")
    held_out = same_held_out(run, rows, lambda: [
        row for row in rows if row["split"] != "train"] or training[:16])
    if held_out[0]["split"] == "train":
        print(f"{folder} holds out no captioned clip: the held-out loss is that of training clips",
              file=sys.stderr)
    return folder, training, Stream(held_out, args.seed).take(0, min(len(held_out), 256))


def pick_caption(row, args, step):
    """Draws one of a clip's captions by their weights."""
    weights = np.array([caption["weight"] for caption in row["captions"]])
    random = rng(args.seed, "caption", step, row["key"])
    return row["captions"][random.choice(len(weights), p=weights / weights.sum())]


@one_run
def train(args, run):
    rank, world, device = setup(args, args.batch, "--batch")
    claim(run)
    folder, rows, held_out = captioned(args, run)
    shape, step = MODELS[args.model], 0
    checkpoint = start_run(run, {"kind": "captioner", "args": vars(args), "model": shape})
    sheet = run / "samples" / f"step-{args.steps:06d}.png"
    if is_finished(checkpoint, args) and sheet.exists():
        return
    captions = [caption["text"] for row in rows for caption in row["captions"]]
    tokenizer = open_tokenizer(run / "tokenizer.json", captions, args.vocab)
    texts = functools.lru_cache(maxsize=2**16)(lambda t: encode(tokenizer, t, args.max_tokens))
    captions = [texts(text) for text in captions]
    torch.manual_seed(args.seed)
    model = Captioner(**shape, vocab=tokenizer.get_vocab_size()).to(device)
    optimizer = MuonAdamW(model, plain=("head", "words", "position", "stem"))
    if checkpoint:
        step, saved = load_step(checkpoint)
        model.load_state_dict(saved["model"])
        restore_optimizer(optimizer, model, saved["optimizer"])
    else:
        word_prior(model, captions)
    # the sum over a caption's tokens is divided by the mean length: each token counts alike
    length = sum(len(ids) - 1 for ids in captions) / len(captions)
    frames = Frames(folder, rows + held_out, shape["size"], shape["frames"])
    stream = Stream(rows, args.seed)
    print(f"{run}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, "
          f"{len(rows)} captioned clips to train on, {len(held_out)} held out, {device}",
          file=sys.stderr)

    def batch(step):
        picked = stream.take(step * args.batch, args.batch)[rank::world]
        return draw_batch(picked, frames, texts, args, step, rows)

    def learn(step, drawn):
        view, jitter, noise, ids, blank = (moved(tensor, device) for tensor in drawn[1:])
        x = augment(view, jitter) + 0.15 * noise
        loss, words = losses(model, x, ids, blank) / (args.batch * length)
        (loss + WORDS * words).backward()
        norm = take_step(model, optimizer, lr_at(step, args))
        return {"loss": loss.detach(), "words": words.detach()}, norm, drawn.keys

    by_frequency = frequency_loss([ids[1:] for ids in captions], [
        texts(row["captions"][0]["text"])[1:] for row in held_out])

    def evaluate(done):
        loss, temperature = held_out_loss(model, held_out, frames, texts)
        return {**report(run, done, loss, by_frequency), "temperature": temperature}

    fit(args, run, step, batch, learn, evaluate,
        lambda: {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer, model)})
    if rank == 0 and not sheet.exists():
        shown = held_out[:24]
        x = to_input(torch.from_numpy(np.stack([frames(row["key"]) for row in shown])).to(device))
        write_sheet(sheet, folder, shown, [tokenizer.decode(ids).strip()
                                           for ids, _ in model.generate(x, args.max_tokens)])
    barrier()


# -- captioning a data set -------------------------------------------------------------------------


def finished(run):
    """(config, newest checkpoint's folder) of a captioner's run; refuses an unfinished one."""
    config, step = read_config(run, "captioner"), last_step(run)
    if not is_finished(step, argparse.Namespace(**config["args"])):
        refuse(f"{run} has not finished training: run its caption.py --train command again")
    return config, step


def resume(part, keys, block):
    """Truncates a .part file to its complete blocks of clips in the order of `keys`; returns their
    number of clips. Resuming at whole blocks writes the same bytes as an unbroken run."""
    lines = part.read_bytes().split(b"\n")[:-1]
    n = len(list(itertools.takewhile(
        lambda pair: pair[0].startswith(json_line({"key": pair[1]})[:-2].encode()),
        zip(lines, keys))))
    n = n if n == len(keys) else n - n % block
    os.truncate(part, sum(len(line) + 1 for line in lines[:n]))
    return n


def own_writer(name, folder, rows, args, device):
    """(load, write) of a captioner of our own: load(row) runs in a thread; write(pairs of a row and
    the loaded frames) yields (key, caption, prompt, scores) in any order."""
    run = run_dir(name)
    (config, step), tokenizer = finished(run), open_tokenizer(run / "tokenizer.json")
    try:
        model = Captioner(**config["model"], vocab=tokenizer.get_vocab_size())
        model.load_state_dict(load_file(step / "model.safetensors"))
    except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:
        refuse(f"{step} is damaged, or {run / 'config.json'}: {error}")
    model.to(device).eval().requires_grad_(False)
    frames = Frames(folder, rows, config["model"]["size"], config["model"]["frames"], mib=0)
    most, temperature = config["args"]["max_tokens"], run_temperature(run)
    read = ((row["key"], load_or_fault(lambda row: frames(row["key"]), row))
            for row in Stream(rows, 0).take(0, len(rows)))
    others = {key: to_input(torch.from_numpy(view).to(device)) for key, view in itertools.islice(
        (pair for pair in read if not isinstance(pair[1], Exception)), 5)}

    def write(pairs):
        for group in in_groups(pairs, args.batch):
            x = to_input(torch.from_numpy(np.stack([view for _, view in group])).to(device))
            captions = model.generate(x, most)
            ids = pad([[BOS, *ids, EOS] for ids, _ in captions]).to(device)
            four = torch.stack([torch.stack(
                [other for key, other in others.items() if key != row["key"]][:4] or [view])
                for (row, _), view in zip(group, x)])
            sure = certainty(model, x, four, ids, temperature).tolist()
            yield from ((row["key"], tokenizer.decode(ids).strip(), "",
                         {"logprob": score, "sure": sure})
                        for (row, _), (ids, score), sure in zip(group, captions, sure))

    return lambda row: frames(row["key"]), write


def run_temperature(run):
    """The last temperature in the run's log; 1 for runs older than `certainty`."""
    return next(iter(read_log(run)[-1:]), {}).get("temperature", 1.0)


def in_groups(items, n):
    """Lists of n items; the last may be shorter."""
    items = iter(items)
    while group := list(itertools.islice(items, n)):
        yield group


def load_or_fault(load, row):
    """load(row), or the error that the clip causes; errors of the machine are raised."""
    try:
        return load(row)
    except Exception as error:
        if is_machine_error(error):
            raise
        return error


def caption_shard(load, write, scorer, rows, path, args, bar):
    """Writes the captions of one shard's `rows` to `path`, rejected ones to `rejected_path`, in the
    order of the rows. They are collected in `part_path` first."""
    part, keys = part_path(path, args), [row["key"] for row in rows]
    with open(part, "a", encoding="utf-8") as file:
        if not is_sole(file):
            refuse(f"{part}: another process writes these captions: wait until it ends")
        first = resume(part, keys, args.batch)
        bar.update(first)
        todo, waiting, done = rows[first:], keys[first:], {}

        def pairs():
            for i, loaded in prefetch(lambda i: load_or_fault(load, todo[i]), 0, len(todo),
                                      ahead=args.batch):
                if isinstance(loaded, Exception):
                    name = todo[i]["key"]
                    note_fault(path.with_name("faults.log"), faulted(name, loaded))
                    tqdm.write(f"warning: {name}: {loaded}", file=sys.stderr)
                    done[name] = json_line({"key": name, "caption": "", "prompt": "", "scores": {},
                                            "rejected": UNREADABLE})
                else:
                    yield todo[i], loaded

        def flush():
            while waiting and waiting[0] in done:
                file.write(done.pop(waiting.pop(0)))
                file.flush()
                bar.update()

        for name, text, prompt, scores in write(pairs()):
            scores = {**scores, **(scorer(name, text) if scorer else {})}
            reason = fault(text, args.style) if prompt else (
                "unsure" if scores["sure"] < args.sure else None if text else "empty")
            done[name] = json_line({
                "key": name, "caption": text, "prompt": prompt, "scores": {
                    score: round(value, 4) for score, value in scores.items()},
                **({"rejected": reason} if reason else {})})
            flush()
        flush()
        records, crc = read_rows(part), path.with_name(f"{path.name}.crc")
        rejected = [record for record in records if "rejected" in record]
        if rejected:
            write_rows(rejected_path(path), rejected)
        else:
            rejected_path(path).unlink(missing_ok=True)      # of an earlier run
        crc.unlink(missing_ok=True)
        write_rows(path, [record for record in records if "rejected" not in record])
        write_text(crc, f"{zlib.crc32(path.read_bytes())}\n")
        part.unlink()
    remove_parts(path)


def captioned_records(path):
    """The records of a shard's captions, rejected ones included."""
    return [record for file in (path, rejected_path(path)) if path.exists() and file.exists()
            for record in read_rows(file)]


def is_captioned(path, keys, args):
    """Whether the captions of all `keys` are written; removes what other commands left unfinished.
    A run that was killed after writing them still has its `part_path`, and ends again."""
    if part_path(path, args).exists() or not set(keys) <= {
            record["key"] for record in captioned_records(path)}:
        return False
    remove_parts(path)
    return True


def shaping(args):
    """{option: value} of the options that change the captions."""
    return {name: value for name, value in vars(args).items()
            if name not in ("name", "all", "eval", "device", "where", "skip_clips", "few")}


def refuse_other_options(folder, run, args, vlm):
    """Refuses another captioner or other options than those that a source's captions were made with
    (recorded in caption-options-SOURCE.json)."""
    path = folder / f"caption-options-{run}.json"
    model = zlib.crc32((run_dir(vlm) / "config.json").read_bytes())
    now = {**shaping(args), "vlm": f"{run_dir(vlm).name} ({model:08x})"}
    now = {name: value for name, value in now.items() if name not in ("batch", "source")}
    if any(folder.glob(f"shard-*captions-{run}.jsonl*")) and path.exists():
        was = read_published(path)
        for name in sorted(was):
            if was[name] != now.get(name, was[name]):
                refuse(f"captions of {folder} by {run} were made with --{name} {was[name]}, not "
                       f"{now[name]}: give another --source, or remove them: rm {folder}/"
                       f"shard-*captions-{run}.jsonl*")
    if int(os.environ.get("RANK", 0)) == 0:
        write_text(path, json.dumps(now, indent=1, sort_keys=True) + "\n")


def part_path(path, args):
    """The unfinished file of a shard, named by a hash of the options that change the captions."""
    text = json.dumps(shaping(args), sort_keys=True)
    return path.with_name(f"{path.name}.{hashlib.sha256(text.encode()).hexdigest()[:8]}.part")


def remove_parts(path):
    """Removes unfinished files of a finished shard, except those of running processes."""
    for part in path.parent.glob(f"{path.name}.*.part"):
        with contextlib.suppress(FileNotFoundError), open(part) as file:
            if is_sole(file):
                part.unlink()


def rejected_path(path):
    shard, _, run = path.name.partition(".captions-")
    return path.with_name(f"{shard}.rejected-captions-{run}")


def caption(args):
    rank, world, device = setup(args)
    folder, vlm = dataset_dir(args.name), args.vlm or f"{Path(args.name).name}-captioner"
    rows, run = own_captions(folder, open_dataset(folder)), run_dir(vlm).name
    wanted = [row for row in rows if args.all or not row["captions"]]
    if not wanted:
        return print(f"{folder}: each of {len(rows)} clips has a caption of its own: nothing to do "
                     "(--all captions them too)", file=sys.stderr)
    if not args.vlm and not run_dir(vlm).exists():
        refuse(f"{folder}: {len(wanted)} clips have no caption, and no captioner has been trained "
               f"({run_dir(vlm)}). Train one (--train). {WITHOUT}")
    if not (run_dir(vlm) / "config.json").is_file():
        read_config(run_dir(vlm), "captioner")                   # refuses it, and says what it is
    config = read_published(run_dir(vlm) / "config.json")
    is_own = "kind" in config and "init" not in config.get("model", {})
    if is_own and (args.lm or args.frames or args.prompt):
        refuse(f"{vlm} is a run of our own captioner: it takes no --lm, --frames or --prompt")
    run = args.source or (run if is_own else f"{run}-{args.style}")
    if run in {caption["source"] for row in rows for caption in row["captions"]}:
        refuse(f"{run} is a source of {folder}'s own captions: give another --source")
    if not os.access(folder, os.W_OK):
        refuse(f"{folder} cannot be written to: captions are kept beside its shards")
    sweep(folder)                        # temporary files of a killed run
    refuse_other_options(folder, run, args, vlm)
    sheet, shards = folder / f"captions-{run}.png", {}
    for row in sorted(wanted, key=lambda row: row["shard"]):
        shards.setdefault(folder / f"{row['shard']}.captions-{run}.jsonl", []).append(row)
    todo = [(path, mine) for path, mine in [*shards.items()][rank::world]
            if not is_captioned(path, [row["key"] for row in mine], args)]
    wanted = [*itertools.chain.from_iterable(shards.values())]
    if todo:
        load, write = (own_writer if is_own else vlm_writer)(vlm, folder, rows, args, device)
        scorer = Scorer(args, folder, rows, device) if args.clip else None
    with tqdm(total=sum(len(mine) for _, mine in todo), desc="caption", unit="clip",
              disable=rank > 0) as bar:
        for path, mine in todo:
            caption_shard(load, write, scorer, mine, path, args, bar)
    barrier()
    if rank:
        return
    keys = {row["key"] for row in wanted}
    records = {record["key"]: record for path in shards for record in captioned_records(path)
               if record["key"] in keys}
    texts = {key: record["caption"] for key, record in records.items() if "rejected" not in record}
    if todo or not sheet.exists():
        shown = [row for row in Stream(wanted, 0).take(0, min(36, len(wanted)))
                 if records[row["key"]].get("rejected") != UNREADABLE]
        write_sheet(sheet, folder, shown, [
            texts.get(row["key"], "(rejected) " + records[row["key"]]["caption"]) for row in shown])
    reasons = Counter(record["rejected"] for record in records.values() if "rejected" in record)
    rejects = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    print(f"{folder}: {len(texts)} of {len(wanted)} clips captioned by {run}" + (
        f"; {rejects}, see shard-*.rejected-captions-{run}.jsonl" if rejects else ""),
        file=sys.stderr)
    print(f"look at {sheet}; remove these captions: rm {folder}/shard-*captions-{run}.jsonl*",
          file=sys.stderr)
    if args.eval:
        evaluate(folder / f"captions-{run}.eval.json", rows, texts)


# -- scores against reference captions -------------------------------------------------------------


def words_of(text):
    """Lower-case words without punctuation, split about as in the Penn Treebank."""
    return re.findall(r"n't|'(?:s|re|ve|ll|d|m)\b|(?:(?!n't)[^\W_])+", text.lower())


def grams(words):
    """Counts of the n-grams of 1 to 4 words."""
    return Counter(tuple(words[i:i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def bleu(counts):
    """BLEU-1 to BLEU-4 of `bleu_counts` of a caption, or of their sum."""
    guesses, correct, (length, nearest) = np.split(counts, [4, 8])
    products = np.cumprod((correct + 1e-15) / (guesses + 1e-9))
    ratio = (length + 1e-15) / (nearest + 1e-9)
    return (products ** (1 / np.arange(1, 5)) * math.exp(min(0, 1 - 1 / ratio))).tolist()


def bleu_counts(mine, texts):
    """[10]: n-grams by n, those that are in a reference, and the two texts' lengths."""
    counts, best = grams(mine), functools.reduce(lambda a, b: a | b, map(grams, texts))
    correct = [sum(min(n, best[g]) for g, n in counts.items() if len(g) == k) for k in range(1, 5)]
    nearest = min((abs(len(text) - len(mine)), len(text)) for text in texts)[1]
    return np.array([*(max(0, len(mine) - k) for k in range(4)), *correct, len(mine), nearest])


def rouge_l(mine, texts):
    """ROUGE-L: F score (beta 1.2) of the longest common subsequence, best precision and recall."""
    best = [0.0, 0.0]
    for text in texts:
        row = [0] * (len(text) + 1)
        for word in mine:
            before, row = row, [0]
            for j, other in enumerate(text):
                row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
        best = [max(b, row[-1] / max(1, len(of))) for b, of in zip(best, (mine, text))]
    precision, recall = best
    return 2.44 * precision * recall / (recall + 1.44 * precision) if precision * recall else 0.0


def score_captions(candidates, references, words=words_of):
    """BLEU-1..4, ROUGE-L and CIDEr-D of candidates {key: text} and references {key: texts}, as in
    pycocoevalcap: {"bleu": [4], "rouge_l", "cider"}, and for each clip "bleu_each" and so on.
    (METEOR and SPICE need Java and WordNet.)"""
    texts = {key: [words(text) for text in references[key]] for key in candidates}
    mine = {key: words(text) for key, text in candidates.items()}
    counted = {key: bleu_counts(mine[key], texts[key]) for key in mine}
    counts = {key: [grams(text) for text in texts[key]] for key in texts}
    seen = Counter(g for figures in counts.values() for g in set().union(*figures))

    def weigh(counts):
        """TF-IDF weights by n; the number of bigrams, which CIDEr-D uses as the length."""
        tables = [{}, {}, {}, {}]
        for g, n in counts.items():
            tables[len(g) - 1][g] = n * (math.log(len(mine)) - math.log(max(1, seen[g])))
        return tables, sum(n for g, n in counts.items() if len(g) == 2)

    def cider(key):
        (a, length), total = weigh(grams(mine[key])), 0.0
        for b, other in map(weigh, counts[key]):
            for x, y in zip(a, b):
                norm = math.sqrt(sum(v * v for v in x.values()) * sum(v * v for v in y.values()))
                dot = sum(min(v, y.get(g, 0)) * y.get(g, 0) for g, v in x.items())
                total += dot / (norm or 1) * math.exp(-(length - other)**2 / 72)
        return 10 * total / 4 / len(counts[key])

    rouges = {key: rouge_l(mine[key], texts[key]) for key in mine}
    ciders = {key: cider(key) for key in mine}
    return {"bleu": bleu(sum(counted.values())), "rouge_l": float(np.mean([*rouges.values()])),
            "cider": float(np.mean([*ciders.values()])), "rouge_l_each": rouges,
            "cider_each": ciders, "bleu_each": {key: bleu(counted[key]) for key in mine}}


def evaluate(path, rows, texts):
    """Scores captions {key: text} against the clips' own; writes and prints the figures."""
    references = {row["key"]: [c["text"] for c in row["captions"]] for row in rows
                  if row["key"] in texts and row["captions"]}
    if not references:
        refuse("--eval: no clip with captions of its own has a new one: give --all, or look at the "
               "rejected captions")
    scores = score_captions({key: texts[key] for key in references}, references)
    figures = {**{f"bleu_{n + 1}": x for n, x in enumerate(scores["bleu"])},
               **{name: scores[name] for name in ("rouge_l", "cider")}, "clips": len(references),
               "references": sum(map(len, references.values()))}
    write_text(path, json.dumps(figures, indent=1) + "\n")
    print(" ".join(f"{name} {value:.4g}" for name, value in figures.items()))


# -- the command line ------------------------------------------------------------------------------


def parse(argv=None):
    parser = option_parser(__doc__)
    parser.epilog = ("Look at data/NAME/captions-RUN.png; rm data/NAME/shard-*captions-RUN.jsonl* "
                     "removes the captions of RUN.")
    parser.add_argument("name", help="data set: data/NAME, or a path with a slash")
    add = parser.add_argument_group("what to do").add_argument
    add("--train", action="store_true", help="train a captioner, instead of captioning the clips")
    add("--few", action="store_true",
        help=f"with --train: allow fewer than {FEWEST} captioned clips")
    add("--run", help="the run to train: runs/RUN, or a path with a slash (NAME-captioner)")
    add("--vlm", help="the captioner: a run, or a published folder (NAME-captioner)")
    add("--all", action="store_true", help="caption all clips, even those with a caption")
    add("--eval", action="store_true",
        help="score the captions against the clips' own: BLEU, ROUGE-L, CIDEr")
    add("--batch", type=number(int, 1), default=32,
        help="clips per step, over all ranks, or captioned at a time (%(default)s)")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="captioner-xs", choices=sorted(MODELS),
        help="size of the captioner to train (%(default)s)")
    add("--vocab", type=number(int, 259), default=512,
        help="largest vocabulary of the captions' BPE, 259 or more tokens (%(default)s)")
    add("--max_tokens", type=number(int, 1), default=128,
        help="longest caption, in tokens (%(default)s)")
    add("--paste", type=number(float, 0, 1), default=0.0, help="share of training clips, 0 to 1, "
        "onto which moving objects of another are pasted, the captions joined by 'and'; for dark "
        "backgrounds (%(default)s)")
    add("--sure", type=number(float, 0, 1), default=0.75, metavar="P", help="reject a caption of a "
        "captioner of your own below this `certainty`, 0 to 1 (%(default)s; 0: none)")
    training_options(parser, steps=700, lr=8e-3, warmup=60, eval_every=350)
    published_options(parser)
    args = parser.parse_args(argv)
    if args.init:
        parser.set_defaults(lr={"connector": 1e-3, "lora": 2e-4, "all": 2e-5}[args.tune])
        args = parser.parse_args(argv)
    if (args.vlm and args.train) or (args.run and not args.train):
        refuse("--run goes with --train, --vlm without it")
    for name, *others in map(str.split, ("eval all", "aesthetics clip", "summary lm", "init train",
                                         "few train", "template vlm lm init")):
        if getattr(args, name) and not any(getattr(args, other) for other in others):
            refuse(f"--{name} goes with " + " or ".join(f"--{other}" for other in others))
    return args


@one_line
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:
        return bench("bench", argv[1:], "caption_peers.py", "transformers")
    args = parse(argv)
    if not args.train:
        return caption(args)
    run = run_dir(args.run or f"{Path(args.name).name}-captioner")
    try:
        (tune if args.init else train)(args, run)
    except Unreadable as error:
        refuse(f"{error}: prepare the data set again, or leave it out (--skip_clips)")
    print(f"{run}: trained; look at {run / ('log.jsonl' if args.init else 'samples')}",
          file=sys.stderr)


# == published weights: key maps, text encoders ====================================================
#
# Papers: Raffel 2019 (T5, 1910.10683); Chung 2023 (UMT5, 2304.09151); Radford 2021 (CLIP,
# 2103.00020); Ainslie 2023 (grouped queries, 2305.13245); Hu 2021 (LoRA, 2106.09685); Peng 2023
# (NTK scaling, 2309.00071).


def read_published(path, missing=None):
    """Reads the object of a published JSON file; returns `missing`, if given, without a file."""
    if missing is not None and not path.exists():
        return missing
    with contextlib.suppress(OSError, ValueError, RecursionError):
        result = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(result, dict):
            return result
    if path.is_file():
        refuse_pointer(path)
        refuse(f"{path} holds no JSON object: it is damaged, fetch it again")
    refuse(f"{path} is missing{lying_in(path.parent)}")


@contextlib.contextmanager
def read_as_config(where, name="config.json"):
    """Turns errors in the block into one line about the published config: a missing key, or a
    value that no published model of the family has."""
    try:
        yield
    except KeyError as error:
        refuse(f"{where}: {error} is missing in the config or in the weights")
    except ValueError as error:
        refuse(f"{where}: {error}")
    except (TypeError, AttributeError, ArithmeticError, LookupError, RuntimeError) as error:
        refuse(f"{where}: a value in its {name} does not fit: {' '.join(str(error).split())[:200]}")


TANH = functools.partial(F.gelu, approximate="tanh")
ACTS = {    # activations by their published names
    **dict.fromkeys(("gelu", "gelu_python"), F.gelu), "relu": F.relu,
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh",
                     "gelu_python_tanh"), TANH),
    **dict.fromkeys(("silu", "swish"), F.silu),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


def check_transformer(config):
    """Raises ValueError for a TransformerConfig that no network can have."""
    width, heads, kv_heads = config.width, config.heads, config.kv_heads or config.heads
    if not all(isinstance(n, int) and n > 0 for n in (width, heads, kv_heads)):
        raise ValueError(f"width {width}, heads {heads}, kv_heads {kv_heads}: they must be "
                         "numbers above 0")
    if (not config.head and width % (2 * heads)) or heads % kv_heads:
        raise ValueError(f"width {width}, heads {heads}, kv_heads {config.kv_heads}: heads must "
                         "divide width into even parts, and kv_heads must divide heads")
    if not isinstance(config.depth, int) or not 0 <= config.depth <= 1000:
        raise ValueError(f"{config.depth} layers: it must be a number up to 1000")
    if config.sections and 2 * sum(config.sections) != config.head_dim:
        raise ValueError(f"mrope_section {list(config.sections)}: the sum must be half of the head "
                         f"dim {config.head_dim}")
    if config.act not in ACTS:
        raise ValueError(f"activation {config.act} is not one of {', '.join(sorted(ACTS))}")


def scaled_rotary(positions, stack, prompts=None):
    """`rotary` of published models that scale the angles. With sections positions are [3, ...];
    prompts: lengths [B] of the prompts, for Qwen 1, which also scales the queries."""
    E, base = stack.head_dim, stack.rope
    i = torch.arange(0, E, 2, dtype=torch.float32, device=positions.device)
    if stack.trained and prompts is not None:        # NTK: the base grows by powers of the excess
        alpha = 2 ** ((prompts / stack.trained).log2() + 1).ceil() - 1
        base = (base * alpha.clamp(min=1) ** (E / (E - 2)))[:, None, None]
    speeds = base ** (-i / E)
    if len(stack.scaling) == 1:                      # linear: all wavelengths grow alike
        speeds = speeds / stack.scaling[0]
    elif stack.scaling:                              # Llama 3.1: only long wavelengths grow
        factor, low, high, length = stack.scaling
        share = ((length * speeds / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        speeds = speeds * (share + (1 - share) / factor)
    angles = positions[..., None].float() * speeds
    if stack.sections:
        axis = torch.tensor([axis for axis in range(3) for _ in range(stack.sections[axis])],
                            device=i.device)
        angles = angles.gather(0, axis.expand(1, *angles.shape[1:]))[0]
    if not stack.trained:
        return cos_sin(angles)
    length = math.log(stack.trained)                 # a query's factor: log_trained(position + 1)
    return *cos_sin(angles), (positions + 1.0).log().clamp(min=length) / length


class ExpertLayer(Layer):
    """A Layer with other weights for image tokens: separate ones (stack.expert -1, CogVLM), or the
    text's plus a product of rank stack.expert (InternLM-XComposer2)."""

    def __init__(self, stack):
        super().__init__(stack)
        self.expert = nn.ModuleDict({
            name: type(f)(f.in_features, f.out_features, f.bias is not None)
            if stack.expert < 0 else nn.Sequential(
                nn.Linear(f.in_features, stack.expert, False),
                nn.Linear(stack.expert, f.out_features, False))
            for name, f in self.named_children() if isinstance(f, nn.Linear)})

    def linear(self, name, x, image):
        f = getattr(self, name)
        if image is None:
            return f(x)
        theirs = self.expert[name](x[image])
        if self.stack.expert > 0:
            return f(x).index_put((image,), theirs, accumulate=True)
        y = theirs.new_empty(*x.shape[:-1], theirs.shape[-1])
        y[image], y[~image] = theirs, f(x[~image])
        return y


def fill_prefix(decoder, cache, slots, rows):
    """Runs the tokens that all prompts begin with once, if they are 16 or more, and copies their
    keys and values into the slots; returns their number, or 0."""
    lengths = [len(row.request.ids) for row in rows]
    if cache.prefix is None:
        texts = [[str(i) for i in row.request.ids] for row in rows]
        shared = os.path.commonprefix(texts) if len(rows) > 1 and not decoder.stack.trained else []
        n = shared.index("-1") if "-1" in shared else min(len(shared), *lengths) - 1
        first, cache.prefix = rows[0].request, []
        if n >= 16:
            cache.plan([slots[0]], 0, n)
            decoder(first.x[None, :n], first.positions[..., None, :n], cache)
            cache.save_prefix(first.ids[:n], slots[0])
    start = len(cache.prefix)
    if not start or not all(len(row.request.ids) > start and row.request.ids[:start] == cache.prefix
                            for row in rows):
        return 0
    cache.copy_prefix(slots)
    return start


def nucleus(scores, draws, temperature, top_p, vocab):
    """Draws a token [B, 1] for each row of scores [B, V] by draws [B] in 0..1, from the most likely
    ones whose probabilities add up to top_p, of the first `vocab`."""
    order = (scores[:, :vocab] / temperature).softmax(-1).double().sort(
        dim=-1, descending=True, stable=True)
    reach = order.values.cumsum(-1)
    reach = reach.masked_fill(reach - order.values >= top_p, torch.inf)
    most = reach.masked_fill(reach.isinf(), 0).amax(-1)
    index = torch.searchsorted(reach, (draws.to(reach) * most)[:, None])
    return order.indices.gather(1, index.clamp(max=reach.shape[1] - 1))


def penalised(logits, rows, penalty, size):
    """Logits [B, V] after repetition_penalty and no_repeat_ngram_size, as transformers applies them
    to prompt and answer: the logit of a token that a row holds is divided by `penalty`, or
    multiplied below 0; a token that would repeat `size` tokens (0: any may) gets -inf."""
    scores, ends = logits.float().clone(), []
    for row in rows:
        ids = row.request.counted + row.ids
        row.seen.update(dict.fromkeys(ids[row.n_noted:]))
        for i in range(max(size - 1, row.n_noted), len(ids) * bool(size)):
            row.grams.setdefault(tuple(ids[i - size + 1:i]), []).append(ids[i])
        row.n_noted = len(ids)
        ends.append(row.grams.get(tuple(ids[len(ids) - size + 1:])))
    index = torch.from_numpy(np.concatenate([scores.shape[1] * n + np.fromiter(row.seen, np.int64)
                                             for n, row in enumerate(rows)])).to(scores.device)
    seen = scores.view(-1)[index]
    scores.view(-1)[index] = torch.where(seen < 0, seen * penalty, seen / penalty)
    for score, banned in zip(scores, ends):
        if banned:
            score[banned] = -torch.inf
    return scores


class Renamed(dict):
    """Tensors by our names; `theirs`: {our name: the file's}."""


USUALLY = {     # our name: a module's name in most files | in Wan's CLIP
    "decoder.head": "lm_head", "decoder.norm": "model.norm", "decoder.embed": "model.embed_tokens",
    "tower.cls": "embeddings.class_embedding|visual.cls_embedding",
    "tower.position": "embeddings.position_embedding|visual.pos_embedding",
    "tower.patch": "embeddings.patch_embedding|visual.patch_embedding",
    "tower.pre": "pre_layrnorm|visual.pre_norm", "tower.post": "post_layernorm",
    "connector.0": "multi_modal_projector.linear_1", "visual": "visual_projection",
    "connector.2": "multi_modal_projector.linear_2", "textual": "text_projection"}


def published_name(name, weights):
    """The file's name for one of ours; for a missing tensor derived from a similar one, of another
    layer or the weight of the same bias."""
    def form(name):
        return re.sub(r"\.layers\.\d+\.", ".layers.N.", name.rpartition(".")[0])

    theirs = getattr(weights, "theirs", {})
    if name in theirs or not theirs:
        return theirs.get(name, name)
    nearest = next((one for ours, one in theirs.items() if form(ours) == form(name)), None)
    if not nearest:
        module, _, kind = name.rpartition(".")
        is_wan = any(each.startswith("visual.p") for each in theirs.values())
        module = USUALLY.get(module, module).split("|")[-1 if is_wan else 0]
        return module if re.search("(class|cls|pos)_embedding$", module) else f"{module}.{kind}"
    nearest = re.sub(r"\.(weight|bias)$", f".{name.rpartition('.')[2]}", nearest)
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return re.sub(r"\.\d+\.", f".{layer[1]}.", nearest, count=1) if layer else nearest


def load_strictly(model, weights, patterns, ignored, dtype, device, where):
    """Loads published weights into `model`, which is on the meta device. `patterns` lists (pattern
    of our module's name, published name, or alternatives separated by |). Refuses, by name, tensors
    that are missing, of another shape, or unexpected and not `ignored`."""
    state, read, used, faults = {}, {}, set(), []
    for name, parameter in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        theirs = next(match.expand(theirs) for ours, theirs in patterns
                      if (match := re.fullmatch(ours, module)))
        names = [f"{part}.{kind}" for part in theirs.split("|")]
        used.update(names)
        there = next((part for part in names if part in weights), None)
        if there is None:
            faults.append((names[0], "missing"))
        elif not torch.is_tensor(weights[there]):
            faults.append((there, "no tensor"))
        elif (tensor := weights[there]).shape != parameter.shape:
            faults.append((there, f"{list(tensor.shape)}, not {list(parameter.shape)}"))
        elif not tensor.is_floating_point():
            faults.append((there, f"{str(tensor.dtype)[6:]}, as quantized weights are"))
        else:
            state[name] = tensor.to(device, dtype)
            read[published_name(there, weights)] = state[name]
    faults += [(name, "unexpected") for name in sorted(weights)
               if name not in used and not re.fullmatch(ignored, name)]
    if faults:
        lines = [f"{published_name(name, weights)} is {what}" for name, what in faults[:8]]
        refuse(f"{where}: " + "; ".join(lines) + f"; {len(faults)} in all" * (len(faults) > 8))
    refuse_nan(read, where)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def published_tensors(path, mark, ours=""):
    """`read_tensors` without wrappers and prefixes; `mark` and `ours`: arguments of `unwrapped`."""
    return unwrapped(innermost(read_tensors(path)), mark, ours)


# Marks for `unwrapped`: the pattern of a name, and the prefix of its network's names
T5_MARK = r"(encoder\.)?block\.0\.layer\.0\.layer_norm\.weight", "encoder."
CLIP_MARK = r"(text_model\.)?embeddings\.token_embedding\.weight", "text_model."
TOWER_MARK = r"(vision_model\.)?embeddings\.patch_embedding\.weight"
LM = r"(?:language_model\.model|model\.language_model|llm\.model|transformer|model)\."
LM_MARK = LM + r"(embed_tokens|tok_embeddings|wte)\.weight"
T5_KEYS = [
    (r"embed", r"shared|encoder.embed_tokens"), (r"norm", r"encoder.final_layer_norm"),
    (r"tables.(\d+)", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias"),
    (r"layers.(\d+).norm1", r"encoder.block.\1.layer.0.layer_norm"),
    (r"layers.(\d+).norm2", r"encoder.block.\1.layer.1.layer_norm"),
    (r"layers.(\d+).([qkv])", r"encoder.block.\1.layer.0.SelfAttention.\2"),
    (r"layers.(\d+).out", r"encoder.block.\1.layer.0.SelfAttention.o"),
    (r"layers.(\d+).gate", r"encoder.block.\1.layer.1.DenseReluDense.wi_0"),
    (r"layers.(\d+).up", r"encoder.block.\1.layer.1.DenseReluDense.wi_1"),
    (r"layers.(\d+).down", r"encoder.block.\1.layer.1.DenseReluDense.wo")]
T5_IGNORED = r"decoder\..*|lm_head\.weight"                              # of a whole T5
WAN_T5 = "models_t5_umt5-xxl-enc-bf16.pth"                               # UMT5 in Wan's own layout
WAN_KEYS = [
    (r"embed", r"token_embedding"), (r"norm", r"norm"),
    (r"tables.(\d+)", r"blocks.\1.pos_embedding.embedding"),
    (r"layers.(\d+).(norm\d)", r"blocks.\1.\2"), (r"layers.(\d+).([qkv])", r"blocks.\1.attn.\2"),
    (r"layers.(\d+).out", r"blocks.\1.attn.o"), (r"layers.(\d+).gate", r"blocks.\1.ffn.gate.0"),
    (r"layers.(\d+).up", r"blocks.\1.ffn.fc1"), (r"layers.(\d+).down", r"blocks.\1.ffn.fc2")]
CLIP_KEYS = [
    (r"embed", r"text_model.embeddings.token_embedding"), (r"norm", r"text_model.final_layer_norm"),
    (r"position", r"text_model.embeddings.position_embedding"),
    (r"layers.(\d+).norm(\d)", r"text_model.encoder.layers.\1.layer_norm\2"),
    (r"layers.(\d+).([qkv]|out)", r"text_model.encoder.layers.\1.self_attn.\2_proj"),
    (r"layers.(\d+).up", r"text_model.encoder.layers.\1.mlp.fc1"),
    (r"layers.(\d+).down", r"text_model.encoder.layers.\1.mlp.fc2")]
CLIP_IGNORED = (r"text_model\.embeddings\.position_ids|vision_model\..*|logit_scale|"
                r"(text|visual)_projection\.weight|text_model\.head\..*|logit_bias")


def values_of(config):
    """A published config with strings such as "1e-5" or "true" converted. Nulls are dropped, except
    of keys in VALUES: there null is a value (no sliding window), or an error."""
    if isinstance(config, dict):
        return {name: values_of(value) for name, value in config.items()
                if value is not None or name in VALUES}
    if isinstance(config, list):
        return [values_of(value) for value in config]
    if isinstance(config, str) and re.fullmatch(
            r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[Tt]rue|[Ff]alse", config):
        return json.loads(config.lower()) if config[-1] == "e" else (
            int(config) if re.fullmatch(r"[-+]?\d+", config) else float(config))
    return config


# Defaults of absent keys for each config class: those of transformers 4.36 to 5.24, or of the
# folder's own code. A null is a value: no default replaces it.
LLAMA = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000,
             num_attention_heads=32, num_key_value_heads=None, head_dim=None, hidden_act="silu",
             rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=2048,
             tie_word_embeddings=False)
QWEN2 = LLAMA | dict(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32,
                     max_position_embeddings=32768)
MISTRAL = LLAMA | dict(intermediate_size=14336, num_key_value_heads=8, sliding_window=4096,
                       max_position_embeddings=131072)
CLIP = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            image_size=224, patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5)
SIGLIP = CLIP | dict(patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
T5 = dict(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, vocab_size=32128,
          relative_attention_num_buckets=32, relative_attention_max_distance=128,
          layer_norm_epsilon=1e-6, feed_forward_proj="relu")
DEFAULTS = {
    "llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN2 | dict(head_dim=128),
    "internlm2": LLAMA | dict(vocab_size=103168, bias=True),
    "internlmxcomposer2": LLAMA | dict(vocab_size=103168, bias=True),
    "CogVLMForCausalLM": LLAMA, "omnilmm": MISTRAL,
    "minicpmv": LLAMA | dict(tie_word_embeddings=True, scale_emb=1, scale_depth=1, slice_mode=True,
                             dim_model_base=1, query_num=64, max_slice_nums=9, scale_resolution=448,
                             vision_encoder="vit_so400m_patch14_siglip_384.webli"),
    "qwen": dict(hidden_size=4096, intermediate_size=22016, num_hidden_layers=32, kv_channels=128,
                 num_attention_heads=32, vocab_size=151936, layer_norm_epsilon=1e-6, rotary_pct=1.0,
                 rotary_emb_base=10000, use_dynamic_ntk=True, use_logn_attn=True, no_bias=True,
                 tie_word_embeddings=False),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), LLAMA | dict(
        hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=152064, rms_norm_eps=1e-5, rope_theta=1e6,
        max_position_embeddings=32768)),
    "qwen2_vl's vision": dict(depth=32, embed_dim=1280, num_heads=16, mlp_ratio=4, patch_size=14,
                              hidden_act="quick_gelu", spatial_merge_size=2, temporal_patch_size=2),
    "qwen2_5_vl's vision": dict(depth=32, hidden_size=3584, num_heads=16, intermediate_size=3420,
                                patch_size=14, hidden_act="silu", spatial_merge_size=2,
                                temporal_patch_size=2, window_size=112, tokens_per_second=4,
                                fullatt_block_indexes=(7, 15, 23, 31)),
    "clip's text": CLIP | dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8,
                               max_position_embeddings=77, vocab_size=49408, eos_token_id=49407),
    "siglip's text": SIGLIP | dict(max_position_embeddings=64, vocab_size=32000),
    "t5": T5, "umt5": T5 | dict(d_ff=1024, num_layers=8, num_heads=6, vocab_size=250112,
                                feed_forward_proj="gated-gelu")}
VALUES = set().union(*DEFAULTS.values()) - {"max_position_embeddings"}
CLIP_L = CLIP | dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, patch_size=14,
                     num_attention_heads=16)        # of a LLaVA without vision_config
PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))


def clean_prompt(text):
    """The cleaning of Wan's prompts: HTML entities decoded; typographic quotes, ligatures and
    full-width forms replaced by plain characters; control characters removed; white space
    collapsed. (Wan uses ftfy, which also repairs wrongly decoded text.)"""
    text = text if "<" in text else html.unescape(text)
    text = re.sub("[\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\u3000\ufb00-\ufb06\uff01-\uffef]",
                  lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = re.sub("[\u201c-\u201f]", '"', re.sub("[\u02bc\u2018-\u201b]", "'", text))
    text = re.sub("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]", "", text)
    text = html.unescape(html.unescape(unicodedata.normalize("NFC", text)))
    return re.sub(r"\s+", " ", text).strip()


def distance_buckets(n, buckets, furthest):
    """int64 [n, n]: the row of T5's relative position table for query i and key j. One half of the
    rows is for earlier keys, one for later ones; in each, the first half holds single distances,
    the rest logarithmically wider ranges, the last row all from `furthest` on."""
    positions, half = torch.arange(n), buckets // 2
    away, exact = positions - positions[:, None], half // 2
    large = (away.abs().clamp(min=1).float() / exact).log() / math.log(furthest / exact)
    large = (exact + (large * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(away.abs() < exact, away.abs(), large) + half * (away > 0)


class TextEncoder(nn.Module):
    """A frozen text encoder, made by `open_text_encoder`. T5 and UMT5 add a relative position bias
    to the scores (T5: the first layer's table in all layers, UMT5: one in each); CLIP is causal and
    adds position embeddings; so does SigLIP, which attends to the padding and reads lower case
    without punctuation. `hash` is its name in file names."""

    def __init__(self, stack, vocab, positions=0, tables=0, buckets=32, furthest=128):
        super().__init__()
        self.buckets, self.furthest, self.max_length = buckets, furthest, positions or 512
        self.embed = nn.Embedding(vocab, stack.width)
        self.position = nn.Embedding(positions, stack.width) if positions else None
        self.tables = nn.ModuleList(nn.Embedding(buckets, stack.heads) for _ in range(tables))
        self.layers, self.norm = stack.layers(), stack.make_norm()

    def forward(self, ids, mask=None):
        """ids int64 [B, L]; mask [B, L], 0 at padding (T5's alone) -> (last hidden states, those
        before the last layer and norm), each [B, L, D]."""
        x, bias, n = self.embed(ids), None, ids.shape[1]
        if self.position is not None:
            x = x + self.position.weight[:n]
        rows = distance_buckets(n, self.buckets, self.furthest).to(ids.device)
        for i, layer in enumerate(self.layers):
            if self.tables:
                table = self.tables[i % len(self.tables)].weight.float()
                bias = table[rows].permute(2, 0, 1)[None]                # [1, A, L, L]
                if mask is not None:
                    bias = bias.masked_fill(mask[:, None, None] == 0, -torch.inf)
            before, x = x, layer(x, bias=bias)                           # [B, L, D]
        return self.norm(x), before

    def read_tokenizer(self, folder):
        """Sets `split`, text -> ids, and the ids before a text, after a text, and of padding."""
        tokens, is_clip = Tokens(folder), self.position is not None
        marks = ["<|startoftext|>", *2 * ["<|endoftext|>"]] if is_clip else ["</s>", "<pad>"]
        marks = 2 * ["</s>"] if self.is_siglip else marks
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            setting = read_published(folder / name, {}).get("pad_token")
            marks[-1] = setting["content"] if isinstance(setting, dict) else setting or marks[-1]
        *self.begin, self.after, self.padding = map(tokens.id, marks)
        if None in (*self.begin, self.after, self.padding):
            refuse(f"{folder}: the tokenizer has not all of {', '.join(marks)}")
        self.split = tokens.encode

    def pooled(self, ids, hidden):
        """[B, D]: CLIP's hidden state at the first end token of each text, SigLIP's at the last
        token. An eos_token_id 2 in CLIP's config is wrong and stands for the largest id."""
        if self.is_siglip:
            return hidden[:, -1]
        is_end = ids == (ids.amax(1, True) if self.end == 2 else self.end)
        return hidden[torch.arange(len(ids)), is_end.int().argmax(1)]

    def ids(self, texts, max_length=None):
        """(ids, mask), int64 [B, max_length]: texts with special tokens, cut and padded."""
        most, rows = max_length or self.max_length, []
        if self.position is not None and most > self.max_length:
            raise ValueError(f"max_length {most}: this encoder has {self.max_length} positions")
        for text in texts:
            text = clean_prompt(text) if self.is_wan else text
            if self.is_siglip:
                text = " ".join(text.translate(PUNCTUATION).lower().split())
            ids = self.begin + self.split(text)
            rows.append(ids[:most - 1] + [self.after])
            check_ids(rows[-1] + [self.padding], self.embed.num_embeddings, self.where)
        mask = torch.arange(most) < torch.tensor([[len(row)] for row in rows])
        padded = [row + [self.padding] * (most - len(row)) for row in rows]
        return torch.tensor(padded), mask.long()

    @torch.no_grad()
    def encode(self, texts, max_length=None, batch=8):
        """The prompt embeddings [L, D] of each text, without padding; CLIP's with padding up to
        max_length, as its models were trained."""
        encoded, device = [], self.embed.weight.device
        for i in range(0, len(texts), batch):
            ids, mask = self.ids(texts[i:i + batch], max_length)
            lengths = (mask if self.tables else torch.ones_like(mask)).sum(1).tolist()
            ids, mask = (x[:, :max(lengths)].to(device) for x in (ids, mask))
            encoded += [x[:n] for x, n in zip(self(ids, mask)[0], lengths)]
        return encoded


def wan_config(weights):
    """The config.json of Wan's text encoder, from the shapes in its file."""
    (vocab, width), (buckets, heads), (inner, _), (ffn, _) = (
        weights[name].shape for name in (
            "token_embedding.weight", "blocks.0.pos_embedding.embedding.weight",
            "blocks.0.attn.q.weight", "blocks.0.ffn.fc1.weight"))
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    return dict(model_type="umt5", d_model=width, vocab_size=vocab, num_heads=heads, d_ff=ffn,
                d_kv=inner // heads, num_layers=depth, layer_norm_epsilon=1e-6,
                relative_attention_num_buckets=buckets, feed_forward_proj="gated-gelu")


def clip_stack(config, depth, **more):
    """The TransformerConfig of a CLIP or SigLIP tower."""
    return TransformerConfig(
        config["hidden_size"], depth, config["num_attention_heads"], eps=config["layer_norm_eps"],
        ffn=config["intermediate_size"], act=config["hidden_act"], **more)


def make_text_encoder(config):
    """(TextEncoder on the meta device, a text that describes its computation) of a config."""
    kind = config.get("model_type")
    kind = "clip" if kind == "clip_text_model" else kind
    if kind in ("t5", "umt5"):
        config = DEFAULTS[kind] | config
        if config["feed_forward_proj"] != "gated-gelu":
            raise ValueError(f"feed_forward_proj {config['feed_forward_proj']} of a {kind}: known "
                             "is gated-gelu, that of T5 v1.1 and UMT5")
        stack = TransformerConfig(
            config["d_model"], config["num_layers"], config["num_heads"], ffn=config["d_ff"],
            norm="rms", glu=True, eps=config["layer_norm_epsilon"], act="gelu_new",
            head=config["d_kv"], bias=False, scale=1.0)
        shape = dict(tables=stack.depth if kind == "umt5" else 1,
                     buckets=config["relative_attention_num_buckets"],
                     furthest=config["relative_attention_max_distance"])
    elif kind in ("clip", "siglip"):
        flat = config if config["model_type"] == "clip_text_model" or "vocab_size" in config else {}
        config = {**DEFAULTS[f"{kind}'s text"], **config.get("text_config", flat),
                  **(config.get("text_config_dict") or {})}
        stack = clip_stack(config, config["num_hidden_layers"], causal=kind != "siglip")
        shape = dict(positions=config["max_position_embeddings"])
    else:
        says = f"model_type {kind}" if kind else "its config.json names no model_type"
        raise ValueError(f"{says}: known text encoders are t5 and umt5 with gated-gelu, clip, "
                         "clip_text_model and siglip")
    with torch.device("meta"):
        model = TextEncoder(stack, config["vocab_size"], **shape)
    end = config.get("eos_token_id")
    end = end[0] if isinstance(end, list) and len(end) == 1 else end
    if kind == "clip" and type(end) is not int:
        raise ValueError(f"eos_token_id {end}: it must be the number of one token")
    model.end, model.is_siglip = end, kind == "siglip"
    # users' files are named by a hash of this text, which has the class's former name
    return model, f"{stack} {shape}".replace("TransformerConfig", "Stack", 1)


def open_text_encoder(path, device="cpu", dtype=torch.float32, is_wan=False):
    """The TextEncoder of a Hugging Face folder, of a diffusers pipeline, or of Wan's own layout.
    Wan's encoder, in any layout or by `is_wan`, cleans its prompts. float16, in which T5 overflows,
    is refused for it."""
    path = where = tokens = Path(path)
    index, weights, patterns = path / "model_index.json", None, None
    is_wan = is_wan or str(read_published(index, {}).get("_class_name")).startswith("Wan")
    if (path / WAN_T5).exists():
        where, tokens, is_wan = path / WAN_T5, path / "google" / "umt5-xxl", True
        weights, patterns = read_tensors(where), (WAN_KEYS, "")
    elif (path / "text_encoder").is_dir():
        where, tokens = path / "text_encoder", path / "tokenizer"
    elif not (path / "config.json").exists():
        refuse(f"{path} holds no text encoder, neither config.json nor text_encoder/ nor {WAN_T5}: "
               f"fetch it, or name another by --text_encoder{lying_in(path)}")
    with read_as_config(where):
        config = wan_config(weights) if weights else values_of(read_published(
            where / "config.json"))
        if "_class_name" in config:
            refuse(f"{path} holds no text encoder: fetch its {WAN_T5}, or name one by "
                   "--text_encoder")
        check_published(where, config)
        model, facts = make_text_encoder(config)
    if model.is_siglip and (model.embed.num_embeddings == 256000 or str(read_published(
            tokens / "tokenizer_config.json", {}).get("tokenizer_class")).startswith("Gemma")):
        refuse(f"{path} is a SigLIP 2, which is not supported: SigLIP is")
    is_clip = model.position is not None
    if dtype == torch.float16 and not is_clip:
        refuse(f"{path}: T5 overflows in float16: use bfloat16 or float32")
    weights = weights or published_tensors(where, *(CLIP_MARK if is_clip else T5_MARK))
    patterns = patterns or ((CLIP_KEYS, CLIP_IGNORED) if is_clip else (T5_KEYS, T5_IGNORED))
    load_strictly(model, weights, *patterns, dtype, device, where)
    model.is_wan, model.where = is_wan, tokens
    with read_as_config(tokens, "tokenizer_config.json"):
        model.read_tokenizer(tokens)
        model.ids(["a dog"])
    digest = hashlib.sha256(f"{facts} {is_wan} {dtype}".encode())
    for _, tensor in sorted(model.state_dict().items()):
        digest.update(tensor.flatten()[:4096].float().cpu().numpy().tobytes())
    model.hash = digest.hexdigest()[:8]
    return model


def text_path(folder, shard, name):
    return Path(folder) / f"{shard}.text-{name}.safetensors"


def encode_captions(folder, rows, encoder, max_length=None, negative="", rank=0, world=1):
    """Writes the prompt embeddings of the captions of `rows`, of the empty prompt and of a negative
    prompt: one file per shard, in which tensor "7" belongs to text 7 of the header. A file that has
    all of them is kept; else it is rewritten, with its other texts."""
    most, shards = max_length or encoder.max_length, {}
    for row in rows:
        texts = shards.setdefault(row["shard"], {"", negative})
        texts.update(caption["text"] for caption in row["captions"])
    for shard in tqdm(sorted(shards)[rank::world], desc="encode", unit="shard", disable=rank > 0):
        path, texts = text_path(folder, shard, encoder.hash), shards[shard]
        if path.exists():
            was = read_header(path)
            if was["max_length"] != most:
                refuse(f"{path} was encoded with at most {was['max_length']} tokens, not {most}: "
                       "give the same, or remove the file")
            if texts <= set(was["texts"]):
                continue
            texts = texts.union(was["texts"])
        texts = sorted(texts, key=lambda text: (len(text), text))        # for little padding
        tensors = {str(i): x.cpu().clone() for i, x in enumerate(encoder.encode(texts, most))}
        header = {"format": RUN_FORMAT, "encoder": encoder.hash, "max_length": most, "texts": texts,
                  "sums": {name: tensor_sum(x) for name, x in tensors.items()}}
        with atomic(path) as part:
            save_file(tensors, part, {"nanosora": json.dumps(header, sort_keys=True)})
    barrier()


class TextEmbeddings:
    """The embeddings that `encode_captions` wrote for some shards: text -> [L, D], read lazily."""

    def __init__(self, folder, shards, name):
        self.locations, self.sums = {}, {}
        for path in (text_path(folder, shard, name) for shard in sorted(set(shards))):
            if not path.exists():
                refuse(f"{path} is missing: encode the captions (again)")
            header = read_header(path)
            self.sums[path] = header.get("sums", {})
            for i, text in enumerate(header["texts"]):
                self.locations.setdefault(text, (path, str(i)))

    def __getitem__(self, text):
        path, name = self.locations[text]
        with safe_open(path, "pt") as file:
            return checked(file.get_tensor(name), self.sums[path].get(name), path, name)


# -- published captioners: key maps and chat templates ---------------------------------------------

NAMES = [   # of all models: (published, ours), each substituted once, in this order
    (r"\.(?:transformer\.)?(?:encoder\.)?(?:layers?|h|blocks|resblocks)\.(\d+)\.", r".layers.\1."),
    (r"(input_layernorm|attention_norm|ln_1|layer_norm1)\.", "norm1."),
    (r"(post_attention_layernorm|ffn_norm|ln_2|layer_norm2)\.", "norm2."),
    (r"(self_attn|attention|attn)\.([qk]_norm)\.", r"\2."),
    (r"(self_attn|attention|attn)\.([qkv])_(?:proj\.)?", r"\2."),
    (r"(attention\.(wo|dense)|(self_)?attn\.(o_proj|c_proj|out_proj|proj))\.", "out."),
    (r"(attention\.query_key_value|attn\.(c_attn|in_proj|qkv))[._]", "qkv."),
    (r"attention\.wqkv\.", "qkv_kv."), (r"mlp\.(w2|gate_proj)\.", "gate."),
    (r"mlp\.(w1|up_proj|fc1|c_fc)\.", "up."),
    (r"mlp\.(down_proj|c_proj|fc2)\.", "down."),
    (r"feed_forward\.w(\d)\.", lambda match: ("gate.", "down.", "up.")[int(match[1]) - 1]),
    (rf"^{LM}(layers|norm|ln_f|embed_tokens|tok_embeddings|wte)\.", r"decoder.\1."),
    (r"^decoder\.(embed_tokens|tok_embeddings|wte)\.", "decoder.embed."),
    (r"^decoder\.ln_f\.", "decoder.norm."),
    (r"^(language_model\.|llm\.)?(lm_head|output)\.", "decoder.head."),
    (r"tower\.((patch_)?embeddings?\.(class|cls)_embedding|cls_token)$", "tower.cls"),
    (r"tower\.(embeddings\.patch_embedding|patch_embed(ding)?\.proj|conv1)\.", "tower.patch."),
    (r"tower\.((patch_)?embeddings?\.position_embedding|positional_embedding|pos_embed)(?=\.|$)",
     "tower.position"),
    (r"tower\.(pre_layrnorm|ln_pre)\.", "tower.pre."),
    (r"tower\.(post_layernorm|norm)\.", "tower.post.")]
CLIP_TOWER = (r"^(?:model\.|vit\.)*(?:vision_tower\.)*(?:vision_model\.)?"
              r"(?=embeddings|encoder|pre_layrnorm|post_layernorm)", "tower.")
IGNORED = r".*\.(rotary_emb\.inv_freq|position_ids|masked_bias)"


def split_qkv(tensor, heads, kv, groups):
    """q, k and v of a tensor [(heads + 2 kv) E, …]: `groups` times a part of q, of k and of v."""
    parts = tensor.unflatten(0, (groups, (heads + 2 * kv) // groups, -1))
    shares = [heads // groups, kv // groups, kv // groups]
    return [part.flatten(0, 2) for part in parts.split(shares, 1)]


def to_ours(weights, model, names):
    """Renames published tensors to our names: `names`, the family's own, come before NAMES."""
    modules = dict(model.named_modules())
    result, theirs = {}, {}
    for named, tensor in weights.items():
        if re.fullmatch(IGNORED, name := named):
            continue
        for pattern, ours in (*names, *NAMES):
            name = re.sub(pattern, ours, name, count=1)
        if name.rpartition(".")[2] not in ("weight", "bias"):
            name, tensor = f"{name}.weight", tensor.reshape(-1, *tensor.shape[-1:])
        tensor = tensor.flatten(1) if tensor.dim() > 2 else tensor       # convolutions of patches
        tensor = tensor.T if name == "connector.proj.weight" else tensor
        layer, cut, rest = re.fullmatch(r"(.*?)(?:(qkv\w*)\.(.*))?", name).groups()
        module = modules.get(layer.rstrip(".").removesuffix(".expert"))
        parts = {name: tensor}
        if cut and rest.startswith("Plora_A"):
            parts = {f"{layer}{part}.{rest}": tensor for part in "qkv"}
        elif cut and module:
            heads, kv = module.stack.heads, module.stack.kv_heads or module.stack.heads
            if len(tensor) % (heads + 2 * kv):
                raise ValueError(f"{named} has {len(tensor)} rows, which {heads} queries, {kv} "
                                 f"keys and {kv} values do not divide")
            shares = split_qkv(tensor, heads, kv, {"qkv_kv": kv, "qkv_heads": heads}.get(cut, 1))
            parts = {f"{layer}{part}.{rest}": value for part, value in zip("qkv", shares)}
        for name, part in parts.items():
            name = re.sub(r"\.(\w+)\.Plora_([AB])\.", lambda plora:
                          f".expert.{plora[1]}.{'AB'.index(plora[2])}.", name)
            result[name], theirs[name] = part, named
    result = Renamed(result)
    result.theirs = theirs
    return result


def chat_template(folder, is_lm=False):
    """The Jinja chat template of a folder, "" without one: from the file that its version of
    transformers writes; the default of several. A language model's tokenizer config comes before
    the processor's, a captioner's after it."""
    for name in ("chat_template.jinja", "additional_chat_templates/default.jinja"):
        if (folder / name).exists():
            return (folder / name).read_text(encoding="utf-8", errors="replace")
    names = ["chat_template", "processor_config"]
    names.insert(0 if is_lm else 2, "tokenizer_config")
    for name in names:
        template = read_published(folder / f"{name}.json", {}).get("chat_template") or ""
        if isinstance(template, list):
            template = {one["name"]: one["template"] for one in template}
        if isinstance(template, dict):
            template = template.get("default") or next(iter(template.values()), "")
        if template:
            return str(template)
    return ""


class Undefined:
    """Jinja's undefined value: false, empty, without attributes."""

    def __bool__(self):
        return False

    def __iter__(self):
        return iter(())


UNDEFINED, LONGEST = Undefined(), 2**17     # LONGEST: of a template, and of its texts and lists
QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
INSIDE_TAG = rf"""(?:{QUOTED}|[^'"])*?"""
MARKUP = re.compile(rf"(?s)(\{{#.*?#\}}|\{{%{INSIDE_TAG}%\}}|\{{\{{{INSIDE_TAG}\}}\}})")
TODAY = "26 Jul 2024"           # Llama 3's default date: the same command writes the same text


def as_text(value):
    if isinstance(value, (list, dict)):
        raise ValueError("it writes a list or an object as if it were text")
    return "" if value is UNDEFINED else str(value)


def bounded(value):
    if isinstance(value, (str, list)) and len(value) > LONGEST:
        raise ValueError("it makes too long a text")
    return value


def having(items, name, test="", *value, wanted=True):
    """Jinja's `selectattr`, or with wanted=False `rejectattr`."""
    return [item for item in items if wanted == bool(CHECKS[test](part_of(item, name), *value))]


def part_of(value, name):
    """Jinja's value.name and value[name]."""
    if value is UNDEFINED:
        raise ValueError(f"the value with the attribute {name} is not defined")
    if isinstance(value, dict):
        return value.get(name, UNDEFINED)
    is_there = isinstance(name, int) and isinstance(value, (str, list)) and (
        -len(value) <= name < len(value))
    return value[name] if is_there else UNDEFINED


CHECKS = {  # tests, after "is"
    "": bool,
    "defined": lambda x: x is not UNDEFINED, "undefined": lambda x: x is UNDEFINED,
    "none": lambda x: x is None, "string": lambda x: isinstance(x, str),
    "true": lambda x: x is True, "false": lambda x: x is False,
    "mapping": lambda x: isinstance(x, dict),
    "number": lambda x: isinstance(x, (int, float)), "boolean": lambda x: isinstance(x, bool),
    "iterable": lambda x: isinstance(x, (str, list, dict, Undefined)), "in": lambda x, y: x in y,
    "sequence": lambda x: isinstance(x, (str, list, dict, Undefined)),
    **dict.fromkeys(("equalto", "eq", "=="), lambda x, y: x == y)}
FILTERS = {  # after "|"
    "trim": lambda x: as_text(x).strip(), "length": lambda x: len([*x]), "list": list,
    "count": lambda x: len([*x]), "first": lambda x: next(iter(x), UNDEFINED),
    "last": lambda x: [UNDEFINED, *x][-1], "string": as_text, "safe": lambda x: x, "int": int,
    "default": lambda x, y="", or_false=False: y if x is UNDEFINED or or_false and not x else x,
    "items": lambda x: [list(pair) for pair in x.items()] if x else [],
    "map": lambda x, attribute: [part_of(each, attribute) for each in x],
    "selectattr": having, "rejectattr": functools.partial(having, wanted=False),
    "join": lambda x, y="": functools.reduce(
        lambda a, b: b if a is None else bounded(as_text(a) + y + as_text(b)), x, None) or "",
    "reverse": lambda x: x[::-1], "tojson": lambda x: json.dumps(as_text(x), ensure_ascii=False),
    **{name: lambda x, change=getattr(str, name): change(as_text(x))
       for name in ("upper", "lower", "title", "capitalize")}}
METHODS = {  # (type of the object, name): after "."
    **{(str, name): getattr(str, name) for name in (
        "strip", "lstrip", "rstrip", "split", "upper", "lower", "title", "capitalize", "startswith",
        "endswith")},
    (dict, "items"): FILTERS["items"], (dict, "keys"): list, (dict, "get"): dict.get,
    (dict, "values"): lambda x: [*x.values()]}
SUMS = {ast.Add: lambda x, y: x + y, ast.Sub: lambda x, y: x - y, ast.Mod: lambda x, y: x % y,
        ast.FloorDiv: lambda x, y: x // y}
ORDERS = {ast.Eq: lambda x, y: x == y, ast.NotEq: lambda x, y: x != y, ast.Lt: lambda x, y: x < y,
          ast.LtE: lambda x, y: x <= y, ast.Gt: lambda x, y: x > y, ast.GtE: lambda x, y: x >= y,
          ast.In: lambda x, y: x in y, ast.NotIn: lambda x, y: x not in y}


class ChatTemplate:
    """A chat template in Jinja, rendered as transformers does. It is rewritten in Python's grammar
    and parsed to a syntax tree, which `run` and `value` interpret: nothing of it is executed.
    Raises ValueError for unknown syntax, and after some thousands of steps."""

    def __init__(self, text):
        try:
            with warnings.catch_warnings(action="ignore"):               # invalid escapes
                self.tree = ast.parse("\n".join(self.lines(bounded(text))))
        except (SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"its grammar is not supported: {error}") from None

    def lines(self, text):
        """Yields lines of Python: texts and {{ }} become expression statements."""
        depth, parts = 0, MARKUP.split(text.replace("\r\n", "\n").removesuffix("\n"))
        for i, part in enumerate(parts):
            if i % 2 == 0:
                yield f"{' ' * depth}{self.between(parts, i)!r}"
                continue
            inside = re.sub(rf"(?s){QUOTED}|[|~\n]", lambda match: {
                "|": "**", "~": "@", "\n": " "}.get(match[0], match[0].replace("\n", "\\n")),
                re.fullmatch(r"(?s)[-+]?\s*(.*?)\s*-?", part[2:-2])[1])
            if part[1] == "{":
                yield f"{' ' * depth}({inside})"
            elif part[1] == "%":
                if not (tag := re.fullmatch(r"(\w+)\s*(.*)", inside)):
                    raise ValueError(f"its tag {part:.40} is not supported")
                word, rest = tag.groups()
                if word == "for":                    # for … in … if …
                    rest = re.sub(r"^(.+?) in (.+) if ((?!.* else ).+)$",
                                  r"\1 in [(\1) for \1 in \2 if \3]", rest)
                depth -= word.startswith("end") or word in ("else", "elif")
                form = {"set": "{1}" if "=" in rest else "with {1}:", "macro": "def {1}:",
                        "generation": "if 1:", "break": "{0}", "continue": "{0}"}.get(
                            word, "{0} {1}:")
                if not word.startswith("end"):
                    yield " " * depth + form.format(word, rest)
                    if form.endswith(":"):
                        depth += 1
                        yield f"{' ' * depth}pass"

    def between(self, parts, i):
        """The text between two tags, without the white space that the tags remove (with trim_blocks
        and lstrip_blocks)."""
        text, before, after = parts[i], "".join(parts[i - 1:i]), "".join(parts[i + 1:i + 2])
        is_line = not i                              # at the start of a line
        if before.endswith(("-%}", "-}}", "-#}")):
            text, is_line = text.lstrip(), False
        elif before[1:2] in ("%", "#") and text.startswith("\n"):
            text, is_line = text[1:], True
        if after[2:3] == "-":
            return text.rstrip()
        start = text.rfind("\n") + 1
        if after[1:2] in ("%", "#") and after[2:3] != "+" and (start or is_line):
            text = text[:start] + text[start:].lstrip(" \t") * bool(text[start:].strip())
        return text

    def render(self, **names):
        self.written, self.left, self.is_dated = [], 20_000, False
        names = {"true": True, "false": False, "none": None, "strftime_now": self.day,
                 "raise_exception": self.complain, "namespace": dict, "range": self.numbers,
                 **names}
        try:
            self.run(self.tree.body, names)
            return bounded("".join(self.written))
        except (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"{str(error):.100} is not supported") from None

    def run(self, body, names):
        for node in body:
            match node:
                case ast.Expr():
                    self.written.append(as_text(self.value(node.value, names)))
                case ast.Assign(targets=[target]):
                    self.assign(target, self.value(node.value, names), names)
                case ast.If():
                    self.run(node.body if self.value(node.test, names) else node.orelse, names)
                case ast.For(orelse=[]):
                    items = list(self.value(node.iter, names))
                    for i, item in enumerate(items):
                        inner = {**names, "loop": {
                            "index0": i, "index": i + 1, "first": not i, "length": len(items),
                            "last": i + 1 == len(items),
                            **({"previtem": items[i - 1]} if i else {}),
                            **({"nextitem": items[i + 1]} if i + 1 < len(items) else {})}}
                        self.assign(node.target, item, inner)
                        self.run(node.body, inner)
                case ast.With(items=[ast.withitem(context_expr=ast.Name(id=name))]):
                    outer, self.written = self.written, []
                    self.run(node.body, names)
                    names[name], self.written = bounded("".join(self.written)), outer
                case ast.FunctionDef():
                    names[node.name] = functools.partial(self.macro, node, names)
                case ast.Pass():
                    pass
                case _:
                    raise ValueError(f"{type(node).__name__} is not supported")

    def macro(self, node, names, *args, **named):
        words = [arg.arg for arg in node.args.args]
        usual = [self.value(element, names) for element in node.args.defaults]
        outer, self.written = self.written, []
        self.run(node.body, names | dict.fromkeys(words, UNDEFINED)
                 | dict(zip(words[::-1], usual[::-1])) | dict(zip(words, args)) | named)
        text, self.written = bounded("".join(self.written)), outer
        return text

    def assign(self, target, value, names):
        match target:
            case ast.Name(id=name):
                names[name] = value
            case ast.Attribute(value=ast.Name(id=name), attr=attr):      # of a namespace
                names[name][attr] = value
            case ast.Tuple(elts=parts):
                for part, element in zip(parts, value, strict=True):
                    self.assign(part, element, names)

    def value(self, node, names):
        self.left -= 1
        if self.left < 0:
            raise ValueError("it takes too many steps")
        get = functools.partial(self.value, names=names)
        match node:
            case ast.Constant(value=result):
                return result
            case ast.Name(id=name):
                return names.get(name, UNDEFINED)
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                return [get(part) for part in parts]
            case ast.Dict(keys=keys, values=values):
                return {get(key): get(element) for key, element in zip(keys, values)}
            case ast.IfExp():
                return get(node.body if get(node.test) else node.orelse)
            case ast.BoolOp(op=op, values=parts):
                for part in parts:
                    result = get(part)
                    if bool(result) is isinstance(op, ast.Or):
                        break
                return result
            case ast.UnaryOp(op=op):
                return not get(node.operand) if isinstance(op, ast.Not) else -get(node.operand)
            case ast.BinOp(op=ast.Pow()):
                return self.filtered(get(node.left), node.right, names)
            case ast.BinOp(op=ast.MatMult()):
                return bounded(as_text(get(node.left)) + as_text(get(node.right)))
            case ast.BinOp(op=op):
                a, b = get(node.left), get(node.right)
                if type(a) is not type(b) or isinstance(a, str) > isinstance(op, ast.Add):
                    raise ValueError(f"{type(a).__name__} and {type(b).__name__} do not add up")
                return bounded(SUMS[type(op)](a, b))
            case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot() as op], comparators=[test]):
                test, args = (test.func, test.args) if isinstance(test, ast.Call) else (test, ())
                name = str(test.value).lower() if isinstance(test, ast.Constant) else test.id
                return isinstance(op, ast.Is) is bool(CHECKS[name](get(left), *map(get, args)))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                if isinstance(a := get(left), (list, dict)):
                    raise ValueError("it compares lists or objects")
                return ORDERS[type(op)](a, get(right))
            case ast.Subscript(slice=ast.Slice() as part):
                return get(node.value)[slice(*(element and get(element) for element in (
                    part.lower, part.upper, part.step)))]
            case ast.Subscript() | ast.Attribute():
                is_named = isinstance(node, ast.Attribute)
                return part_of(get(node.value), node.attr if is_named else get(node.slice))
            case ast.ListComp(generators=[ast.comprehension(target=target, ifs=[test]) as element]):
                result = []                           # for … in … if …
                for item in get(element.iter):
                    self.assign(target, item, inner := dict(names))
                    result += [item] * bool(self.value(test, inner))
                return result
            case ast.Call():
                return self.called(node, names)
            case _:
                raise ValueError(f"{type(node).__name__} is not supported")

    def filtered(self, value, node, names):
        """Applies the filter, or chain of filters, after "|"."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            return self.filtered(self.filtered(value, node.left, names), node.right, names)
        name, args, named = (node.func.id, *self.arguments(node, names)) if isinstance(
            node, ast.Call) else (node.id, [], {})
        return bounded(FILTERS[name](value, *args, **named))

    def arguments(self, node, names):
        return ([self.value(element, names) for element in node.args],
                {element.arg: self.value(element.value, names) for element in node.keywords})

    def called(self, node, names):
        args, named = self.arguments(node, names)
        if isinstance(node.func, ast.Attribute):
            owner = self.value(node.func.value, names)
            return bounded(METHODS[type(owner), node.func.attr](owner, *args, **named))
        return bounded(names[node.func.id](*args, **named))

    def complain(self, what=""):
        raise ValueError(f"it says: {what:.100}")

    def numbers(self, *bounds):
        if max(map(abs, bounds)) > 1000:
            raise ValueError("it takes too many steps")
        return list(range(*bounds))

    def day(self, form):
        self.is_dated = True
        if not re.fullmatch(r"(%[A-Za-z]|[^%]){1,40}", form):
            raise ValueError("strftime_now is called with a format that is not supported")
        return datetime.datetime.strptime(TODAY, "%d %b %Y").strftime(form)


NO_PREFIX = b"\x1a\x02\x18\x00"     # joined to a sentencepiece model: add_dummy_prefix is false


class Tokens:
    """A published tokenizer: spiece.model, tokenizer.json, tokenizer.model, qwen.tiktoken or
    vocab.json. `first`: the ids before every text. (spiece.model comes first, since T5's
    tokenizer.json may lack the byte tokens of rare characters.)"""

    def __init__(self, folder, remedy="put those of the published folder there"):
        config = read_published(folder / "tokenizer_config.json", {})
        self.template, self.pieces, self.added = "", None, {}
        self.fault, is_llama = "", str(config.get("tokenizer_class")).startswith("LlamaTokenizer")
        marks = {"bos_token": "<s>", "eos_token": "</s>"} if is_llama else {}
        marks |= read_published(folder / "special_tokens_map.json", {}) | config
        marks = {key: mark.get("content") if isinstance(mark, dict) else mark
                 for key, mark in marks.items() if key.endswith("_token")}
        self.marks = {key: mark for key, mark in marks.items() if isinstance(mark, str)}
        names = ("spiece.model", "tokenizer.json", "tokenizer.model", "qwen.tiktoken", "vocab.json")
        path = next((folder / name for name in names if (folder / name).exists()), None)
        if path is None:
            refuse(f"{folder} has no tokenizer, none of {', '.join(names)}: {remedy}")
        self.first, self.inner = [], None
        if path.name == "tokenizer.json":
            self.table = tokenizer_of(tokenizers.Tokenizer.from_file, path)
            self.table.no_truncation()
            self.table.no_padding()
            text = self.table.encode("a", add_special_tokens=False).ids
            ids = self.table.encode("a").ids             # may end with EOS: add_eos_token
            n = next((i for i in range(len(ids)) if ids[i:i + len(text)] == text), 0)
            self.first = ids[:n]
            if is_llama and not config.get("add_bos_token", True):
                self.first = []                          # the class overrides its file
        elif path.suffix != ".model":
            self.table = tokenizer_of(merges_tokenizer if path.suffix == ".json" else
                                      qwen_tokenizer, path)
        else:
            self.pieces = tokenizer_of(sentencepiece.SentencePieceProcessor, path)
            added = config.get("added_tokens_decoder") or {}
            controls = filter(self.pieces.is_control, range(self.pieces.get_piece_size()))
            self.added = {**{self.pieces.id_to_piece(i): i for i in controls},     # <s>, </s>
                          **{token["content"]: int(i) for i, token in added.items()},
                          **read_published(folder / "added_tokens.json", {})}
            i = self.pieces.bos_id()
            self.first = [i] if config.get("add_bos_token", True) and i >= 0 else []
            by = str(read_published(folder / "config.json", {}).get("transformers_version"))
            is_old = config.get("legacy")
            is_old = not by.startswith("5.") if is_old is None else is_old
            if is_llama and not is_old:              # only the start of the text gets a space
                proto = self.pieces.serialized_model_proto()
                self.inner = sentencepiece.SentencePieceProcessor(model_proto=proto + NO_PREFIX)

    @functools.cached_property
    def size(self):
        """The highest id plus one; not all ids below need exist."""
        ids = self.added.values() if self.pieces else self.table.get_vocab().values()
        n_pieces = self.pieces.get_piece_size() if self.pieces else 0
        return max([n_pieces, *(i + 1 for i in ids)])

    def __len__(self):
        return self.size

    def id(self, token):
        """The id of a token, or None."""
        if self.pieces is None:
            return self.table.token_to_id(token)
        i = self.pieces.piece_to_id(token)
        return self.added.get(token, None if i == self.pieces.unk_id() else i)

    def encode(self, text):
        """Ids of a text without those in `first`; added tokens in it are recognized."""
        if self.pieces is None:
            return self.table.encode(text, add_special_tokens=False).ids if text else []
        names = sorted(self.added, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
        if self.inner and parts[0] and parts[0][0] not in " ▁":
            parts[0] = f"▁{parts[0]}"
        split = (self.inner or self.pieces).encode
        return [i for part in parts if part for i in
                ([self.added[part]] if part in self.added else split(part))]

    def decode(self, ids):
        if self.pieces is None:
            return self.table.decode(ids)
        return self.pieces.decode([i for i in ids if i < self.pieces.get_piece_size()])


def qwen_tokenizer(path):
    """Qwen 1's byte-level BPE from its list of tokens and ranks: two tokens merge if their
    concatenation is a token, lowest rank first."""
    ranks = {base64.b64decode(token): int(rank) for token, rank in
             (line.split() for line in lines_of(read_text(path)) if line)}
    part = tokenizers.pre_tokenizers
    alphabet = part.ByteLevel.alphabet()             # printable bytes represent themselves
    order = sorted(range(256), key=lambda byte: (chr(byte) not in alphabet, byte))
    letters = dict(zip(order, sorted(alphabet)))
    spelt = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = [(token[:i], token[i:]) for token in sorted(spelt, key=spelt.get)
              for i in range(1, len(token)) if token[:i] in spelt and token[i:] in spelt]
    return byte_level(tokenizers.models.BPE(spelt, merges), [
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)),
        *(f"<{end}{name}>" for name in ("ref", "box", "quad", "img") for end in ("", "/")),
        "<imgpad>"])


def byte_level(model, marks):
    """Qwen's tokenizer with a given BPE of bytes and special tokens."""
    table, part = tokenizers.Tokenizer(model), tokenizers.pre_tokenizers
    table.normalizer, table.decoder = tokenizers.normalizers.NFC(), tokenizers.decoders.ByteLevel()
    table.pre_tokenizer = part.Sequence([part.Split(tokenizers.Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"), part.ByteLevel(False, use_regex=False)])
    table.add_special_tokens(marks)
    return table


def merges_tokenizer(path):
    """CLIP's or Qwen2's tokenizer from vocab.json and merges.txt, the only files in Stable
    Diffusion's folders."""
    folder = Path(path).parent
    vocab, setting = read_published(folder / "vocab.json"), folder / "tokenizer_config.json"
    added = {int(i): token["content"] for i, token in (
        read_published(setting, {}).get("added_tokens_decoder") or {}).items()}
    added |= {i: name for name, i in read_published(folder / "added_tokens.json", {}).items()}
    marks = [added[i] for i in sorted(added)]
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if not any(token.endswith("</w>") for token in vocab):
        return byte_level(tokenizers.models.BPE(vocab, merges), marks)
    table = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab, merges, end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    part, normal = tokenizers.pre_tokenizers, tokenizers.normalizers
    table.normalizer = normal.Sequence([
        normal.NFC(), normal.Replace(tokenizers.Regex(r"\s+"), " "), normal.Lowercase()])
    table.pre_tokenizer = part.Sequence([part.Split(tokenizers.Regex(
        r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
        part.ByteLevel(False)])
    table.decoder = tokenizers.decoders.ByteLevel()
    table.add_special_tokens(["<|startoftext|>", "<|endoftext|>", *marks])
    return table


def rope_of(config):
    """(rope_type, RoPE parameters) of a published config."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    return rope.get("rope_type", rope.get("type", "default")), rope


ROPES = {"default": (), "mrope": (), "dynamic": (), "linear": ("factor",), "llama3": (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def language_stack(config, **more):
    """The TransformerConfig of a published language model's config."""
    kind = config.get("model_type")
    law, rope = rope_of(config)
    if law not in ROPES:
        raise ValueError(f"rope_scaling {law} is not supported: {', '.join(ROPES)} are")
    for name in ("attention_bias", "mlp_bias", "bias", "use_sliding_window"):
        if config.get(name):
            raise ValueError(f"{name} is {config[name]}, which is not supported for a {kind}")
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError("layer_types: only full_attention is supported")
    if (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1) != 1:
        raise ValueError("partial_rotary_factor: only 1, rotation of whole heads, is supported")
    window = config["sliding_window"] if kind in ("mistral", "omnilmm") else 0
    return TransformerConfig(**{**dict(
        width=config["hidden_size"], depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"] or 0,
        ffn=config["intermediate_size"], norm="rms", glu=True, causal=True,
        rope=float(rope.get("rope_theta") or config["rope_theta"]), eps=config["rms_norm_eps"],
        act=config["hidden_act"], head=config["head_dim"] or 0, bias=False,
        qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3", window=window or 0,
        scaling=tuple(rope[name] for name in ROPES[law]),
        sections=tuple(rope.get("mrope_section", ())), linear=Linear), **more})


class VisionTower(nn.Module):
    """A published vision transformer: float [B, 3, H, W] to tokens [B, N, D]. Learned position
    embeddings are interpolated to the image's grid, bicubic, with or without antialiasing."""

    def __init__(self, stack, patch, positions, cls=False, keep_cls=False, pre=False, post=False,
                 bias=False, antialias=False):
        super().__init__()
        self.size, self.keep_cls, self.antialias = patch, keep_cls, antialias
        self.patch = Linear(3 * patch**2, stack.width, bias)
        self.cls = nn.Embedding(1, stack.width) if cls else None
        self.position = nn.Embedding(positions + cls, stack.width)
        self.pre = stack.make_norm() if pre else nn.Identity()
        self.layers, self.post = stack.layers(), stack.make_norm() if post else nn.Identity()

    def forward(self, pictures):
        (rows, cols), p = (side // self.size for side in pictures.shape[2:]), self.size
        pictures = pictures[:, :, :rows * p, :cols * p]                  # whole patches only
        x = pictures.unflatten(3, (cols, p)).unflatten(2, (rows, p))     # [B, 3, h, p, w, p]
        x = self.patch(x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        marks, positions = self.position.weight.tensor_split([1 if self.cls else 0])
        x = x + stretch(positions, rows, cols, self.antialias)              # [B, N, D]
        if self.cls is not None:
            x = torch.cat([(self.cls.weight + marks).expand(len(x), 1, -1), x], 1)
        x = self.pre(x)
        for layer in self.layers:
            x = layer(x)
        x = self.post(x)
        return x[:, 1:] if self.cls is not None and not self.keep_cls else x


def stretch(positions, rows, cols, antialias=False):
    """Interpolates position embeddings [side^2, D] to another grid, [rows * cols, D]."""
    side = math.isqrt(len(positions))
    if (side, side) == (rows, cols):
        return positions
    square = positions.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, (rows, cols), mode="bicubic", antialias=antialias)
    return square.permute(0, 2, 3, 1).reshape(rows * cols, -1).to(positions.dtype)


def gather(q, k, v, heads):
    """Attention with `heads` heads: queries [B, n, D], keys and values [B, N, D] -> [B, n, D]."""
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Resampler(nn.Module):
    """Cross-attention of n learned queries to an image's tokens: [B, N, wide] to [B, n, D]. `grid`
    makes the keys' positions: the queries' table, interpolated, or (adaptive) sines of column and
    row."""

    def __init__(self, n, wide, width, adaptive=False):
        super().__init__()
        norm = functools.partial(nn.LayerNorm, eps=1e-6)
        self.stack, self.adaptive = TransformerConfig(width, 0, width // 128), adaptive
        self.query, self.position = nn.Embedding(n, width), nn.Embedding(n, width)
        self.kv = nn.Identity() if wide == width else Linear(wide, width, bias=False)
        self.norm_q, self.norm_kv, self.post = norm(width), norm(width), norm(width)
        self.q, self.k, self.v, self.out = (Linear(width, width) for _ in "qkvo")
        self.proj = Linear(width, width, bias=False)

    def grid(self, rows, cols, like):
        if not self.adaptive:
            return stretch(self.position.weight, rows, cols)
        D = self.position.embedding_dim
        rates = 1e4 ** (-torch.arange(D // 4, device=like.device, dtype=torch.float64) / (D // 4))
        axes = (torch.arange(n, device=like.device) for n in (rows, cols))
        positions = torch.cartesian_prod(*axes)
        angles = positions.flip(1)[..., None] * rates                       # [N, 2, D / 4]
        return torch.cat([angles.sin(), angles.cos()], -1).flatten(1).to(like)

    def forward(self, x, rows, cols):
        x = self.norm_kv(self.kv(x))
        q = self.norm_q(self.query.weight) + self.position.weight
        q, k, v = self.q(q).expand(len(x), -1, -1), self.k(x + self.grid(rows, cols, x)), self.v(x)
        return self.proj(self.post(self.out(gather(q, k, v, self.stack.heads))))


class GluHead(nn.Module):
    """CogVLM's connector: a gated MLP, its output between two learned tokens."""

    def __init__(self, wide, width, ffn):
        super().__init__()
        self.enter, self.norm = Linear(wide, width, bias=False), nn.LayerNorm(width)
        self.gate, self.up = (Linear(width, ffn, bias=False) for _ in "gu")
        self.down = Linear(ffn, width, bias=False)
        self.boi, self.eoi = nn.Embedding(1, width), nn.Embedding(1, width)

    def forward(self, x):
        x = F.gelu(self.norm(self.enter(x)))
        x = self.down(F.silu(self.gate(x)) * self.up(x))
        marks = (mark.weight.expand(len(x), 1, -1) for mark in (self.boi, self.eoi))
        return torch.cat([next(marks), x, next(marks)], 1)


def mlp_connector(*layers):
    """A Sequential with the published indices: (in, out) is a linear layer, a width a norm, or
    "gelu"."""
    return nn.Sequential(*[nn.GELU() if part == "gelu" else nn.LayerNorm(part)
                           if isinstance(part, int) else Linear(*part) for part in layers])


class QwenVisionTower(nn.Module):
    """Qwen2-VL's tower and merger, for images of any size: patches in the order of 2 x 2 blocks,
    [L, 3 * 2 * p * p], to [L / 4, width]. Rotary positions are row and column. A pair of frames
    attends to itself alone; in Qwen2.5-VL most layers attend within windows of it."""

    def __init__(self, stack, patch, width, window=0, full=()):
        super().__init__()
        self.stack, self.window, self.full = stack, window // patch // 2, set(full)
        self.patch = Linear(6 * patch**2, stack.width, bias=False)
        self.layers, self.post = stack.layers(), stack.make_norm()
        wide = 4 * stack.width
        self.merge = mlp_connector((wide, wide), "gelu", (wide, width))

    def forward(self, rows, grid):
        """grid: (pairs of frames, patches down, patches across)."""
        t, h, w = grid
        positions = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1)
        positions = positions.view(h // 2, 2, w // 2, 2, 2).transpose(1, 2).flatten(0, 3)
        positions = positions.repeat(t, 1)
        E = self.stack.head_dim
        speeds = self.stack.rope ** (-torch.arange(0, E // 2, 2) / (E // 2))
        angles = (positions[..., None] * speeds).flatten(1).to(rows.device)  # [L, E / 2]
        x, bounds = self.patch(rows), torch.arange(t + 1) * h * w
        order, windows = torch.arange(t * h * w // 4), bounds
        if self.window:                                  # sorts the blocks by window
            pair = order // (h * w // 4)
            down, across = (positions[::4] // 2 // self.window).unbind(1)
            key = (pair * h + down) * w + across
            order = key.argsort(stable=True)
            counts = key[order].unique_consecutive(return_counts=True)[1]
            windows = F.pad(4 * counts.cumsum(0), (1, 0))
        groups = (4 * order[:, None] + torch.arange(4)).flatten().to(x.device)
        x, rotation = x[groups], cos_sin(angles[groups])
        bounds, windows = (x.int().to(rows.device) for x in (bounds, windows))
        for i, layer in enumerate(self.layers):
            x = layer(x, rotation, bounds if i in self.full or not self.window else windows)
        x = self.merge(self.post(x).view(len(order), -1))
        return x[order.argsort().to(x.device)]


@dataclass
class ModelSpec:
    """A published model's parts and prompt format, made by the function of its family below."""
    stack: TransformerConfig
    vocab: int
    names: tuple = ()           # (published, ours) of the family, before NAMES
    tower: object = None        # makes the tower; None: a language model
    connector: object = nn.Identity     # makes the connector
    video_tower: object = None
    picture: object = None      # uint8 [H, W, 3] -> list of float [3, h, w], and text around them
    prompt: str = "{q}"         # \0 is the image or video, {q} the question
    seen: str = "\0"            # replaces \0; each \0 in it is one block of visual tokens
    slot: str = ""              # the image token, where a prompt is encoded as a whole
    stop: tuple = ()            # texts that end an answer
    zero: str = "-"             # pattern of our names: zeros if missing
    ignored: str = "-"          # pattern of our names that are not used
    scales: tuple = (1.0, 1.0)  # factors of token embeddings and of the last hidden states
    frames: int = 0             # of a video, if the model takes videos; 0: single frames
    video_slot: str = ""        # the video token
    rate: float = 1.0           # temporal positions per second of a video
    longest: int = 0            # longest prompt in tokens, before RoPE would be scaled; 0: any
    counts_prompt: bool = True  # penalties count the prompt, if generate() is given its ids


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
VICUNA = ("A chat between a curious human and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the human's questions. ")
YI = ("This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI "
      "assistant. Read all the images carefully, and respond to the human's questions with "
      "informative, helpful, detailed and polite answers. "
      "这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。"
      "仔细阅读所有的图像，并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。"
      "\n\n### Human: \0\n{q}\n### Assistant:")
CHATML = "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n"
CHATML_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + CHATML
ZEPHYR = "<|user|>\n{q}</s>\n<|assistant|>\n"
INTERNLM = "[UNUSED_TOKEN_146]user\n{q}[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n"
LLAMA_3 = ("<|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|>"
           "<|start_header_id|>assistant<|end_header_id|>\n\n")
CHATS = {   # --template: (token that identifies it without a template, prompt, end of a turn)
    "chatml": ("<|im_start|>", CHATML, "<|im_end|>"),
    "llama3": ("<|start_header_id|>", LLAMA_3, "<|eot_id|>"),
    "internlm": ("[UNUSED_TOKEN_146]", INTERNLM, "[UNUSED_TOKEN_145]"),
    "zephyr": (None, ZEPHYR, "</s>"), "mistral": (None, "[INST] {q} [/INST]", "</s>"),
    "llama2": (None, "[INST] {q} [/INST]", "</s>"),
    "vicuna": (None, VICUNA + "USER: {q} ASSISTANT:", "</s>")}


def chat_of(tokens, where, spec):
    """(prompt, texts that end an answer) from the chat template, rendered with one turn of a user,
    with an image unless it is a language model, and no system message; a default one of the
    template is kept. Raises ValueError if it cannot be rendered."""
    template, slot, why = ChatTemplate(tokens.template), spec.tower and spec.slot, []
    mark = spec.seen.replace("\0", slot or "")
    gap = re.sub(r"(?s).*\0(\s*)\{q\}.*", r"\1", spec.prompt)            # after the image
    parts = [{"type": "image"}] * bool(slot) + [{"type": "text", "text": "{q}"}]
    plain = f"{mark}{gap}{{q}}" if slot else "{q}"

    def render(content, *answer):
        messages = [{"role": "user", "content": content}] + [
            {"role": "assistant", "content": part} for part in answer]
        return template.render(**tokens.marks, messages=messages, tools=None, documents=None,
                               add_generation_prompt=not answer, enable_thinking=False)
    for content in (parts, plain) if slot else (plain, parts):
        try:
            prompt = render(content)
            if prompt.count("{q}") != 1 or slot and prompt.count(mark) != 1:
                raise ValueError("it leaves out the question, or the image")
        except ValueError as error:
            why.append(str(error))
            continue
        if template.is_dated:
            tqdm.write(f"{where}: its chat template contains the date: {TODAY} is used always, so "
                       "that the same command writes the same captions", file=sys.stderr)
        if prompt.startswith(bos := tokens.marks.get("bos_token") or "\0"):
            prompt, tokens.first = prompt.removeprefix(bos), tokens.first or [tokens.id(bos)]
        answer, end = "{a}" if content == plain else [{"type": "text", "text": "{a}"}], None
        with contextlib.suppress(ValueError):
            end = re.match(r"\s*(<[^<>\s]+>|\[\S+?\])", render(content, answer).partition("{a}")[2])
        return prompt.replace(mark, "\0") if slot else prompt, (end[1],) if end else spec.stop
    raise ValueError(why[0])


def clip_tower(config, last, keep_cls=False, post=False):
    """Makes a CLIP vision tower that returns hidden state `last` (-1, -2, …)."""
    c = CLIP | config
    depth = c["num_hidden_layers"] + last + 1 if last < 0 else last
    stack = clip_stack(c, depth, linear=Linear)
    positions = (c["image_size"] // c["patch_size"])**2
    return functools.partial(VisionTower, stack, c["patch_size"], positions, cls=True,
                             keep_cls=keep_cls, pre=True, post=post)


def normal(picture, mean_std):
    """uint8 [H, W, 3] -> float [3, H, W]."""
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in mean_std)
    return (torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255 - mean) / std


def resize(frame, width, height, how=Image.Resampling.BICUBIC):
    return np.asarray(Image.fromarray(frame).resize((width, height), how))


def squash(frame, size, mean_std=CLIP_MEAN, how=Image.Resampling.BICUBIC):
    """Resizes to a square of `size` px, without keeping the aspect ratio."""
    return [normal(resize(frame, size, size, how), mean_std)], None


def crop(frame, size, mean_std=CLIP_MEAN, how=Image.Resampling.BICUBIC, short=None):
    """Resizes the shorter side to `short`, else to `size`, and crops the middle square."""
    H, W = frame.shape[:2]
    h, w = (int((short or size) * side / min(H, W)) for side in (H, W))
    top, left = (h - size) // 2, (w - size) // 2
    return [normal(resize(frame, w, h, how)[top:top + size, left:left + size], mean_std)], None


def pad_square(frame, size, mean_std=CLIP_MEAN):
    """Pads to a square with the mean colour, and resizes."""
    H, W = frame.shape[:2]
    square = np.empty((max(H, W), max(H, W), 3), np.uint8)
    square[:] = [int(255 * level) for level in mean_std[0]]
    top, left = (max(H, W) - H) // 2, (max(H, W) - W) // 2
    square[top:top + H, left:left + W] = frame
    return squash(square, size, mean_std)


def slices(frame, size, patch, most, slots=False):
    """MiniCPM-V's slices: the image at about size^2 px and, if it is larger, tiles of it at a finer
    resolution, in the grid of about as many tiles whose aspect ratio is nearest."""
    H, W = frame.shape[:2]

    def nearest(w, h, grow):
        if w * h > size * size or grow:
            h_new = int(size / math.sqrt(w / h))
            w, h = int(h_new * (w / h)), h_new
        return [max(patch, round(side / patch) * patch) for side in (w, h)]

    n = min(math.ceil(W * H / size**2), most)
    if n <= 1:
        return [normal(resize(frame, *nearest(W, H, True)), HALF)], "<image>\0</image>"
    grids = [(across, i // across) for i in (n - 1, n, n + 1) if 1 < i <= most
             for across in range(1, i + 1) if i % across == 0]
    across, down = min(grids, key=lambda grid: abs(math.log(W / H) - math.log(grid[0] / grid[1])))
    w, h = nearest(max(across, round(W / across) * across) / across,
                max(down, round(H / down) * down) / down, True)
    fine = resize(frame, w * across, h * down)
    tiles = [fine[y * h:(y + 1) * h, x * w:(x + 1) * w] for y in range(down) for x in range(across)]
    rows = "\n".join(["<image>\0</image>" * across] * down)
    return ([normal(picture, HALF) for picture in (resize(frame, *nearest(W, H, False)), *tiles)],
            f"<image>\0</image><slice>{rows}</slice>")


def qwen_rows(frames, patch, least, most, mean_std=CLIP_MEAN, video=None):
    """Qwen2-VL's patches [L, 3 * 2 * p * p] and their grid, of frames of one shape: sides are
    multiples of two patches, areas within least..most px, of a video's frames within `video` if
    given, and at most 768 blocks; the last of an odd number of frames is repeated."""
    (H, W), step = frames[0].shape[:2], 2 * patch
    if len(frames) > 1:
        least, most = video or (least, most)
        most = min(most, 768 * step**2)
    h, w = (round(side / step) * step for side in (H, W))
    if h * w > most or h * w < least:
        to, scale = (math.floor, H * W / most) if h * w > most else (math.ceil, H * W / least)
        h, w = (max(step, to(side / math.sqrt(scale) / step) * step) for side in (H, W))
    x = torch.stack([normal(resize(frame, w, h), mean_std) for frame in frames])
    x = torch.cat([x, x[-1:]]) if len(x) % 2 else x
    x = x.unflatten(3, (-1, 2, patch)).unflatten(2, (-1, 2, patch)).unflatten(0, (-1, 2))
    rows = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5).flatten(0, 4)
    return rows, (len(x), h // patch, w // patch)


def plain_lm(c, weights, folder):
    return ModelSpec(language_stack(with_biases(c, weights)), c["vocab_size"])


def with_biases(c, weights):
    """InternLM2's config, with biases only if the weights have them."""
    return c | {"bias": "bias" in c and any(name.endswith("wqkv.bias") for name in weights)}


def image_processor(folder, size=None, mean_std=CLIP_MEAN, free=()):
    """(The image processor's config, from the file of the folder's version of transformers; mean
    and standard deviation.) Raises ValueError for other processing than bicubic resizing, with
    `size` also cropping of that middle square; `free`: keys that may differ."""
    config = read_published(folder / "processor_config.json", {}).get("image_processor") or {}
    config = values_of(config | read_published(folder / "preprocessor_config.json", {}))
    usual = dict(do_resize=True, do_rescale=True, do_normalize=True, resample=3)
    usual = {name: value for name, value in usual.items() if name not in free}
    if abs(config.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise ValueError(f"its image processor has rescale_factor {config['rescale_factor']}, "
                         "supported is 1/255")
    if size:
        usual |= dict(do_center_crop=True, size=size, crop_size=size)
    for name, value in usual.items():
        says = config.get(name, value)
        sides = set(says.values()) if isinstance(says, dict) else {says}
        squeezes = name == "size" and isinstance(says, dict) and "height" in says
        if sides != {value} or squeezes:
            raise ValueError(f"its image processor has {name} {says}, supported is {value}")
    return config, tuple(tuple(config.get(name, usual)) for name, usual in zip(
        ("image_mean", "image_std"), mean_std))


def llava(c, weights, folder):
    """LLaVA-1.5 and Video-LLaVA in transformers' layout, and LLaVA and Yi-VL in their own."""
    is_port = not any(name.startswith("mm_") for name in c)
    is_video, projector = c["model_type"] == "video_llava", c.get("mm_projector_type", "linear")
    text = (c.get("text_config") or {}) if is_port else c | {"model_type": "llama"}
    kind = text.get("model_type", "llama")
    if FAMILIES.get(kind) is not plain_lm:
        raise ValueError(f"text_config is of a {kind}: known are " + ", ".join(
            name for name, make in FAMILIES.items() if make is plain_lm))
    text = DEFAULTS[kind] | {"model_type": kind} | text
    stack = language_stack(text)
    last = c.get("vision_feature_layer", c.get("mm_vision_select_layer", -2))
    take = c.get("vision_feature_select_strategy", "default")
    if is_port:
        large = CLIP_L | {"image_size": 224 if is_video else 336}
        tower = CLIP | v if (v := c.get("vision_config")) is not None else large
    else:
        tower = CLIP | sub_config(folder, c["mm_vision_tower"])
    size, wide, width = tower["image_size"], tower["hidden_size"], stack.width
    has_bias = c.get("multimodal_projector_bias", True)
    layers = [(wide, width, has_bias), "gelu", (width, width, has_bias)]
    config = dict(
        add_time_attn=(tower.get("add_time_attn"), (None, False)),
        vision_config=(tower.get("model_type", "clip_vision_model"), ("clip_vision_model", "clip")),
        mm_video_tower=(c.get("mm_video_tower"), (None,)),
        vision_feature_layer=(last, range(-99, 99)),
        vision_feature_select_strategy=(f"select strategy {take}", ("select strategy default",)),
        mm_vision_select_feature=(c.get("mm_vision_select_feature", "patch"), ("patch",)),
        projector_hidden_act=(c.get("projector_hidden_act", "gelu"), ("gelu",)),
        mm_projector_type=(is_port or projector, (True, "mlp2x_gelu", "mlp2x_gelu_Norm")),
        mm_use_im_start_end=(c.get("mm_use_im_start_end", False), (False,)),
        image_aspect_ratio=(c.get("image_aspect_ratio"), (None, "pad", "square")))
    for name, (value, known) in config.items():
        if value not in known:
            raise ValueError(f"{name} is {value}: known of LLaVA-1.5's kind are " + (
                "single layers" if isinstance(known, range) else
                ", ".join(map(str, known)).replace("select strategy ", "")))
    is_yi = projector.endswith("Norm")
    if is_yi:
        layers = [(wide, width), width, "gelu", (width, width), width]
    make = functools.partial(clip_tower, tower, last)
    config, mean_std = image_processor(folder, size) if is_port else ({}, CLIP_MEAN)
    made = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
    is_padded = c.get("image_aspect_ratio") == "pad" or (      # CLIP's image processor never pads
        config.get("do_pad") and not made.startswith("CLIP"))
    return ModelSpec(
        stack, text["vocab_size"], tower=make(),
        connector=functools.partial(mlp_connector, *layers),
        video_tower=make(keep_cls=True) if is_video else None,
        picture=functools.partial(pad_square if is_padded else crop, size=size, mean_std=mean_std),
        prompt=YI if is_yi else ("" if is_port else VICUNA) + "USER: \0\n{q} ASSISTANT:",
        slot="<image>" if is_port else "", video_slot="<video>", frames=8 if is_video else 0,
        counts_prompt=is_port,
        stop=("###",) if is_yi else (), ignored=r"(video_)?tower\.(post|layers\.\d+)\..*",
        names=((r"^(?:model\.)?image_tower\.(image_tower\.)?(vision_model\.)?", "tower."),
               (r"^(?:model\.)?video_tower\.(video_tower\.)?(vision_model\.)?", "video_tower."),
               (r"^(?:model\.)?multi_modal_projector\.linear_1\.", "connector.0."),
               (r"^(?:model\.)?multi_modal_projector\.linear_2\.", "connector.2."),
               (r"^model\.mm_projector\.", "connector."), CLIP_TOWER))


def sub_config(folder, name):
    """The config.json of a vision tower, given its path within or beside the folder."""
    last = Path(name).name                       # 'openai/clip-vit-large-patch14-336' has two parts
    path = next((path for path in (folder / name, folder.parent / name, Path(name), folder / last,
                                   folder.parent / last) if (path / "config.json").exists()), None)
    if path is None:
        raise ValueError(f"mm_vision_tower {name}: no folder {last} within or beside it: put that "
                         "CLIP there")
    config = values_of(read_published(path / "config.json"))
    return {**config.get("vision_config", config), "folder": str(path)}


def xcomposer(c, weights, folder):
    tower = c.get("nanosora_vit") or dict(hidden_size=1024, intermediate_size=4096, patch_size=14,
                                          num_hidden_layers=24, num_attention_heads=16,
                                          image_size=490)
    if any("plora_glb" in name for name in weights):
        raise ValueError("plora_glb_GN: XComposer 4KHD and 2.5 are not supported")
    rank = next(len(t) for name, t in weights.items() if name.endswith("wo.Plora_A.weight"))
    stack, wide = language_stack(with_biases(c, weights), expert=rank), tower["hidden_size"]
    return ModelSpec(
        stack, c["vocab_size"], tower=clip_tower(tower, -1), ignored=r"tower\.post\..*",
        connector=functools.partial(mlp_connector, (wide, stack.width), "gelu", 2 * (stack.width,)),
        picture=functools.partial(squash, size=tower["image_size"]), counts_prompt=False,
        names=((r"^vision_proj\.", "connector."), CLIP_TOWER),
        prompt="[UNUSED_TOKEN_146]system\nYou are an AI assistant.[UNUSED_TOKEN_145]\n"
               + INTERNLM.replace("{q}", "\0{q}"), stop=("[UNUSED_TOKEN_145]",))


RESAMPLER = ((r"connector\.ln_(q|kv)\.", r"connector.norm_\1."),
             (r"connector\.ln_post\.", "connector.post."),
             (r"connector\.kv_proj\.", "connector.kv."),
             (r"connector\.pos_embed$", "connector.position"))


def qwen_vl(c, weights, folder):
    v, heads = c["visual"], c["num_attention_heads"]
    stack = TransformerConfig(
        c["hidden_size"], c["num_hidden_layers"], heads, ffn=c["intermediate_size"] // 2,
        norm="rms", glu=True, causal=True, rope=float(c["rotary_emb_base"]), act="silu",
        eps=c["layer_norm_epsilon"], head=c["kv_channels"], bias=False, qkv_bias=True,
        linear=Linear, trained=c["seq_length"])
    if not c["use_logn_attn"] or not c["use_dynamic_ntk"] or c["rotary_pct"] != 1:
        raise ValueError("only use_logn_attn, use_dynamic_ntk and rotary_pct 1 are supported")
    tower = TransformerConfig(v["width"], v["layers"], v["heads"], eps=1e-6, linear=Linear,
                              ffn=int(v["width"] * v["mlp_ratio"]))
    positions = len(weights["transformer.visual.positional_embedding"])
    queries = len(weights["transformer.visual.attn_pool.query"])
    return ModelSpec(
        stack, c["vocab_size"], tower=functools.partial(
            VisionTower, tower, v["patch_size"], positions, pre=True),
        connector=functools.partial(Resampler, queries, v["width"], v["output_dim"]),
        picture=functools.partial(squash, size=v["image_size"]), seen="<img>\0</img>",
        prompt=CHATML_SYSTEM.replace("{q}", "Picture 1: \0\n{q}"), slot="<imgpad>",
        stop=("<|im_end|>", "<|endoftext|>"),
        names=((r"^transformer\.visual\.(attn_pool\.|(?=proj$|ln_post))", "connector."),
               (r"^transformer\.visual\.", "tower."), (r"^(tower.*)attn\.in_proj[._]",
                                                       r"\1qkv_heads."), *RESAMPLER))


def cogvlm(c, weights, folder):
    v = c["vision_config"]
    if "num_multi_query_heads" in c or "model.vision.conv.weight" in weights:
        raise ValueError("this is a CogVLM2, which is not supported: CogVLM is")
    if any("cross_vision" in name for name in weights):
        raise ValueError("this is a CogAgent, which is not supported: CogVLM is")
    stack = language_stack(c, expert=-1)
    tower = TransformerConfig(v["hidden_size"], v["num_hidden_layers"], v["num_heads"],
                  ffn=v["intermediate_size"], act=v["hidden_act"], eps=v["layer_norm_eps"],
                  post_norm=True, linear=Linear)
    return ModelSpec(
        stack, c["vocab_size"], tower=functools.partial(
            VisionTower, tower, v["patch_size"], v["num_positions"] - 1, cls=True, bias=True),
        connector=functools.partial(GluHead, v["hidden_size"], stack.width, c["intermediate_size"]),
        picture=functools.partial(squash, size=v["image_size"]),
        prompt="\0Question: {q} Answer:",
        names=((r"^model\.vision\.linear_proj\.linear_proj\.", "connector.enter."),
               (r"^model\.vision\.linear_proj\.norm1\.", "connector.norm."),
               (r"^model\.vision\.linear_proj\.gate_proj\.", "connector.gate."),
               (r"^model\.vision\.linear_proj\.dense_h_to_4h\.", "connector.up."),
               (r"^model\.vision\.linear_proj\.dense_4h_to_h\.", "connector.down."),
               (r"^model\.vision\.(boi|eoi)$", r"connector.\1"),
               (r"^model\.vision\.", "tower."),
               (r"(self_attn|mlp)\.language_(expert_|mlp\.)", r"\1."),
               (r"(self_attn|mlp)\.vision_(expert_|mlp\.)", r"expert.\1."),
               (r"(self_attn\.query_key_value)\.", "qkv."), (r"self_attn\.dense\.", "out.")))


TIMM_HEADS = {"eva02_enormous_patch14_clip_224": 16, "vit_so400m_patch14_siglip_384": 16}


def timm_tower(name, config, weights, prefix, **more):
    """(function that makes a timm tower, width, patch): sizes from the weights, heads by name."""
    heads = config.get("num_heads") or TIMM_HEADS.get(name.split(".")[0])
    if not heads:
        raise ValueError(f"vision tower {name}: known are {', '.join(TIMM_HEADS)}")
    depth = 1 + max(int(key.split(".")[-4 if "mlp" in key else -3]) for key in weights
                    if re.match(re.escape(prefix) + r"blocks\.\d+\.norm1\.weight", key))
    ffn, width = weights[f"{prefix}blocks.0.mlp.fc1.weight"].shape
    stack = TransformerConfig(width, depth, heads, ffn=ffn, eps=1e-6, linear=Linear,
                              post_norm="cls" in more)
    positions = weights[f"{prefix}pos_embed"].shape[1] - ("cls" in more)
    patch = weights[f"{prefix}patch_embed.proj.weight"].shape[-1]
    return functools.partial(VisionTower, stack, patch, positions, post=True, bias=True,
                             antialias=True, **more), width, patch


def minicpm_v(c, weights, folder):
    if "vision_config" in c:
        raise ValueError("vision_config: MiniCPM-V 2.5 and later are not supported, 2.0 is")
    if not c["slice_mode"]:
        raise ValueError("slice_mode is false: only images in slices are supported")
    tower, wide, patch = timm_tower(c["vision_encoder"], c.get("nanosora_vit", {}), weights, "vpm.")
    stack = language_stack(c, branch=c["scale_depth"] / math.sqrt(c["num_hidden_layers"]))
    return ModelSpec(
        stack, c["vocab_size"], tower=tower,
        scales=(c["scale_emb"], c["dim_model_base"] / stack.width),
        connector=functools.partial(Resampler, c["query_num"], wide, stack.width, adaptive=True),
        picture=functools.partial(slices, size=c["scale_resolution"], patch=patch,
                                  most=c["max_slice_nums"]),
        prompt="<用户>\0\n{q}<AI>", slot="<unk>", counts_prompt=False,
        names=((r"^vpm\.", "tower."), (r"^resampler\.", "connector."), *RESAMPLER))


def omnilmm(c, weights, folder):
    tower, wide, _ = timm_tower(c["mm_vision_tower"], c.get("nanosora_vit", {}), weights,
                                "model.vision_tower.", cls=True)
    stack = language_stack(c)
    return ModelSpec(
        stack, c["vocab_size"], tower=tower, zero=r"tower\..*\.k\.bias",
        seen="<im_start>\0<im_end>", counts_prompt=False,
        connector=functools.partial(Resampler, c["num_query"], wide, stack.width),
        picture=functools.partial(squash, size=c["image_size"]), slot="<im_patch>",
        prompt="<|system|>\nYou are an artificial intelligence assistant, which gives helpful, "
               "detailed, and polite answers to the human's questions.</s>\n"
               + ZEPHYR.replace("{q}", "\0\n{q}"),
        names=((r"^model\.vision_tower\.", "tower."), (r"^model\.resampler\.", "connector."),
               *RESAMPLER))


def qwen2_vl(c, weights, folder):
    """Qwen2-VL and Qwen2.5-VL."""
    is_new = c["model_type"] == "qwen2_5_vl"
    text = {**c, **(c.get("text_config") or {})}             # transformers 4.45 to 4.51: one level
    text["rope_parameters"] = {"mrope_section": (16, 24, 24), **rope_of(text)[1]}
    v = DEFAULTS[f"{c['model_type']}'s vision"] | (c.get("vision_config") or {})
    stack = language_stack({**text, "model_type": "qwen2"})
    width, patch = v["hidden_size" if is_new else "embed_dim"], v["patch_size"]
    tower = TransformerConfig(
        width, v["depth"], v["num_heads"], linear=Linear, eps=1e-6, act=v["hidden_act"],
        norm="rms" if is_new else "ln", glu=is_new,
        ffn=v["intermediate_size"] if is_new else int(width * v["mlp_ratio"]))
    config, mean_std = image_processor(folder)
    of_video = read_published(folder / "processor_config.json", {}).get("video_processor") or {}
    of_video = of_video | read_published(folder / "video_preprocessor_config.json", {})

    def limits(config, least, most):
        size = config.get("size") or {}
        config = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge"),
                **{name: size[name] for name in ("min_pixels", "max_pixels") if name in size},
                **{name: config[name] for name in ("min_pixels", "max_pixels") if config.get(name)}}
        return config["min_pixels"] or least, config["max_pixels"] or most
    least, most = limits(config, 3136, 1003520)
    if (v["spatial_merge_size"], v["temporal_patch_size"]) != (2, 2):
        raise ValueError("only spatial_merge_size and temporal_patch_size 2 are supported")
    return ModelSpec(
        stack, text["vocab_size"], tower=functools.partial(
            QwenVisionTower, tower, patch, stack.width, v["window_size"] if is_new else 0,
            v["fullatt_block_indexes"] if is_new else ()),
        picture=functools.partial(
            qwen_rows, patch=patch, least=least, most=most, mean_std=mean_std,
            video=limits(of_video, 100352, 602112) if of_video else None),
        prompt=CHATML_SYSTEM.replace("{q}", "\0{q}"), seen="<|vision_start|>\0<|vision_end|>",
        slot="<|image_pad|>", video_slot="<|video_pad|>", frames=8, stop=("<|im_end|>",),
        rate=v["tokens_per_second"] if is_new else 1,
        names=((r"^(?:model\.)?visual\.merger\.mlp\.", "tower.merge."),
               (r"^(?:model\.)?visual\.merger\.ln_q\.", "tower.post."),
               (r"^(?:model\.)?visual\.", "tower.")))


# Published captioners (--vlm)             model_type                          input
# LLaVA-1.5 (two layouts), Yi-VL           llava                               frames
# Video-LLaVA (transformers' layout)       video_llava                         video, 8 frames
# Qwen-VL-Chat                             qwen                                frames
# InternLM-XComposer2-VL                   internlmxcomposer2                  frames
# CogVLM                                   CogVLMForCausalLM                   frames
# MiniCPM-V 2.0                            minicpmv                            frames, in slices
# OmniLMM                                  omnilmm                             frames
# Qwen2-VL, Qwen2.5-VL                     qwen2_vl, qwen2_5_vl                video, any size
# Language models (--lm, --rewrite): Llama, Vicuna, Yi: llama; Mistral: mistral; Qwen2 and 2.5:
# qwen2; Qwen3: qwen3; InternLM2: internlm2
FAMILIES = {**{kind: plain_lm for kind in ("llama", "mistral", "qwen2", "qwen3", "internlm2")},
            "llava": llava, "video_llava": llava, "internlmxcomposer2": xcomposer, "qwen": qwen_vl,
            "CogVLMForCausalLM": cogvlm, "minicpmv": minicpm_v, "omnilmm": omnilmm,
            "qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_vl}


def check_ids(ids, n, where):
    if max(ids) >= n:
        refuse(f"{where}: its tokenizer has the token id {max(ids)}, its model {n} embeddings: "
               "they do not belong together")


class VLM(nn.Module):
    """A published captioner or language model, made by `open_vlm`."""

    def __init__(self, spec):
        super().__init__()
        self.spec, is_lm = spec, spec.tower is None
        self.tower = None if is_lm else spec.tower()
        self.video_tower = spec.video_tower() if spec.video_tower else None
        self.connector = None if is_lm else spec.connector()
        self.decoder = Decoder(spec.stack, spec.vocab, spec.scales)

    def prompt(self, question):
        """The prompt with the question; NUL is the place of the image or video."""
        if not self.spec.prompt:
            what = f"not supported: {self.tokens.fault}" if self.tokens.template else "missing"
            refuse(f"{self.where}: its chat template is {what}: give --template NAME, one of "
                   f"{', '.join(CHATS)}, or put a chat_template.jinja there")
        return self.spec.prompt.replace("{q}", question.replace("\0", ""))

    def read(self, prompt, frames=(), is_video=False, seconds=1.0):
        """(ids with -1 for visual tokens, pixels, seconds of two frames if it is a video) of a
        prompt with NUL in the place of uint8 frames [H, W, 3]: one image, or a video."""
        spec, seen, pixels = self.spec, self.spec.seen, []
        is_rows = isinstance(self.tower, QwenVisionTower)
        if is_rows and len(frames):
            pixels = [spec.picture(frames)]
        else:
            for frame in frames:
                pictures, text = spec.picture(frame)
                pixels, seen = pixels + pictures, text or seen
        slot = spec.video_slot if is_video else spec.slot
        prompt = prompt.replace(slot, "") if slot else prompt        # no image token in the text
        parts = prompt.replace("\0", seen).split("\0")
        if slot and len(parts) > 1:
            ids, mark = self.tokens.encode(slot.join(parts)), self.tokens.id(slot)
            ids = [-1 if i == mark else i for i in ids]
        else:
            ids = [i for n, part in enumerate(parts) for i in [-1][:n] + self.tokens.encode(part)]
        return self.tokens.first + ids, pixels, seconds if is_video else None

    def features(self, pixels, is_video=False):
        """The visual tokens [n, width] of each image (Qwen2-VL: of each clip)."""
        device, dtype = self.decoder.embed.weight.device, self.decoder.embed.weight.dtype
        if isinstance(self.tower, QwenVisionTower):
            return [self.tower(rows.to(device, dtype), grid) for rows, grid in pixels]
        tower, features = self.video_tower if is_video and self.video_tower else self.tower, {}
        order = sorted(range(len(pixels)), key=lambda i: pixels[i].shape)
        for shape, same in itertools.groupby(order, key=lambda i: pixels[i].shape):
            grid = [side // self.tower.size for side in shape[1:]]
            for some in in_groups(same, 32):                             # images of one shape
                x = tower(torch.stack([pixels[i] for i in some]).to(device, dtype))
                x = self.connector(x, *grid if isinstance(self.connector, Resampler) else ())
                features.update(zip(some, x))
        return [features[i] for i in range(len(pixels))]

    def requests(self, keys, reads):
        """Makes Requests from the results of `read`; all images pass the tower in batches."""
        blocks = [None] * len(reads)
        for is_video in (False, True):
            some = [i for i, read in enumerate(reads) if (read[2] is not None) == is_video]
            features = iter(self.features([each for i in some for each in reads[i][1]], is_video))
            for i in some:
                blocks[i] = [next(features) for _ in reads[i][1]]
        return [self.request(key, *read, mine) for key, read, mine in zip(keys, reads, blocks)]

    def request(self, key, ids, pixels, seconds, blocks):
        """The Request of a prompt. Each -1 in `ids` is replaced by a block of visual tokens; a
        video's frames share one -1."""
        if blocks and ids.count(-1) == 1:
            blocks = [torch.cat(blocks)]
        check_ids(ids, self.decoder.embed.num_embeddings, self.where)
        lengths = iter(len(block) for block in blocks)
        runs = [(i, next(lengths) if i < 0 else 1) for i in ids]
        ids = [i for i, n in runs for _ in range(n)]
        if 0 < self.spec.longest < len(ids):
            refuse(f"a prompt of {len(ids)} tokens: longer than this model's "
                   f"{self.spec.longest} positions: give fewer frames")
        x, image = self.decoder.read([max(0, i) for i in ids]), torch.tensor(ids) < 0
        if blocks:
            x[image.to(x.device)] = torch.cat(blocks).to(x)
        positions, seen = torch.arange(len(ids)), image.clone()
        if self.spec.stack.sections:
            positions = self.grid_positions(runs, pixels, seconds)
        elif blocks and isinstance(self.connector, GluHead):     # all patches share a position
            first, last = image.nonzero()[[0, -1], 0].tolist()
            positions = torch.where(positions < last, positions.clamp(max=first + 1),
                                    positions - last + first + 2)
            seen[last] = False                           # the end token has the text's weights
        slot = self.tokens.id(self.spec.slot if seconds is None else self.spec.video_slot)
        counted = [slot if i < 0 else i for i in ids if i >= 0 or slot is not None]
        return Request(key, ids, x, positions.to(x.device), seen.to(x.device),
                       counted * self.spec.counts_prompt)

    def grid_positions(self, runs, pixels, seconds):
        """int64 [3, n], Qwen2-VL's positions: text has the same in all three, visual tokens have
        time, row and column; Qwen2.5-VL's time depends on the frame rate."""
        parts, after, grids = [], 0, iter(pixels)
        for i, n in runs:
            positions = torch.zeros(3, 1, dtype=torch.long)
            if i < 0:
                t, h, w = next(grids)[1]
                positions = torch.cartesian_prod(*(torch.arange(k) for k in (t, h // 2, w // 2))).T
                if seconds is not None and self.tower.window:
                    times = (positions[0] * seconds * self.spec.rate).long()
                    positions = torch.stack([times, *positions[1:]])
            parts.append(positions + after)
            after = int(parts[-1].max()) + 1
        return torch.cat(parts, 1)

    @torch.no_grad()
    def write(self, requests, batch=1, most=512, temperature=0.0, top_p=1.0, seed=0):
        """Generates the answers; yields (key, text, mean log-probability) as they finish."""
        own = {name: self.tokens.id(name) for name in self.spec.stop}
        names = [name for name, i in own.items() if i is None or self.tokens.decode([i])]

        def is_over(ids):
            return any(name in self.tokens.decode(ids[-16:]) for name in names)
        for request, ids, score in generate(
                self.decoder, requests, batch, most, self.stop, is_over if names else None,
                temperature, top_p, seed, len(self.tokens), self.penalties):
            text = self.tokens.decode(ids)
            for name in names:
                text = text.split(name)[0]
            yield request.key, re.sub(r"(?s)^.*</think>", "", text).strip(), score


# Other keys of generation_config.json that change a greedy answer: {key: default}.
NOT_APPLIED = dict(
    num_beams=1, min_length=0, min_new_tokens=0, guidance_scale=1, encoder_repetition_penalty=1,
    bad_words_ids=[], suppress_tokens=[], begin_suppress_tokens=[], sequence_bias={},
    forced_bos_token_id=None, forced_eos_token_id=None, exponential_decay_length_penalty=None)


def answer_rules(folder, config, tokens, names):
    """(ids that end an answer, from the folder's configs and of the family; (repetition_penalty,
    no_repeat_ngram_size), or None without). They are read from generation_config.json, or without
    it from config.json."""
    text, file = config.get("text_config") or {}, folder / "generation_config.json"
    generation = read_published(file, {})
    rules = values_of(generation if file.exists() else {**text, **config})
    penalty, size = rules.get("repetition_penalty") or 1.0, rules.get("no_repeat_ngram_size") or 0
    if not (0 < penalty < 1e6 and isinstance(size, int) and size >= 0):
        raise ValueError(f"repetition_penalty {penalty}, no_repeat_ngram_size {size}: above 0, and "
                         "a whole number from 0 on")
    others = [f"{name} {json.dumps(rules[name])[:40]}" for name, usual in NOT_APPLIED.items()
              if rules.get(name) not in (None, usual)]
    if others:
        where = file.name if file.exists() else "config.json"
        say_once(f"{folder}: {', '.join(others)} of its {where}: not applied here")
    stops = [part.get("eos_token_id") for part in (config, text, generation)]
    stops += map(tokens.id, (*names, "</s>", "<|endoftext|>"))
    flat = [i for stop in stops for i in (stop if isinstance(stop, list) else [stop])]
    penalties = None if (penalty, size) == (1, 0) else (penalty, size)
    return {i for i in flat if i is not None}, penalties


def check_published(path, config):
    """Refuses folders of quantized weights and of LoRA adapters."""
    adapter = path / "adapter_config.json"
    if adapter.exists():
        of = read_published(adapter).get("base_model_name_or_path") or "another model"
        refuse(f"{path} is a LoRA adapter of {of}: merge it (PEFT: merge_and_unload), save the "
               "model and give that folder; if the weights here are merged already, remove "
               "adapter_config.json")
    refuse_quantized(path, config)


def kind_of(config):
    """(The key in FAMILIES of a published config, or its own name; its first architecture.)"""
    made = str([*(config.get("architectures") or ()), "?"][0])
    kind = config.get("model_type") or made
    if made.startswith("InternLMXComposer2"):
        kind = "internlmxcomposer2"
    return "llava" if kind == "llava_llama" else kind, made


def open_vlm(path, device="cpu", dtype=torch.float32, tokenizer=None, sees=None, template=None):
    """The VLM of a published folder: family and sizes from its config, weights from its files.
    sees: refuse a language model (True) or a captioner (False). template: of CHATS, instead of the
    folder's."""
    path = Path(path)
    config = values_of(read_published(
        path / "config.json", *[{}] * (path / "adapter_config.json").exists()))
    with read_as_config(path):
        check_published(path, config)
        kind, made = kind_of(config)
        if kind == "?":
            refuse(f"{path}: its config.json names neither model_type nor architectures: fetch the "
                   f"published one, or add \"model_type\", one of {', '.join(FAMILIES)}")
        if kind not in FAMILIES:
            refuse(f"{path}: model_type {kind} is not supported: {', '.join(FAMILIES)} are"
                   if config.get("model_type") else f"{path}: its config.json has no model_type: "
                   f"add the one that goes with {kind}")
        if re.search(r"For(Sequence|Token|Question|Reward)|RewardModel|(?<!LMHead)Model$", made):
            refuse(f"{path} is a {made}, which generates no text: give a {kind} that does")
        weights = published_tensors(path, LM_MARK)
        config = DEFAULTS.get(kind, {}) | config | {"model_type": kind}
        spec = FAMILIES[kind](config, weights, path)
        text = config.get("text_config") or config
        if rope_of(text)[0] == "dynamic":
            row = DEFAULTS.get(text.get("model_type"), DEFAULTS.get(kind, LLAMA))
            spec.longest = (row | text)["max_position_embeddings"]
        tower = config.get("mm_vision_tower", "")
        if kind == "llava" and "vision_config" not in config and tower and not any(
                "vision_tower" in name for name in weights):
            beside = published_tensors(                         # of a tower or a whole CLIP
                sub_config(path, tower)["folder"], TOWER_MARK)
            weights |= {name: beside[name] for name in beside
                        if "vision_model." in name or re.match(
                            "(embeddings|encoder|pre_layrnorm|post_layernorm)\\.", name)}
        with torch.device("meta"):
            model = VLM(spec)
        result = to_ours(weights, model, spec.names)
        tied = config.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    is_lm = spec.tower is None
    if sees is not None and sees == is_lm:
        refuse(f"{path} is a language model alone, without a vision tower: give it as --lm" if sees
               else f"{path} is a captioner: give a language model alone")
    if tied and "decoder.embed.weight" in result:
        result.setdefault("decoder.head.weight", result["decoder.embed.weight"])
    result.update({name: torch.zeros(p.shape) for name, p in model.state_dict().items()
                  if name not in result and re.fullmatch(spec.zero, name)})
    load_strictly(model, result, [(".*", r"\g<0>")], spec.ignored, dtype, device, path)
    with read_as_config(tokenizer or path, "tokenizer_config.json"):
        remedy = ["put them there, or name a folder of them by --tokenizer"][is_lm:]
        model.where, model.tokens = path, Tokens(Path(tokenizer or path), *remedy)
        model.tokens.template = chat_template(path, is_lm) or chat_template(
            Path(tokenizer or path), is_lm)
        if spec.slot and model.tokens.id(spec.slot) is None:
            refuse(f"{tokenizer or path}: its tokenizer has no {spec.slot}, which {kind} needs")
        set_prompt(spec, kind, model.tokens, template, path)
    with read_as_config(path, "generation_config.json"):
        model.stop, model.penalties = answer_rules(path, config, model.tokens, spec.stop)
    return model


def set_prompt(spec, kind, tokens, name, where):
    """Sets the prompt format of a language model, or of LLaVA or Qwen2-VL in transformers' layout:
    CHATS[name], else the chat template, else the row of CHATS whose token its vocabulary has, else
    ''. Other captioners keep that of their code."""
    is_lm = spec.tower is None
    is_port = kind in ("llava", "video_llava", "qwen2_vl", "qwen2_5_vl") and spec.slot
    if not (name or is_lm or is_port and tokens.template):
        if tokens.template and spec.prompt:
            tqdm.write(f"{where}: its chat template is not used: a {kind} has the prompt of its "
                       "own code (--template NAME changes it)", file=sys.stderr)
        return
    if tokens.template and not name:
        try:
            spec.prompt, spec.stop = chat_of(tokens, where, spec)
        except ValueError as error:
            spec.prompt, tokens.fault = "", str(error)
        return
    name = name or next((name for name, (mark, *_) in CHATS.items()
                         if mark and tokens.id(mark) is not None), None)
    _, prompt, end = CHATS[name] if name else ("", "", None)
    if is_lm and prompt:
        prompt += "<think>\n\n</think>\n\n" * (tokens.id("<think>") is not None)
    elif prompt:
        seen = re.search(r"\0\s*\{q\}", spec.prompt) or ["\0\n{q}"]
        prompt = prompt.replace("{q}", seen[0])
    spec.prompt, spec.stop = prompt, (end,) if end else spec.stop


# -- questions to a published captioner, checks and scores of its captions -------------------------

STYLES = {  # question, fewest and most words of a valid caption
    "short": ("Describe this {what} in one sentence: who or what is there, what happens.", 3, 60),
    "long": ("Describe this {what} in at most six sentences, so that somebody could draw it: all "
             "objects and people, what they do, the place, the light, the camera, the style.",
             8, 400),
    "tags": ("List what this {what} shows as a line of short tags, separated by commas.", 1, 80)}
SUMMARY = ("These are descriptions of moments of one video, in their order, each with its time:\n"
           "{notes}\n{meta}They show the same scene. Tell what the whole video shows, in order. Do "
           "not mention descriptions, frames or times. {ask}")
REWRITE = ("Rewrite a short prompt for a video generator as a caption like these:\n{examples}\n"
           "Keep everything that it asks for and add plausible detail. Answer with the caption "
           "alone.\nPrompt: {prompt}")
REFUSAL = (r"\b(i am|i'm) (sorry|unable|not able)|\bas an ai\b|"
           r"\bi (can ?not|can't) (see|describe|help|assist|view)")
OPENING = (r"^(the|this|in the|in this) (image|video|picture|photo|frame|clip)(?: also)?,? "
           r"(shows|depicts|features|captures|presents|displays|there is|there are|we see) ")


def tidy(text):
    """The caption in one line, without 'The image shows …'."""
    text = " ".join(text.split())
    rest = re.sub(OPENING, "", text, flags=re.I)
    return rest if rest == text else rest[:1].upper() + rest[1:]


def fault(text, style):
    """The reason to reject a caption, or None."""
    words, (_, fewest, most) = words_of(text), STYLES[style]
    runs = Counter(zip(*(words[i:] for i in range(4))))
    if not words:
        return "empty"
    if re.search(REFUSAL, text.lower()):
        return "refusal"
    if sum(n - 1 for n in runs.values()) > len(words) / 4 or re.search(r"(.)\1{9}", text):
        return "repeated"
    if not fewest <= len(words) <= most:
        return "length"
    letters = [unicodedata.name(letter, "") for letter in text if letter.isalpha()]
    return None if sum("LATIN" in name for name in letters) > 0.8 * len(letters) else "language"


def published_options(parser):
    """The options of published captioners."""
    language = [kind for kind, make in FAMILIES.items() if make is plain_lm]
    captioners = [kind for kind, make in FAMILIES.items() if make is not plain_lm]
    add = parser.add_argument_group("published captioners", "--vlm and --init take folders of the "
                                    f"model types {', '.join(captioners)}").add_argument
    add("--lm", metavar="DIR", help="language model that merges the captions of a clip's frames: "
        f"{', '.join(language)} (none)")
    add("--style", default="long", choices=sorted(STYLES),
        help="the question, and the valid length of a caption (%(default)s)")
    add("--prompt", help="another question: text, or a text file; {what} becomes image or video")
    add("--summary", help="the question to --lm: text, or a text file, with {notes} for the "
        "frames' captions, {meta} for the metadata's, {ask} for the --prompt")
    add("--frames", type=frame_rule, metavar="RULE", help="frames that the captioner gets: "
        "uniform:N evenly spaced, fps:X per second, key:N by change (of a video uniform:8, for "
        "--lm uniform:4, else uniform:1)")
    add("--source", type=source_name,
        help="name of these captions in the data set (the folder's name and the style)")
    add("--temperature", type=number(float, 0, 10), default=0.0, help="sampling temperature, 0 to "
        "10; of generation_config.json only repetition_penalty and no_repeat_ngram_size apply "
        "(%(default)s: greedy)")
    add("--top_p", type=number(float, 1e-6, 1), default=1.0, help="nucleus sampling: total "
        "probability of the most likely tokens to draw from, up to 1 (%(default)s)")
    add("--dtype", choices=["fp32", "bf16"], help="dtype of the weights (bf16 on CUDA, else fp32)")
    add("--template", choices=sorted(CHATS), metavar="NAME", help="chat format of --lm, or "
        f"without it of --vlm or --init: {', '.join(CHATS)} (the folder's chat template)")
    add("--tokenizer", metavar="DIR", help="folder of the tokenizer (the folder of --vlm)")
    add("--clip", metavar="DIR", help="CLIP or SigLIP folder, for the score clip: the mean cosine "
        "of caption and frames (none)")
    add("--aesthetics", metavar="FILE", help="LAION's linear head on that CLIP, for the score "
        "aesthetic (none)")
    add("--init", metavar="DIR", help="with --train: the published captioner to fine-tune (none)")
    add("--tune", default="connector", choices=["connector", "lora", "all"], help="the weights of "
        "--init to train (%(default)s), at --lr 1e-3, 2e-4 or 2e-5 by default")
    add("--rank", type=number(int, 1), default=8, help="rank of --tune lora (%(default)s)")


def source_name(text):
    """argparse type: a part of a file's name."""
    if not re.fullmatch(r"[\w.-]+", text):
        raise argparse.ArgumentTypeError(f"'{text}' may hold only letters, digits, '.', '-', '_'")
    return text


def frame_rule(text):
    """argparse type: [kind, number] of uniform:N, fps:X, key:N."""
    match = re.fullmatch(r"(uniform|key):([1-9]\d*)|(fps):(\d*\.?\d+)", text)
    if not match or not float(match[2] or match[4]):
        raise argparse.ArgumentTypeError(f"'{text}' is none of uniform:8, fps:0.5, key:4")
    return [match[1] or match[3], float(match[4]) if match[4] else int(match[2])]


def pick_frames(rule, folder, row):
    """(frames uint8 [H, W, 3], their times in s) of a clip. uniform:N: evenly spaced from first to
    last, the middle one if N is 1; fps:X: X per second; key:N: N frames with about equal change
    between them."""
    n, fps = row["frames"], row["fps"] or 1
    kind, value = rule if n > 1 else ("uniform", 1)
    at = np.array([n // 2])
    if kind == "fps":
        at = (np.arange(0.5 / value, max(n / fps, 0.6 / value), 1 / value) * fps).astype(int)
    elif kind == "uniform" and value > 1:
        at = np.linspace(0, n - 1, int(value)).astype(int)
    elif kind == "key":
        small = np.stack([np.asarray(Image.fromarray(frame).resize((16, 16)).convert("L"))
                          for frame in frames_of(folder, row)]).astype(np.float32)
        change = np.cumsum([0, *np.abs(np.diff(small, axis=0)).mean((1, 2)) + 1e-3])
        at = np.searchsorted(change, np.linspace(0, change[-1], int(value) + 1)[:-1]
                             + change[-1] / value / 2)
    at = at.clip(max=n - 1).tolist()
    frames = dict(zip(sorted(set(at)), frames_of(folder, row, set(at))))
    return [frames[i] for i in at], [i / fps for i in at]


def text_option(value):
    """A prompt given as text or as the path of a text file."""
    text = value
    if os.path.isfile(value):
        text = read_text(value, "--prompt")
    elif value.endswith(".txt"):
        refuse(f"{value} is missing")
    return text.strip() or refuse(f"'{value}' holds no text")


def question_for(args, is_video):
    """The question about a clip."""
    ask = text_option(args.prompt) if args.prompt else STYLES[args.style][0]
    return ask.replace("{what}", "video" if is_video else "image")


def sampling_rules(vlm, name, args, lm=None):
    """(Whether the model takes a video, the rule of `pick_frames`, the question.)"""
    is_video = bool(vlm.spec.frames) and not lm
    for model in (vlm, *filter(None, [lm])):         # refuse a wrong tokenizer now
        ids = model.read(model.prompt(question_for(args, is_video)))[0]
        check_ids(ids, model.decoder.embed.num_embeddings, model.where)
    rule = args.frames or ["uniform", vlm.spec.frames if is_video else 4 if lm else 1]
    if rule != ["uniform", 1] and not is_video and not lm:
        refuse(f"{name} takes one frame at a time: " + (
            "leave --frames out" if args.train else "give --lm DIR, which merges the captions of "
            "several, or --frames uniform:1"))
    return is_video, rule, question_for(args, is_video)


def frames_for(vlm, prompt, is_video, rule, folder, row):
    """([results of vlm.read], times in s): one for the whole video, or one for each frame."""
    frames, times = pick_frames(rule, folder, row)
    if not (is_video and row["fps"]):
        return [vlm.read(prompt, [frame]) for frame in frames], times
    gap = (times[-1] - times[0]) / max(1, len(times) - 1) or 1.0         # if frames are repeated
    return [vlm.read(prompt, frames, True, 2 * gap)], times


def vlm_writer(name, folder, rows, args, device):
    """(load, write) as in `own_writer`, of a published captioner: of the video if the model takes
    videos, else of each frame; with --lm, a language model merges the frames' captions."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[
        args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    vlm = open_captioner(run_dir(name), device, dtype, args.tokenizer,
                         None if args.lm else args.template)
    lm = open_vlm(args.lm, device, dtype, sees=False, template=args.template) if args.lm else None
    is_video, rule, question = sampling_rules(vlm, name, args, lm)
    template = text_option(args.summary or SUMMARY).replace("{ask}", question_for(args, True))
    meta = {row["key"]: " ".join(c["text"] for c in row["captions"]) for row in rows}
    how = dict(batch=args.batch, most=args.max_tokens, temperature=args.temperature,
               top_p=args.top_p, seed=args.seed)

    def load(row):
        return frames_for(vlm, vlm.prompt(question), is_video, rule, folder, row)

    def notes(pairs):
        """Yields (key, times, texts, mean log-probability) when all frames of a clip have texts."""
        waiting, answers = {}, {}

        def requests():
            for group in in_groups(pairs, args.batch):
                waiting.update({row["key"]: loaded for row, loaded in group})
                frames = [(f"{row['key']}#{i}", read) for row, (reads, _) in group
                          for i, read in enumerate(reads)]
                with torch.no_grad():
                    yield from vlm.requests(*zip(*frames))
        for name, text, score in vlm.write(requests(), **how):
            key, _, i = name.rpartition("#")
            answers.setdefault(key, {})[int(i)] = tidy(text), score
            if len(answers[key]) == len(waiting[key][0]):
                texts, scores = zip(*(answer for _, answer in sorted(answers.pop(key).items())))
                yield key, waiting.pop(key)[1], texts, float(np.mean(scores))

    def write(pairs):
        if not lm:
            yield from ((key, texts[0], question, {"logprob": score})
                        for key, _, texts, score in notes(pairs))
            return
        scores = {}

        def requests():
            for key, times, texts, score in notes(pairs):
                scores[key] = score
                lines = "\n".join(f"{at:.1f} s: {text}" for at, text in zip(times, texts))
                words = template.replace("{notes}", lines).replace(
                    "{meta}", f"Its publisher says: {meta[key]}\n" if meta[key] else "")
                yield lm.request(key, *lm.read(lm.prompt(words)), [])
        for key, text, score in lm.write(requests(), **how):
            yield key, tidy(text), question, {"logprob": score, "logprob_frames": scores.pop(key)}

    return load, write


def rewrite(lm, prompt, examples=(), seed=0, temperature=0.0, most=160):
    """Expands a short prompt by the language model `lm` (of open_vlm), like the examples."""
    words = REWRITE.replace("{examples}", "\n".join(f"- {text}" for text in examples))
    request = lm.request(prompt, *lm.read(lm.prompt(words.replace("{prompt}", prompt))), [])
    (_, text, _), = lm.write([request], most=most, temperature=temperature, top_p=0.9, seed=seed)
    return tidy(text) or prompt


class Probe(nn.Module):
    """SigLIP's attention pooling head (2303.15343): [B, N, D] to [B, D]."""

    def __init__(self, stack):
        super().__init__()
        self.stack, D = stack, stack.width
        self.probe, self.layernorm = nn.Embedding(1, D), stack.make_norm()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        self.up, self.down = nn.Linear(D, stack.ffn), nn.Linear(stack.ffn, D)

    def forward(self, x):
        q = self.q(self.probe.weight).expand(len(x), 1, -1)
        x = self.out(gather(q, self.k(x), self.v(x), self.stack.heads)[:, 0])
        return x + self.down(ACTS[self.stack.act](self.up(self.layernorm(x))))


def scored_picture(folder, size, is_siglip):
    """The preprocessing of CLIP or SigLIP by the folder's image processor: `squash` or `crop`."""
    config, mean_std = image_processor(folder, None, HALF if is_siglip else CLIP_MEAN,
                                       ("resample",))
    scaled, cut = config.get("size", size), config.get("crop_size", size)
    is_cut = config.get("do_center_crop", not is_siglip)
    is_whole = "height" in scaled if isinstance(scaled, dict) else is_siglip
    scaled, cut = (set(value.values()) if isinstance(value, dict) else {value}
                   for value in (scaled, cut))
    short, how = max(scaled), Image.Resampling(config.get("resample", 3))
    if (is_cut and cut != {size}) or len(scaled) > 1 or short < size or (
            short > size and (is_whole or not is_cut)) or not (is_whole or is_cut):
        cut = f"cut to {config.get('crop_size')}" if is_cut else "not cut"
        raise ValueError(f"its image processor makes images of {config.get('size')}, {cut}: "
                         f"its model takes {size} x {size} px")
    return functools.partial(squash, mean_std=mean_std, how=how) if is_whole else functools.partial(
        crop, mean_std=mean_std, how=how, short=short)


class Scorer:
    """Scores a clip and its caption by a CLIP or SigLIP folder: the mean cosine of four frames and
    the text; with LAION's linear head (weight [1, D], bias [1]) also their mean aesthetics."""

    def __init__(self, args, folder, rows, device):
        config = values_of(read_published(Path(args.clip, "config.json")))
        self.is_siglip, kind = config.get("model_type") == "siglip", config.get("model_type")
        if kind not in ("clip", "siglip"):
            refuse(f"{args.clip} is no CLIP or SigLIP of images and texts: " + (
                f"it is a {kind}" if kind else "its config.json names no model_type"))
        self.folder, self.rows, self.device = folder, {row["key"]: row for row in rows}, device
        self.text = open_text_encoder(args.clip, device)
        weights = published_tensors(args.clip, *CLIP_MARK)
        with read_as_config(args.clip):
            sight = {**(SIGLIP if self.is_siglip else CLIP), **(config.get("vision_config") or {}),
                     **(config.get("vision_config_dict") or {})}
            self.size, read = sight["image_size"], self.text.embed.embedding_dim
            self.picture = scored_picture(Path(args.clip), self.size, self.is_siglip)
            with torch.device("meta"):
                model = nn.Module()
                if self.is_siglip:
                    stack = clip_stack(sight, sight["num_hidden_layers"], linear=Linear)
                    positions = (self.size // sight["patch_size"])**2
                    model.tower = VisionTower(stack, sight["patch_size"], positions, bias=True,
                                              post=True)
                    model.visual, width = Probe(stack), stack.width
                else:
                    model.tower = clip_tower(sight, -1, True, True)()
                    width = config.get("projection_dim", 512)
                    model.visual = nn.Linear(model.tower.patch.out_features, width, bias=False)
                model.textual = nn.Linear(read, width, bias=self.is_siglip)
            names = ((r"^vision_model\.head\.attention\.", "visual.attn."), CLIP_TOWER,
                     (r"^(visual_projection|vision_model\.head)\.", "visual."),
                     (r"^(text_projection|text_model\.head)\.", "textual."))
            sights = {name: t for name, t in weights.items()
                      if not re.match(r"text_model\.(?!head)|logit_", name)}
            result = to_ours(sights, model, names)
        self.model = load_strictly(model, result, [(".*", r"\g<0>")], "-", torch.float32, device,
                                   args.clip)
        self.head = read_tensors(args.aesthetics) if args.aesthetics else {}
        shapes = {name: list(tensor.shape) for name, tensor in self.head.items()}
        if shapes not in ({}, {"weight": [1, width], "bias": [1]}):
            refuse(f"{args.aesthetics} holds {shapes}, not weight [1, {width}] and bias [1]")

    def __call__(self, key, text):
        return self.score(pick_frames(("uniform", 4), self.folder, self.rows[key])[0], text)

    @torch.no_grad()
    def score(self, frames, text):
        x = torch.stack([self.picture(frame, self.size)[0][0] for frame in frames]).to(self.device)
        x = self.model.tower(x)                      # CLIP uses the first token, SigLIP all
        seen = F.normalize(self.model.visual(x if self.is_siglip else x[:, 0]), dim=-1)
        ids = self.text.ids([text])[0].to(self.device)
        read = F.normalize(self.model.textual(self.text.pooled(ids, self.text(ids)[0])), dim=-1)
        scores = {"clip": (seen @ read[0]).mean().item()}
        if self.head:
            weight, bias = self.head["weight"].to(seen), self.head["bias"].to(seen)
            scores["aesthetic"] = F.linear(seen, weight, bias).mean().item()
        return scores


# -- fine-tuning a published captioner: --init, --tune ---------------------------------------------


class LoRA(nn.Module):
    """A frozen linear layer plus a trained product of rank n, which starts at zero."""

    def __init__(self, base, n):
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, n, bias=False)
        self.up = nn.Linear(n, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


TUNED = {"connector": r"connector\..*|tower\.merge\..*",           # Qwen2-VL's is in the tower
         "lora": r".*\.[a-z]+\.(up|down)\.weight", "all": r"(?!tower\.(?!merge)|video_tower).*"}


def open_tuned(init, tune, rank, device, dtype=torch.float32, tokenizer=None, template=None):
    """The model of `open_vlm` with the weights of `tune` trainable: connector; lora, of the
    decoder's layers; all, except the towers."""
    model = open_vlm(init, device, dtype, tokenizer, True, template)
    if tune == "lora":
        torch.manual_seed(0)
        for layer in model.decoder.layers:
            for name, f in list(layer.named_children()):
                if isinstance(f, nn.Linear):
                    setattr(layer, name, LoRA(f, rank).to(device, dtype))
    for name, p in model.named_parameters():
        p.requires_grad_(bool(re.fullmatch(TUNED[tune], name)) and ".base." not in name)
    return model


def open_captioner(path, device, dtype, tokenizer=None, template=None):
    """The VLM of a published folder, or of a run that fine-tuned one."""
    if "kind" not in read_published(path / "config.json", {}):
        return open_vlm(path, device, dtype, tokenizer, True, template)
    config, step = finished(path)
    model = open_tuned(*(config["args"][name] for name in ("init", "tune", "rank")), device, dtype,
                       config["args"]["tokenizer"], config["args"].get("template"))
    saved = load_file(step / "model.safetensors")
    if saved.keys() != trainable(model).keys():
        refuse(f"{step} does not belong to the model {config['args']['init']}")
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in saved.items()},
                          strict=False)
    return model


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def answer_loss(model, requests, answers):
    """Cross entropy in nats, summed over the tokens of the answers: lists of ids with a stop."""
    decoder, texts = model.decoder, []
    for request, ids in zip(requests, answers):
        positions = request.positions
        after = torch.arange(len(ids) - 1, device=positions.device) + positions.max() + 1
        texts.append(request._replace(
            x=torch.cat([request.x, decoder.read(ids[:-1])]),
            positions=torch.cat([positions, after.expand(*positions.shape[:-1], -1)], -1),
            image=F.pad(request.image, (0, len(ids) - 1))))
    x, positions, image = pad_requests(texts)
    h = decoder(x, positions, image=image, prompts=torch.tensor(
        [len(request.ids) for request in requests], device=x.device))
    h = torch.cat([row[len(request.ids) - 1:][:len(ids)]
                   for row, request, ids in zip(h, requests, answers)])
    wanted = torch.tensor([i for ids in answers for i in ids], device=x.device)
    return F.cross_entropy(decoder.logits(h).float(), wanted, reduction="sum")


@one_run
def tune(args, run):
    """Fine-tunes a published captioner on the captions, with the question, or with the prompt that
    is stored beside a caption."""
    rank, world, device = setup(args, args.batch, "--batch")
    claim(run)
    folder, rows, held_out = captioned(args, run)
    is_done, step = is_finished(last_step(run), args), 0
    if not is_done:                                  # before start_run: a refusal leaves no run
        model = open_tuned(args.init, args.tune, args.rank, device, tokenizer=args.tokenizer,
                           template=args.template)
        is_video, rule, question = sampling_rules(model, args.init, args)
    checkpoint = start_run(run, {"kind": "captioner", "args": vars(args), "model": {
        "init": args.init, "tune": args.tune, "rank": args.rank}})
    if is_done:
        return
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=args.lr, weight_decay=0.0)
    if checkpoint:
        step, saved = load_step(checkpoint)
        model.load_state_dict(saved["model"], strict=False)
        restore_optimizer(optimizer, model, saved["optimizer"])
    stream = Stream(rows, args.seed)

    def ids_of(caption):
        return model.tokens.encode(caption["text"])[:args.max_tokens] + [min(model.stop)]
    # the sum over a step's tokens is divided by this constant: equal on any number of ranks
    answers = [ids_of(caption) for row in rows[:1000] for caption in row["captions"]]
    length = np.mean([len(ids) for ids in answers])
    by_frequency = frequency_loss(answers, [ids_of(row["captions"][0]) for row in held_out[:64]])

    def read(row, caption):
        prompt = model.prompt(caption.get("prompt") or question)
        (first, *_), _ = frames_for(model, prompt, is_video, rule, folder, row)
        return row["key"], first, ids_of(caption)

    def batch(step):
        drawn = stream.take(step * args.batch, args.batch)[rank::world]
        return list(zip(*(read(row, pick_caption(row, args, step)) for row in drawn)))

    def learn(step, drawn):
        keys, reads, answers = drawn
        loss = answer_loss(model, model.requests(keys, reads), answers)
        (loss / (args.batch * length)).backward()
        count = loss.new_full((), sum(map(len, answers)))
        return ({"loss": torch.stack([loss.detach(), count])},
                take_step(model, optimizer, lr_at(step, args)), keys)

    @torch.no_grad()
    def held_out_nats(done):
        total, count = 0.0, 0
        for row in held_out[:64]:
            key, prompt, ids = read(row, row["captions"][0])
            total += answer_loss(model, model.requests([key], [prompt]), [ids]).item()
            count += len(ids)
        return report(run, done, total / count, by_frequency)

    fit(args, run, step, batch, learn, held_out_nats,
        lambda: {"model": trainable(model), "optimizer": optimizer_tensors(optimizer, model)})


if __name__ == "__main__":
    script(main)
