/* check.h -- counting checks for the C tests.  A test prints what failed, ends with "N passed, N failed" and exits
 * non-zero on failure; what cannot run here says what it lacks. */
#ifndef KV_CHECK_H
#define KV_CHECK_H
#include <stdio.h>
#include <stdlib.h>

static int check_passed, check_failed;

#define CHECK(cond, ...) do { \
        if (cond) check_passed++; \
        else { check_failed++; printf("FAIL %s:%d: %s: ", __FILE__, __LINE__, #cond); printf(__VA_ARGS__); printf("\n"); } \
    } while (0)
#define SKIP(...) do { printf("skip: "); printf(__VA_ARGS__); printf("\n"); } while (0)

static inline int check_end(void)
{
    printf("%d passed, %d failed\n", check_passed, check_failed);
    return check_failed != 0;
}
#endif
