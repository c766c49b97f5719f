"""Speed, memory and compile time against peers: `python -m tests.benchmarks` prints the tables of the README."""
