"""What is known of GPU kernels with and without a GPU: measured times, compiled code, and predictions from it."""
