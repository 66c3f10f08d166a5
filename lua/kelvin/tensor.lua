--- kelvin.tensor: a block of numbers that owns its memory, or a view into another tensor's.
--
-- { _v = kv_tensor, keep = what must stay alive }.  K/V data is [heads, tokens, dim] everywhere.  Indices count from 1.
-- The cdata stays inside lua/kelvin/: modules here use _view() and _data().

local K = require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local check = require "kelvin.check"
local doc = require("kelvin.help").doc

local M, Tensor = {}, {}
Tensor.__index = Tensor
Tensor.__name = "tensor"

local dtypes = { f32 = C.KV_F32, f16 = C.KV_F16, bf16 = C.KV_BF16, i32 = C.KV_I32, u8 = C.KV_U8 }
local names = {}
for name, code in pairs(dtypes) do names[code] = name end
local ctypes = { f32 = "float", f16 = "uint16_t", bf16 = "uint16_t", i32 = "int32_t", u8 = "uint8_t" }
local words = { [1] = { "elements" }, [2] = { "rows", "dim" }, [3] = { "heads", "tokens", "dim" } }

local function wrap(view, keep, labels) return setmetatable({ _v = view, keep = keep, labels = labels }, Tensor) end

local function check_shape(shape)
  local n = #shape
  check.that(n >= 1 and n <= C.KV_MAX_DIMS, "kv.tensor: %d dimensions given, 1..%d allowed", n, C.KV_MAX_DIMS)
  local total = 1
  for i, s in ipairs(shape) do
    check.that(type(s) == "number" and s >= 1 and s < 2 ^ 31 and s % 1 == 0, "kv.tensor: dimension %d is %s, a whole number from 1 is needed", i, tostring(s))
    total = total * s
  end
  check.that(total <= 2 ^ 33, "kv.tensor: %g elements given, at most 2^33", total)
  return total
end

doc("kv.tensor", [[
  kv.tensor(nested table) -> tensor;  kv.tensor.zeros{3, 8, 64};  kv.tensor.randn{3, 8, 64, seed = 1}
  Numbers with a shape; f32 unless dtype = "f16", "bf16", "i32" or "u8".  K/V data is [heads, tokens, dim].
  t:shape()  t:get(h, t, d)  t:set(h, t, d, x)  t:slice(dim, first, last)  t:view(shape)  t:select(dim, i)  t:clone()
  t:totable()  t:stats() -> min, max, mean, rms.  Indices count from 1; slices and views share memory.]])

--- zeros{d1, d2, ...; dtype=}: a new tensor of zeros.
function M.zeros(shape)
  local total = check_shape(shape)
  local dtype = shape.dtype or "f32"
  check.that(dtypes[dtype], "kv.tensor: dtype '%s' is none of f32, f16, bf16, i32, u8", tostring(dtype))
  local data = ffi.new(ctypes[dtype] .. "[?]", total)
  local v = ffi.new "kv_tensor"
  v.data, v.dtype, v.ndim = data, dtypes[dtype], #shape
  local stride = 1
  for i = #shape, 1, -1 do
    v.shape[i - 1], v.stride[i - 1] = shape[i], stride
    stride = stride * shape[i]
  end
  return wrap(v, data)
end

local function shape_of(o)
  local shape = {}
  for i, s in ipairs(o.shape or o) do shape[i] = s end
  return shape
end

--- randn{d1, d2, ...; seed=1, stream=0}: unit normal numbers, the same on every machine.
function M.randn(o)
  local t = M.zeros(shape_of(o))
  check(C.kv_rng_normal(o.seed or 1, o.stream or 0, 0, t:n_elements(), t:_data()))
  return t
end

--- uniform{d1, ...; seed=1, stream=0}: numbers in (0, 1).
function M.uniform(o)
  local t = M.zeros(shape_of(o))
  check(C.kv_rng_uniform(o.seed or 1, o.stream or 0, 0, t:n_elements(), t:_data()))
  return t
end

--- A tensor from a nested table, or from a flat one with a shape.
function M.of(values, shape, dtype)
  if not shape then
    shape = {}
    local v = values
    while type(v) == "table" do
      shape[#shape + 1] = #v
      v = v[1]
    end
  end
  local s = shape_of(shape)
  s.dtype = dtype
  local t = M.zeros(s)
  local n, i = t:n_elements(), 0
  local data = t:_data()
  local function fill(v, depth)
    if type(v) == "table" then
      for j = 1, #v do fill(v[j], depth + 1) end
    else
      check.that(i < n, "kv.tensor: more values than the shape %s holds", table.concat(s, "x"))
      check.that(type(v) == "number", "kv.tensor: value %d is a %s, a number is needed", i + 1, type(v))
      data[i] = v
      i = i + 1
    end
  end
  fill(values, 1)
  check.that(i == n, "kv.tensor: %d values given, the shape %s holds %d", i, table.concat(s, "x"), n)
  return t
end

--- For modules here: a tensor over memory that `keep` owns.  labels: words for the dimensions, in printing.
function M._over(data, shape, keep, labels)
  local v = ffi.new "kv_tensor"
  v.data, v.dtype, v.ndim = ffi.cast("void *", data), C.KV_F32, #shape
  local stride = 1
  for i = #shape, 1, -1 do
    v.shape[i - 1], v.stride[i - 1] = shape[i], stride
    stride = stride * shape[i]
  end
  return wrap(v, keep, labels)
end

function M.is(t) return getmetatable(t) == Tensor end

function Tensor:_view() return self._v end
function Tensor:dtype() return names[self._v.dtype] end

--- Pointer to the first element of a contiguous tensor.
function Tensor:_data()
  check.that(self:is_contiguous(), "tensor: a view with gaps has no flat data; use t:clone()")
  return ffi.cast(ctypes[self:dtype()] .. " *", self._v.data)
end

function Tensor:shape()
  local shape = {}
  for i = 1, self._v.ndim do shape[i] = self._v.shape[i - 1] end
  return shape
end

function Tensor:n_elements()
  local n = 1
  for i = 0, self._v.ndim - 1 do n = n * self._v.shape[i] end
  return n
end

function Tensor:is_contiguous()
  local stride = 1
  for i = self._v.ndim - 1, 0, -1 do
    if self._v.shape[i] > 1 and tonumber(self._v.stride[i]) ~= stride then return false end
    stride = stride * self._v.shape[i]
  end
  return true
end

local function offset(self, n, ...)
  local v = self._v
  check.that(n == v.ndim, "tensor: %d indices given, %d needed", n, v.ndim)
  local at = 0
  for i = 1, n do
    local x = select(i, ...)
    check.that(type(x) == "number" and x >= 1 and x <= v.shape[i - 1] and x % 1 == 0, "tensor: index %d is %s, outside 1..%d", i, tostring(x), v.shape[i - 1])
    at = at + (x - 1) * tonumber(v.stride[i - 1])
  end
  return at
end

local function plain(self)
  local dtype = self:dtype()
  if dtype == "f16" or dtype == "bf16" then return self:to "f32" end
  return self
end

--- t:get(i, j, ...): one number.
function Tensor:get(...)
  local at = offset(self, select("#", ...), ...)
  local dtype = self:dtype()
  if dtype == "f16" or dtype == "bf16" then
    local one, out = ffi.new "kv_tensor", ffi.new "float[1]"
    one.data, one.dtype, one.ndim, one.shape[0], one.stride[0] = ffi.cast("uint16_t *", self._v.data) + at, self._v.dtype, 1, 1, 1
    local dst = ffi.new "kv_tensor"
    dst.data, dst.dtype, dst.ndim, dst.shape[0], dst.stride[0] = out, C.KV_F32, 1, 1, 1
    check(C.kv_tensor_copy(one, dst))
    return out[0]
  end
  return ffi.cast(ctypes[dtype] .. " *", self._v.data)[at]
end

--- t:set(i, j, ..., x): writes one number of an f32, i32 or u8 tensor.
function Tensor:set(...)
  local n = select("#", ...)
  local dtype = self:dtype()
  check.that(dtype ~= "f16" and dtype ~= "bf16", "tensor: set() writes f32, i32 and u8; this one is %s: use t:to 'f32'", dtype)
  local x = select(n, ...)
  local at
  if n == 2 then at = offset(self, 1, (...))
  else
    local index = { ... }
    index[n] = nil
    at = offset(self, n - 1, unpack(index, 1, n - 1))
  end
  ffi.cast(ctypes[dtype] .. " *", self._v.data)[at] = x
  return self
end

--- t:slice(dim, first, last): elements first..last of one dimension; shares memory.
function Tensor:slice(dim, first, last)
  local v = self._v
  check.that(type(dim) == "number" and dim >= 1 and dim <= v.ndim, "tensor: dimension %s is outside 1..%d", tostring(dim), v.ndim)
  local n = v.shape[dim - 1]
  last = last or n
  check.that(first >= 1 and first <= last and last <= n, "tensor: slice %s..%s is outside 1..%d", tostring(first), tostring(last), n)
  local out = ffi.new("kv_tensor", v)
  out.data = ffi.cast("uint8_t *", v.data) + (first - 1) * tonumber(v.stride[dim - 1]) * C.kv_dtype_size(v.dtype)
  out.shape[dim - 1] = last - first + 1
  return wrap(out, self.keep, self.labels)
end

--- t:select(dim, i): index i of one dimension, which goes away; shares memory.
function Tensor:select(dim, i)
  local out = self:slice(dim, i, i)
  local v = out._v
  check.that(v.ndim > 1, "tensor: select needs two dimensions or more")
  for j = dim - 1, v.ndim - 2 do v.shape[j], v.stride[j] = v.shape[j + 1], v.stride[j + 1] end
  v.ndim = v.ndim - 1
  out.labels = nil
  return out
end

--- t:view{d1, d2, ...}: the same numbers in another shape; shares memory.
function Tensor:view(shape)
  local total = check_shape(shape)
  check.that(total == self:n_elements(), "tensor: a view of %d elements over %d", total, self:n_elements())
  self:_data()
  local v = ffi.new("kv_tensor", self._v)
  v.ndim = #shape
  local stride = 1
  for i = #shape, 1, -1 do
    v.shape[i - 1], v.stride[i - 1] = shape[i], stride
    stride = stride * shape[i]
  end
  return wrap(v, self.keep)
end

--- t:to(dtype): a contiguous copy as f32, f16 or bf16.
function Tensor:to(dtype)
  local shape = self:shape()
  shape.dtype = dtype
  local out = M.zeros(shape)
  check(C.kv_tensor_copy(self._v, out._v))
  out.labels = self.labels
  return out
end

function Tensor:clone() return self:to(self:dtype()) end

--- t:totable(): nested Lua tables.
function Tensor:totable()
  local t = plain(self)
  local v = t._v
  local data = ffi.cast(ctypes[t:dtype()] .. " *", v.data)
  local function dig(dim, at)
    local out, stride = {}, tonumber(v.stride[dim])
    for i = 0, v.shape[dim] - 1 do
      if dim == v.ndim - 1 then out[i + 1] = data[at + i * stride] else out[i + 1] = dig(dim + 1, at + i * stride) end
    end
    return out
  end
  return dig(0, 0)
end

--- t:stats(): min, max, mean, rms, n, n_nonfinite.
function Tensor:stats()
  local s = ffi.new "kv_stats[1]"
  check(C.kv_tensor_stats(self._v, s))
  local x = s[0]
  return { min = x.min, max = x.max, mean = x.mean, rms = x.rms, n = x.n, n_nonfinite = x.n_nonfinite }
end

local function short(x)
  if x ~= x then return "nan" end
  if x == math.huge or x == -math.huge then return x > 0 and "inf" or "-inf" end
  if x ~= 0 and (math.abs(x) < 1e-3 or math.abs(x) >= 1e5) then return ("%.2e"):format(x) end
  return ("%.4g"):format(x)
end

function Tensor:__tostring()
  local shape, w = self:shape(), self.labels or words[self._v.ndim]
  local dims = {}
  for i, n in ipairs(shape) do dims[i] = w and w[i] and ("%d %s"):format(n, w[i]) or tostring(n) end
  local head = ("tensor %s [%s]"):format(self:dtype(), table.concat(dims, ", "))
  local t = self
  if self:dtype() == "i32" or self:dtype() == "u8" then t = nil end
  if t then
    local s = self:stats()
    head = head .. ("  min %s  max %s  rms %s"):format(short(s.min), short(s.max), short(s.rms))
    if s.n_nonfinite > 0 then head = head .. ("  %d not finite"):format(s.n_nonfinite) end
  end
  local corner = self
  while corner._v.ndim > 2 do corner = corner:select(1, 1) end
  local lines = { head }
  local n_cols = corner._v.shape[corner._v.ndim - 1]
  local n_rows = corner._v.ndim == 2 and corner._v.shape[0] or 1
  for r = 1, math.min(n_rows, 3) do
    local row = {}
    for c = 1, math.min(n_cols, 6) do
      local x = corner._v.ndim == 2 and corner:get(r, c) or corner:get(c)
      row[c] = ("%9s"):format(short(x))
    end
    lines[#lines + 1] = "  " .. table.concat(row, " ") .. (n_cols > 6 and "  …" or "")
  end
  if n_rows > 3 then lines[#lines + 1] = "          …" end
  return table.concat(lines, "\n")
end

function Tensor:__len() return self._v.shape[0] end

return setmetatable(M, { __call = function(_, values, shape, dtype) return M.of(values, shape, dtype) end })
