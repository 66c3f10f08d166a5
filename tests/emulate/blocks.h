// blocks.h -- between the runtime (runtime.cpp) and what runs blocks (blocks.cpp).
#pragma once
#include <functional>
#include "emulate.h"
namespace kv_emulate {
extern __thread int last_error __attribute__((visibility("hidden")));     // cudaGetLastError's
void enter_device();                                    // by an OS thread that runs blocks alone: device memory is open to it
// All blocks of a grid, on as many OS threads as are worth it; returns when they are done.  One grid at a time.
void run_grid(const char *name, dim3 grid, dim3 block, size_t shared, const std::function<void()> &one_thread);
}
