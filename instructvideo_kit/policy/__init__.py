from . import lora # completes diffusers' UNet3D, so that pipeline.load_lora_weights works
from .base import VideoPolicy
