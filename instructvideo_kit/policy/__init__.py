from .base import VideoPolicy
