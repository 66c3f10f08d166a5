#!/usr/bin/env python3
"""gpu_peers.py -- bf16 and fp8 decode attention of others, on the device that `kelvin bench gpu` measures, in the same run.

    gpu_peers.py --out peers.jsonl --shape 8x32768x128x8x4 --shape 1x131072x128x8x4     BATCHxLENGTHxHEAD_DIMxKV_HEADSxGROUP
    gpu_peers.py --prepare --shape ...                     compiles FlashInfer's kernels of these shapes and ends

Peers: PyTorch's scaled_dot_product_attention (cuDNN, flash) and FlashInfer's BatchDecodeWithPagedKVCacheWrapper (tensor cores,
pages of 64; bf16 and fp8 e4m3 caches).  All read the same random keys and values; pages of a sequence are shuffled within it,
which attention cannot see, so that every peer's output is held against f32.  A call reads its own copy of the cache, as many
copies as exceed the second-level cache several times over; one CUDA graph runs over all copies; graphs of all peers take turns;
us is the median of the turns, per call.  A peer that is not here is a row with status "missing" and the reason.
"""
import argparse
import json
import math
import sys
import time

PEERS = ("sdpa_cudnn", "sdpa_flash", "flashinfer_bf16", "flashinfer_fp8")
PAGE = 64


def shape_of(text):
    parts = text.split("x")
    if len(parts) != 5 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"shape '{text}' is not BATCHxLENGTHxHEAD_DIMxKV_HEADSxGROUP, five whole numbers from 1")
    batch, length, head_dim, n_kv_heads, group = map(int, parts)
    if length % PAGE:
        raise argparse.ArgumentTypeError(f"shape '{text}': length {length} is not a multiple of the page, {PAGE}")
    return dict(batch=batch, length=length, head_dim=head_dim, n_kv_heads=n_kv_heads, group=group)


def arguments():
    p = argparse.ArgumentParser(description="Decode attention of other libraries, for kelvin bench gpu --peers.")
    p.add_argument("--shape", action="append", type=shape_of, required=True, metavar="BxLxDxHxG")
    p.add_argument("--peer", action="append", choices=PEERS, help="again for more (default: all)")
    p.add_argument("--repeats", type=int, default=15)
    p.add_argument("--out", help="rows as JSON lines (default: standard output)")
    p.add_argument("--prepare", action="store_true", help="compile FlashInfer's kernels and end")
    p.add_argument("--copies-bytes", type=float, default=512e6, help="caches are copied up to so many bytes, at least four times")
    return p.parse_args()


def first_line(e):
    return (f"{type(e).__name__}: {e}".splitlines() or ["?"])[0][:300]


def prepare(torch, shapes, peers):
    """FlashInfer compiles a module per head_dim and cache type with nvcc: all of them in one ninja, since several in its one folder spoil
    each other's log, and what is compiled is not compiled again."""
    from flashinfer.jit import core
    from flashinfer.jit.attention.modules import gen_batch_prefill_module
    build = core.JitSpec.build
    core.JitSpec.build = lambda spec, *args, **more: None if spec.jit_library_path.exists() else build(spec, *args, **more)
    kinds = {"flashinfer_bf16": torch.bfloat16, "flashinfer_fp8": torch.float8_e4m3fn}
    specs = []
    for head_dim, peer in sorted({(s["head_dim"], p) for s in shapes for p in peers if p in kinds}):
        specs.append(gen_batch_prefill_module("fa2", torch.bfloat16, kinds[peer], torch.bfloat16, torch.int32, head_dim, head_dim, 0, False, False, False))
    missing = [s for s in specs if not s.jit_library_path.exists()]
    if missing:
        t = time.time()
        core.build_jit_specs(missing)
        print(f"gpu_peers: {len(missing)} kernels of FlashInfer compiled in {time.time() - t:.0f} s", file=sys.stderr)


class Caches:
    """K and V of one shape, `copies` of them: [copies][batch][length][kv heads][head_dim], random."""

    def __init__(self, torch, s, copies_bytes):
        self.torch, self.s = torch, s
        one = 2 * 2 * s["batch"] * s["length"] * s["n_kv_heads"] * s["head_dim"]
        self.bytes = one
        self.copies = max(4, min(64, math.ceil(copies_bytes / one)))
        size = (self.copies, s["batch"], s["length"], s["n_kv_heads"], s["head_dim"])
        g = torch.Generator(device="cuda").manual_seed(7)
        self.k = torch.empty(size, dtype=torch.bfloat16, device="cuda")
        self.v = torch.empty_like(self.k)
        for i in range(self.copies):
            self.k[i].normal_(generator=g)
            self.v[i].normal_(generator=g)
        self.q = torch.empty((s["batch"], s["n_kv_heads"] * s["group"], s["head_dim"]), dtype=torch.bfloat16, device="cuda").normal_(generator=g)
        self.fp8 = None

    def in_fp8(self):
        if self.fp8 is None:
            self.fp8 = tuple(x.to(self.torch.float8_e4m3fn) for x in (self.k, self.v))
        return self.fp8

    def reference(self):
        """The first copy's output in f32, first sequence, heads of the first KV head."""
        s = self.s
        q, k, v = self.q[0, :s["group"]].float(), self.k[0, 0, :, 0].float(), self.v[0, 0, :, 0].float()
        return self.torch.softmax(q @ k.T / math.sqrt(s["head_dim"]), -1) @ v


def call_sdpa(torch, c, backend):
    from torch.nn.attention import sdpa_kernel, SDPBackend
    import torch.nn.functional as F
    which = {"sdpa_cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa_flash": SDPBackend.FLASH_ATTENTION}[backend]
    q = c.q.unsqueeze(2)
    k, v = c.k.transpose(2, 3), c.v.transpose(2, 3)

    def call(i):
        with sdpa_kernel([which]):
            return F.scaled_dot_product_attention(q, k[i], v[i], enable_gqa=c.s["group"] > 1)[:, :, 0]
    return call, c.bytes


def call_flashinfer(torch, c, peer):
    import flashinfer
    s = c.s
    fp8 = peer == "flashinfer_fp8"
    k, v = c.in_fp8() if fp8 else (c.k, c.v)
    pages = s["length"] // PAGE
    g = torch.Generator().manual_seed(5)
    indices = torch.cat([torch.randperm(pages, generator=g) + b * pages for b in range(s["batch"])]).to(torch.int32).cuda()
    indptr = (torch.arange(s["batch"] + 1, dtype=torch.int32) * pages).cuda()
    last = torch.full((s["batch"],), PAGE, dtype=torch.int32, device="cuda")
    work = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    w = flashinfer.BatchDecodeWithPagedKVCacheWrapper(work, "NHD", use_tensor_cores=True)
    w.plan(indptr, indices, last, s["n_kv_heads"] * s["group"], s["n_kv_heads"], s["head_dim"], PAGE, q_data_type=torch.bfloat16, kv_data_type=k.dtype)
    shape = (k.shape[0], s["batch"] * pages, PAGE, s["n_kv_heads"], s["head_dim"])
    k, v = k.view(shape), v.view(shape)
    out = torch.empty_like(c.q)
    return (lambda i: w.run(c.q, (k[i], v[i]), out=out)), c.bytes // 2 if fp8 else c.bytes


def graph_of(torch, call, copies):
    """One graph over all copies, after calls outside it that compile and allocate."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(2):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(i)
    return graph


def measure(torch, s, peers, a):
    rows, ready = [], []
    c = Caches(torch, s, a.copies_bytes)
    want = c.reference()
    for peer in peers:
        row = dict(bench="gpu_peer", peer=peer, **s)
        rows.append(row)
        try:
            call, row["bytes"] = (call_flashinfer if peer.startswith("flashinfer") else call_sdpa)(torch, c, peer)
            got = call(0)[0, :s["group"]].float()
            row["rel_err"] = float((got - want).norm() / want.norm())
            ready.append((row, graph_of(torch, call, c.copies), call, []))
        except Exception as e:                      # a peer that cannot do a shape must not end the others
            row.update(status="missing", reason=first_line(e))
            torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for r in range(-2, a.repeats):
        for _, graph, _, times in ready:
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if r >= 0:
                times.append(start.elapsed_time(end) * 1e3 / c.copies)
    for row, _, _, times in ready:
        times.sort()
        us = times[len(times) // 2]
        # bf16 outputs are good to 4e-3, e4m3 rounds keys and values to 3 bits.  NaN is wrong.
        good = row["rel_err"] < (0.1 if row["peer"].endswith("fp8") else 0.02)
        row.update(status="ok" if good else "wrong", us=us, us_q1=times[len(times) // 4], us_q3=times[3 * len(times) // 4], tb_per_s=row["bytes"] / us / 1e6, repeats=a.repeats, copies=c.copies)
    return rows


def main():
    a = arguments()
    if a.repeats < 1:
        sys.exit(f"gpu_peers: --repeats {a.repeats} is not 1 or more")
    peers = a.peer or list(PEERS)
    out = open(a.out, "w") if a.out else sys.stdout

    def put(row):
        out.write(json.dumps(row, sort_keys=True) + "\n")
        out.flush()
    try:
        import torch
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA device")
    except Exception as e:
        for s in a.shape:
            for peer in peers:
                put(dict(bench="gpu_peer", peer=peer, status="missing", reason=first_line(e), **s))
        return
    versions = dict(torch=torch.__version__, cudnn=torch.backends.cudnn.version(), device=torch.cuda.get_device_name())
    try:
        import flashinfer
        versions["flashinfer"] = flashinfer.__version__
        prepare(torch, a.shape, peers)
    except Exception as e:
        versions["flashinfer"] = None
        print("gpu_peers: flashinfer:", first_line(e), file=sys.stderr)
    if a.prepare:
        return
    with torch.inference_mode():
        for s in a.shape:
            try:
                rows = measure(torch, s, peers, a)
            except torch.OutOfMemoryError as e:
                rows = [dict(bench="gpu_peer", peer=p, status="missing", reason=first_line(e), **s) for p in peers]
            for row in rows:
                put({**row, **versions})
                print("{peer:16} B{batch} L{length} D{head_dim} Hkv{n_kv_heads} g{group}: {said}".format(said=f"{row['us']:.1f} us  {row['tb_per_s']:.3f} TB/s  {row['status']}" if "us" in row else row["reason"], **row), file=sys.stderr)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
