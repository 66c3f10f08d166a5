"""FAISS's half of nn_search.lua: FOLDER METRIC K THREADS REPEATS SEED INDEXES CLOCK.  Reads FOLDER/base.fvecs and queries.fvecs, writes the
numbers that each index finds to FOLDER, and prints a JSON line an index.  Needs faiss-cpu and numpy."""
import json
import os
import sys
import time

folder, metric = sys.argv[1], sys.argv[2]
k, threads, repeats, seed = map(int, sys.argv[3:7])
os.environ.update(OMP_NUM_THREADS=str(threads), OPENBLAS_NUM_THREADS=str(threads), OMP_WAIT_POLICY="passive")

import faiss
import numpy as np

trainers = min(4, max(threads, len(os.sched_getaffinity(0))))     # indexes are built on up to 4 cores, and searched on `threads`


def read(name):
    x = np.fromfile(f"{folder}/{name}", dtype=np.float32)
    dim = int(x[:1].view(np.int32)[0])
    return np.ascontiguousarray(x.reshape(-1, dim + 1)[:, 1:])


base, queries = read("base.fvecs"), read("queries.fvecs")
if metric == "cosine":
    faiss.normalize_L2(base)
    faiss.normalize_L2(queries)
kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
dim = base.shape[1]

# k-means gets 40 vectors a centroid, about what FAISS asks for, and its 25 iterations.
TRAIN = 40

# At the bytes of 8, 6, 4, 3, 2 and 1 bits an element: scalar codes, product codes of 8 bits a sub-code where they divide the
# dimension (else of 6), product codes of 4 bits with FAISS's SIMD scan, RaBitQ.
names = ["Flat", "SQ8", "SQ6", "SQ4"]
for m, bits in ((dim, 8), (dim, 6), (dim / 2, 8), (dim / 2, 6), (dim / 4, 8), (dim / 8, 8)):
    if m == int(m):
        names.append(f"PQ{int(m)}x{bits}")
for m in (dim, dim / 2, dim / 4):
    if m == int(m):
        names.append(f"PQ{int(m)}x4fs")
names.append("RaBitQ")
if len(sys.argv) > 7 and sys.argv[7]:
    names = sys.argv[7].split(",")

print(json.dumps({"version": faiss.__version__}))


now = time.process_time if len(sys.argv) > 8 and sys.argv[8] == "cpu" else time.perf_counter


def rate(n, search):
    best = float("inf")
    for _ in range(repeats):
        t0 = now()
        search()
        best = min(best, now() - t0)
    return n / best


for name in names:
    faiss.omp_set_num_threads(trainers)
    t0 = time.perf_counter()
    index = faiss.index_factory(dim, name, kind)
    sub_bits = 8
    if hasattr(index, "do_polysemous_training"):
        index.do_polysemous_training = False     # the factory asks for it; minutes of annealing that a plain search makes no use of
    if name.startswith("PQ"):
        index.pq.cp.seed, index.pq.cp.min_points_per_centroid, sub_bits = seed, 1, index.pq.nbits
    n_train = 20000 if name == "RaBitQ" or name.startswith("SQ") else TRAIN << sub_bits
    index.train(base[:n_train])
    index.add(base)
    build_s = time.perf_counter() - t0
    faiss.omp_set_num_threads(threads)
    _, ids = index.search(queries, k)
    out = np.empty((len(queries), k + 1), dtype=np.float32)
    out[:, 0] = np.full(len(queries), k, dtype=np.int32).view(np.float32)
    out[:, 1:] = ids
    out.tofile(f"{folder}/{name}.fvecs")
    few = queries[:50]
    print(json.dumps({
        "arm": name, "file": f"{name}.fvecs", "vector_bytes": 4 * dim if name == "Flat" else index.code_size, "train": 0 if name == "Flat" else min(n_train, len(base)), "build_s": build_s,
        "queries_per_s": rate(len(queries), lambda: index.search(queries, k)),
        "queries_per_s_alone": rate(len(few), lambda: [index.search(few[i:i + 1], k) for i in range(len(few))]),
    }), flush=True)
