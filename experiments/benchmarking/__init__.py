"""The parts of benchmark.py: the processes that it times, their tasks, its tables and charts."""
