"""Latency, throughput, memory, time per stage, and the limit of the machine."""
