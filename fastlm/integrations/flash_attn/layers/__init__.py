"""Hold the layers of flash_attn that fastlm has: rotary."""
