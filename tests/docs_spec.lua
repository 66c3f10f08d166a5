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
