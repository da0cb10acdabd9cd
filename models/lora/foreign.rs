//! Adapters of other models, told by names and shapes that only they have.

use super::Error;
use crate::weights::Checkpoint;

/// What the file is if it is not a FLUX.1 adapter that can be applied. `unmatched` are the keys that name no module of FLUX.1: only
/// they can tell.
pub(super) fn refuse(checkpoint: &Checkpoint, unmatched: &[String]) -> Result<(), Error> {
    let any = |parts: &[&str]| unmatched.iter().any(|key| parts.iter().any(|part| key.contains(part)));
    let wrong = |what| Err(Error::WrongBase { what });
    if any(&["distilled_guidance_layer"]) {
        return wrong("a Chroma adapter");
    }
    if any(&["to_qkv_mlp_proj", "linear_in.lora", "double_stream_modulation", "single_stream_modulation"])
        || gated_mlp(checkpoint)
    {
        return wrong("a FLUX.2 adapter, whose blocks are of other shapes");
    }
    if any(&[
        "lora_te2_text_model",
        "text_encoder_2.text_model",
        "input_blocks_4",
        "down_blocks_1_attentions_0_transformer_blocks_1",
    ]) {
        return wrong("an SDXL adapter");
    }
    if any(&["down_blocks", "up_blocks", "mid_block", "input_blocks", "output_blocks", "middle_block"]) {
        return wrong("a Stable Diffusion (UNet) adapter, SD 1.5 or SDXL");
    }
    if any(&["joint_blocks", "lora_unet_joint"]) {
        return wrong("a Stable Diffusion 3 adapter");
    }
    if any(&["diffusion_model.layers.", "lora_unet_layers_"]) {
        return wrong("a Z-Image or Lumina adapter");
    }
    if any(&["blocks.0.self_attn", "blocks_0_self_attn", "blocks.0.cross_attn"]) {
        return wrong("a Wan adapter");
    }
    if any(&["wscales", ".qweight", "mlp_fc1", "mlp_context_fc1", "qkv_proj_context"]) {
        return Err(Error::Unsupported {
            what: "an adapter packed for Nunchaku (use the file it was converted from)".into(),
            keys: Vec::new(),
        });
    }
    if any(&["ip_adapter", "controlnet", "input_hint_block"]) {
        return Err(Error::Unsupported { what: "an IP-Adapter or ControlNet, not a LoRA".into(), keys: Vec::new() });
    }
    Ok(())
}

/// FLUX.2's MLP has a gate, so its first layer is six times as high as it is wide; FLUX.1's is four times.
fn gated_mlp(checkpoint: &Checkpoint) -> bool {
    let size = |ends: [&str; 2], axis: usize| {
        checkpoint
            .keys()
            .filter(|key| key.contains("img_mlp_0.") || key.contains("img_mlp.0."))
            .find(|key| ends.iter().any(|end| key.ends_with(end)))
            .and_then(|key| checkpoint.get(key)?.shape.get(axis).copied())
    };
    let (rows, columns) = (size(["lora_up.weight", "lora_B.weight"], 0), size(["lora_down.weight", "lora_A.weight"], 1));
    matches!((rows, columns), (Some(rows), Some(columns)) if rows == 6 * columns)
}

/// Every tensor is a plain weight: a base model, or a part of one.
pub(super) fn whole_checkpoint(checkpoint: &Checkpoint) -> bool {
    !checkpoint.is_empty()
        && checkpoint.keys().all(|key| key.ends_with(".weight") || key.ends_with(".bias") || key.ends_with(".scale"))
        && !checkpoint
            .keys()
            .any(|key| ["lora", "hada_", "lokr_", ".down.weight", ".up.weight"].iter().any(|part| key.contains(part)))
}
