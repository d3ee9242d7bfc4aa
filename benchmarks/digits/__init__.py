"""The worked example: a VAE of handwritten digits, with the fused latent and with an eager one."""
