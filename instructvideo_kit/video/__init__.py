from .read import FITS, ClipInfo, choose_frames, clip_info, frame_size, read_frames, read_video, resize_frame
from .write import encode_gif, encode_mp4, to_uint8, write_gif, write_video
from .show import beside, caption_strip, clip_grid, film_strip, show_video
