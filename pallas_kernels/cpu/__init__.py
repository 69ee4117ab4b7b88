"""The attention of CPUs, in C++."""
