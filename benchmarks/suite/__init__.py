"""The rows of the benchmark, how they are checked and timed, and the machine that they are timed on."""
