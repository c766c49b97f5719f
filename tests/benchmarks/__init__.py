"""Speed, memory and compile time against peers: `python -m tests.benchmarks` prints the table of CPU.md."""
