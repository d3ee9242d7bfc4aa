"""Hold the modules of flash_attn that fastlm has: mha."""
