"""Makes fp_grids.bin beside it with the PyPI package `ml_dtypes` (0.6.0) as the oracle.  Run: python3 tests/golden/fp_grids.py

  values    f32: 256 of e4m3fn, 256 of e5m2, 16 of e2m1fn, 256 of e8m0fnu
  rounding  u32 n, f32 x[n], then the codes u8[n] of e4m3fn, e5m2, e2m1fn: nearest, ties to even, x clipped to the largest first
  rows      f32 x[32][64], then for each format its page as the OCP MX and NVFP4 texts say it, computed here in numpy, and the
            f32 values: mxfp8 e4m3, mxfp8 e5m2, mxfp4 (codes, e8m0 scales of 32), nvfp4 (codes, e4m3 scales of 16, tensor scale 0.25)"""
import pathlib
import ml_dtypes as m
import numpy as np

f32 = np.float32
E4M3, E5M2, E2M1, E8M0 = m.float8_e4m3fn, m.float8_e5m2, m.float4_e2m1fn, m.float8_e8m0fnu
LARGEST, EMAX = {E4M3: 448.0, E5M2: 57344.0, E2M1: 6.0}, {E4M3: 8, E5M2: 15, E2M1: 2}


def codes(x, grid):
    return np.clip(x, -LARGEST[grid], LARGEST[grid]).astype(f32).astype(grid).view(np.uint8)


def values(code, grid):
    return code.view(grid).astype(f32)


rng = np.random.default_rng(11)
points = [rng.standard_normal(1000) * 10.0 ** rng.uniform(-8, 6, 1000), [0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38]]
for grid in (E4M3, E5M2, E2M1):                                    # every number of the grid and every tie, and their neighbours
    v = np.unique(values(np.arange(16 if grid is E2M1 else 256, dtype=np.uint8), grid))
    v = v[np.isfinite(v)].astype(np.float64)
    for p in (v, (v[1:] + v[:-1]) / 2):
        p = p.astype(f32)
        points += [p, np.nextafter(p, f32(np.inf)), np.nextafter(p, f32(-np.inf))]
x = np.concatenate([np.asarray(p, dtype=f32) for p in points])

rows = rng.standard_normal((32, 64)).astype(f32)
rows[4:8] = rows[4:8] ** 5                                         # heavy tails
rows[8:12] *= f32(1e-6)
rows[12:14] *= f32(1e30)
rows[14:16] *= f32(1e-40)                                          # subnormal in f32
rows[16] = 0
rows[17] = 1.25
rows[18:20] = np.round(rows[18:20] * 4) / 4                        # ties
rows[20:24] *= f32(100)


def nibbles(c):
    return (c[:, 0::2] | c[:, 1::2] << 4).astype(np.uint8)


def mx(grid):
    b = rows.reshape(32, 2, 32)
    amax = np.abs(b).max(axis=2)
    log2 = np.where(amax > 0, np.floor(np.log2(np.maximum(amax.astype(np.float64), 1e-300))), -1000)
    e = np.clip(log2 - EMAX[grid], -127, 127)
    scale = (2.0 ** e).astype(f32)
    c = codes((b.astype(np.float64) / scale[:, :, None]).astype(f32), grid)
    return c.reshape(32, 64), (e + 127).astype(np.uint8), (values(c, grid) * scale[:, :, None]).reshape(32, 64)


def nvfp4(tensor):
    b = rows.reshape(32, 4, 16)
    s = codes(np.abs(b).max(axis=2) / f32(6) / tensor, E4M3)
    scale = values(s, E4M3) * tensor
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.where(scale[:, :, None] > 0, b / scale[:, :, None], f32(0))
    c = codes(y, E2M1)
    return c.reshape(32, 64), s, (values(c, E2M1) * scale[:, :, None]).reshape(32, 64)


with open(pathlib.Path(__file__).with_suffix(".bin"), "wb") as f:
    for grid, n in ((E4M3, 256), (E5M2, 256), (E2M1, 16), (E8M0, 256)):
        f.write(values(np.arange(n, dtype=np.uint8), grid).tobytes())
    f.write(np.uint32(len(x)).tobytes() + x.tobytes())
    for grid in (E4M3, E5M2, E2M1):
        f.write(codes(x, grid).tobytes())
    f.write(rows.tobytes())
    for (c, s, v), pack in ((mx(E4M3), bytes), (mx(E5M2), bytes), (mx(E2M1), nibbles), (nvfp4(f32(0.25)), nibbles)):
        f.write(bytes(pack(c)) + s.tobytes() + v.astype(f32).tobytes())
