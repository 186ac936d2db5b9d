"""The demo model: SmolLM2-135M-Instruct rebuilt as a mixture of experts, see demo/README.md."""
