"""The quantized model in integers: exact sums of products, and the laws that scale them."""
