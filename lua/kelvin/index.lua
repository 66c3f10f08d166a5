--- kelvin.index: nearest vectors, searched on a codec's codes.
--
-- What a cache does with keys, for any vectors: encoded in pages, scanned by the codec's own dot product.  Vectors are numbered
-- from 1 in the order they are added, and keep their number for good.

local K = require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local check = require "kelvin.check"
local tensor = require "kelvin.tensor"
local codec = require "kelvin.codec"
local bytes = require "kelvin.bytes"
local doc = require("kelvin.help").doc

local M, Index = {}, {}
Index.__index, Index.__name = {}, "index"

local metrics = { ip = C.KV_METRIC_IP, l2 = C.KV_METRIC_L2, cosine = C.KV_METRIC_COSINE }
local keeps = { none = -1, f32 = C.KV_F32, f16 = C.KV_F16 }
local known = { dim = true, codec = true, metric = true, train = true, mean = true, keep = true, page = true }

M.PAGE = 256             -- vectors of a page: 64 bytes of rounding and the scan's start are then little of it

-- One vector [dim] counts as one row.
local function rows(t, what)
  check.that(tensor.is(t), "%s: a %s given, a tensor [vectors, dim] is needed", what, type(t))
  local v = t:_view()
  if v.ndim == 1 then return t:clone():view { 1, v.shape[0] } end
  return t
end

local function wrap(handle)
  local info = ffi.new "kv_index_info[1]"
  check(C.kv_index_get_info(handle, info))
  local i = info[0]
  return setmetatable({ _ix = handle, family = ffi.string(i.family), params = ffi.string(i.params), metric = ffi.string(i.metric), dim = i.dim, page = i.page_rows,
    keep = i.keep < 0 and "none" or i.keep == C.KV_F32 and "f32" or "f16", mean = i.centre ~= 0, parts = i.n_parts, fused = i.fused ~= 0,
    vector_bytes = i.vector_bytes, mapped = i.mapped ~= 0 }, Index)
end

doc("kv.index", [[
  kv.index{ dim =, codec = "turboquant-4", metric = "ip", train =, mean =, keep = "none", page = 256 } -> index
  Nearest vectors on codes.  codec: any of kv.codecs() that takes keys.  metric: "ip" (largest inner product), "l2" (smallest
  squared distance) or "cosine".  train: a tensor [n, dim] of typical vectors: for calibrated tables, and for the mean that is
  then removed before coding (mean = false: not).  keep = "f16" or "f32" keeps the originals too, for re-ranking.  A dim over
  512 is cut into equal parts.
  ix:add(t) -> first, last   ix:search(q, { k = 10, rerank = 0 }) -> ids, scores   ix:remove(ids) -> count   ix:count()
  ix:decode(first, last) -> tensor   ix:bytes() -> by purpose   kv.save(path, ix), kv.load(path): mapped, not read
  Vectors are numbered from 1 in the order they were added, for good.  NaN or inf is an error that names row and dimension.]])
function M.new(o)
  check.that(type(o) == "table" and not tensor.is(o), "kv.index: a %s given, kv.index{ dim = ... } is needed", type(o))
  for name in pairs(o) do check.that(known[name], "kv.index: '%s' is unknown%s", tostring(name), check.suggest(name, { "dim", "codec", "metric", "train", "mean", "keep", "page" })) end
  local metric, keep, page = o.metric or "ip", o.keep or "none", o.page or M.PAGE
  check.that(metrics[metric], "kv.index: metric '%s' is none of ip, l2, cosine", tostring(metric))
  check.that(keeps[keep], "kv.index: keep '%s' is none of none, f16, f32", tostring(keep))
  check.that(type(page) == "number" and page % 1 == 0 and page < 2 ^ 31, "kv.index: page=%s is not a whole number", tostring(page))
  local train = o.train and rows(o.train, "kv.index: train")
  local dim = o.dim or train and train:shape()[2]
  check.that(type(dim) == "number" and dim % 1 == 0 and math.abs(dim) < 2 ^ 31, "kv.index: dim=%s is not a whole number", tostring(dim))
  check.that(not o.mean or train, "kv.index: mean = true needs train = tensor, whose mean it is")
  local c = codec.new(o.codec or "turboquant-4")
  local cfg = ffi.new "kv_index_config"
  local params = c:_params "k"
  cfg.family, cfg.params, cfg.dim, cfg.page_rows = c.family, params, dim, page
  cfg.metric, cfg.keep, cfg.centre = metrics[metric], keeps[keep], train and o.mean ~= false and 1 or 0
  return wrap(K.handle("kv_index", C.kv_index_free, function(out) return C.kv_index_new(out, cfg, train and train:_view() or nil) end))
end

--- For kv.load.
function M._load(file) return wrap(K.handle("kv_index", C.kv_index_free, function(out) return C.kv_index_load(out, file.path) end)) end
function Index.__index:_save(path, stage, level) check(C.kv_index_save(self._ix, path, stage, level)) end

--- ix:add(t): adds the rows of f32 [n, dim]; returns the numbers of the first and the last.
function Index.__index:add(t)
  t = rows(t, "index:add")
  local first = ffi.new "int[1]"
  check(C.kv_index_add(self._ix, t:_view(), first))
  return first[0] + 1, first[0] + t:_view().shape[0]
end

--- ix:remove(ids): a number or a list of them; returns how many were still there.
function Index.__index:remove(ids)
  if type(ids) == "number" then ids = { ids } end
  check.that(type(ids) == "table", "index:remove: a %s given, a list of numbers is needed", type(ids))
  local n, list = ffi.new "int[1]", ffi.new("int32_t[?]", math.max(1, #ids))
  local count = self:count "added"
  for i, id in ipairs(ids) do
    check.that(type(id) == "number" and id % 1 == 0 and id >= 1 and id <= count, "index:remove: vector %s is outside 1..%d", tostring(id), count)
    list[i - 1] = id - 1
  end
  check(C.kv_index_remove(self._ix, list, #ids, n))
  return n[0]
end

doc("index:search", [[
  ix:search(q [, { k = 10, rerank = 0, fused = true }]) -> ids, scores
  The k nearest of each query, best first: tensors [queries, k], ids i32 (0: there are no more), scores f32 (ip and cosine
  falling, l2 squared distances rising).  Scores are to what is stored, not to the originals; rerank = r takes the r k best on
  codes and orders them by the originals (keep = "f16" or "f32").  fused = false decodes pages first.
  kv.index.recall(ids, truth [, k]) -> share of the true k nearest that were found, share of queries whose nearest was.]])
function Index.__index:search(q, o)
  o = o or {}
  q = rows(q, "index:search")
  local k, n = o.k or 10, q:_view().shape[0]
  local rerank = o.rerank or 0
  check.that(type(k) == "number" and k % 1 == 0 and k >= 1 and k <= 65536, "index:search: k=%s is not a whole number in 1..65536", tostring(k))
  check.that(type(rerank) == "number" and rerank % 1 == 0 and rerank >= 0 and rerank <= 65536, "index:search: rerank=%s is not a whole number in 0..65536", tostring(rerank))
  local fused = o.fused
  if fused == nil then fused = self.fused end
  local ids, scores = tensor.zeros { n, k, dtype = "i32" }, tensor.zeros { n, k }
  check(C.kv_index_search(self._ix, q:_view(), k, rerank, fused and 1 or 0, scores:_view(), ids:_view()))
  local d = ids:_data()
  for i = 0, n * k - 1 do d[i] = d[i] + 1 end
  return ids, scores
end

--- ix:decode(first, last): vectors as they are stored, f32 [last - first + 1, dim].
function Index.__index:decode(first, last)
  last = last or first
  check.that(type(first) == "number" and type(last) == "number" and first % 1 == 0 and last % 1 == 0 and first >= 1 and last >= first and last <= self:count "added",
    "index:decode: vectors %s..%s are not a range within 1..%d", tostring(first), tostring(last), self:count "added")
  local t = tensor.zeros { last - first + 1, self.dim }
  check(C.kv_index_decode(self._ix, first - 1, last, t:_view()))
  return t
end

--- ix:count(): vectors there are; ix:count "added": vectors ever added.
function Index.__index:count(what)
  local info = ffi.new "kv_index_info[1]"
  check(C.kv_index_get_info(self._ix, info))
  return what == "added" and info[0].n_rows or info[0].n_live
end

--- ix:bytes(): by purpose, with bits per element of the vectors there are.
function Index.__index:bytes()
  local b = ffi.new "kv_bytes[1]"
  check(C.kv_index_bytes(self._ix, b))
  return bytes.new(b[0], self:count() * self.dim)
end

function Index:__tostring()
  return ("index %s(%s)  %d vectors of %d, %s  %.4g bytes a vector%s%s%s%s"):format(self.family, self.params, self:count(), self.dim, self.metric, self.vector_bytes,
    self.keep ~= "none" and (" and %s originals"):format(self.keep) or "", self.mean and ", mean removed" or "", self.mapped and ", mapped" or "", self.fused and "" or ", by decoding")
end

--- recall(ids, truth [, k]): of the first k columns; truth may have more.
function M.recall(ids, truth, k)
  local a, b = ids:shape(), truth:shape()
  k = k or math.min(a[2], b[2])
  check.that(a[1] == b[1] and k >= 1 and k <= a[2] and k <= b[2], "kv.index.recall: %dx%d and %dx%d numbers, k=%s", a[1], a[2], b[1], b[2], tostring(k))
  local found, nearest, wanted, x, y = 0, 0, 0, ids:_data(), truth:_data()
  for i = 0, a[1] - 1 do
    local set = {}
    for j = 0, k - 1 do if x[i * a[2] + j] > 0 then set[x[i * a[2] + j]] = true end end
    for j = 0, k - 1 do
      local id = y[i * b[2] + j]
      if id > 0 then wanted = wanted + 1 found = found + (set[id] and 1 or 0) end
    end
    nearest = nearest + (set[y[i * b[2]]] and 1 or 0)
  end
  return wanted > 0 and found / wanted or 1, nearest / a[1]
end

-- ---- the command ----------------------------------------------------------------------------------------------------

local function build(a)
  local container = require "kelvin.container"
  check.that(a.vectors, "index build: --vectors FILE is needed")
  local t = M.read(a.vectors)
  local ix = M.new { codec = a.codec, metric = a.metric, keep = a.keep, train = t, mean = not a.no_mean, page = a.page }
  ix:add(t)
  container.save(a.file, ix, { stage = a.stage })
  print(tostring(ix))
  return 0
end

local function search(a, ix)
  check.that(a.queries, "index search: --queries FILE is needed")
  local ids, scores = ix:search(M.read(a.queries), { k = a.k, rerank = a.rerank })
  for i = 1, ids:shape()[1] do
    local out = {}
    for j = 1, a.k do if ids:get(i, j) > 0 then out[#out + 1] = ("%d %.6g"):format(ids:get(i, j), scores:get(i, j)) end end
    print(i .. "\t" .. table.concat(out, "\t"))
  end
  return 0
end

--- For `kelvin index`.
function M.main(a)
  if a.what == "build" then return build(a) end
  local ix = require("kelvin.container").load(a.file)
  check.that(getmetatable(ix) == Index, "index %s: '%s' holds no index", a.what, a.file)
  if a.what == "search" then return search(a, ix) end
  print(tostring(ix))
  print("  " .. tostring(ix:bytes()))
  return 0
end

local vectors = require "kelvin.vectors"
M.read, M.write, M.clusters = vectors.read, vectors.write, vectors.clusters

return setmetatable(M, { __call = function(_, o) return M.new(o) end })
