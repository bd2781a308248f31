"""Learning from human feedback for video diffusion, small enough to step through."""
__version__ = "0.1.0"
