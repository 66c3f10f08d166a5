--- kelvin.bytes: a byte ledger as a table that prints as bits per element.

local M = {}
local fields = { "codes", "scales", "outliers", "exact", "padding", "slack", "state", "shared", "total" }
local B = {}
B.__name = "bytes"

--- new(kv_bytes cdata, elements): a plain table with the same fields, elements and bits (per element, of the total).
function M.new(b, elements)
  local t = {}
  for _, f in ipairs(fields) do t[f] = b[f] end
  t.elements = elements
  t.bits = elements > 0 and 8 * t.total / elements or 0
  return setmetatable(t, B)
end

function B:__tostring()
  local parts = {}
  for _, f in ipairs(fields) do
    if f ~= "total" and self[f] > 0 then parts[#parts + 1] = ("%s %.3g"):format(f, 8 * self[f] / self.elements) end
  end
  return ("%d bytes  bits/elem %.3f (%s)"):format(self.total, self.bits, table.concat(parts, ", "))
end

M.fields = fields
return M
