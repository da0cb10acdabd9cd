//! The layouts that weights are published in: BFL and ComfyUI single files, all-in-one files, shards, fp8, GGUF.

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{DType, Device, Tensor};
use darkroom::engine::{LoadEvent, Pipeline, Sizes};
use models::bundle::{Blob, Bundle};
use models::clip::ClipText;
use models::flux::{Conditioning, Config, Flux, Rope};
use models::lora::{Adapter, Mode, Patches, Scales, Selected};
use models::t5::T5Encoder;
use models::vae::Autoencoder;
use models::weights::{Checkpoint, Component, Error, Source, names};

use crate::fixtures::{self, Fixture, MODULE, assert_close, relative_l2};

fn open(path: &Path) -> Checkpoint {
    Checkpoint::open(&[path.to_path_buf()]).unwrap()
}

fn flux(path: &Path) -> Flux {
    let loaded = Arc::default();
    let source = Source::new(Component::Transformer, &open(path), DType::F32, &Device::Cpu).counting(&loaded);
    let flux = Flux::load(&source, None).unwrap();
    assert_eq!(loaded.load(Ordering::Relaxed), source.bytes(), "{}", path.display());
    let report = source.finish().unwrap();
    assert!(report.applied > 30, "{report}");
    flux
}

/// The transformer's output on the inputs that are called `prefix.*` in `fixture`.
pub(crate) fn velocity(flux: &Flux, fixture: &Fixture, prefix: &str) -> Tensor {
    let at = |name: &str| fixture.get(&format!("{prefix}.{name}"));
    let places = at("img_ids").to_vec2::<f32>().unwrap();
    let last = places.last().unwrap();
    let l_txt = at("txt_ids").dim(0).unwrap();
    let rope = Rope::new(flux.config(), l_txt, last[1] as usize + 1, last[2] as usize + 1, &Device::Cpu).unwrap();
    let conditioning = Conditioning { txt: at("txt"), pooled: at("pooled"), guidance: Some(at("guidance")) };
    flux.forward(&at("img"), &at("timestep"), &conditioning, &rope).unwrap()
}

#[test]
fn transformers_in_every_storage_equal_their_dequantised_reference() {
    let (layouts, modules) = (Fixture::open("layouts/layouts.safetensors"), Fixture::open("modules/modules.safetensors"));
    for name in [
        "flux1-mini.safetensors",
        "flux1-mini-prefixed-fp8.safetensors",
        "flux1-mini-fp8-scaled.safetensors",
        "flux1-cut-fp8.safetensors",
        "flux1-mini-F16.gguf",
        "flux1-mini-Q8_0.gguf",
        "flux1-mini-Q4_0.gguf",
    ] {
        let flux = flux(&fixtures::path(&format!("layouts/{name}")));
        let got = if name.contains("cut") { velocity(&flux, &modules, "flux.in") } else { velocity(&flux, &layouts, "mini.in") };
        // Guidance 3.5 is an angle of 3500 rad: the last bit of a frequency is 1e-4 there (`flux::sinusoid`).
        assert_close(name, &got, &layouts.get(&format!("{name}.out")), 2. * MODULE);
    }
}

/// A weak LoRA, whose deltas are far below a step of 4-bit numbers, on every storage: beside a quantised weight it has all of its
/// effect, merged into the dequantised weight it is the same.
#[test]
fn a_lora_has_its_full_effect_on_every_storage() {
    let layouts = Fixture::open("layouts/layouts.safetensors");
    let folder = tempfile::tempdir().unwrap();
    for name in ["flux1-mini.safetensors", "flux1-mini-fp8-scaled.safetensors", "flux1-mini-Q8_0.gguf", "flux1-mini-Q4_0.gguf"] {
        let path = fixtures::path(&format!("layouts/{name}"));
        let source = Source::new(Component::Transformer, &open(&path), DType::F32, &Device::Cpu);
        let flux = Flux::load(&source, None).unwrap();
        let parameters: BTreeMap<_, _> =
            source.parameters().into_iter().map(|(name, p)| ((Component::Transformer, name), p)).collect();
        let mut lora = HashMap::new();
        for ((_, name), parameter) in
            parameters.iter().filter(|((_, name), _)| name.contains("blocks") && name.ends_with(".weight"))
        {
            let [output, input] = parameter.shape()[..] else { continue };
            let random = |shape: (usize, usize), deviation: f32| Tensor::randn(0f32, deviation, shape, &Device::Cpu).unwrap();
            let stem = name.trim_end_matches(".weight");
            lora.insert(format!("{stem}.lora_A.weight"), random((2, input), 0.02));
            lora.insert(format!("{stem}.lora_B.weight"), random((output, 2), 0.02));
        }
        let file = folder.path().join("lora.safetensors");
        save(&lora, &file);
        let set = [Selected { adapter: Arc::new(Adapter::open(&file).unwrap()), scales: Scales::uniform(0.8) }];
        let mut patches = Patches::new(parameters, &Device::Cpu, DType::F32);
        let mut with = |set: &[Selected], mode| {
            patches.apply(set, mode).unwrap();
            velocity(&flux, &layouts, "mini.in")
        };
        let base = with(&[], Mode::Auto);
        let moved = |velocity: Tensor| (velocity - &base).unwrap();
        let merged = moved(with(&set, Mode::Merge));
        assert!(relative_l2(&base, &(&base + &merged).unwrap()) > 1e-5, "{name}: the LoRA moves nothing");
        for mode in [Mode::Auto, Mode::Branch] {
            let error = relative_l2(&moved(with(&set, mode)), &merged);
            assert!(error < 0.01, "{name} {mode:?}: {error}");
        }
        assert!(with(&[], Mode::Auto).to_vec3::<f32>().unwrap() == base.to_vec3::<f32>().unwrap(), "{name}");
    }
}

#[test]
fn t5_in_every_storage_equals_its_dequantised_reference() {
    let (layouts, modules) = (Fixture::open("layouts/layouts.safetensors"), Fixture::open("modules/modules.safetensors"));
    for name in ["t5xxl_fp16.safetensors", "t5xxl_fp8_e4m3fn.safetensors", "t5-encoder-Q8_0.gguf"] {
        let file = open(&fixtures::path(&format!("layouts/{name}")));
        let loaded = Arc::default();
        let source = Source::new(Component::T5, &file, DType::F32, &Device::Cpu).counting(&loaded);
        let t5 = T5Encoder::load(&source, None).unwrap();
        assert_eq!(loaded.load(Ordering::Relaxed), source.bytes(), "{name}: what no model uses is not waited for");
        source.finish().unwrap();
        let hidden = t5.forward(&modules.ids("t5.in.ids")).unwrap().narrow(1, 0, 12).unwrap();
        assert_close(name, &hidden, &layouts.get(&format!("{name}.hidden")), MODULE);
    }
}

/// ComfyUI's file of the autoencoder: BFL's names in bf16.
#[test]
fn a_single_file_of_the_autoencoder_equals_diffusers() {
    let (layouts, modules) = (Fixture::open("layouts/layouts.safetensors"), Fixture::open("modules/modules.safetensors"));
    let file = open(&fixtures::path("layouts/ae.safetensors"));
    let loaded = Arc::default();
    let source = Source::new(Component::Vae, &file, DType::F32, &Device::Cpu).counting(&loaded);
    let vae = Autoencoder::load(&source, Some(&fixtures::json("tiny-dev/vae/config.json"))).unwrap();
    assert_eq!(loaded.load(Ordering::Relaxed), source.bytes());
    source.finish().unwrap();
    let picture = vae.decode(&modules.get("vae.decode.in.latent").narrow(0, 0, 1).unwrap()).unwrap();
    assert_close("decode", &picture, &layouts.get("ae.safetensors.decode"), MODULE);
    let mean = vae.encode(&modules.get("vae.encode.in.image")).unwrap().mean;
    assert_close("encode", &mean, &layouts.get("ae.safetensors.encode_mean"), MODULE);
}

/// ComfyUI's file of CLIP, with what such files carry and this model does not use: position ids, CLIP's scale and projection.
#[test]
fn a_single_file_of_clip_equals_transformers() {
    let (layouts, modules) = (Fixture::open("layouts/layouts.safetensors"), Fixture::open("modules/modules.safetensors"));
    let file = open(&fixtures::path("layouts/clip_l.safetensors"));
    let loaded = Arc::default();
    let source = Source::new(Component::Clip, &file, DType::F32, &Device::Cpu).counting(&loaded);
    let clip = ClipText::load(&source, Some(&fixtures::json("tiny-dev/text_encoder/config.json"))).unwrap();
    assert_eq!(loaded.load(Ordering::Relaxed), source.bytes(), "what no model uses is not waited for");
    source.finish().unwrap();
    let (_, pooled) = clip.forward(&modules.ids("clip.in.ids")).unwrap();
    assert_close("pooled", &pooled, &layouts.get("clip_l.safetensors.pooled"), MODULE);
}

/// Every tensor of a component of tiny-dev under its canonical (BFL) name, put together as the model reads it.
fn canonical(component: Component, folder: &str) -> HashMap<String, Tensor> {
    let (source, _) = fixtures::component("tiny-dev", folder, component);
    let file = std::fs::read_dir(fixtures::path(&format!("tiny-dev/{folder}"))).unwrap().map(|e| e.unwrap().path());
    let file = file.into_iter().find(|path| path.extension().is_some_and(|e| e == "safetensors")).unwrap();
    let names = names::canonical(component, &open(&file)).into_keys();
    names.map(|name| (name.clone(), source.tensor(&name, source.shape(&name).unwrap().as_slice()).unwrap())).collect()
}

fn prefixed(tensors: HashMap<String, Tensor>, prefix: &str) -> HashMap<String, Tensor> {
    tensors.into_iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor)).collect()
}

fn save(tensors: &HashMap<String, Tensor>, path: &Path) {
    candle_core::safetensors::save(tensors, path).unwrap();
}

/// Latents of a short job. Bare files cannot tell CLIP's heads and the autoencoder's groups of a tiny model.
fn latents(mut bundle: Bundle) -> Tensor {
    let config = |name: &str| Some(Blob::File(fixtures::path(&format!("tiny-dev/{name}/config.json"))));
    bundle.clip.config = config("text_encoder");
    bundle.vae.config = config("vae");
    let pipeline = Pipeline::load(&bundle, &Device::Cpu, DType::F32, &mut |_| {}).unwrap();
    let job = fixtures::job("a cat on a wooden table", 48, 32, 2);
    pipeline.run(&job, &mut |_| ControlFlow::Continue(())).unwrap().latents
}

fn sizes(bundle: &Bundle) -> Sizes {
    let checkpoint = bundle.transformer.checkpoint().unwrap();
    let source = Source::new(Component::Transformer, &checkpoint, DType::F32, &Device::Cpu);
    Sizes::of(bundle, &Config::read(&source, None).unwrap()).unwrap()
}

#[test]
fn a_load_counts_each_byte_once() {
    let bundle = fixtures::bundle("tiny-dev");
    let files = [&bundle.clip, &bundle.t5, &bundle.transformer, &bundle.vae].map(|files| files.checkpoint().unwrap());
    let bytes = |file: &Checkpoint| file.keys().map(|key| file.bytes(file.get(key).unwrap()).len() as u64).sum::<u64>();
    let mut last = LoadEvent::default();
    Pipeline::load(&bundle, &Device::Cpu, DType::F32, &mut |event| {
        assert!(event.done >= last.done && event.elapsed >= last.elapsed);
        last = event;
    })
    .unwrap();
    let all: u64 = files.iter().map(bytes).sum();
    assert_eq!([last.done, last.total], [all, all]);
}

#[test]
fn single_files_and_all_in_one_files_give_the_same_bits_as_the_folder() {
    let folder = latents(fixtures::bundle("tiny-dev"));
    let parts = [
        ("flux1-dev.safetensors", canonical(Component::Transformer, "transformer"), "model.diffusion_model."),
        ("ae.safetensors", canonical(Component::Vae, "vae"), "vae."),
        (
            "clip_l.safetensors",
            prefixed(canonical(Component::Clip, "text_encoder"), "text_model."),
            "text_encoders.clip_l.transformer.",
        ),
        ("t5xxl_fp16.safetensors", canonical(Component::T5, "text_encoder_2"), "text_encoders.t5xxl.transformer."),
    ];

    let single = tempfile::tempdir().unwrap();
    fixtures::copy_folders("tiny-dev", &["tokenizer", "tokenizer_2"], single.path());
    parts.iter().for_each(|(name, tensors, _)| save(tensors, &single.path().join(name)));
    let from_file = latents(Bundle::detect(&single.path().join("flux1-dev.safetensors")).unwrap());
    let from_folder = latents(Bundle::detect(single.path()).unwrap());

    let whole = tempfile::tempdir().unwrap();
    fixtures::copy_folders("tiny-dev", &["tokenizer", "tokenizer_2"], whole.path());
    let all = parts.into_iter().flat_map(|(_, tensors, prefix)| prefixed(tensors, prefix)).collect();
    let path = whole.path().join("flux1-dev-fp8.safetensors");
    save(&all, &path);
    let from_whole = latents(Bundle::detect(&path).unwrap());
    // Plans count each component once, wherever it is.
    assert_eq!(sizes(&Bundle::detect(&path).unwrap()), sizes(&fixtures::bundle("tiny-dev")));

    for (name, other) in [("file", from_file), ("folder of files", from_folder), ("all in one", from_whole)] {
        assert_eq!(relative_l2(&other, &folder), 0., "{name}");
    }
}

/// pocket is wide enough for K-quants, whose blocks are 256 weights.
#[cfg(feature = "pocket")]
#[test]
fn gguf_kinds_stay_near_the_exact_velocity() {
    let bundle = models::pocket::bundle();
    let checkpoint = bundle.transformer.checkpoint().unwrap();
    let exact = Source::new(Component::Transformer, &checkpoint, DType::F32, &Device::Cpu);
    let config = Config::read(&exact, None).unwrap();
    let rope = Rope::new(&config, 8, 4, 6, &Device::Cpu).unwrap();
    let random = |shape: &[usize]| Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap();
    let img = random(&[1, 24, config.channels]);
    let time = Tensor::new(&[0.6f32], &Device::Cpu).unwrap();
    let conditioning = Conditioning {
        txt: random(&[1, 8, config.text_width]),
        pooled: random(&[1, config.pooled_width]),
        guidance: Some(Tensor::new(&[3f32], &Device::Cpu).unwrap()),
    };
    let names: Vec<String> = names::canonical(Component::Transformer, &checkpoint).into_keys().collect();
    let want = Flux::load(&exact, None).unwrap().forward(&img, &time, &conditioning, &rope).unwrap();

    let folder = tempfile::tempdir().unwrap();
    for (kind, bound) in [
        (GgmlDType::Q8_0, 0.02),
        (GgmlDType::Q6K, 0.05),
        (GgmlDType::Q5K, 0.1),
        (GgmlDType::Q5_0, 0.1),
        (GgmlDType::Q4K, 0.2),
        (GgmlDType::Q4_0, 0.25),
    ] {
        let quantised = |name: &String| {
            let tensor = exact.tensor(name, exact.shape(name).unwrap().as_slice()).unwrap();
            let blocks = tensor.rank() == 2 && tensor.dim(1).unwrap().is_multiple_of(kind.block_size());
            (name.clone(), QTensor::quantize(&tensor, if blocks { kind } else { GgmlDType::F32 }).unwrap())
        };
        let tensors: Vec<(String, QTensor)> = names.iter().map(quantised).collect();
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let path = folder.path().join(format!("{kind:?}.gguf"));
        gguf_file::write(&mut std::fs::File::create(&path).unwrap(), &[], &tensors).unwrap();
        let got = flux(&path).forward(&img, &time, &conditioning, &rope).unwrap();
        let error = relative_l2(&got, &want);
        println!("{kind:?}: {error:.4}");
        assert!(error > 0. && error < bound, "{kind:?}: {error}");
    }
}

fn load_error(path: PathBuf) -> String {
    let checkpoint = match Checkpoint::open(&[path]) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return error.to_string(),
    };
    let source = Source::new(Component::Transformer, &checkpoint, DType::F32, &Device::Cpu);
    match Flux::load(&source, None) {
        Err(error) => error.to_string(),
        Ok(_) => source.finish().unwrap_err().to_string(),
    }
}

#[test]
fn damaged_and_foreign_files_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let written = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        load_error(path)
    };
    let good = std::fs::read(fixtures::path("layouts/flux1-mini.safetensors")).unwrap();
    assert!(written("short.safetensors", &good[..good.len() - 100]).contains("truncated"));
    assert!(written("header.safetensors", &good[..40]).contains("damaged"));
    let gguf = std::fs::read(fixtures::path("layouts/flux1-mini-Q8_0.gguf")).unwrap();
    assert!(written("short.gguf", &gguf[..gguf.len() - 100]).contains("download it again"));
    assert!(written("header.gguf", &gguf[..60]).contains("damaged"));
    assert!(written("model.ckpt", b"\x80\x02}q\x00").contains("pickle"));
    assert!(written("page.safetensors", b"<!doctype html><html>").contains("web page"));
    assert!(written("empty.safetensors", b"").contains("empty"));

    let foreign = |keys: &[&str]| {
        let path = folder.path().join("foreign.safetensors");
        let zero = Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap();
        save(&keys.iter().map(|key| ((*key).to_string(), zero.clone())).collect(), &path);
        load_error(path)
    };
    assert!(foreign(&["conditioner.embedders.1.model.ln_final.weight"]).contains("SDXL"));
    assert!(foreign(&["double_stream_modulation_img.lin.weight", "img_in.weight"]).contains("FLUX.2"));
    assert!(foreign(&["distilled_guidance_layer.in_proj.weight"]).contains("Chroma"));
    assert!(foreign(&["double_blocks.0.img_attn.qkv.qweight"]).contains("Nunchaku"));
    assert!(foreign(&["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"]).contains("LoRA"));
}

#[test]
fn a_load_lists_every_missing_unused_and_misshapen_key() {
    let mut tensors = candle_core::safetensors::load(fixtures::path("layouts/flux1-mini.safetensors"), &Device::Cpu).unwrap();
    let qkv = "double_blocks.0.img_attn.qkv.weight";
    tensors.remove("txt_in.bias");
    tensors.remove("single_blocks.0.linear2.weight");
    tensors.insert("strange.weight".into(), Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap());
    tensors.insert(qkv.into(), Tensor::zeros((95, 32), DType::F32, &Device::Cpu).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("flux.safetensors");
    save(&tensors, &path);
    let source = Source::new(Component::Transformer, &open(&path), DType::F32, &Device::Cpu);
    Flux::load(&source, None).unwrap();
    let Err(Error::Incomplete { report }) = source.finish() else { panic!("an incomplete load must fail") };
    assert_eq!(report.missing, ["txt_in.bias", "single_blocks.0.linear2.weight"]);
    assert_eq!(report.unused, ["strange.weight"]);
    assert_eq!(report.wrong_shape, [(qkv.to_string(), vec![96, 32], vec![95, 32])]);
}

#[test]
fn a_missing_shard_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let parts = ["transformer", "text_encoder", "text_encoder_2", "vae", "tokenizer", "tokenizer_2", "scheduler"];
    fixtures::copy_folders("tiny-schnell", &parts, folder.path());
    Bundle::from_folder(folder.path()).unwrap();
    let shards = std::fs::read_dir(folder.path().join("transformer")).unwrap().map(|entry| entry.unwrap().path());
    let shard = shards.into_iter().find(|path| path.to_string_lossy().contains("-00002-")).unwrap();
    std::fs::remove_file(&shard).unwrap();
    let error = Bundle::from_folder(folder.path()).unwrap_err().to_string();
    assert!(error.contains("-00002-of-00002.safetensors"), "{error}");
}
