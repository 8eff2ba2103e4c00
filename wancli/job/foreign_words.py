"""What words of other programs, as `cfg`, `num_frames` or `scheduler`, are in a job, if they are anything."""

from __future__ import annotations

_SAME = {
    "sampler.guidance": ("cfg", "cfg_scale", "guidance_scale", "guide_scale", "sample_guide_scale"),
    "sampler.solver": ("scheduler", "sampler_name", "sample_solver", "solver", "sampling_method"),
    "sampler.steps": ("steps", "num_inference_steps", "sample_steps", "sampling_steps"),
    "sampler.shift": ("shift", "flow_shift", "sample_shift"),
    "frames": ("num_frames", "frame_num", "frame_count", "video_length", "length", "num_video_frames"),
    "size: 832x480": ("width", "height", "resolution", "video_size"),
    "negative": ("negative_prompt", "n_prompt", "neg_prompt"),
    "seed": ("noise_seed", "base_seed", "rand_seed", "random_seed"),
    "matrix: {seed: [0, 1]}": ("batch_size", "num_videos", "num_samples", "batch_count", "seeds"),
    "video.fps": ("fps", "frame_rate", "framerate"),
    "video.crf": ("crf", "quality"),
    "video.codec": ("codec",),
    "loras": ("lora", "lora_path", "lora_paths", "lora_weights"),
    "image.first": ("start_image", "first_frame", "init_image", "input_image", "image_path"),
    "image.last": ("end_image", "last_frame", "end_frame", "last_image"),
    "model: {text_encoder: FILE}": ("text_encoder", "clip", "t5"),
    "model: {vae: FILE}": ("vae",),
    "model": ("ckpt", "ckpt_dir", "checkpoint", "model_path", "task"),
    "memory.dtype": ("dtype", "precision", "weight_dtype"),
    "memory.device": ("device",),
    "memory.residency": ("offload", "offload_model", "t5_cpu", "low_vram", "lowvram", "block_swap"),
    "output": ("output_path", "save_file", "save_path", "out"),
    "extends": ("include", "base"),
}
_MP4 = "wancli writes 8-bit 4:2:0 MP4 alone; video.keep_latents: true keeps the latent for other programs"
_NONE = {
    **dict.fromkeys(
        ("bits", "bit_depth", "pix_fmt", "format", "container", "prores", "dnxhd", "vp9", "av1", "ffv1"), _MP4
    ),
    **dict.fromkeys(
        ("preview", "previews"), "`wancli decode NAME.state.safetensors --preview` shows a shot in progress"
    ),
    **dict.fromkeys(("audio", "sound", "audio_path"), "wancli renders no sound"),
    **dict.fromkeys(
        ("control_video", "src_video", "input_video", "vace", "mask_video", "src_mask", "init_video"),
        "wancli takes no video as input; image: FILE begins with a picture",
    ),
    "<<": "YAML 1.2 has no merge keys; write extends, or common keys above items",
    "denoise": "wancli begins with noise alone; image: FILE begins with a picture",
}
_WORDS = {word: f"write {key}" for key, words in _SAME.items() for word in words} | _NONE


def explain_word(word: str) -> str | None:
    """Say what to write instead of a word of another program. Returns None for an unknown word."""
    return _WORDS.get(word.lower().replace("-", "_"))
