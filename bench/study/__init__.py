"""Ways to tune routers compared on one small model: stock, ReMoE, its controls, cache-prior, and what goes beyond."""
