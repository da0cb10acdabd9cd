//! diffusers names to BFL names for the autoencoder.

use super::Target;

const RESNET: &[(&str, &str)] =
    &[("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2"), ("conv_shortcut", "nin_shortcut")];

const ATTENTION: &[(&str, &str)] =
    &[("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")];

/// FLUX's autoencoder has four resolutions; BFL counts the decoder's from the finest, diffusers from the coarsest.
const LEVELS: usize = 4;

pub(super) fn target(key: &str) -> Target {
    Target::whole(translate(key).unwrap_or_else(|| key.into()))
}

fn translate(key: &str) -> Option<String> {
    let (side, rest) = key.split_once('.')?;
    let (module, suffix) = rest.rsplit_once('.')?;
    let name = match module {
        "conv_norm_out" => "norm_out".into(),
        _ => inside(module)?,
    };
    Some(format!("{side}.{name}.{suffix}"))
}

fn inside(module: &str) -> Option<String> {
    let resnet = |name: &str| RESNET.iter().find(|(from, _)| *from == name).map(|(_, to)| *to);
    if let Some(rest) = module.strip_prefix("mid_block.resnets.") {
        let (i, name) = rest.split_once('.')?;
        return Some(format!("mid.block_{}.{}", i.parse::<usize>().ok()? + 1, resnet(name)?));
    }
    if let Some(name) = module.strip_prefix("mid_block.attentions.0.") {
        let (_, to) = ATTENTION.iter().find(|(from, _)| *from == name)?;
        return Some(format!("mid.attn_1.{to}"));
    }
    let (way, rest) = match module.split_once("_blocks.")? {
        ("down", rest) => ("down", rest),
        ("up", rest) => ("up", rest),
        _ => return None,
    };
    let (level, rest) = rest.split_once('.')?;
    let level: usize = level.parse().ok()?;
    let level = if way == "up" { LEVELS.checked_sub(level + 1)? } else { level };
    if let Some(rest) = rest.strip_prefix("resnets.") {
        let (i, name) = rest.split_once('.')?;
        return Some(format!("{way}.{level}.block.{i}.{}", resnet(name)?));
    }
    let sampler = rest.strip_suffix("samplers.0.conv")?;
    (sampler == way).then(|| format!("{way}.{level}.{way}sample.conv"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_namings_meet() {
        let name = |key: &str| target(key).name;
        assert_eq!(name("decoder.up_blocks.0.resnets.2.conv1.weight"), "decoder.up.3.block.2.conv1.weight");
        assert_eq!(name("decoder.up_blocks.2.upsamplers.0.conv.bias"), "decoder.up.1.upsample.conv.bias");
        assert_eq!(name("encoder.down_blocks.1.resnets.0.conv_shortcut.weight"), "encoder.down.1.block.0.nin_shortcut.weight");
        assert_eq!(name("encoder.down_blocks.0.downsamplers.0.conv.weight"), "encoder.down.0.downsample.conv.weight");
        assert_eq!(name("decoder.mid_block.attentions.0.to_out.0.weight"), "decoder.mid.attn_1.proj_out.weight");
        assert_eq!(name("encoder.mid_block.resnets.1.norm2.bias"), "encoder.mid.block_2.norm2.bias");
        assert_eq!(name("encoder.conv_norm_out.weight"), "encoder.norm_out.weight");
        for same in ["decoder.up.3.block.2.conv1.weight", "decoder.mid.attn_1.q.bias", "decoder.conv_out.weight"] {
            assert_eq!(name(same), same);
        }
    }
}
