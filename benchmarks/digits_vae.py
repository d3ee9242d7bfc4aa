"""Run the worked example. digits/vae.py says what it does, ``--help`` has its options."""

from digits.vae import main

main()
