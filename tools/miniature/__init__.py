"""The parts of `tools/train_miniature.py`: pictures, autoencoder, text and denoiser, and the folder that ships."""
