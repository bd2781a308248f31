from . import lora # completes diffusers' video UNets, so that pipeline.load_lora_weights works
from .base import VideoPolicy
from . import cogvideox, first_frame, svd, wan # kinds of policy behind VideoPolicy.from_pretrained
