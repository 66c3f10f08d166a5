/* check.h -- counting checks for the C tests.  A test prints what failed, ends with "N passed, N failed" and exits
 * non-zero on failure; what cannot run here says what it lacks. */
#ifndef KV_CHECK_H
#define KV_CHECK_H
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static int check_passed, check_failed;

#define CHECK(cond, ...) do { \
        if (cond) check_passed++; \
        else { check_failed++; printf("FAIL %s:%d: %s: ", __FILE__, __LINE__, #cond); printf(__VA_ARGS__); printf("\n"); } \
    } while (0)
#define SKIP(...) do { printf("skip: "); printf(__VA_ARGS__); printf("\n"); } while (0)

/* Where a model file lies: KELVIN_MODELS, else the cache folder.  0 if it is in neither. */
static inline int model_path(char *path, size_t cap, const char *file)
{
    const char *dir = getenv("KELVIN_MODELS"), *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    if (dir && *dir) snprintf(path, cap, "%s/%s", dir, file);
    else if (cache && *cache) snprintf(path, cap, "%s/kelvin/models/%s", cache, file);
    else snprintf(path, cap, "%s/.cache/kelvin/models/%s", home ? home : "", file);
    return access(path, R_OK) == 0;
}

static inline int check_end(void)
{
    printf("%d passed, %d failed\n", check_passed, check_failed);
    return check_failed != 0;
}
#endif
