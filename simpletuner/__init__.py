"""Fine-tune text-to-image diffusion models: from a folder of pictures and a config to weights that work everywhere."""

__version__ = "0.1.0"
