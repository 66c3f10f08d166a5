--- kelvin.compare: how far one tensor is from another.  Diagnostics: the verdict on a codec is KL divergence (kv.eval).

local K = require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local check = require "kelvin.check"
local tensor = require "kelvin.tensor"
local doc = require("kelvin.help").doc

local M, Diff = {}, {}
Diff.__name = "comparison"

doc("kv.compare", [[
  kv.compare(a, b) -> comparison
  a: the original; b: what stands for it, of the same shape.  rel_mse = |a-b|^2 / |a|^2 over all, rel_err its square root,
  cosine (mean over rows of the last dimension), cosine_min, max_abs.  With b from c:roundtrip(a) also bits per element.]])
function M.compare(a, b)
  check.that(tensor.is(a) and tensor.is(b), "kv.compare: two tensors are needed")
  local d = ffi.new "kv_diff[1]"
  check(C.kv_tensor_diff(a:_view(), b:_view(), d))
  local x = d[0]
  return setmetatable({ rel_mse = x.rel_mse, rel_err = math.sqrt(x.rel_mse), cosine = x.cosine_mean, cosine_min = x.cosine_min,
    max_abs = x.max_abs, n = x.n, bits = b.bits and b.bits.bits, bytes = b.bits, codec = b.codec }, Diff)
end

function Diff:__tostring()
  local s = ("rel_err %.4g   cosine %.5f (min %.5f)   max_abs %.4g"):format(self.rel_err, self.cosine, self.cosine_min, self.max_abs)
  if self.bytes then s = s .. "   " .. tostring(self.bytes):gsub("^%d+ bytes  ", "") end
  return s
end

return M
