"""Pipelines of diffusers with tiny random components, and what each is called with.

Prompts are given as embeddings, so that there is no text encoder and no tokenizer; results are
latents, so that only what reads an image has an autoencoder.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from tests.adapters.driving import STEPS, Pipe
from tests.adapters.parts import (
    FLOW,
    NO_TEXT,
    NO_TEXTS,
    SIZE,
    VIDEO,
    both,
    embeds,
    image_vae,
    model,
    picture,
    wan_vae,
)

# ------------------------------------------------------------------------------------ Wan


def wan(scheduler: Any = None, **parts: Any) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.WanPipeline(
        **NO_TEXT, **{"vae": None, "transformer": model("WanTransformer3DModel"), **parts},
        scheduler=scheduler or FLOW(shift=3.0),
    )  # fmt: skip
    return pipe, {**VIDEO, **both(prompt_embeds=(5, 16))}


def _wan_two() -> tuple[Any, dict[str, Any]]:
    return wan(transformer_2=model("WanTransformer3DModel"), boundary_ratio=0.9)


def _wan_image() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.WanImageToVideoPipeline(
        **NO_TEXT, vae=wan_vae(), scheduler=FLOW(shift=3.0),
        transformer=model("WanTransformer3DModel", in_channels=12),
    )  # fmt: skip
    return pipe, {**VIDEO, **both(prompt_embeds=(5, 16)), "image": picture()}


def _wan_video() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.WanVideoToVideoPipeline(
        **NO_TEXT, vae=wan_vae(), scheduler=diffusers.UniPCMultistepScheduler(flow_shift=3.0),
        transformer=model("WanTransformer3DModel"),
    )  # fmt: skip
    given = {**SIZE, **both(prompt_embeds=(5, 16)), "video": [picture() for _ in range(5)]}
    return pipe, {**given, "num_inference_steps": 6, "strength": 0.7}


def _wan_vace() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.WanVACEPipeline(
        **NO_TEXT, vae=wan_vae(), scheduler=FLOW(shift=3.0),
        transformer=model("WanVACETransformer3DModel", vace_in_channels=2 * 4 + 64),
    )  # fmt: skip
    given = {**VIDEO, **both(prompt_embeds=(5, 16))}
    given |= {"video": 5 * [picture()], "mask": 5 * [Image.new("L", (64, 64), 255)]}
    return pipe, given


def _wan_animate() -> tuple[Any, dict[str, Any]]:
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    pipe = diffusers.WanAnimatePipeline(
        **NO_TEXT, vae=wan_vae(), scheduler=FLOW(shift=3.0),
        image_processor=transformers.CLIPImageProcessorPil(crop_size=8, size=8),
        image_encoder=transformers.CLIPVisionModel(vision).eval(),
        transformer=model("WanAnimateTransformer3DModel"),
    )  # fmt: skip
    frames = [picture() for _ in range(5)]
    given = {
        **SIZE, **both(prompt_embeds=(5, 16)), "segment_frame_length": 5,
        "image": picture(), "pose_video": frames,
        "face_video": [picture(16) for _ in range(5)], "guidance_scale": 3.0,
    }  # fmt: skip
    return pipe, given


# ----------------------------------------------------------------------- Flux, SD3 and others


def _flux_prompt() -> dict[str, Any]:
    return {"prompt_embeds": embeds(6, 24), "pooled_prompt_embeds": embeds(20)}


def flux(kind: Any = None, *, cfg: bool = False, **parts: Any) -> tuple[Any, dict[str, Any]]:
    pipe = (kind or diffusers.FluxPipeline)(
        **NO_TEXTS, **{"vae": None, "scheduler": FLOW(), **parts},
        transformer=model("FluxTransformer2DModel"),
    )  # fmt: skip
    given = {**SIZE, **_flux_prompt()}
    if cfg:
        given |= {f"negative_{name}": value for name, value in _flux_prompt().items()}
        given["true_cfg_scale"] = 3.0
    return pipe, given


def _flux_image() -> tuple[Any, dict[str, Any]]:
    pipe, given = flux(diffusers.FluxImg2ImgPipeline, vae=image_vae(1))
    size = {"height": 8, "width": 8, "image": picture(8)}
    return pipe, {**given, **size, "num_inference_steps": 6, "strength": 0.7}


def _flux_kontext() -> tuple[Any, dict[str, Any]]:
    pipe, given = flux(diffusers.FluxKontextPipeline, vae=image_vae(1))
    size = {"height": 8, "width": 8, "max_area": 64, "image": picture(8), "_auto_resize": False}
    return pipe, {**given, **size}


def sd3(kind: Any = None, **parts: Any) -> tuple[Any, dict[str, Any]]:
    pipe = (kind or diffusers.StableDiffusion3Pipeline)(
        **NO_TEXTS, text_encoder_3=None, tokenizer_3=None,
        **{"vae": None, "scheduler": FLOW(shift=3.0), **parts},
        transformer=model("SD3Transformer2DModel"),
    )  # fmt: skip
    return pipe, {**SIZE, **both(prompt_embeds=(6, 24), pooled_prompt_embeds=(16,))}


def _sd3_image() -> tuple[Any, dict[str, Any]]:
    pipe, given = sd3(diffusers.StableDiffusion3Img2ImgPipeline, vae=image_vae(4))
    size = {"height": 8, "width": 8, "image": picture(8)}
    return pipe, {**given, **size, "num_inference_steps": 6, "strength": 0.7}


def _qwen() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.QwenImagePipeline(
        **NO_TEXT, vae=None, scheduler=FLOW(), transformer=model("QwenImageTransformer2DModel")
    )
    given = both(prompt_embeds=(6, 24), prompt_embeds_mask=(6,))
    return pipe, {**SIZE, **given, "true_cfg_scale": 3.0}


def _pixart(kind: Any) -> tuple[Any, dict[str, Any]]:
    pipe = kind(
        **NO_TEXT, vae=None, scheduler=diffusers.DPMSolverMultistepScheduler(),
        transformer=model("PixArtTransformer2DModel", use_additional_conditions=False),
    )  # fmt: skip
    given = both(prompt_embeds=(6, 16), prompt_attention_mask=(6,))
    return pipe, {**SIZE, **given, "negative_prompt": None, "use_resolution_binning": False}


def _sana() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.SanaPipeline(
        **NO_TEXT, vae=None, transformer=model("SanaTransformer2DModel"),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
    )  # fmt: skip
    given = both(prompt_embeds=(6, 16), prompt_attention_mask=(6,))
    size = {"height": 256, "width": 256, "use_resolution_binning": False}
    return pipe, {**size, **given, "negative_prompt": None}


def _sana_sprint() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.SanaSprintPipeline(
        **NO_TEXT, vae=None, scheduler=diffusers.SCMScheduler(),
        transformer=model("SanaTransformer2DModel", guidance_embeds=True),
    )  # fmt: skip
    given = {"prompt_embeds": embeds(6, 16), "prompt_attention_mask": torch.ones(1, 6)}
    size = {"height": 256, "width": 256, "use_resolution_binning": False}
    return pipe, {**size, **given, "intermediate_timesteps": None}


def lumina2() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.Lumina2Pipeline(
        **NO_TEXT, vae=None, scheduler=FLOW(), transformer=model("Lumina2Transformer2DModel")
    )
    return pipe, {**SIZE, **both(prompt_embeds=(8, 16), prompt_attention_mask=(8,))}


def _z_image() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.ZImagePipeline(
        **NO_TEXT, vae=None, scheduler=FLOW(), transformer=model("ZImageTransformer2DModel")
    )
    texts = {"prompt_embeds": [embeds(6, 16)[0]], "negative_prompt_embeds": [embeds(6, 16)[0]]}
    return pipe, {**SIZE, **texts}


def lumina() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.LuminaPipeline(
        **NO_TEXT, vae=None, scheduler=FLOW(), transformer=model("LuminaNextDiT2DModel")
    )
    return pipe, {**SIZE, **both(prompt_embeds=(6, 16), prompt_attention_mask=(6,))}


# ------------------------------------------------------------------------------ other videos


def cogvideox(scheduler: Any = None) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.CogVideoXPipeline(
        **NO_TEXT, vae=None, scheduler=scheduler or diffusers.CogVideoXDDIMScheduler(),
        transformer=model("CogVideoXTransformer3DModel"),
    )  # fmt: skip
    return pipe, {**VIDEO, **both(prompt_embeds=(6, 16)), "max_sequence_length": 6}


def _cogvideox_image() -> tuple[Any, dict[str, Any]]:
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    pipe = diffusers.CogVideoXImageToVideoPipeline(
        **NO_TEXT, vae=vae.eval(), scheduler=diffusers.CogVideoXDDIMScheduler(),
        transformer=model("CogVideoXTransformer3DModel", in_channels=8),
    )  # fmt: skip
    given = {**VIDEO, **both(prompt_embeds=(6, 16)), "max_sequence_length": 6}
    return pipe, {**given, "image": picture()}


def _ltx() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.LTXPipeline(
        **NO_TEXT, vae=None, scheduler=FLOW(), transformer=model("LTXVideoTransformer3DModel")
    )
    size = {"height": 128, "width": 128, "num_frames": 9}
    return pipe, {**size, **both(prompt_embeds=(5, 16), prompt_attention_mask=(5,))}


def _hunyuan() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.HunyuanVideoPipeline(
        **NO_TEXTS, vae=None, scheduler=FLOW(), transformer=model("HunyuanVideoTransformer3DModel")
    )
    given = both(prompt_embeds=(6, 16), pooled_prompt_embeds=(8,), prompt_attention_mask=(6,))
    return pipe, {**VIDEO, **given, "true_cfg_scale": 3.0}


def _hunyuan15() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.HunyuanVideo15Pipeline(
        **NO_TEXTS, scheduler=FLOW(), guider=diffusers.ClassifierFreeGuidance(3.0),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1
        ).eval(),
        transformer=model("HunyuanVideo15Transformer3DModel"),
    )  # fmt: skip
    given = both(
        prompt_embeds=(6, 16), prompt_embeds_mask=(6,), prompt_embeds_2=(4, 12),
        prompt_embeds_mask_2=(4,),
    )  # fmt: skip
    return pipe, {**VIDEO, **given}


def _framepack() -> tuple[Any, dict[str, Any]]:
    vision = transformers.SiglipVisionConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    pipe = diffusers.HunyuanVideoFramepackPipeline(
        **NO_TEXTS, scheduler=FLOW(),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2
        ).eval(),
        image_encoder=transformers.SiglipVisionModel(vision).eval(),
        feature_extractor=transformers.SiglipImageProcessorPil(size={"height": 8, "width": 8}),
        transformer=model("HunyuanVideoFramepackTransformer3DModel"),
    )  # fmt: skip
    given = both(prompt_embeds=(6, 16), pooled_prompt_embeds=(8,), prompt_attention_mask=(6,))
    windows = {"num_frames": 9, "latent_window_size": 2}
    return pipe, {**SIZE, **given, **windows, "true_cfg_scale": 3.0, "image": picture()}


def _ltx2() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.LTX2Pipeline(
        **NO_TEXT, vocoder=None, scheduler=FLOW(),
        vae=diffusers.AutoencoderKLLTX2Video(
            latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 3,
            layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4,
            spatial_compression_ratio=32, temporal_compression_ratio=8,
        ).eval(),
        audio_vae=diffusers.AutoencoderKLLTX2Audio(
            base_channels=8, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=16
        ).eval(),
        connectors=diffusers.pipelines.ltx2.LTX2TextConnectors(
            caption_channels=16, text_proj_in_factor=1, video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=8, video_connector_num_layers=1,
            video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=8, audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None, connector_rope_base_seq_len=32,
            rope_theta=10000.0, rope_double_precision=True, causal_temporal_positioning=False,
        ).eval(),
        transformer=model("LTX2VideoTransformer3DModel"),
    )  # fmt: skip
    size = {"height": 128, "width": 128, "num_frames": 9}
    return pipe, {**size, **both(prompt_embeds=(6, 16), prompt_attention_mask=(6,))}


def _mochi() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.MochiPipeline(
        **NO_TEXT, vae=None, scheduler=FLOW(), transformer=model("MochiTransformer3DModel")
    )
    given = both(prompt_embeds=(8, 16), prompt_attention_mask=(8,))
    given = {n: v.bool() if "mask" in n else v for n, v in given.items()}
    return pipe, {**SIZE, "num_frames": 7, **given}


def _latte() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.LattePipeline(
        **NO_TEXT, vae=None, scheduler=diffusers.DDIMScheduler(),
        transformer=model("LatteTransformer3DModel"),
    )  # fmt: skip
    given = {"video_length": 2, **both(prompt_embeds=(6, 16)), "negative_prompt": None}
    return pipe, {**SIZE, **given}


def _allegro() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.AllegroPipeline(
        **NO_TEXT, vae=None, scheduler=diffusers.EulerAncestralDiscreteScheduler(),
        transformer=model("AllegroTransformer3DModel"),
    )  # fmt: skip
    given = both(prompt_embeds=(6, 16), prompt_attention_mask=(6,))
    return pipe, {**SIZE, "num_frames": 8, **given, "negative_prompt": None}


def skyreels(kind: Any, **more: Any) -> tuple[Any, dict[str, Any]]:
    pipe = kind(
        **NO_TEXT, vae=None, transformer=model("SkyReelsV2Transformer3DModel", num_layers=2),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
    )  # fmt: skip
    return pipe, {**VIDEO, **both(prompt_embeds=(5, 16)), "prompt": None, **more}


def shapes(**options: Any) -> tuple[Any, dict[str, Any]]:
    """A Wan pipeline and its call."""
    pipe, given = wan(**options)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**given, "num_inference_steps": STEPS, "output_type": "latent"}


ONE = ("call0",)
TWO = ("call0", "call1")
BOTH_HALVES = ("cond_uncond",)

PIPES: dict[str, Pipe] = {
    "wan": Pipe(wan),
    "wan two experts": Pipe(_wan_two),
    "wan image to video": Pipe(_wan_image, full=True),
    "wan video to video": Pipe(_wan_video, calls=TWO),
    "wan vace": Pipe(_wan_vace, full=True),
    "wan animate": Pipe(_wan_animate, full=True),
    "flux": Pipe(flux, calls=("cond",)),
    "flux true cfg": Pipe(lambda: flux(cfg=True), full=True),
    "flux img2img": Pipe(_flux_image, calls=ONE, steps=5),
    "flux kontext": Pipe(_flux_kontext, calls=ONE, full=True),
    "sd3": Pipe(sd3, calls=ONE, full=True),
    "sd3 img2img": Pipe(_sd3_image, calls=ONE, steps=5, full=True),
    "cogvideox": Pipe(cogvideox, calls=BOTH_HALVES),
    "cogvideox image to video": Pipe(_cogvideox_image, calls=BOTH_HALVES, full=True),
    "ltx": Pipe(_ltx, calls=BOTH_HALVES, full=True),
    "hunyuan": Pipe(_hunyuan, full=True),
    "hunyuan 1.5": Pipe(_hunyuan15, full=True),
    "framepack": Pipe(_framepack, calls=TWO, requests=2, full=True),
    "ltx2": Pipe(_ltx2, calls=(*BOTH_HALVES, "uncond_stg", "uncond_modality"), full=True),
    "mochi": Pipe(_mochi, calls=BOTH_HALVES, full=True),
    "qwen": Pipe(_qwen, full=True),
    "pixart alpha": Pipe(lambda: _pixart(diffusers.PixArtAlphaPipeline), calls=ONE, full=True),
    "pixart sigma": Pipe(lambda: _pixart(diffusers.PixArtSigmaPipeline), calls=ONE, full=True),
    "sana": Pipe(_sana, calls=ONE, full=True),
    "sana sprint": Pipe(_sana_sprint, calls=ONE),
    "latte": Pipe(_latte, calls=ONE, full=True),
    "allegro": Pipe(_allegro, calls=ONE, full=True),
    "lumina2": Pipe(lumina2, calls=TWO, full=True),
    "z-image": Pipe(_z_image, calls=ONE, full=True),
    "skyreels": Pipe(lambda: skyreels(diffusers.SkyReelsV2Pipeline), full=True),
    "skyreels forcing": Pipe(lambda: skyreels(diffusers.SkyReelsV2DiffusionForcingPipeline)),
}
