"""`python caption.py bench`: captions beside transformers' LLaVA-1.5 with equal weights, in one run."""
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

import caption as C
import train_vae as V
from kernels.memory import keep_memory

FIXTURE = Path(__file__).with_name("fixtures") / "vlm-llava15"


def make(folder):
    """transformers' LLaVA-1.5 of about 100M parameters, random weights, saved to `folder` with a
    tokenizer: frames of 224 px in 256 tokens, a decoder of 12 layers of 768."""
    torch.manual_seed(0)
    text = transformers.LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                                    num_attention_heads=12, num_key_value_heads=12,
                                    vocab_size=8000, max_position_embeddings=2048)
    vision = transformers.CLIPVisionConfig(hidden_size=384, intermediate_size=1536, patch_size=14,
                                           num_hidden_layers=5, num_attention_heads=6,
                                           image_size=224)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=384)
    peer = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():                        # margins between tokens as wide as a trained one's
        peer.get_output_embeddings().weight.normal_(std=0.2)
    peer.generation_config.eos_token_id = peer.generation_config.pad_token_id = None
    peer.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FIXTURE / name, folder)
    return peer


def bench(argv):
    """Prints a table: tokens/s of ours and of transformers', greedy, the same tokens or not."""
    parser = V.option_parser("Captions beside transformers' (which must be installed)")
    parser.add_argument("--repeats", type=V.number(int, 1), default=2, help="of each (%(default)s)")
    parser.add_argument("--clips", type=V.number(int, 1), nargs="+", default=[1, 16],
                        help="how many at a time (1 16)")
    parser.add_argument("--frames", type=V.number(int, 1), nargs="+", default=[1, 4],
                        help="clips have 1 to as many frames, in turn (1 4)")
    parser.add_argument("--new", type=V.number(int, 1), default=64, help="tokens (%(default)s)")
    args = parser.parse_args(argv)
    keep_memory()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, float32, "
          f"{torch.get_num_threads()} threads; {args.new} new tokens, best of {args.repeats}")
    print(f"{'clips, frames of each':21} {'tokens in':>11} {'theirs tok/s':>12} {'ours tok/s':>12} "
          f"{'ratio':>6}  same tokens")
    with tempfile.TemporaryDirectory() as folder:
        peer = make(folder)
        random = np.random.default_rng(0)
        for n, most in [(n, most) for n in args.clips for most in args.frames if most <= n]:
            ours = C.open_vlm(folder)
            clips = [random.integers(0, 255, (1 + i % most, 224, 224, 3), np.uint8)
                     for i in range(n)]
            asked = ["what is seen in this clip? " * (1 + i % 4) for i in range(n)]
            reads = [ours.read(ours.prompt(q), frames) for q, frames in zip(asked, clips)]
            pixels = torch.stack([picture for read in reads for picture in read[1]])
            rows = [[i for k in ids for i in ([384] * 256 * len(seen) if k < 0 else [k])]
                    for ids, seen, _ in reads]
            longest = max(map(len, rows))
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])

            def theirs():
                out = peer.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels,
                                    do_sample=False, max_new_tokens=args.new, pad_token_id=0)
                return out[:, longest:].tolist()

            @torch.no_grad()
            def mine():
                requests = ours.requests([str(i) for i in range(n)], reads)
                result = {int(request.key): ids for request, ids, _ in C.generate(
                    ours.decoder, requests, n, args.new)}
                return [result[i] for i in range(n)]

            times, outs = {}, {}
            for _ in range(args.repeats):
                for fn in (theirs, mine):
                    began = time.perf_counter()
                    outs[fn] = fn()
                    times.setdefault(fn, []).append(time.perf_counter() - began)
            a, b = (n * args.new / min(times[fn]) for fn in (theirs, mine))
            same = np.mean([x == y for x, y in zip(outs[theirs], outs[mine])])
            label = f"{n}, 1" + (f" to {most}" if most > 1 else "")
            tokens = " to ".join(map(str, sorted({min(map(len, rows)), longest})))
            print(f"{label:21} {tokens:>11} {a:12.1f} {b:12.1f} {b / a:6.2f}  {same:.0%}",
                  flush=True)
