"""Noise to latent: solvers, stages, the denoising loop."""
