--- kelvin.vectors: vectors from files and for trials: .fvecs, .npy, text; clusters of Gaussians.

local ffi = require("kelvin.ffi").ffi
local check = require "kelvin.check"
local tensor = require "kelvin.tensor"
local doc = require("kelvin.help").doc

local M = {}
local readers = {}

--- .fvecs: each vector is its dimension, i32, then so many f32.
function readers.fvecs(text, path)
  check.that(#text >= 4, "vectors '%s': %d bytes", path, #text)
  local p = ffi.cast("const int32_t *", text)
  local dim = p[0]
  check.that(dim >= 1 and dim <= 65536 and #text % (4 * dim + 4) == 0, "vectors '%s': %d bytes are no whole number of vectors of %d", path, #text, dim)
  local n = #text / (4 * dim + 4)
  local t = tensor.zeros { n, dim }
  local d, f = t:_data(), ffi.cast("const float *", text)
  for i = 0, n - 1 do
    check.that(p[i * (dim + 1)] == dim, "vectors '%s': vector %d has %d dimensions, the first has %d", path, i + 1, p[i * (dim + 1)], dim)
    ffi.copy(d + i * dim, f + i * (dim + 1) + 1, 4 * dim)
  end
  return t
end

--- .npy: a 2-dimensional little-endian f4 or f2 array in C order.
function readers.npy(text, path)
  local wide = text:byte(7) == 1 and 2 or 4
  local n_head = 0
  check.that(text:sub(1, 6) == "\147NUMPY" and #text > 12, "vectors '%s': no .npy file", path)
  for i = wide, 1, -1 do n_head = n_head * 256 + text:byte(8 + i) end
  local head = text:sub(9 + wide, 8 + wide + n_head)
  local kind, order = head:match "'descr': *'([^']*)'", head:match "'fortran_order': *(%a+)"
  local n, dim = head:match "'shape': *%((%d+), *(%d+),? *%)"
  n, dim = tonumber(n), tonumber(dim)
  local size = kind == "<f4" and 4 or kind == "<f2" and 2 or nil
  check.that(size and order == "False" and n and n > 0 and dim > 0 and #text == 8 + wide + n_head + n * dim * size,
    "vectors '%s': %s is not a 2-dimensional C-order array of <f4 or <f2", path, head:sub(1, 100):gsub("%c", ""))
  local t = tensor.zeros { n, dim, dtype = size == 2 and "f16" or nil }
  ffi.copy(t:_data(), text:sub(9 + wide + n_head), n * dim * size)
  return size == 2 and t:to "f32" or t
end

--- Text: a vector a line, numbers apart by tabs, commas or blanks.  A first column 0, 1, 2 ... and a last column that counts
-- up by one are numbers of lines, and left out.
function readers.text(text, path)
  local list, width, counted, numbered = {}, nil, true, true
  for line in text:gmatch "[^\r\n]+" do
    local v = {}
    for word in line:gmatch "[^%s,;]+" do
      local x = tonumber(word)
      check.that(x, "vectors '%s': line %d: '%s' is not a number", path, #list + 1, word:sub(1, 40))
      v[#v + 1] = x
    end
    width = width or #v
    check.that(#v == width, "vectors '%s': line %d has %d numbers, the first has %d", path, #list + 1, #v, width)
    counted = counted and v[1] == #list
    numbered = numbered and (#list == 0 or v[#v] == list[#list][width] + 1)
    list[#list + 1] = v
  end
  check.that(#list > 0, "vectors '%s': no vectors", path)
  local skip = counted and #list > 1 and width > 1 and 1 or 0
  local last = numbered and #list > 2 and width - skip > 1 and width - 1 or width
  local t = tensor.zeros { #list, last - skip }
  local d = t:_data()
  for i, v in ipairs(list) do
    for j = 1 + skip, last do d[(i - 1) * (last - skip) + j - 1 - skip] = v[j] end
  end
  return t
end

doc("kv.index.read", [[
  kv.index.read(path) -> tensor [n, dim]
  Vectors from a file: .fvecs, .npy (f4 or f2, two dimensions), or text with a vector a line (a first column that counts from 0
  and a last one that counts up by one are left out).]])
function M.read(path)
  local f, err = io.open(path, "rb")
  if not f then check.fail("vectors: %s", err) end
  local text = f:read "*a"
  f:close()
  check.that(text, "vectors '%s' cannot be read", path)
  return (readers[path:match "%.(%w+)$"] or readers.text)(text, path)
end

--- kv.index.write(path, t): vectors as .fvecs.
function M.write(path, t)
  local f, err = io.open(path, "wb")
  if not f then check.fail("vectors: %s", err) end
  local n, dim = t:shape()[1], t:shape()[2]
  local d, one = t:_data(), ffi.new("int32_t[?]", dim + 1)
  one[0] = dim
  for i = 0, n - 1 do
    ffi.copy(one + 1, d + i * dim, 4 * dim)
    f:write(ffi.string(one, 4 * dim + 4))
  end
  f:close()
end

doc("kv.index.clusters", [[
  kv.index.clusters{ n =, dim =, clusters = 1000, spread = 1, seed = 1 } -> base, queries
  Synthetic vectors: unit normal centres, plus spread times unit normal noise; queries = { n = 1000 } more from the same clusters.]])
function M.clusters(o)
  local n, dim, n_clusters, spread, seed = o.n, o.dim, o.clusters or 1000, o.spread or 1, o.seed or 1
  local n_queries = o.queries and o.queries.n or 1000
  local centres = tensor.randn { n_clusters, dim, seed = seed, stream = 1 }
  local function draw(count, stream)
    local t = tensor.randn { count, dim, seed = seed, stream = stream }
    local which = tensor.uniform { count, seed = seed, stream = stream + 1 }
    local d, w, from = t:_data(), which:_data(), centres:_data()      -- the tensors own the memory: they stay in scope
    for i = 0, count - 1 do
      local c = math.min(n_clusters - 1, math.floor(w[i] * n_clusters)) * dim      -- a float of (0, 1) may round to 1
      for j = 0, dim - 1 do d[i * dim + j] = from[c + j] + spread * d[i * dim + j] end
    end
    return t, which
  end
  return (draw(n, 2)), (draw(n_queries, 4))
end

return M
