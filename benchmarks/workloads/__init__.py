"""List the sections of the report about ops, in their order, from one file for each op. A new op enters the report here."""

from workloads import attention, latent, noise

BENCHMARKS = attention.BENCHMARKS + noise.BENCHMARKS + latent.BENCHMARKS
