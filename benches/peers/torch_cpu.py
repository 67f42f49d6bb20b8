"""PyTorch on the CPU, as CSV on stdout: scaled_dot_product_attention, or the layer. Started by ./torch_cpu."""

import argparse
import copy
import csv
import math
import os
import platform
import statistics
import sys
import time

COLUMNS = "peer,version,adapter,dtype,shape,options,ms,gflops,max_error".split(",")


def arguments():
    p = argparse.ArgumentParser(prog="torch_cpu", description=__doc__)
    p.add_argument("--shapes", default="1x8x512x64,1x8x1024x64,1x8x2048x64",
                   help="comma list of BxHq[/Hkv]xSq[/Sk]xD[/Dv]")
    p.add_argument("--layer", action="store_true", help="nn.MultiheadAttention; a shape is BxSxExH then")
    p.add_argument("--backward", action="store_true", help="the gradients of q, k and v alone")
    p.add_argument("--options", default="plain,causal", help="comma list of plain, causal")
    p.add_argument("--dtype", default="f32", choices=["f32", "f16"])
    p.add_argument("--repeat", type=int, default=10, help="timed calls per case; the median counts")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                   else os.cpu_count())
    a = p.parse_args()
    a.shapes = [(s, parse_layer(s) if a.layer else parse_shape(s)) for s in a.shapes.split(",")]
    a.options = a.options.split(",")
    if bad := [o for o in a.options if o not in ("plain", "causal")]:
        p.error(f"unknown option {bad[0]!r}")
    if a.repeat < 1 or a.threads < 1:
        p.error("--repeat and --threads start at 1")
    return a


def parse_shape(text):
    """`BxHq[/Hkv]xSq[/Sk]xD[/Dv]` as (b, hq, hkv, sq, sk, d, dv)."""
    try:
        b, h, s, d = text.split("x")
        (hq, hkv), (sq, sk), (dq, dv) = (
            (lambda n: (n[0], n[-1]))([int(n) for n in part.split("/", 1)]) for part in (h, s, d))
        shape = (int(b), hq, hkv, sq, sk, dq, dv)
        if min(shape) < 1 or hq % hkv:
            raise ValueError
        return shape
    except ValueError:
        sys.exit(f"torch_cpu: bad shape {text!r}, expected BxHq[/Hkv]xSq[/Sk]xD[/Dv]")


def parse_layer(text):
    """`BxSxExH` as (b, s, e, h)."""
    try:
        shape = b, s, e, h = [int(n) for n in text.split("x")]
        if min(shape) < 1 or e % h:
            raise ValueError
        return shape
    except ValueError:
        sys.exit(f"torch_cpu: bad shape {text!r}, expected BxSxExH")


def cpu_name():
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def spread(n, most):
    """At most `most` of 0..n, evenly spread, the first and the last among them."""
    if n <= most:
        return list(range(n))
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


def max_error(torch, q, k, v, o, causal):
    """max|o - o64| over up to 32 (batch, head) pairs and 64 rows of each, o64 computed in float64."""
    b, hq, sq, d = q.shape
    group = hq // k.shape[1]
    rows = torch.tensor(spread(sq, 64))
    worst = 0.0
    for pair in spread(b * hq, 32):
        i, h = divmod(pair, hq)
        s = q[i, h, rows].double() @ k[i, h // group].double().T / math.sqrt(d)
        if causal:
            s.masked_fill_(torch.arange(k.shape[2])[None, :] > rows[:, None], -math.inf)
        o64 = torch.softmax(s, -1) @ v[i, h // group].double()
        worst = max(worst, (o[i, h, rows].double() - o64).abs().max().item())
    return worst


def attend(torch, q, k, v, causal):
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def attention(torch, shape, dtype, causal):
    """The call, the error of its result, and its operations; None for what peers see differently."""
    b, hq, hkv, sq, sk, d, dv = shape
    if causal and sq != sk:
        return None
    q = torch.randn(b, hq, sq, d).to(dtype)
    k = torch.randn(b, hkv, sk, d).to(dtype)
    v = torch.randn(b, hkv, sk, dv).to(dtype)
    call = lambda: attend(torch, q, k, v, causal)
    return call, lambda o: max_error(torch, q, k, v, o, causal), 2 * b * hq * sq * sk * (d + dv) / (1 + causal)


def gradients_of(torch, q, k, v, dout, causal):
    """A call that gives autograd's gradients of q, k and v, again and again after one forward call."""
    of = [x.detach().requires_grad_() for x in (q, k, v)]
    o = attend(torch, *of, causal)
    return lambda: torch.autograd.grad(o, of, dout, retain_graph=True)


def gradients_error(torch, q, k, v, dout, causal, got):
    """max|x - x64| over the gradients of the first entry's first group of heads, x64 computed in float64."""
    group = q.shape[1] // k.shape[1]
    heads = (group, 1, 1, group)
    golden = gradients_of(torch, *(x[:1, :n].double() for x, n in zip((q, k, v, dout), heads)), causal)()
    return max((x[:1, :n].double() - y).abs().max().item() for x, n, y in zip(got, heads, golden))


def backward(torch, shape, dtype, causal):
    """The same of the gradients."""
    b, hq, hkv, s, _, d, _ = shape
    if shape != (b, hq, hkv, s, s, d, d):
        return None
    q, k, v, dout = (torch.randn(b, h, s, d).to(dtype) for h in (hq, hkv, hkv, hq))
    error = lambda got: gradients_error(torch, q, k, v, dout, causal, got)
    return gradients_of(torch, q, k, v, dout, causal), error, 10 * b * hq * s * s * d / (1 + causal)


def layer(torch, shape, dtype, causal):
    """The same of nn.MultiheadAttention over one sequence: packed weights, biases, no weights given back."""
    b, s, e, h = shape
    x = torch.randn(b, s, e).to(dtype)
    mha = torch.nn.MultiheadAttention(e, h, batch_first=True, dtype=dtype).eval()
    for bias in (mha.in_proj_bias, mha.out_proj.bias):
        torch.nn.init.normal_(bias, std=0.1)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(s, dtype=dtype) if causal else None

    def call(mha, x, mask):
        return mha(x, x, x, need_weights=False, attn_mask=mask, is_causal=causal)[0]

    def error(y):
        golden = call(copy.deepcopy(mha).double(), x.double(), mask.double() if causal else None)
        return (y.double() - golden).abs().max().item()

    return (lambda: call(mha, x, mask)), error, 8 * b * s * e * e + 4 * b * s * s * e / (1 + causal)


def main():
    a = arguments()
    # Before torch is loaded: its thread pools read these once.
    os.environ.setdefault("OMP_NUM_THREADS", str(a.threads))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import warnings
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    dtype = {"f32": torch.float32, "f16": torch.float16}[a.dtype]
    out = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    out.writeheader()
    for text, shape in a.shapes:
        for option in a.options:
            made = (layer if a.layer else backward if a.backward else attention)(torch, shape, dtype, option == "causal")
            if made is None:
                print(f"torch_cpu: {text} causal skipped: peers align Sq != Sk differently", file=sys.stderr)
                continue
            call, error_of, flop = made
            times = []
            with torch.inference_mode(not a.backward):
                result = call()
                for _ in range(2):
                    call()
                for _ in range(a.repeat):
                    start = time.perf_counter()
                    call()
                    times.append(time.perf_counter() - start)
                error = error_of(result)
            seconds = statistics.median(times)
            out.writerow({
                "peer": "torch_cpu" + " layer" * a.layer + " backward" * a.backward, "version": torch.__version__.split("+")[0],
                "adapter": f"{cpu_name()} x{a.threads}", "dtype": a.dtype, "shape": text, "options": option,
                "ms": f"{seconds * 1e3:.4f}", "gflops": f"{flop / seconds / 1e9:.2f}", "max_error": f"{error:.3e}"})
            sys.stdout.flush()


if __name__ == "__main__":
    main()
