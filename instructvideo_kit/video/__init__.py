from .read import FITS, ClipInfo, choose_frames, clip_info, frame_size, read_frames, read_video, resize_frame
from .write import encode_gif, encode_mp4, to_uint8, write_gif, write_video
from .show import beside, caption_strip, clip_grid, film_strip, magnification, show_video
from .folder import ClipFolder, cut_caption, describe_captions, export_videofolder
from .folder import preview_sheet, read_captions, write_preview

_to_uint8 = to_uint8 # the name until it became public
