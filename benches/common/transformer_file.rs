//! A file with FLUX.1's block shapes and random values in bf16, to be loaded.

#![allow(unreachable_pub, reason = "benches take it in by its path")]

use std::io::Write;
use std::path::Path;

pub const D: usize = 3072;
const MLP: usize = 12288;

/// Writes as many blocks as fit, two single ones for each double one as in FLUX.1, and answers how many bytes they are.
pub fn write(path: &Path, gigabytes: f64) -> std::io::Result<u64> {
    let triples = ((gigabytes * 1e9 / 2.0 - 90e6) / 623e6).round().max(1.0) as usize;
    let mut shapes: Vec<(String, Vec<usize>)> = Vec::new();
    let mut linear = |name: String, output: usize, input: usize| {
        shapes.push((format!("{name}.weight"), vec![output, input]));
        shapes.push((format!("{name}.bias"), vec![output]));
    };
    for (name, output, input) in [("img_in", D, 64), ("txt_in", D, 4096), ("final_layer.linear", 64, D)] {
        linear(name.into(), output, input);
    }
    linear("final_layer.adaLN_modulation.1".into(), 2 * D, D);
    for (name, input) in [("time_in", 256), ("guidance_in", 256), ("vector_in", 768)] {
        linear(format!("{name}.in_layer"), D, input);
        linear(format!("{name}.out_layer"), D, D);
    }
    for i in 0..triples {
        for side in ["img", "txt"] {
            let name = format!("double_blocks.{i}.{side}");
            linear(format!("{name}_mod.lin"), 6 * D, D);
            linear(format!("{name}_attn.qkv"), 3 * D, D);
            linear(format!("{name}_attn.proj"), D, D);
            linear(format!("{name}_mlp.0"), MLP, D);
            linear(format!("{name}_mlp.2"), D, MLP);
        }
    }
    for i in 0..2 * triples {
        let name = format!("single_blocks.{i}");
        linear(format!("{name}.modulation.lin"), 3 * D, D);
        linear(format!("{name}.linear1"), 3 * D + MLP, D);
        linear(format!("{name}.linear2"), D, D + MLP);
    }
    let norms = (0..triples).flat_map(|i| ["img", "txt"].map(|side| format!("double_blocks.{i}.{side}_attn.norm")));
    for norm in norms.chain((0..2 * triples).map(|i| format!("single_blocks.{i}.norm"))) {
        shapes.extend(["query", "key"].map(|which| (format!("{norm}.{which}_norm.scale"), vec![D / 24])));
    }
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in &shapes {
        let start = end;
        end += 2 * shape.iter().product::<usize>() as u64;
        header.insert(name.clone(), serde_json::json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] }));
    }
    let mut text = serde_json::to_vec(&header)?;
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut file = std::io::BufWriter::with_capacity(1 << 20, std::fs::File::create(path)?);
    file.write_all(&(text.len() as u64).to_le_bytes())?;
    file.write_all(&text)?;
    // Random bytes with small exponents, the same megabytes over and over: nothing here looks at the values.
    let mut random = fastrand::Rng::with_seed(1);
    let block: Vec<u8> = (0..1 << 21).flat_map(|_| [random.u8(..), 0x3c | (random.u8(..) & 0x83)]).collect();
    let mut left = end;
    while left > 0 {
        let n = left.min(block.len() as u64);
        file.write_all(&block[..n as usize])?;
        left -= n;
    }
    file.flush()?;
    Ok(end)
}
