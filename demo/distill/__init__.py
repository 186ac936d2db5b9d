"""SmolLM2-135M-Instruct as a trained fine-grained mixture of experts: split, route, distil, pack, rebuild."""

EXPERTS, TOP_K, SHARED, RANK = 32, 8, 768, 32
