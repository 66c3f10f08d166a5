-- busted's terminal output, ending in the one line that everything here ends with: `N passed, N failed, N skipped`.
local base = require "busted.outputHandlers.plainTerminal"

return function(options)
  local handler = base(options)
  local busted = require "busted"
  local function report()
    print(("%d passed, %d failed, %d skipped"):format(handler.successesCount, handler.failuresCount + handler.errorsCount, handler.pendingsCount))
    return nil, true
  end
  busted.subscribe({ "exit" }, report, { priority = 1 })
  return handler
end
