-- The declarations that Lua has are those that the library was compiled from.
local ffi = require "ffi"
local K = require "kelvin.ffi"

describe("the boundary", function()
  it("lays out every struct as the C compiler does", function()
    local n = 0
    while true do
      local e = K.C.kv_layout_at(n)
      if e == nil then break end
      local name = ffi.string(e.name)
      local struct, field = name:match "^([%w_]+)%.([%w_]+)$"
      if struct then
        assert.are.equal(e.offset, ffi.offsetof(struct, field), name)
      else
        assert.are.equal(e.size, ffi.sizeof(name), name)
      end
      n = n + 1
    end
    assert.is_true(n > 10, "the library lists its layouts")
  end)

  it("refuses a library that was built from another header", function()
    local folder = os.tmpname()
    os.remove(folder)
    os.execute(("mkdir -p '%s' && cp '%s/libkelvin.so' '%s/'"):format(folder, K.folder, folder))
    local f = assert(io.open(folder .. "/kelvin_cdef.lua", "wb"))
    f:write 'return "const char *kv_abi_hash(void);", "9bc2000000000000"'
    f:close()
    local script = ([[package.loaded["kelvin.ffi"] = nil package.loaded["kelvin.host"] = { lib = "%s" } package.path = "%s/lua/?.lua;" .. package.path
      print(select(2, pcall(require, "kelvin.ffi")))]]):format(folder, K.root)
    local s = assert(io.open(folder .. "/s.lua", "wb"))
    s:write(script)
    s:close()
    local host = package.loaded["kelvin.host"]
    local runner = host and ("'%s' lua"):format(host.exe) or ("'%s'"):format(arg and arg[-1] or "luajit")
    local p = io.popen(("%s '%s/s.lua' 2>&1"):format(runner, folder))
    local out = p:read "*a"
    p:close()
    os.execute(("rm -r '%s'"):format(folder))
    assert.matches("libkelvin%.so was built from another kelvin%.h %(lib " .. K.hash:sub(1, 4) .. "…, lua 9bc2…%): run make", out)
  end)
end)
