/* host.c -- the program `kelvin`: LuaJIT with the module path set for wherever the program lies, then lua/kv_main.lua.
 *
 * It links LuaJIT alone; libkelvin.so comes through LuaJIT's FFI like for any other script, so that the program and a plain
 * `luajit` run the same code.  Where things are, by the folder of /proc/self/exe:
 *
 *    checkout      build/<flavour>/bin/kelvin    Lua in ../../../lua            library in ..
 *    installed     PREFIX/bin/kelvin             Lua in ../share/kelvin/lua     library in ../lib
 *    relocatable   DIR/bin/kelvin                Lua in ../share/kelvin/lua or ../lua, library in ../lib */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>

static const struct { const char *lua, *lib; } layout[] = {
    { "../share/kelvin/lua", "../lib" },      /* first: a relocatable tree may lie inside a checkout */
    { "../../../lua", ".." },
    { "../lua", "../lib" },
};

/* dir/relative as an absolute path if it is there; NULL otherwise.  The caller frees it. */
static char *find(const char *dir, const char *relative)
{
    char path[PATH_MAX];
    if (snprintf(path, sizeof path, "%s/%s", dir, relative) >= (int)sizeof path) return NULL;
    return realpath(path, NULL);
}

static int traceback(lua_State *L)
{
    if (!lua_isstring(L, 1)) return 1;
    luaL_traceback(L, L, lua_tostring(L, 1), 1);
    return 1;
}

/* package.path = LUA/?.lua;<as it was>, package.loaded["kelvin.host"] = { exe =, lib = }. */
static void prepare(lua_State *L, const char *exe, const char *lua, const char *lib)
{
    lua_getglobal(L, "package");
    lua_getfield(L, -1, "path");
    lua_pushfstring(L, "%s/?.lua;%s", lua, lua_tostring(L, -1));
    lua_setfield(L, -3, "path");
    lua_pop(L, 1);
    lua_getfield(L, -1, "loaded");
    lua_newtable(L);
    lua_pushstring(L, exe);
    lua_setfield(L, -2, "exe");
    lua_pushstring(L, lib);
    lua_setfield(L, -2, "lib");
    lua_setfield(L, -2, "kelvin.host");
    lua_pop(L, 2);
}

int main(int argc, char **argv)
{
    char exe[PATH_MAX], dir[PATH_MAX];
    const ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    if (n <= 0) {
        fputs("kelvin: /proc/self/exe cannot be read\n", stderr);
        return 1;
    }
    exe[n] = 0;
    memcpy(dir, exe, (size_t)n + 1);
    *strrchr(dir, '/') = 0;

    char *lua = NULL, *lib = NULL, script[PATH_MAX];
    for (size_t i = 0; i < sizeof layout / sizeof *layout; i++) {
        lua = find(dir, layout[i].lua);
        lib = find(dir, layout[i].lib);
        if (lua && lib && snprintf(script, sizeof script, "%s/kv_main.lua", lua) < (int)sizeof script && access(script, R_OK) == 0) break;
        free(lua);
        free(lib);
        lua = lib = NULL;
    }
    if (!lua) {
        fprintf(stderr, "kelvin: its Lua files are not beside %s: ../../../lua, ../share/kelvin/lua or ../lua with kv_main.lua\n", dir);
        return 1;
    }

    int code = 1;
    lua_State *L = luaL_newstate();
    if (!L) {
        fputs("kelvin: no memory for LuaJIT\n", stderr);
    } else {
        luaL_openlibs(L);
        prepare(L, exe, lua, lib);
        lua_createtable(L, argc, 1);
        for (int i = 0; i < argc; i++) {
            lua_pushstring(L, argv[i]);
            lua_rawseti(L, -2, i);
        }
        lua_setglobal(L, "arg");
        lua_pushcfunction(L, traceback);
        if (luaL_loadfile(L, script) || lua_pcall(L, 0, 1, -2)) fprintf(stderr, "kelvin: %s\n", lua_tostring(L, -1));
        else code = (int)lua_tointeger(L, -1);
        lua_close(L);
    }
    free(lua);
    free(lib);
    return code;
}
