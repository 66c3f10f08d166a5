# Kelvin.  `make help` lists what there is; flavours live side by side in build/<flavour>/.
FLAVOUR ?= release
BUILD   ?= build/$(FLAVOUR)
CC      ?= cc
CXX     ?= g++
LUAJIT  ?= luajit

.PHONY: help
help:
	@echo 'make            build/$(FLAVOUR): libkelvin.so, bin/kelvin and, with nvcc, libkelvin_cuda.so'
	@echo 'make demo       install packages, build, fetch a model and a text, measure, name the report (MODEL=, TEXT= for your own)'
	@echo 'make test       build, lint, every test; the last line is N passed, N failed, N skipped'
	@echo 'make lint | asan | valgrind | fuzz [FUZZ_SECONDS=60]'
	@echo 'make cuda       the CUDA plugin alone        make gpu-test   its specs, on a machine with a GPU (gpu-sanitize: under compute-sanitizer)'
	@echo 'make emulated   the same kernels for the CPU: the device "emulated" of the tests'
	@echo 'make install PREFIX=/usr/local               make dist       a tree that runs on another machine'
	@echo 'make bench      the speed pages rows         make clean'

# The rules of arithmetic: no contraction, no fast-math, so that plain C, SIMD and CUDA give the same bytes.
CSTD    := -std=c11 -D_GNU_SOURCE
WARN    := -Wall -Wextra -Wpedantic -Wshadow -Wstrict-prototypes -Wpointer-arith -Werror
CFLAGS.release := -O3 -g1
CFLAGS.asan    := -O1 -g1 -fsanitize=address,undefined -fno-omit-frame-pointer -Wno-format-truncation    # gcc warns of the checks' own branches
CFLAGS.fuzz    := -O1 -g1 -fsanitize=fuzzer-no-link,address,undefined -fno-omit-frame-pointer
CFLAGS  ?= $(CFLAGS.$(FLAVOUR))
KV_CFLAGS = $(CSTD) $(WARN) $(CFLAGS) -fPIC -fvisibility=hidden -ffp-contract=off -pthread -Icore -I$(BUILD) $(PKG_CFLAGS)

PKGS    := openblas libcjson libpcre2-8 libedit zlib liblzma
PKG_CFLAGS := $(shell pkg-config --cflags $(PKGS) 2>/dev/null)
PKG_LIBS   := $(shell pkg-config --libs $(PKGS) 2>/dev/null)
LIBS    = $(PKG_LIBS) -lm -lpthread -ldl

CORE    := $(sort $(wildcard core/*.c core/codecs/*.c))
OBJ     := $(CORE:%.c=$(BUILD)/%.o)
LIB     := $(BUILD)/libkelvin.so
HOST    := $(BUILD)/bin/kelvin
CTESTS  := $(patsubst tests/c/%.c,$(BUILD)/tests/%,$(sort $(wildcard tests/c/test_*.c)))

# OpenBLAS chooses its kernels by the processor.  A pin in the caller's environment would be what the demo measures.
unexport OPENBLAS_CORETYPE

.DEFAULT_GOAL := all
.PHONY: all
all: $(LIB) $(HOST) cuda

# ---- the boundary: the marked region of kelvin.h, as text for LuaJIT and as a hash for both sides
$(BUILD)/kelvin_cdef.txt: core/kelvin.h
	@mkdir -p $(@D)
	@sed -n '/^.. @cdef-begin/,/^.. @cdef-end/p' $< | sed '1d;$$d' > $@
$(BUILD)/kelvin_cdef.lua: $(BUILD)/kelvin_cdef.txt
	@{ printf 'return [==[\n'; cat $<; printf ']==], "%s"\n' "$$(sha256sum < $< | cut -c1-64)"; } > $@
$(BUILD)/kelvin_abi.h: $(BUILD)/kelvin_cdef.txt
	@printf '#define KV_ABI_HASH "%s"\n#define KV_BUILD_FLAGS "%s"\n' "$$(sha256sum < $< | cut -c1-64)" "$$($(CC) --version | head -1 | tr -d '\"') $(CFLAGS)" > $@

# Dozens of unrolled kernels in a file: checks in line take a compiler minutes, as calls and without those of a pointer's form 15 s.
UNROLLED := codecs/scalar_avx512 codecs/scalar_avx2 codecs/int codecs/fp_rows rows weights_avx2 weights_avx512
ifneq ($(filter asan fuzz,$(FLAVOUR)),)
$(BUILD)/core/error.o: CFLAGS += -DKV_ALLOC_EXACT    # no bytes past the end of what was asked for: a checker sees the first one read
$(UNROLLED:%=$(BUILD)/core/%.o): CFLAGS += -fno-sanitize=null,alignment,object-size,pointer-overflow \
    $(if $(findstring clang,$(CC)),-mllvm -asan-instrumentation-with-call-threshold=0,--param asan-instrumentation-with-call-threshold=0)
endif
# -O3 is for loops.  What opens, checks and hands on compiles in two thirds of the time without it; int.c's 130 kernels are
# unrolled by hand and as fast (bench codecs), given that short loops still are.
ifeq ($(FLAVOUR)$(origin CFLAGS),releasefile)
PLUMBING := artifact chat codec container container_block container_cache container_write device edit gguf index_file json layout model offload plan session tokenizer tokenizer_merge tokenizer_split
$(PLUMBING:%=$(BUILD)/core/%.o): KV_CFLAGS += -O2
$(BUILD)/core/codecs/int.o: KV_CFLAGS += -O2 -fpeel-loops
endif
$(BUILD)/%.o: %.c | $(BUILD)/kelvin_abi.h
	@mkdir -p $(@D)
	@echo "  cc $<"
	@$(CC) $(KV_CFLAGS) -MMD -MP -c $< -o $@

# nodelete: LuaJIT unloads libraries when it closes, under worker threads that still run their code.
$(LIB): $(OBJ) $(BUILD)/kelvin_cdef.lua
	@echo "  link $@"
	@$(CC) $(CFLAGS) -shared -o $@ $(OBJ) $(LIBS) -Wl,-z,defs,-z,now,-z,nodelete

# ---- the program: LuaJIT and lua/kv_main.lua.  LUAJIT_LIBS='-Wl,-Bstatic -lluajit-5.1 -Wl,-Bdynamic' puts LuaJIT inside.
LUAJIT_CFLAGS ?= $(shell pkg-config --cflags luajit 2>/dev/null)
LUAJIT_LIBS   ?= $(shell pkg-config --libs luajit 2>/dev/null)
$(HOST): lua/host.c
	@mkdir -p $(@D)
	@echo "  cc $<"
	@$(CC) $(CSTD) $(WARN) $(CFLAGS) $(LUAJIT_CFLAGS) -MMD -MP -MF $@.d $< $(LUAJIT_LIBS) -lm -ldl -rdynamic -o $@

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
# sm_80 code runs on 8.6 and 8.9 too, and what comes after 10.x makes its own from the PTX of the last.  CI has no GPU: one will do.
CUDA_ARCHS ?= $(if $(CI),90,80 90 100)
NVCCFLAGS   = -O3 -std=c++17 --fmad=false $(LINEINFO) -Xcompiler -fPIC,-fvisibility=hidden,-Wall -Icore -Ikernels -Ikernels/include \
              $(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) \
              -gencode arch=compute_$(lastword $(CUDA_ARCHS)),code=compute_$(lastword $(CUDA_ARCHS))
CUDA_SRC := $(sort $(wildcard kernels/*.cu))
CUDA_LIB := $(BUILD)/libkelvin_cuda.so
# Programs of tests/cuda, by nvcc for the GPU and by g++ for the emulator.
GPU_CHECKS   := attend_check prefill_check user_kernel language_check
GPU_PROGRAMS := $(GPU_CHECKS:%=$(BUILD)/cuda/%)

.PHONY: cuda
ifneq ($(NVCC),)
cuda: $(CUDA_LIB)
else
cuda:
	@echo "cuda: nvcc is not here, the CUDA plugin is left out (CUDA Toolkit 13.0 or later; NVCC=/path/to/nvcc)"
endif
$(BUILD)/kernels/%.o: kernels/%.cu $(wildcard kernels/*.cuh kernels/codecs/*.cuh kernels/include/kelvin/* core/codecs/*_device.h) core/backend.h
	@mkdir -p $(@D)
	@echo "  nvcc $<"
	@$(NVCC) $(NVCCFLAGS) -c $< -o $@
# wgmma is Hopper's own: code of sm_90a runs on every 9.0.
$(BUILD)/kernels/prefill.o: override CUDA_ARCHS := $(patsubst 90,90a,$(CUDA_ARCHS))
$(CUDA_LIB): $(CUDA_SRC:%.cu=$(BUILD)/%.o)
	@echo "  link $@"
	@$(NVCC) -shared -cudart static -Xlinker -z,defs -Xlinker --exclude-libs,ALL -o $@ $^

# The device library's programs, against its headers alone: its own check, and a user's.
ATTEND_ARCH ?= 90
$(BUILD)/cuda/prefill_check: ATTEND_ARCH = 90a
$(BUILD)/cuda/%: tests/cuda/%.cu $(wildcard kernels/include/kelvin/*)
	@mkdir -p $(@D)
	@echo "  nvcc $<"
	@$(NVCC) -O3 -std=c++17 -Ikernels/include -cudart static -gencode arch=compute_$(ATTEND_ARCH),code=sm_$(ATTEND_ARCH) -gencode arch=compute_80,code=compute_80 $< -o $@

# ---- the same kernels by g++ under tests/emulate's CUDA: the device "emulated", for tests on machines without a GPU.
CXXFLAGS.release := -O2 -g1
CXXFLAGS.asan    := $(CFLAGS.asan)
EMULATED     := $(BUILD)/libkelvin_emulated.so
EMULATE_SRC  := $(sort $(wildcard tests/emulate/*.cpp))
EMULATE_OBJ  := $(EMULATE_SRC:%.cpp=$(BUILD)/%.o)
EMULATED_OBJ := $(CUDA_SRC:%.cu=$(BUILD)/emulated/%.o)
# fmaf is an instruction where the processor has it, a call elsewhere; its bits are the same.
EMULATE_FMA  := $(shell grep -qsw fma /proc/cpuinfo && echo -mfma)
EMULATE_FLAGS = $(EMULATE_FMA) -std=c++17 $(CXXFLAGS.$(FLAVOUR)) -fPIC -fvisibility=hidden -ffp-contract=off -pthread -fno-strict-aliasing -DKV_EMULATE -Wall -Wno-unknown-pragmas -Wno-sign-compare -Wno-parentheses \
                -Itests/emulate -Icore -Ikernels -Ikernels/include
.PHONY: emulated
emulated: $(EMULATED) $(GPU_CHECKS:%=$(BUILD)/emulated/%)
$(EMULATE_OBJ): $(BUILD)/%.o: %.cpp
	@mkdir -p $(@D)
	@echo "  c++ $<"
	@$(CXX) $(EMULATE_FLAGS) -O3 -MMD -MP -c $< -o $@
$(BUILD)/emulated/%.o: %.cu
	@mkdir -p $(@D)
	@echo "  c++ $<"
	@$(CXX) -x c++ $(EMULATE_FLAGS) -MMD -MP -c $< -o $@
# Tiles by bulk copies here, as on sm_90; by asynchronous copies of 16 bytes in the plugin, as before sm_90.
$(BUILD)/emulated/tests/cuda/attend_check.o: EMULATE_FLAGS += -DKELVIN_BULK=true
$(EMULATED): $(EMULATED_OBJ) $(EMULATE_OBJ)
	@echo "  link $@"
	@$(CXX) $(CXXFLAGS.$(FLAVOUR)) -shared -pthread -o $@ $^ -ldl -Wl,-z,nodelete $(if $(filter asan,$(FLAVOUR)),,-Wl,-z,defs)
$(BUILD)/emulated/%_check: $(BUILD)/emulated/tests/cuda/%_check.o $(EMULATE_OBJ)
	@echo "  link $@"
	@$(CXX) $(CXXFLAGS.$(FLAVOUR)) -pthread -o $@ $^
$(BUILD)/emulated/user_kernel: $(BUILD)/emulated/tests/cuda/user_kernel.o $(EMULATE_OBJ)
	@echo "  link $@"
	@$(CXX) $(CXXFLAGS.$(FLAVOUR)) -pthread -o $@ $^
.PRECIOUS: $(BUILD)/emulated/%.o

# ---- lint, sanitizers, fuzzing
.PHONY: lint asan fuzz gpu-test gpu-sanitize
# On a machine with a GPU: the whole suite, whose GPU specs are pending elsewhere.
gpu-test: all ctests $(GPU_PROGRAMS)
	@$(HOST) doctor | grep -E 'cuda'
	@FLAVOUR=$(FLAVOUR) $(BUSTED) tests/cuda
gpu-sanitize: all ctests $(GPU_PROGRAMS)
	@FLAVOUR=$(FLAVOUR) KELVIN_TEST='$(BUSTED)' sh tests/cuda/sanitize.sh $(BUILD)/cuda:$(BUILD)/tests
lint:
	@sh tests/lint.sh

# The C tests under ASan and UBSan, then the specs with a LuaJIT into which ASan is loaded (its own heap, freed at the end of the
# process, is no leak of ours: the C tests look for leaks).
SANITIZE := UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
ASAN_SPECS ?= tests/unit
ASAN_EMULATED := build/asan/emulated/language_check
asan:
	@$(MAKE) --no-print-directory FLAVOUR=asan build/asan/libkelvin.so build/asan/bin/kelvin ctests $(ASAN_EMULATED)
	@fail=0; for t in $(patsubst tests/c/%.c,build/asan/tests/%,$(sort $(wildcard tests/c/test_*.c))) $(ASAN_EMULATED); do \
	  echo "  $$t"; ASAN_OPTIONS=detect_leaks=1 $(SANITIZE) $$t > $$t.log 2>&1 || { fail=1; tail -30 $$t.log; }; done; exit $$fail
	@LD_PRELOAD=$$($(CC) -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 $(SANITIZE) FLAVOUR=asan $(BUSTED) $(ASAN_SPECS)

# Under valgrind: the fuzz targets over their seeds (every parser, every codec), then C tests.  It knows no AVX-512, and what it
# emulates is what the processor says it has, so these run the AVX2 and the plain form; one core, because it runs one thread at a time.
# Without model files: what they are tested for there is time.
VALGRIND_TESTS ?= test_rng test_tensor test_gguf test_model test_kvtc test_tokenizer
VALGRIND := KELVIN_MODELS=/dev/null OPENBLAS_CORETYPE=Haswell OPENBLAS_NUM_THREADS=1 taskset -c 0 valgrind -q --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite
REPLAYS  := $(patsubst tests/fuzz/%.c,%,$(sort $(wildcard tests/fuzz/fuzz_*.c)))
.PHONY: valgrind
valgrind: all $(VALGRIND_TESTS:%=$(BUILD)/tests/%) $(REPLAYS:%=$(BUILD)/replay/%) $(BUILD)/replay/seeds
	@$(BUILD)/replay/seeds $(BUILD)/seeds && $(LUAJIT) tests/fuzz/make_gguf_seeds.lua $(BUILD)/seeds
	@for t in $(REPLAYS); do echo "  $$t"; $(VALGRIND) $(BUILD)/replay/$$t $(BUILD)/seeds/$$t > $(BUILD)/replay/$$t.log 2>&1 || { tail -40 $(BUILD)/replay/$$t.log; exit 1; }; done
	@for t in $(VALGRIND_TESTS); do echo "  $$t"; $(VALGRIND) $(BUILD)/tests/$$t > $(BUILD)/tests/$$t.valgrind.log 2>&1 || { tail -40 $(BUILD)/tests/$$t.valgrind.log; exit 1; }; done
$(BUILD)/replay/seeds: tests/fuzz/seeds.c tests/fuzz/fuzz.h $(OBJ)
	@mkdir -p $(@D)
	@echo "  cc $<"
	@$(CC) $(KV_CFLAGS) $< $(OBJ) $(LIBS) -o $@
$(BUILD)/replay/fuzz_%: tests/fuzz/fuzz_%.c tests/fuzz/replay.c tests/fuzz/fuzz.h $(OBJ)
	@mkdir -p $(@D)
	@echo "  cc $<"
	@$(CC) $(KV_CFLAGS) $< tests/fuzz/replay.c $(OBJ) $(LIBS) -o $@

# FUZZ_SECONDS for each target in tests/fuzz, from small whole files on; findings stay in build/fuzz/.
FUZZ_SECONDS ?= 60
CLANG ?= clang
FUZZERS := $(patsubst tests/fuzz/%.c,build/fuzz/bin/%,$(sort $(wildcard tests/fuzz/fuzz_*.c)))
fuzz:
	@$(MAKE) --no-print-directory FLAVOUR=fuzz CC='$(CLANG)' fuzzers
	@build/fuzz/replay/seeds build/fuzz/seeds && $(LUAJIT) tests/fuzz/make_gguf_seeds.lua build/fuzz/seeds
	@for f in $(FUZZERS); do n=$$(basename $$f); mkdir -p build/fuzz/corpus/$$n build/fuzz/seeds/$$n; echo "  $$n, $(FUZZ_SECONDS) s"; \
	  (cd build/fuzz && bin/$$n -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 corpus/$$n seeds/$$n > $$n.log 2>&1) || { tail -30 build/fuzz/$$n.log; exit 1; }; \
	  grep -E 'stat::number_of_executed_units' build/fuzz/$$n.log; done
.PHONY: fuzzers
fuzzers: $(FUZZERS) build/fuzz/replay/seeds
build/fuzz/bin/%: tests/fuzz/%.c tests/fuzz/fuzz.h $(OBJ)
	@mkdir -p $(@D)
	@echo "  cc $<"
	@$(CC) $(subst fuzzer-no-link,fuzzer,$(KV_CFLAGS)) $< $(OBJ) $(LIBS) -o $@

# ---- the demo: from a bare machine to a Pareto plot.  MODEL=path.gguf and TEXT=path.txt measure your own; RESUME=1 goes on.
APT_PACKAGES := gcc g++ make pkg-config git libc6-dev libluajit-5.1-dev luajit libcjson-dev libpcre2-dev libopenblas-dev libedit-dev zlib1g-dev liblzma-dev \
                lua-argparse lua-busted lua-check python3-pip unzip ca-certificates
MODEL ?=
TEXT  ?=
RESUME ?=
.PHONY: packages demo
packages:
	@missing=""; for p in $(APT_PACKAGES); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q ' installed' || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
	  sudo=""; if [ "$$(id -u)" != 0 ]; then sudo=sudo; echo "packages: not root, so apt-get runs under sudo"; fi; \
	  echo "packages: installing$$missing"; \
	  { DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -q --no-install-recommends $$missing >/dev/null 2>&1 || \
	    { $$sudo apt-get update -q >/dev/null && DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -q --no-install-recommends $$missing >/dev/null; }; } || \
	  { echo "packages: apt-get could not install$$missing"; exit 1; }; fi

# The build is a make of its own: what pkg-config says may have changed since this one read it.
demo: packages
	@$(MAKE) --no-print-directory -j$$(nproc) $(LIB) $(HOST)
	@[ -n "$(MODEL)" ] || $(HOST) models get smollm2-135m
	@$(HOST) run experiments/01_pareto.lua $(if $(MODEL),--model '$(MODEL)') $(if $(TEXT),--text '$(abspath $(TEXT))') $(if $(RESUME),--resume)

# ---- installing, and a tree that runs elsewhere
PREFIX  ?= /usr/local
DESTDIR ?=
INST     = $(DESTDIR)$(PREFIX)
.PHONY: install
install: all
	@mkdir -p $(INST)/bin $(INST)/lib $(INST)/share/kelvin
	@install -m 755 $(HOST) $(INST)/bin/kelvin
	@install -m 755 $(LIB) $(wildcard $(CUDA_LIB)) $(INST)/lib/
	@install -m 644 $(BUILD)/kelvin_cdef.lua $(INST)/lib/
	@cp -R lua configs experiments docs $(INST)/share/kelvin/
	@rm -f $(INST)/share/kelvin/lua/host.c
	@c=$$(git rev-parse HEAD 2>/dev/null) && echo "$$c$$(git diff --quiet HEAD 2>/dev/null || echo ' dirty')" > $(INST)/share/kelvin/commit || rm -f $(INST)/share/kelvin/commit
	@echo "installed kelvin in $(INST)"

# Relocatable: LuaJIT inside the program, zlib and liblzma inside libkelvin.so, the other libraries beside it (found by $$ORIGIN), busted's Lua files and
# the specs.  Runs on x86-64 with glibc 2.36 or later and nothing installed: `bin/kelvin`, `bin/kelvin-test`.
DIST ?= dist/kelvin
BUSTED_MODULES := busted busted.lua lfs.lua cliargs cliargs.lua luassert pl say term system dkjson.lua mediator.lua argparse.lua
LUA_SHARE ?= /usr/share/lua/5.1
LUA_LIB   ?= /usr/lib/x86_64-linux-gnu/lua/5.1
.PHONY: dist
dist: all ctests
	@rm -rf $(DIST)
	@$(MAKE) --no-print-directory install PREFIX= DESTDIR=$(abspath $(DIST)) > /dev/null
	@$(CC) $(CSTD) $(WARN) $(CFLAGS) $(LUAJIT_CFLAGS) lua/host.c -Wl,-Bstatic -lluajit-5.1 -Wl,-Bdynamic -lm -ldl -rdynamic -o $(DIST)/bin/kelvin
	@$(CC) $(CFLAGS) -shared -o $(DIST)/lib/libkelvin.so $(OBJ) $(filter-out -lz -llzma,$(LIBS)) -Wl,-Bstatic -lz -llzma -Wl,-Bdynamic -Wl,--exclude-libs,libz.a:liblzma.a -Wl,-z,defs,-z,now,-z,nodelete,-rpath,'$$ORIGIN'
	@for so in $$(ldd $(DIST)/lib/libkelvin.so | awk '/=> \// { print $$3 }' | grep -vE '/(libc|libm|libdl|libpthread|librt|ld-linux[^/]*)\.so'); do cp -L $$so $(DIST)/lib/; done
	@mkdir -p $(DIST)/share/kelvin/busted $(DIST)/libexec && cp -R tests $(DIST)/share/kelvin/
	@for m in $(BUSTED_MODULES); do [ ! -e $(LUA_SHARE)/$$m ] || cp -RL $(LUA_SHARE)/$$m $(DIST)/share/kelvin/busted/; done
	@for m in term system lfs.so; do [ ! -e $(LUA_LIB)/$$m ] || cp -RL $(LUA_LIB)/$$m $(DIST)/share/kelvin/busted/; done
	@cp -L $(LUA_SHARE)/argparse.lua $(DIST)/share/kelvin/lua/
	@for t in $(CTESTS) $(wildcard $(GPU_PROGRAMS)); do cp $$t $(DIST)/libexec/; done
	@install -m 755 tests/kelvin-test.sh $(DIST)/bin/kelvin-test
	@strip -g $(DIST)/bin/kelvin $(DIST)/lib/*.so* $(DIST)/libexec/* 2>/dev/null; true
	@du -sh $(DIST) | awk '{ print "dist: " $$2 ", " $$1 }'

# ---- specs under the project's own LuaJIT (.busted); the last line is `N passed, N failed, N skipped`.
BUSTED  ?= busted
SPECS   ?= tests
.PHONY: specs
specs: $(LIB) $(HOST)
	@FLAVOUR=$(FLAVOUR) $(BUSTED) $(SPECS)

# From a bare machine: packages, build, the model that some specs need (without a network those are skipped), then every spec.
# tests/c_spec.lua runs the C tests and the house rules, so busted's closing line counts everything.
.PHONY: test
test: packages
	@$(MAKE) --no-print-directory -j$$(nproc) all ctests emulated
	@$(HOST) models get smollm2-135m > /dev/null || echo "test: without the model, specs that need it are skipped"
	@FLAVOUR=$(FLAVOUR) $(BUSTED) $(SPECS)

.PHONY: clean
clean:
	rm -rf build

-include $(HOST).d $(OBJ:.o=.d) $(CTESTS:%=%.d) $(EMULATE_OBJ:.o=.d) $(EMULATED_OBJ:.o=.d) $(wildcard $(BUILD)/emulated/tests/cuda/*.d)
