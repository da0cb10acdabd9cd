//! LoRA files as strangers write them: every naming of the same change, and everything that is none.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use models::lora::{Adapter, Mode, Scales, Selected};
use models::weights::Component;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use tempfile::TempDir;

use crate::fixtures;

/// Hidden width of the tiny model.
pub(crate) const D: usize = 64;

pub(crate) fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 0.3, shape, &Device::Cpu).unwrap()
}

pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn bytes(&self, name: &str, bytes: &[u8]) -> PathBuf {
        std::fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    /// A safetensors file of these tensors, stored as `dtype`.
    pub(crate) fn write(&self, name: &str, tensors: &[(String, Tensor)], dtype: DType) -> PathBuf {
        self.write_with(name, tensors, dtype, None)
    }

    pub(crate) fn write_with(
        &self,
        name: &str,
        tensors: &[(String, Tensor)],
        dtype: DType,
        header: Option<BTreeMap<String, String>>,
    ) -> PathBuf {
        let stored: Vec<(String, Vec<usize>, Vec<u8>)> =
            tensors.iter().map(|(key, tensor)| (key.clone(), tensor.dims().to_vec(), raw(tensor, dtype))).collect();
        let kind = match dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            _ => Dtype::F8_E4M3,
        };
        let views = stored.iter().map(|(key, shape, bytes)| (key.clone(), TensorView::new(kind, shape.clone(), bytes).unwrap()));
        let bytes = safetensors::serialize(views, header.map(|header| header.into_iter().collect())).unwrap();
        self.bytes(name, &bytes)
    }
}

fn raw(tensor: &Tensor, dtype: DType) -> Vec<u8> {
    let values: Vec<f32> = tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap();
    match dtype {
        DType::F32 => values.into_iter().flat_map(f32::to_le_bytes).collect(),
        DType::F16 => values.into_iter().flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect(),
        DType::BF16 => values.into_iter().flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect(),
        _ => values.into_iter().map(|v| float8::F8E4M3::from_f32(v).to_bits()).collect(),
    }
}

pub(crate) fn named(pairs: &[(&str, &Tensor)]) -> Vec<(String, Tensor)> {
    pairs.iter().map(|(key, tensor)| ((*key).to_owned(), (*tensor).clone())).collect()
}

pub(crate) fn number(value: f32) -> Tensor {
    Tensor::new(value, &Device::Cpu).unwrap()
}

/// The named weight of the tiny model with the file on it, as bits.
pub(crate) fn merged(file: &std::path::Path, name: &str) -> Vec<u32> {
    let pipeline = fixtures::pipeline("tiny-dev", DType::F32);
    let adapter = Arc::new(Adapter::open(file).unwrap_or_else(|e| panic!("{}: {e}", file.display())));
    assert_eq!(adapter.report.unmatched_keys, Vec::<String>::new(), "{}", file.display());
    let mut patches = pipeline.patches();
    patches.apply(&[Selected { adapter, scales: Scales::uniform(0.8) }], Mode::Merge).unwrap();
    let (weight, _) = patches.parameter(Component::Transformer, name).unwrap().current().unwrap();
    let values: Vec<f32> = weight.dense(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn the_same_change_in_every_naming_gives_the_same_bits() {
    let folder = Folder::new();
    let (up, down) = (random(&[4 * D, 4]), random(&[4, D]));
    let alpha = number(4.0);
    let name = "double_blocks.1.img_mlp.0.weight";
    let downs_and_ups = [
        (".lora_down.weight", ".lora_up.weight"),
        (".lora_A.weight", ".lora_B.weight"),
        (".lora_A.default.weight", ".lora_B.default.weight"),
        (".lora_A", ".lora_B"),
        (".lora.down.weight", ".lora.up.weight"),
        ("_lora.down.weight", "_lora.up.weight"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ];
    let stems = [
        "lora_unet_double_blocks_1_img_mlp_0",
        "diffusion_model.double_blocks.1.img_mlp.0",
        "model.diffusion_model.double_blocks.1.img_mlp.0",
        "double_blocks.1.img_mlp.0",
        "transformer.double_blocks.1.img_mlp.0",
        "base_model.model.double_blocks.1.img_mlp.0",
        "transformer.transformer_blocks.1.ff.net.0.proj",
        "transformer.base_model.model.transformer_blocks.1.ff.net.0.proj",
        "base_model.model.transformer_blocks.1.ff.net.0.proj",
        "diffusion_model.transformer_blocks.1.ff.net.0.proj",
        "transformer_blocks.1.ff.net.0.proj",
        "lora_unet_transformer_blocks_1_ff_net_0_proj_",
        "lora_transformer_transformer_blocks_1_ff_net_0_proj",
        "lycoris_transformer_blocks_1_ff_net_0_proj",
        "diffusion_model.double_blocks.1.img_mlp_0",
    ];
    let mut first = None;
    for (i, stem) in stems.iter().enumerate() {
        for (j, (a, b)) in downs_and_ups.iter().enumerate() {
            let file = folder.write(
                &format!("{i}-{j}.safetensors"),
                &named(&[(&format!("{stem}{a}"), &down), (&format!("{stem}{b}"), &up), (&format!("{stem}.alpha"), &alpha)]),
                DType::F32,
            );
            let got = merged(&file, name);
            assert!(first.get_or_insert_with(|| got.clone()) == &got, "{stem}{a}");
            if j > 0 && i > 0 {
                break; // each suffix once, each stem once
            }
        }
    }
}

#[test]
fn parts_of_a_fused_weight_equal_the_whole() {
    let folder = Folder::new();
    let (up, down) = (random(&[7 * D, 4]), random(&[4, D]));
    let name = "single_blocks.1.linear1.weight";
    let whole = "single_blocks.1.linear1";
    let whole = named(&[(&format!("{whole}.lora_A.weight"), &down), (&format!("{whole}.lora_B.weight"), &up)]);
    let want = merged(&folder.write("whole.safetensors", &whole, DType::F32), name);
    let rows = |from: usize, n: usize| up.narrow(0, from * D, n * D).unwrap().contiguous().unwrap();
    let members = [("attn.to_q", rows(0, 1)), ("attn.to_k", rows(1, 1)), ("attn.to_v", rows(2, 1)), ("proj_mlp", rows(3, 4))];
    let split = |which: &[usize]| -> Vec<(String, Tensor)> {
        which
            .iter()
            .flat_map(|i| {
                let (member, up) = &members[*i];
                let stem = format!("transformer.single_transformer_blocks.1.{member}");
                [(format!("{stem}.lora_A.weight"), down.clone()), (format!("{stem}.lora_B.weight"), up.clone())]
            })
            .collect()
    };
    let close = |a: &[u32], b: &[u32]| {
        a.iter().zip(b).all(|(a, b)| {
            (f32::from_bits(*a) - f32::from_bits(*b)).abs() <= 2.0 * f32::EPSILON * f32::from_bits(*b).abs().max(0.5)
        })
    };
    assert!(close(&merged(&folder.write("split.safetensors", &split(&[0, 1, 2, 3]), DType::F32), name), &want));
    // OneTrainer numbers the parts; ComfyUI names the upper ones.
    let numbered: Vec<_> = members
        .iter()
        .enumerate()
        .flat_map(|(i, (_, up))| {
            let stem = format!("transformer.single_blocks.1.linear1.{i}");
            [(format!("{stem}.lora_down.weight"), down.clone()), (format!("{stem}.lora_up.weight"), up.clone())]
        })
        .collect();
    assert!(close(&merged(&folder.write("numbered.safetensors", &numbered, DType::F32), name), &want));

    // Missing members leave their rows as they are.
    let base = merged(
        &folder.write(
            "other.safetensors",
            &named(&[("img_in.lora_A.weight", &random(&[1, 64])), ("img_in.lora_B.weight", &random(&[D, 1]))]),
            DType::F32,
        ),
        name,
    );
    let partial = merged(&folder.write("partial.safetensors", &split(&[1, 3]), DType::F32), name);
    assert!(partial[..D * D] == base[..D * D] && partial[2 * D * D..3 * D * D] == base[2 * D * D..3 * D * D]);
    assert!(close(&partial[D * D..2 * D * D], &want[D * D..2 * D * D]) && close(&partial[3 * D * D..], &want[3 * D * D..]));
}

#[test]
fn files_of_every_number_type_are_read() {
    let folder = Folder::new();
    let exact = |shape: &[usize]| (random(shape) * 8.).unwrap().round().unwrap().clamp(-8., 8.).unwrap();
    let (up, down) = (exact(&[D, 2]), exact(&[2, D]));
    let tensors =
        named(&[("double_blocks.0.img_attn.proj.lora_A.weight", &down), ("double_blocks.0.img_attn.proj.lora_B.weight", &up)]);
    let files = [DType::F32, DType::F16, DType::BF16, DType::F8E4M3]
        .map(|dtype| folder.write(&format!("{dtype:?}.safetensors"), &tensors, dtype));
    let want = merged(&files[0], "double_blocks.0.img_attn.proj.weight");
    for file in &files[1..] {
        assert!(merged(file, "double_blocks.0.img_attn.proj.weight") == want, "{}", file.display());
    }
}

#[test]
fn replacements_are_there_at_any_scale_but_zero() {
    let folder = Folder::new();
    let value = random(&[D, D]);
    let file = folder.write(
        "set.safetensors",
        &named(&[("diffusion_model.double_blocks.0.img_attn.proj.set_weight", &value)]),
        DType::F32,
    );
    let pipeline = fixtures::pipeline("tiny-dev", DType::F32);
    let adapter = Arc::new(Adapter::open(&file).unwrap());
    let mut patches = pipeline.patches();
    let mut at = |scale| {
        patches.apply(&[Selected { adapter: adapter.clone(), scales: Scales::uniform(scale) }], Mode::Auto).unwrap();
        let parameter = patches.parameter(Component::Transformer, "double_blocks.0.img_attn.proj.weight").unwrap();
        parameter.current().unwrap().0.dense(DType::F32).unwrap()
    };
    let apart = |a: &Tensor, b: &Tensor| (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    let base = at(0.);
    assert!(apart(&base, &value) > 0.1);
    assert!(apart(&at(0.3), &value) < 1e-6 && apart(&at(2.), &value) < 1e-6);
    assert_eq!(apart(&at(0.), &base), 0.);
}

#[test]
fn schnell_has_no_guidance_and_says_so() {
    let folder = Folder::new();
    let tensors = named(&[
        ("guidance_in.in_layer.lora_A.weight", &random(&[4, 256])),
        ("guidance_in.in_layer.lora_B.weight", &random(&[D, 4])),
        ("double_blocks.0.img_attn.proj.lora_A.weight", &random(&[4, D])),
        ("double_blocks.0.img_attn.proj.lora_B.weight", &random(&[D, 4])),
    ]);
    let adapter = Arc::new(Adapter::open(&folder.write("dev.safetensors", &tensors, DType::F32)).unwrap());
    let set = [Selected { adapter, scales: Scales::uniform(1.) }];
    let apply = |model: &str| fixtures::pipeline(model, DType::F32).patches().apply(&set, Mode::Auto).unwrap();
    let schnell = apply("tiny-schnell");
    assert_eq!(schnell.changed, 1);
    assert!(schnell.notes.len() == 1 && schnell.notes[0].contains("guidance embedding"), "{:?}", schnell.notes);
    let dev = apply("tiny-dev");
    assert_eq!((dev.changed, dev.notes.len()), (2, 0));
}

#[test]
fn alpha_comes_from_the_tensor_then_the_header_then_the_rank() {
    let folder = Folder::new();
    let (up, down) = (random(&[D, 4]), random(&[4, D]));
    let stem = "transformer.transformer_blocks.0.attn.to_out.0";
    let file = |name: &str, alpha: Option<Tensor>, header: Option<&str>| {
        let mut tensors = named(&[(&format!("{stem}.lora_A.weight"), &down), (&format!("{stem}.lora_B.weight"), &up)]);
        tensors.extend(alpha.map(|alpha| (format!("{stem}.alpha"), alpha)));
        let header = header.map(|text| BTreeMap::from([("lora_adapter_metadata".to_owned(), text.to_owned())]));
        let adapter = Adapter::open(&folder.write_with(&format!("{name}.safetensors"), &tensors, DType::F32, header)).unwrap();
        adapter.updates[0].change.factor
    };
    let header = Some(r#"{"transformer.lora_alpha": 12, "transformer.r": 99}"#);
    assert_eq!(file("none", None, None), 1.);
    assert_eq!(file("tensor", Some(number(2.)), header), 0.5);
    assert_eq!(file("one", Some(number(2.).reshape(1).unwrap()), None), 0.5);
    assert_eq!(file("header", None, header), 3.);
    assert_eq!(file("zero", Some(number(0.)), None), 1.);
    assert_eq!(file("zero and header", Some(number(0.)), header), 3.);
    assert_eq!(file("root", None, Some(r#"{"transformer.lora_alpha": 12, "transformer.use_rslora": true}"#)), 6.);
}

pub(crate) fn refused(path: &std::path::Path) -> (String, String) {
    let report = Adapter::inspect(path);
    let error = Adapter::open(path).expect_err("it should have been refused");
    let refused = report.refused.expect("the report says so too");
    assert_eq!(refused.reason, error.to_string());
    (refused.code.to_owned(), refused.reason)
}

#[test]
fn what_is_no_adapter_of_flux_is_refused_by_name() {
    let folder = Folder::new();
    let t = random(&[4, 4]);
    let keys = |keys: &[&str]| keys.iter().map(|key| ((*key).to_owned(), t.clone())).collect::<Vec<_>>();
    let good = ["double_blocks.0.img_attn.proj.lora_A.weight", "double_blocks.0.img_attn.proj.lora_B.weight"];
    let cases: &[(&[&str], &str, &str)] = &[
        (
            &[
                "lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight",
                "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
            ],
            "wrong_base",
            "SDXL",
        ),
        (&["lora_unet_up_blocks_1_attentions_0_proj_in.lora_down.weight"], "wrong_base", "Stable Diffusion"),
        (&["transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight"], "wrong_base", "FLUX.2"),
        (&["distilled_guidance_layer.in_proj.lora_A.weight", good[0], good[1]], "wrong_base", "Chroma"),
        (&["transformer_blocks.0.mlp_fc1.lora_down"], "unsupported", "Nunchaku"),
        (&["joint_blocks.0.x_block.attn.qkv.lora_A.weight"], "wrong_base", "Stable Diffusion 3"),
        (&["diffusion_model.layers.0.attention.qkv.lora_A.weight"], "wrong_base", "Z-Image"),
        (&["blocks.0.self_attn.q.lora_A.weight"], "wrong_base", "Wan"),
        (&["double_blocks.0.img_attn.proj.weight", "img_in.weight"], "unsupported", "base model"),
        (&["lora_unet_double_blocks_0_img_attn_proj.a1.weight", good[0], good[1]], "unsupported", "GLoRA"),
        (&["lora_unet_double_blocks_0_img_attn_proj.oft_blocks"], "unsupported", "OFT"),
        (&["lora_unet_double_blocks_0_img_attn_proj.lora_mid.weight", good[0], good[1]], "unsupported", "convolution"),
        (&["something.else.lora_A.weight"], "nothing_matched", "something.else"),
        (&[good[0], good[1], "a.lora_A.weight", "b.lora_A.weight"], "mostly_unmatched", "more than half"),
        (&[good[0]], "bad_module", "missing"),
        (&["lora_unet_double_blocks_0_img_attn_proj.lokr_w1"], "bad_module", "missing"),
        (&["lora_unet_double_blocks_0_img_attn_proj.dora_scale"], "bad_module", "magnitude"),
    ];
    for (i, (names, code, part)) in cases.iter().enumerate() {
        let (got, reason) = refused(&folder.write(&format!("{i}.safetensors"), &keys(names), DType::F32));
        assert!(got == *code && reason.contains(part), "{names:?}: {got}: {reason}");
    }
    let (up, down) = (random(&[D, 4]), random(&[4, 128]));
    let control = named(&[("img_in.lora_A.weight", &down), ("img_in.lora_B.weight", &up), ("img_in.lora_B.bias", &random(&[D]))]);
    let (code, reason) = refused(&folder.write("control.safetensors", &control, DType::F32));
    assert!(code == "unsupported" && reason.contains("control"), "{reason}");
    // The right names with FLUX.2's gated MLP.
    let gated = named(&[
        ("double_blocks.0.img_mlp.0.lora_A.weight", &random(&[4, 64])),
        ("double_blocks.0.img_mlp.0.lora_B.weight", &random(&[384, 4])),
    ]);
    assert!(refused(&folder.write("gated.safetensors", &gated, DType::F32)).1.contains("FLUX.2"));
}

#[test]
fn odd_ranks_and_alphas_have_one_meaning() {
    let folder = Folder::new();
    let stem = "double_blocks.0.img_attn.proj";
    let file = |name: &str, rank: usize, alpha: Option<f32>| {
        let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let (down, up) = if rank == 0 { (zeros((0, D)), zeros((D, 0))) } else { (random(&[rank, D]), random(&[D, rank])) };
        let mut tensors = named(&[(&format!("{stem}.lora_A.weight"), &down), (&format!("{stem}.lora_B.weight"), &up)]);
        tensors.extend(alpha.map(|alpha| (format!("{stem}.alpha"), number(alpha))));
        folder.write(name, &tensors, DType::F32)
    };
    let (code, reason) = refused(&file("none", 0, None));
    assert!(code == "bad_module" && reason.contains("empty"), "{code}: {reason}");
    let large = Adapter::open(&file("large", 4096, Some(4096.0))).unwrap();
    assert_eq!((large.updates[0].change.factor, large.report.ranks[&4096]), (1.0, 1));
    for alpha in [f32::NAN, f32::INFINITY] {
        let (code, reason) = refused(&file("alpha", 4, Some(alpha)));
        assert!(code == "bad_module" && reason.contains("its alpha is"), "{code}: {reason}");
    }
}

#[test]
fn damaged_files_and_other_kinds_are_refused_by_name() {
    let folder = Folder::new();
    let (up, down) = (random(&[D, 4]), random(&[4, D]));
    let tensors =
        named(&[("double_blocks.0.img_attn.proj.lora_A.weight", &down), ("double_blocks.0.img_attn.proj.lora_B.weight", &up)]);
    let good = std::fs::read(folder.write("good.safetensors", &tensors, DType::F32)).unwrap();
    let is = |name: &str, bytes: &[u8], code: &str, part: &str| {
        let (got, reason) = refused(&folder.bytes(name, bytes));
        assert!(got == code && reason.contains(part), "{name}: {got}: {reason}");
    };
    is("cut", &good[..good.len() - 5], "damaged", "truncated");
    is("longer", &[&good[..], b"x"].concat(), "damaged", "left over");
    is("header", &good[..40], "over_limit", "ends before");
    is("empty", b"", "not_safetensors", "empty");
    is("page", b"<!DOCTYPE html><html>login</html>", "not_safetensors", "web page");
    is("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not_safetensors", "git-lfs");
    is("pickle", b"PK\x03\x04archive/data.pkl", "not_safetensors", "pickle");
    is("json", b"{\"error\": \"not found\"}", "not_safetensors", "JSON");
    assert_eq!(refused(&folder.path("absent.safetensors")).0, "unreadable");
    for bad in [f32::NAN, f32::INFINITY] {
        let mut values: Vec<f32> = up.flatten_all().unwrap().to_vec1().unwrap();
        values[37] = bad;
        let up = Tensor::from_vec(values, (D, 4), &Device::Cpu).unwrap();
        let tensors = named(&[
            ("double_blocks.0.img_attn.proj.lora_A.weight", &down),
            ("double_blocks.0.img_attn.proj.lora_B.weight", &up),
        ]);
        let (code, reason) = refused(&folder.write("nan.safetensors", &tensors, DType::F32));
        assert!(code == "not_finite" && reason.contains("img_attn.proj.lora_B"), "{reason}");
    }
    // No mutation of a good file makes the reader fail other than by an error.
    let mut random = fastrand::Rng::with_seed(23);
    for _ in 0..2000 {
        let mut bytes = good.clone();
        for _ in 0..random.usize(1..=4) {
            bytes[random.usize(..400)] = random.u8(..);
        }
        let _ = Adapter::open(&folder.bytes("mutated", &bytes));
    }
}

#[test]
fn the_report_says_what_is_there() {
    let folder = Folder::new();
    let (up, down, zero) = (random(&[D, 4]), random(&[4, D]), Tensor::zeros((D, 4), DType::F32, &Device::Cpu).unwrap());
    let tensors = named(&[
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", &down),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_up.weight", &up),
        ("lora_unet_double_blocks_0_img_attn_proj.alpha", &number(2.)),
        ("lora_unet_double_blocks_1_img_attn_proj.lora_down.weight", &down),
        ("lora_unet_double_blocks_1_img_attn_proj.lora_up.weight", &zero),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", &random(&[2, 32])),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight", &random(&[32, 2])),
        ("lora_unet_unknown_thing.lora_down.weight", &down),
        ("_aux.slider", &number(1.)),
    ]);
    let header = BTreeMap::from(
        [
            ("ss_network_module", "networks.lora_flux"),
            ("modelspec.architecture", "flux-1-dev/lora"),
            ("modelspec.trigger_phrase", "ohwx"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned())),
    );
    let report = Adapter::inspect(&folder.write_with("a.safetensors", &tensors, DType::BF16, Some(header)));
    let json = serde_json::to_value(&report).unwrap();
    for field in [
        "digest",
        "bytes",
        "tensors",
        "prefix",
        "naming",
        "algorithms",
        "modules_matched",
        "modules_empty",
        "unmatched_keys",
        "ranks",
        "alphas",
        "dtypes",
        "text_encoders",
        "trigger_words",
        "trainer",
        "base",
        "notes",
        "warnings",
        "refused",
    ] {
        assert!(json.get(field).is_some(), "{field}");
    }
    assert!(json["refused"].is_null());
    assert_eq!((report.modules_matched, report.modules_empty), (3, 1));
    assert_eq!(report.unmatched_keys, ["lora_unet_unknown_thing.lora_down.weight"]);
    assert_eq!(json["ranks"], serde_json::json!({ "2": 1, "4": 2 }));
    assert_eq!(json["alphas"], serde_json::json!([2.0]));
    assert_eq!(json["dtypes"], serde_json::json!({ "bf16": 9 }));
    assert_eq!(json["text_encoders"], serde_json::json!(["clip_l"]));
    assert_eq!(json["trigger_words"], serde_json::json!(["ohwx"]));
    assert_eq!(json["base"], "dev");
    assert_eq!(report.digest.len(), 64);
    assert!(report.warnings.len() == 1 && report.warnings[0].contains("unknown_thing"));
}
