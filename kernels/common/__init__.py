"""What the Triton kernels of several ops share: launches, elementary functions and the generator of the noise."""
