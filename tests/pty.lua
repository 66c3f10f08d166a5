--- A program on a pseudo-terminal of its own: what a person's terminal does, for specs.
--
--    local t = pty.open({ exe, "repl" }, { columns = 80, rows = 24, env = { TERM = "xterm" } })
--    t:send "1 + 1\r"  t:expect "2\r\n"  t:resize(40, 24)  t:signal(2)  status = t:close()
--
-- The child has the terminal as its controlling one, so that Ctrl-C (byte 3) becomes SIGINT whenever the program left signals on.

local ffi = require "ffi"
local C = ffi.C
ffi.cdef [[
  struct kv_test_winsize { unsigned short rows, columns, x, y; };
  struct kv_test_pollfd { int fd; short events, revents; };
  int forkpty(int *master, char *name, const void *termios, const struct kv_test_winsize *size);
  int execvp(const char *file, const char *const argv[]);
  void _exit(int status);
  intptr_t read(int fd, void *at, size_t n);
  intptr_t write(int fd, const void *at, size_t n);
  int poll(struct kv_test_pollfd *fds, unsigned long n, int timeout_ms);
  int ioctl(int fd, unsigned long request, ...);
  int waitpid(int pid, int *status, int options);
  int kill(int pid, int signal);
  struct kv_test_termios { unsigned input, output, control, local_modes; unsigned char rest[64]; };
  int tcgetattr(int fd, struct kv_test_termios *modes);
  int usleep(unsigned us);
  int close(int fd);
]]
local TIOCSWINSZ, SIGKILL, POLLIN, ICANON = 0x5414, 9, 1, 2      -- Linux
local library                                          -- forkpty: in libc since glibc 2.34, in libutil before

local M, Terminal = {}, {}
Terminal.__index = Terminal

local function now() return require("kelvin.lib").now() end

--- Starts argv (argv[1] by its path); o.env adds variables, o.columns and o.rows size the terminal.
function M.open(argv, o)
  o = o or {}
  library = library or (pcall(function() return C.forkpty end) and C or ffi.load "util")
  local words = { "/usr/bin/env" }
  for name, value in pairs(o.env or {}) do words[#words + 1] = name .. "=" .. value end
  for _, word in ipairs(argv) do words[#words + 1] = word end
  local list = ffi.new("const char *[?]", #words + 1)
  for i, word in ipairs(words) do list[i - 1] = word end
  local master = ffi.new "int[1]"
  local size = ffi.new("struct kv_test_winsize", o.rows or 24, o.columns or 80)
  local pid = library.forkpty(master, nil, nil, size)
  if pid == 0 then
    C.execvp(list[0], list)
    C._exit(127)
  end
  assert(pid > 0, "forkpty failed")
  return setmetatable({ pid = pid, fd = master[0], all = "", at = 1, anchor = words }, Terminal)
end

function Terminal:send(text) assert(C.write(self.fd, text, #text) == #text, "the terminal takes no input") end

-- One read within `seconds`; false at the time limit, nil when the program has gone.
local buffer = ffi.new "char[4096]"
function Terminal:read(seconds)
  local p = ffi.new("struct kv_test_pollfd[1]", { { self.fd, POLLIN, 0 } })
  if C.poll(p, 1, math.max(0, seconds * 1000)) <= 0 then return false end
  local n = tonumber(C.read(self.fd, buffer, 4096))
  if n <= 0 then return nil end
  self.all = self.all .. ffi.string(buffer, n)
  return true
end

--- Reads until `text` (plain) comes after what was expected before; returns what came in between.  An error with the
-- transcript after `seconds` (20).
function Terminal:expect(text, seconds)
  local limit = now() + (seconds or 20)
  while true do
    local from, to = self.all:find(text, self.at, true)
    if from then
      local between = self.all:sub(self.at, from - 1)
      self.at = to + 1
      return between
    end
    local left = limit - now()
    local got = left > 0 and self:read(left)
    if not got then
      error(("%q did not come%s; since the last match: %q"):format(text, got == nil and ", the program ended" or "", self.all:sub(self.at)), 2)
    end
  end
end

--- Expects a prompt and waits until the program reads keys: a line editor shows its prompt first, and what is typed before
-- goes through the terminal's own line discipline.
function Terminal:prompt(text, seconds)
  local between = self:expect(text, seconds)
  local modes, limit = ffi.new "struct kv_test_termios[1]", now() + (seconds or 20)
  while C.tcgetattr(self.fd, modes) == 0 and bit.band(modes[0].local_modes, ICANON) ~= 0 do
    assert(now() < limit, "the program does not read keys")
    C.usleep(1000)
  end
  return between
end

function Terminal:resize(columns, rows)
  C.ioctl(self.fd, TIOCSWINSZ, ffi.new("struct kv_test_winsize", rows or 24, columns))
end

function Terminal:signal(number) C.kill(self.pid, number) end

--- Waits for the end, up to `seconds` (20), then kills; returns the exit status, 128 + signal, or "killed".
function Terminal:close(seconds)
  if not self.fd then return self.status end
  local limit = now() + (seconds or 20)
  local open = true
  while open and now() < limit do open = self:read(limit - now()) ~= nil end
  if open then C.kill(self.pid, SIGKILL) end
  local status = ffi.new "int[1]"
  C.waitpid(self.pid, status, 0)
  C.close(self.fd)
  self.fd = nil
  local s = status[0]
  self.status = open and "killed" or s % 128 == 0 and math.floor(s / 256) % 256 or 128 + s % 128
  return self.status
end

return M
