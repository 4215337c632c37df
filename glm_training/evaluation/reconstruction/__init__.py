"""How near pictures that went through an autoencoder come to their originals: PSNR, SSIM, LPIPS and rFID."""
