"""Makes ggml_blocks.bin beside it: 32 rows of 64 floats, then for q8_0, q5_1, q5_0, q4_1, q4_0 their blocks as the PyPI
package `gguf` quantizes them, and the values it decodes them to.  Run: python3 tests/golden/ggml_blocks.py"""
import pathlib
import numpy as np
from gguf import GGMLQuantizationType as T, quants

rng = np.random.default_rng(7)
x = rng.standard_normal((32, 64)).astype(np.float32)
x[4:8] = x[4:8] ** 5                                   # heavy tails
x[8:12] *= 1e-6                                        # scales that are subnormal in f16
x[12:16] += 20                                         # far from zero
x[16] = 0
x[17] = 1.25
x[18:20] = np.round(x[18:20] * 4) / 4                  # ties between codes
x[20, 5], x[20, 9] = 3, -3                             # the first of two largest decides q4_0's sign
x[21, 5], x[21, 9] = -3, 3
x[22:26] *= 1000
with open(pathlib.Path(__file__).with_suffix(".bin"), "wb") as f:
    f.write(x.tobytes())
    for t in (T.Q8_0, T.Q5_1, T.Q5_0, T.Q4_1, T.Q4_0):
        blocks = quants.quantize(x, t)
        f.write(blocks.tobytes())
        f.write(quants.dequantize(blocks, t).astype(np.float32).tobytes())
