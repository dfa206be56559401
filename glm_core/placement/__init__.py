"""Which device runs which stage: bytes in, a plan out."""
