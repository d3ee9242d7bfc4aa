"""Plan and measure attention over a sequence that is spread over ranks."""
