-- What bin/kelvin runs: the command line, whose exit status is this chunk's result.
return require("kelvin.cli").main(arg)
