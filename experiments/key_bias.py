"""A copy of a Llama-architecture GGUF whose keys carry a large constant: blk.N.attn_k.bias, which the runner adds before RoPE.

    python3 experiments/key_bias.py smollm2-135m.gguf biased.gguf --norm 100 --pairs 16

Models with such a bias exist (Qwen2 and 2.5: norms to 900), and codecs of one scale a vector code little else.  The bias is Gaussian
in the slowest --pairs pairs of each head, which RoPE hardly turns, so that the model still is one: a constant in a score leaves
softmax alone.  Everything else is copied byte for byte; standard library only.
"""
import argparse, math, random, struct

SIZE = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}      # of GGUF's scalar types
STRING, ARRAY, U32 = 8, 9, 4


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, fmt):
        value, = struct.unpack_from("<" + fmt, self.data, self.at)
        self.at += struct.calcsize("<" + fmt)
        return value

    def string(self):
        n = self.take("Q")
        self.at += n
        return self.data[self.at - n:self.at].decode()

    def value(self, kind):
        """The value of a U32 or string; others are passed over."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            of, n = self.take("I"), self.take("Q")
            for _ in range(n if of == STRING else 0):
                self.string()
            self.at += 0 if of == STRING else n * SIZE[of]
            return None
        if kind == U32:
            return self.take("I")
        self.at += SIZE[kind]


def up(n, to):
    return -(-n // to) * to


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("source")
    p.add_argument("target")
    p.add_argument("--norm", type=float, default=100, help="of a head's bias")
    p.add_argument("--pairs", type=int, default=16, help="RoPE pairs with a bias, the slowest")
    p.add_argument("--seed", type=int, default=5)
    a = p.parse_args()
    r = Reader(open(a.source, "rb").read())
    magic, version, n_tensors, n_kv = r.take("I"), r.take("I"), r.take("Q"), r.take("Q")
    first_kv, kv = r.at, {}
    for _ in range(n_kv):
        key = r.string()
        kv[key] = r.value(r.take("I"))
    for _ in range(n_tensors):
        if r.string() == "blk.0.attn_k.bias":
            p.error(f"{a.source}: its keys have a bias already")
        n_dims = r.take("I")
        r.at += 8 * n_dims + 4 + 8
    arch, align = kv["general.architecture"], kv.get("general.alignment", 32)
    if arch != "llama":
        p.error(f"{a.source}: architecture {arch!r}, only 'llama' takes an optional bias and pairs channels side by side")
    weights = r.data[up(r.at, align):]
    layers, heads = kv["llama.block_count"], kv["llama.attention.head_count"]
    dim = kv.get("llama.attention.key_length", kv["llama.embedding_length"] // heads)
    rng, infos, blocks, end = random.Random(a.seed), b"", b"", up(len(weights), align)
    for layer in range(layers):
        bias = []
        for _ in range(kv["llama.attention.head_count_kv"]):
            g = [rng.gauss(0, 1) if i >= dim - 2 * a.pairs else 0.0 for i in range(dim)]
            norm = math.sqrt(sum(x * x for x in g))
            bias += [x * a.norm / norm for x in g]
        name, data = f"blk.{layer}.attn_k.bias".encode(), struct.pack(f"<{len(bias)}f", *bias)
        infos += struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, len(bias), 0, end + len(blocks))
        blocks += data.ljust(up(len(data), align), b"\0")
    head = struct.pack("<IIQQ", magic, version, n_tensors + layers, n_kv) + r.data[first_kv:r.at] + infos
    with open(a.target, "wb") as f:
        f.write(head.ljust(up(len(head), align), b"\0") + weights.ljust(up(len(weights), align), b"\0") + blocks)


if __name__ == "__main__":
    main()
