"""VGT: an autoencoder over the features of a vision-language model, and a generator of its latents."""
