"""int8 and int4 weights: how they are packed, and the products with them."""
