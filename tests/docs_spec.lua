-- Every ```lua block of the documentation runs, each in an environment of its own.  A block that says `-- needs: MODEL`
-- is left out when that model is not here.
local kv = require "kelvin"
local K = require "kelvin.ffi"

local pages = { "README.md" }
for name in io.popen(("ls '%s/docs'"):format(K.root)):lines() do
  if name:match "%.md$" then pages[#pages + 1] = "docs/" .. name end
end

for _, page in ipairs(pages) do
  local f = io.open(K.root .. "/" .. page)
  local text = f and f:read "*a" or ""
  if f then f:close() end
  local n = 0
  for block in ("\n" .. text):gmatch "\n```lua\n(.-)\n```" do
    n = n + 1
    local needs = block:match "%-%- needs: ([%w%-%._]+)"
    local name = ("%s: Lua block %d runs"):format(page, n)
    if needs and not select(2, kv.model.find(needs)) then pending(name .. " (model " .. needs .. " is not here)")
    else
      it(name, function()
        local env = setmetatable({ kv = kv, print = function(...) for i = 1, select("#", ...) do tostring((select(i, ...))) end end }, { __index = _G })
        local chunk = assert(loadstring(block, "@" .. page .. ":" .. n))
        setfenv(chunk, env)()
      end)
    end
  end
end

describe("docs/conformance.md", function()
  it("names tests that there are", function()
    local tree = io.open(K.root .. "/tests/c/check.h")
    if not tree then return pending "the C tests' source is not here" end
    tree:close()
    local function text(path)
      local f = assert(io.open(K.root .. "/" .. path), path .. " is not there")
      local all = f:read "*a"
      f:close()
      return all
    end
    local n = 0
    for file, name in text "docs/conformance.md":gmatch "`([%w_]+): ([^`]+)`" do
      if not file:find "^x" and file ~= "test_x" then
        local spec = file:match "_spec$"
        local all = text(spec and "tests/unit/" .. file .. ".lua" or "tests/c/" .. file .. ".c")
        assert.is_truthy(all:find((spec and 'it("' or " ") .. name .. (spec and "" or "("), 1, true), file .. ": " .. name)
        n = n + 1
      end
    end
    assert.is_true(n > 60)
  end)
end)
