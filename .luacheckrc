std = "luajit"
max_line_length = 210
ignore = { "212/self" }
exclude_files = { "build", "dist" }
files["tests"] = { std = "+busted" }
