-- Every key of the files in configs/: type, whether it must be there, and one sentence.  kelvin.config checks them at load.
local text, number = "string", "number"
local params = { type = "object", values = { type = "any" }, about = "codec parameters by name" }

return {
  codecs = { type = "object", keys = {
    family   = { type = text, required = true, about = "the codec family (a C file) that this preset sets up" },
    about    = { type = text, required = true, about = "one sentence, shown by `kelvin codecs`" },
    source   = { type = text, required = true, about = "paper and section, or where the format comes from" },
    params   = { type = "object", values = { type = "any" }, about = "parameters of both sides" },
    k        = params,
    v        = params,
    abstract = { type = "boolean", about = "true: only the variants are presets, not the file's own name" },
    aliases  = { type = "array", items = { type = text }, about = "other names of this preset" },
    variants = { type = "object", about = "further names with the parameters that differ", values = { type = "object", keys = {
      params = params, k = params, v = params, about = { type = text }, source = { type = text },
      aliases = { type = "array", items = { type = text } } } } },
  } },
  layers = { type = "object", keys = {
    about   = { type = text, required = true, about = "one sentence" },
    source  = { type = text, required = true, about = "paper and section" },
    codec   = { type = text, required = true, about = "the preset on every layer; boosted layers take other angles" },
    presets = { type = "object", required = true, about = "by name", values = { type = "object", keys = {
      about = { type = text, required = true }, aliases = { type = "array", items = { type = text } },
      names = { type = "array", required = true, items = { type = text }, about = "what a model's name contains, lower case, letters and digits alone" },
      shape = { type = "object", values = { type = "any" }, about = "n_layers, n_kv_heads, head_dim and, where that is not enough, arch" },
      boost = { type = "array", required = true, items = { type = "object", keys = { first = { type = number, required = true }, last = { type = number, required = true } } },
        about = "ranges of layers, from 1" },
      k_angles = { type = number, required = true }, v_angles = { type = number, required = true },
      published = { type = "object", values = { type = "any" }, about = "angle bits, layers they were counted over, changes of perplexity" } } } },
  } },
  models = { type = "object", keys = {
    about      = { type = text, required = true, about = "one sentence, shown by `kelvin models`" },
    file       = { type = text, about = "name of the file in the cache folder" },
    sha256     = { type = text, required = true, about = "of the model file, whole" },
    bytes      = { type = number, about = "size of the model file" },
    license    = { type = text, about = "terms under which the file comes" },
    source     = { type = "any", about = "packages that carry the file: name, version, member" },
    default    = { type = "boolean", about = "true for the model that demos and tests use" },
  } },
  data = { type = "object", keys = {
    about      = { type = text, required = true, about = "one sentence" },
    file       = { type = text, required = true, about = "name of the file in the cache folder" },
    sha256     = { type = text, required = true, about = "of the text file" },
    bytes      = { type = number, about = "size of the text file" },
    license    = { type = text, about = "terms under which the text comes" },
    source     = { type = "any", about = "package that carries the text: kind, package, member" },
    split      = { type = "object", about = "shares of the text, from and to, that calibrate and that are scored", keys = {
      calibrate = { type = "array", items = { type = number } }, score = { type = "array", items = { type = number } } } },
  } },
}
