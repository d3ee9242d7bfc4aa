"""The calls that every op is tested with: one file for each op. A new op enters the tests here."""

from cases import attention, latent, noise

SPECS = {spec.name: spec for spec in noise.SPECS + latent.SPECS + attention.SPECS}
