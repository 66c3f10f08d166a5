/* edit.c -- one line at a time from a terminal, over libedit, pull-style.
 *
 * A terminal is one thing, so there is one editor, made at the first line and guarded by a lock.  Ctrl-C is read as a
 * character and not as a signal: the tty makes no signals while a line is edited, and what the program does with
 * SIGINT elsewhere stays as it was.  libedit reads the character set from the locale; a thread-local locale
 * gives it UTF-8 without changing the process.  Completion is a sorted list of words: a word under the cursor is
 * [A-Za-z0-9_.:]+; Tab adds what all candidates share, and lists them when they share no more. */
#include <ctype.h>
#include <errno.h>
#include <histedit.h>
#include <locale.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include "internal.h"

enum { HISTORY = 2000 };

static struct editor {
    pthread_mutex_t lock;
    EditLine  *el;
    History   *history;
    locale_t   locale;
    char      *prompt, *line;            /* malloc'ed */
    char      *words, **word;            /* the list's text, and its words in order */
    size_t     n_words;
    bool       interrupted;
} ed = { .lock = PTHREAD_MUTEX_INITIALIZER };

int kv_isatty(int fd) { return isatty(fd) == 1; }

/* Columns of the terminal on stdout or stderr; 80 when there is none. */
int kv_term_width(void)
{
    struct winsize w;
    for (int fd = STDOUT_FILENO; fd <= STDERR_FILENO; fd++)
        if (ioctl(fd, TIOCGWINSZ, &w) == 0 && w.ws_col > 0) return w.ws_col;
    return 80;
}

int kv_edit_available(void) { return isatty(STDIN_FILENO) == 1 && isatty(STDOUT_FILENO) == 1; }

static char *prompt_text(EditLine *el) { (void)el; return ed.prompt ? ed.prompt : (char *)(uintptr_t)""; }

static unsigned char on_interrupt_key(EditLine *el, int ch)
{
    (void)el; (void)ch;
    ed.interrupted = true;
    return CC_EOF;
}

static bool in_word(char c) { return isalnum((unsigned char)c) || c == '_' || c == '.' || c == ':'; }

/* Candidates in columns under the line being edited. */
static void list_words(size_t first, size_t last)
{
    size_t wide = 0;
    for (size_t i = first; i < last; i++) wide = strlen(ed.word[i]) > wide ? strlen(ed.word[i]) : wide;
    const size_t columns = (size_t)kv_max(1, kv_term_width() / (int)kv_min64((int64_t)wide + 2, 1000));
    const size_t rows = (last - first + columns - 1) / columns;
    for (size_t r = 0; r < rows; r++) {
        fputs("\r\n", stdout);
        for (size_t i = first + r; i < last; i += rows) printf("%-*s", i + rows < last ? (int)wide + 2 : 0, ed.word[i]);
    }
    fputs("\r\n", stdout);
    fflush(stdout);
}

static unsigned char on_complete_key(EditLine *el, int ch)
{
    (void)ch;
    const LineInfo *const li = el_line(el);
    const char *start = li->cursor;
    while (start > li->buffer && in_word(start[-1])) start--;
    const size_t typed = (size_t)(li->cursor - start);
    size_t first = 0, last, shared;
    while (first < ed.n_words && strncmp(ed.word[first], start, typed) < 0) first++;
    for (last = first; last < ed.n_words && strncmp(ed.word[last], start, typed) == 0; last++) {}
    if (typed == 0 || first == last) return CC_REFRESH_BEEP;
    for (shared = typed; ed.word[first][shared] && ed.word[first][shared] == ed.word[last - 1][shared]; shared++) {}
    if (shared == typed) {
        if (last - first == 1) return CC_NORM;
        list_words(first, last);
        return CC_REDISPLAY;
    }
    char *const more = strndup(ed.word[first] + typed, shared - typed);
    const int inserted = more ? el_insertstr(el, more) : -1;
    free(more);
    return inserted == 0 ? CC_REFRESH : CC_REFRESH_BEEP;
}

static int open_history(void)
{
    HistEvent ev;
    if (ed.history) return KV_OK;
    RETURN_ERROR_IF(!(ed.history = history_init()), KV_E_NOMEM, "line editor: out of memory");
    history(ed.history, &ev, H_SETSIZE, HISTORY);
    history(ed.history, &ev, H_SETUNIQUE, 1);
    return KV_OK;
}

/* libedit's emacs keys take U+0080 to U+00FF for Meta keys; the letters among them are to be typed. */
static void bind_latin(void)
{
    el_set(ed.el, EL_EDITOR, "emacs");
    for (int c = 0xA0; c <= 0xFF; c++) {
        const char key[3] = { (char)(0xC0 | c >> 6), (char)(0x80 | (c & 0x3F)), '\0' };
        el_set(ed.el, EL_BIND, key, "ed-insert", NULL);
    }
}

static int open_editor(void)
{
    FORWARD_IF_ERROR(open_history());
    if (ed.el) return KV_OK;
    if (!ed.locale) ed.locale = newlocale(LC_CTYPE_MASK, "C.UTF-8", (locale_t)0);     /* texts here are UTF-8, whatever LC_ALL says */
    if (!ed.locale) ed.locale = newlocale(LC_CTYPE_MASK, "", (locale_t)0);
    const locale_t before = ed.locale ? uselocale(ed.locale) : (locale_t)0;
    ed.el = el_init("kelvin", stdin, stdout, stderr);
    if (ed.el) bind_latin();
    if (before) uselocale(before);
    RETURN_ERROR_IF(!ed.el, KV_E_UNSUPPORTED, "line editor: libedit cannot use this terminal (TERM=%s)", getenv("TERM") ? getenv("TERM") : "");
    el_set(ed.el, EL_PROMPT, prompt_text);
    el_set(ed.el, EL_HIST, history, ed.history);
    el_set(ed.el, EL_SETTY, "-d", "-isig", NULL);
    el_set(ed.el, EL_ADDFN, "kelvin-interrupt", "Give the line up", on_interrupt_key);
    el_set(ed.el, EL_ADDFN, "kelvin-complete", "Complete the word", on_complete_key);
    el_set(ed.el, EL_BIND, "^C", "kelvin-interrupt", NULL);
    el_set(ed.el, EL_BIND, "^I", "kelvin-complete", NULL);
    el_set(ed.el, EL_BIND, "^R", "em-inc-search-prev", NULL);
    el_set(ed.el, EL_BIND, "\\e[1;5C", "em-next-word", NULL);
    el_set(ed.el, EL_BIND, "\\e[1;5D", "ed-prev-word", NULL);
    el_set(ed.el, EL_SIGNAL, 0);
    return KV_OK;
}

/* See kelvin.h; a negative status below -1 when there is no terminal.  The line has no newline and is in kv_edit_text(). */
int kv_edit_line(const char *prompt)
{
    RETURN_ERROR_IF(!kv_edit_available(), KV_E_UNSUPPORTED, "line editor: stdin or stdout is not a terminal");
    pthread_mutex_lock(&ed.lock);
    int result = open_editor();
    if (result == KV_OK) {
        int n = 0;
        free(ed.prompt);
        ed.prompt = strdup(prompt ? prompt : "");
        ed.interrupted = false;
        fflush(stdout);
        const locale_t before = ed.locale ? uselocale(ed.locale) : (locale_t)0;
        const char *const got = el_gets(ed.el, &n);
        if (before) uselocale(before);
        free(ed.line);
        ed.line = NULL;
        if (ed.interrupted) {
            fputs("^C\n", stdout);
            fflush(stdout);
            result = -1;
        } else if (got && n > 0) {
            ed.line = strndup(got, (size_t)n);
            const size_t len = ed.line ? strlen(ed.line) : 0;
            if (len > 0 && ed.line[len - 1] == '\n') ed.line[len - 1] = '\0';
            result = ed.line ? 1 : kv_set_error(KV_E_NOMEM, "line editor: out of memory");
        }
    }
    pthread_mutex_unlock(&ed.lock);
    return result;
}

/* The last line; "" before the first.  Valid until the next kv_edit_line. */
const char *kv_edit_text(void) { return ed.line ? ed.line : ""; }

void kv_edit_history_add(const char *line)
{
    HistEvent ev;
    if (!line || !*line) return;
    pthread_mutex_lock(&ed.lock);
    if (open_history() == KV_OK) history(ed.history, &ev, H_ENTER, line);
    pthread_mutex_unlock(&ed.lock);
}

static int history_file(const char *path, int op, const char *verb)
{
    HistEvent ev = { 0, "" };
    RETURN_ERROR_IF(!path, KV_E_ARG, "history: path is NULL");
    pthread_mutex_lock(&ed.lock);
    int status = open_history();
    if (status == KV_OK && history(ed.history, &ev, op, path) < 0)
        status = kv_set_error(KV_E_IO, "history '%s': cannot %s it: %s", path, verb, ev.str ? ev.str : "unknown error");
    pthread_mutex_unlock(&ed.lock);
    return status;
}

/* A file that is not there yet is an empty history. */
int kv_edit_history_load(const char *path)
{
    if (path && access(path, F_OK) != 0 && errno == ENOENT) return KV_OK;
    return history_file(path, H_LOAD, "read");
}

int kv_edit_history_save(const char *path) { return history_file(path, H_SAVE, "write"); }

static int by_text(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

/* Replaces the list; NULL or out of memory leaves none. */
void kv_edit_words(const char *words)
{
    pthread_mutex_lock(&ed.lock);
    free(ed.words);
    free(ed.word);
    ed.word = NULL;
    ed.n_words = 0;
    ed.words = words ? strdup(words) : NULL;
    size_t n = 1;
    for (const char *p = ed.words; p && *p; p++) n += *p == '\n';
    if (ed.words && (ed.word = calloc(n, sizeof *ed.word))) {
        char *rest = NULL;
        for (char *w = strtok_r(ed.words, "\n", &rest); w; w = strtok_r(NULL, "\n", &rest)) ed.word[ed.n_words++] = w;
        qsort(ed.word, ed.n_words, sizeof *ed.word, by_text);
    }
    pthread_mutex_unlock(&ed.lock);
}
