/* replay.c -- a target without the fuzzer: every file of the folders given, once.  For valgrind, and for looking at a finding. */
#include <dirent.h>
#include <stdio.h>
#include "fuzz.h"

static int one(const char *path)
{
    FILE *f = fopen(path, "rb");
    if (!f) return 0;
    fseek(f, 0, SEEK_END);
    const long n = ftell(f);
    rewind(f);
    uint8_t *x = n > 0 ? malloc((size_t)n) : NULL;
    const int whole = x && fread(x, 1, (size_t)n, f) == (size_t)n;
    fclose(f);
    if (whole) LLVMFuzzerTestOneInput(x, (size_t)n);
    free(x);
    return whole;
}

int main(int argc, char **argv)
{
    int n = 0;
    for (int i = 1; i < argc; i++) {
        DIR *folder = opendir(argv[i]);
        if (!folder) n += one(argv[i]);
        for (struct dirent *e; folder && (e = readdir(folder));) {
            char path[1024];
            snprintf(path, sizeof path, "%s/%s", argv[i], e->d_name);
            if (e->d_name[0] != '.') n += one(path);
        }
        if (folder) closedir(folder);
    }
    printf("%d passed, %d failed\n", n, n == 0);         /* a broken promise aborts before */
    return n == 0;
}
