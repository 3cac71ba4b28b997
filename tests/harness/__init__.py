"""What tests and benchmarks share: starting processes and engines, waiting for them, and what they leave."""
