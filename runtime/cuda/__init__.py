"""An NVIDIA GPU through cuda-python: memory that both processors see, streams, events. Imported only when asked for."""
