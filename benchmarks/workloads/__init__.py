"""The sections of the benchmark's report about ops, in their order: one file for each op. A new op enters the report here."""

from workloads import attention, latent, noise

BENCHMARKS = attention.BENCHMARKS + noise.BENCHMARKS + latent.BENCHMARKS
