# Kelvin.  `make help` lists what there is; flavours live side by side in build/<flavour>/.
FLAVOUR ?= release
BUILD   ?= build/$(FLAVOUR)
CC      ?= cc
LUAJIT  ?= luajit

# The rules of arithmetic: no contraction, no fast-math, so that plain C, SIMD and CUDA give the same bytes.
CSTD    := -std=c11 -D_GNU_SOURCE
WARN    := -Wall -Wextra -Wpedantic -Wshadow -Wstrict-prototypes -Wpointer-arith -Werror
CFLAGS.release := -O3 -g
CFLAGS.asan    := -O1 -g -fsanitize=address,undefined -fno-omit-frame-pointer
CFLAGS.fuzz    := -O1 -g -fsanitize=fuzzer-no-link,address,undefined -fno-omit-frame-pointer
CFLAGS  ?= $(CFLAGS.$(FLAVOUR))
KV_CFLAGS = $(CSTD) $(WARN) $(CFLAGS) -fPIC -fvisibility=hidden -ffp-contract=off -pthread -Icore -I$(BUILD) $(PKG_CFLAGS)

PKGS    := openblas libcjson libpcre2-8 libedit
PKG_CFLAGS := $(shell pkg-config --cflags $(PKGS) 2>/dev/null)
PKG_LIBS   := $(shell pkg-config --libs $(PKGS) 2>/dev/null)
LIBS    = $(PKG_LIBS) -lm -lpthread -ldl

CORE    := $(sort $(wildcard core/*.c core/codecs/*.c))
OBJ     := $(CORE:%.c=$(BUILD)/%.o)
LIB     := $(BUILD)/libkelvin.so
CTESTS  := $(patsubst tests/c/%.c,$(BUILD)/tests/%,$(sort $(wildcard tests/c/test_*.c)))

.PHONY: all
all: $(LIB) cuda

# ---- the boundary: the marked region of kelvin.h, as text for LuaJIT and as a hash for both sides
$(BUILD)/kelvin_cdef.txt: core/kelvin.h
	@mkdir -p $(@D)
	@sed -n '/^.. @cdef-begin/,/^.. @cdef-end/p' $< | sed '1d;$$d' > $@
$(BUILD)/kelvin_cdef.lua: $(BUILD)/kelvin_cdef.txt
	@{ printf 'return [==[\n'; cat $<; printf ']==], "%s"\n' "$$(sha256sum < $< | cut -c1-64)"; } > $@
$(BUILD)/kelvin_abi.h: $(BUILD)/kelvin_cdef.txt
	@printf '#define KV_ABI_HASH "%s"\n#define KV_BUILD_FLAGS "%s"\n' "$$(sha256sum < $< | cut -c1-64)" "$$($(CC) --version | head -1 | tr -d '\"') $(CFLAGS)" > $@

$(BUILD)/%.o: %.c $(BUILD)/kelvin_abi.h
	@mkdir -p $(@D)
	@echo "  cc $<"
	@$(CC) $(KV_CFLAGS) -MMD -MP -c $< -o $@

$(LIB): $(OBJ) $(BUILD)/kelvin_cdef.lua
	@echo "  link $@"
	@$(CC) $(CFLAGS) -shared -o $@ $(OBJ) $(LIBS) -Wl,-z,defs,-z,now

# ---- C tests see the internals: they link the objects.  Each prints lines and exits non-zero on failure.
.PHONY: ctests
ctests: $(CTESTS)
$(BUILD)/tests/%: tests/c/%.c $(OBJ)
	@mkdir -p $(@D)
	@echo "  cc $<"
	@$(CC) $(KV_CFLAGS) -MMD -MP -Itests/c $< $(OBJ) $(LIBS) -o $@

# ---- the CUDA plugin: cudart inside, no libkelvin symbols, loads without a driver.  Without nvcc it is left out, loudly.
NVCC    ?= $(shell command -v nvcc 2>/dev/null)
# --fmad=false: encode arithmetic gives the CPU's bytes.  Machine code for Ampere to Blackwell, PTX for what comes next.
CUDA_ARCHS ?= 80 86 89 90 100 120
NVCCFLAGS  := -O3 -std=c++17 --fmad=false -lineinfo -Xcompiler -fPIC,-fvisibility=hidden,-Wall -Icore -Ikernels -Ikernels/include \
              $(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) \
              -gencode arch=compute_$(lastword $(CUDA_ARCHS)),code=compute_$(lastword $(CUDA_ARCHS))
CUDA_SRC := $(sort $(wildcard kernels/*.cu))
CUDA_LIB := $(BUILD)/libkelvin_cuda.so

.PHONY: cuda
ifneq ($(NVCC),)
cuda: $(CUDA_LIB)
else
cuda:
	@echo "cuda: nvcc is not here, the CUDA plugin is left out (CUDA Toolkit 13.0 or later; NVCC=/path/to/nvcc)"
endif
$(BUILD)/kernels/%.o: kernels/%.cu $(wildcard kernels/*.cuh kernels/include/*) core/backend.h
	@mkdir -p $(@D)
	@echo "  nvcc $<"
	@$(NVCC) $(NVCCFLAGS) -c $< -o $@
$(CUDA_LIB): $(CUDA_SRC:%.cu=$(BUILD)/%.o)
	@echo "  link $@"
	@$(NVCC) -shared -cudart static -Xlinker -z,defs -Xlinker --exclude-libs,ALL -o $@ $^

.PHONY: clean
clean:
	rm -rf build

-include $(OBJ:.o=.d) $(CTESTS:%=%.d)
