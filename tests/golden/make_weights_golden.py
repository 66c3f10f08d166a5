"""Writes weights_golden.h: random blocks of every weight type and their values by gguf.quants (PyPI package `gguf`).

    python3 tests/golden/make_weights_golden.py > tests/golden/weights_golden.h
"""
import numpy as np
import gguf
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType as T

# Byte offsets of the f16 fields of a block: random bits there would be inf or NaN now and then.
HALVES = {T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208]}

rng = np.random.default_rng(20261122)
print("/* Made by make_weights_golden.py: do not edit.  Values are the bits of f32. */")
rows = []
for t in [T.F32, T.F16, T.BF16, *HALVES]:
    block, size = GGML_QUANT_SIZES[t]
    n = max(1, 96 // block)
    data = rng.integers(0, 256, (n, size), dtype=np.uint8)
    if t in (T.F32, T.F16, T.BF16):
        v = rng.standard_normal(n).astype(np.float32)
        data = v.view(np.uint8).reshape(n, 4) if t == T.F32 else (v.view(np.uint32) >> 16).astype("<u2").view(np.uint8).reshape(n, 2) if t == T.BF16 else v.astype("<f2").view(np.uint8).reshape(n, 2)
    for at in HALVES.get(t, []):
        d = (rng.standard_normal(n) * 10.0 ** rng.integers(-6, 2, n)).astype("<f2")          # down to subnormals
        data[:, at:at + 2] = d.view(np.uint8).reshape(n, 2)
    values = quants.dequantize(data, t).astype(np.float32).ravel()
    assert values.size == n * block and np.isfinite(values).all()
    name = t.name.lower()
    print(f"static const uint8_t {name}_bytes[] = {{" + ",".join(map(str, data.ravel())) + "};")
    print(f"static const uint32_t {name}_bits[] = {{" + ",".join(f"0x{u:x}" for u in values.view(np.uint32)) + "};")
    rows.append(f"{{ {int(t)}, {n * block}, {name}_bytes, {name}_bits }}")
print("static const struct { int type, n; const uint8_t *bytes; const uint32_t *bits; } golden[] = {" + ", ".join(rows) + "};")
