-- A user's own kernel against the headers of kernels/include alone: tests/cuda/user_kernel.cu, built by nvcc (make gpu-test) and for
-- the emulator; it compares with double precision on the host itself.
local h = require "helper"

describe("a user's kernel", function()
  for _, device in ipairs { "cuda", "emulated" } do
    h.check_program("user_kernel", "packs, unpacks, rotates and sums a softmax as double precision does, on " .. device, device, "")
  end
end)
