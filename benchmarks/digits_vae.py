"""The worked example as a program; what it does stands in digits/vae.py, its options in ``--help``."""

from digits.vae import main

main()
