"""bf16 matrix products on a CPU that has instructions for them, and what goes with them."""
