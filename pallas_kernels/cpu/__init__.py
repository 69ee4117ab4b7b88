"""The attention of CPUs, and their product of 16-bit weights, in C++."""
